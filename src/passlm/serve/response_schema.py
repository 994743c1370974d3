"""What the API gives: the replies of the OpenAI API, with what this server adds to them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    """A part of a reply."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetails(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """The body of every error."""

    error: ErrorDetails


class Status(Reply):
    """How the server is."""

    status: Literal["ok", "ready"]


class Model(Reply):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server was started, in seconds since 1970.")
    owned_by: Literal["passlm"] = "passlm"


class ModelList(Reply):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class PromptDetails(Reply):
    """What prompts were made of."""

    cached_tokens: int = Field(description="Prompt tokens that needed no computing.")


class Drafting(Reply):
    """What drafting gained, summed over the choices."""

    passes: int = Field(description="Forward passes of the model, prompts not counted.")
    accepted: int = Field(description="Drafted tokens that were accepted.")
    accepted_by_position: list[int] = Field(
        description="Of these, how many were the first, second, ... candidate of their pass."
    )
    tokens_per_pass: float
    decode_seconds: float = Field(description="Spent in those passes.")


class Usage(Reply):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    passlm: Drafting


class Shown(Reply):
    """How the tokens of one pass came."""

    positions: list[int] = Field(
        description="Where each token stood among the candidates of its pass, from 1; 0 if drawn."
    )
    texts: list[str] = Field(description="What each token lets show.")


class CompletionLogprobs(Reply):
    """Natural log-probabilities under the model itself, a list entry for each token."""

    text_offset: list[int] = Field(description="Where in `text` each token begins.")
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class CompletionChoice(Reply):
    """One text."""

    finish_reason: FinishReason
    index: int
    logprobs: CompletionLogprobs | None
    text: str


class Completion(Reply):
    """The reply to a completion request."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionPiece(Reply):
    """What one text gained."""

    finish_reason: FinishReason | None
    index: int
    logprobs: CompletionLogprobs | None
    text: str
    passlm: Shown | None = None


class CompletionChunk(Reply):
    """One event of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionPiece]
    usage: Usage | None = None


class TopLogprob(Reply):
    """A token that might have come."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token that came, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Natural log-probabilities under the model itself."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Reply):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One answer."""

    finish_reason: FinishReason
    index: int
    logprobs: ChatLogprobs | None
    message: AnswerMessage


class ChatCompletion(Reply):
    """The reply to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Reply):
    """What an answer gained."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatPiece(Reply):
    """What one answer gained."""

    delta: Delta
    finish_reason: FinishReason | None
    index: int
    logprobs: ChatLogprobs | None
    passlm: Shown | None = None


class ChatChunk(Reply):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatPiece]
    usage: Usage | None = None
