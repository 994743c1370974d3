"""Responses of the OpenAI API, with the fields that this server adds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    """A part of a response."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetails(Reply):
    """Details of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Body of every error response."""

    error: ErrorDetails


class Status(Reply):
    """State of the server."""

    status: Literal["ok", "ready"]


class Model(Reply):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Start time of the server, in seconds since 1970.")
    owned_by: Literal["passlm"] = "passlm"


class ModelList(Reply):
    """The list of served models, which has one entry."""

    object: Literal["list"] = "list"
    data: list[Model]


class PromptDetails(Reply):
    """Details of the prompt tokens."""

    cached_tokens: int = Field(
        description="Prompt tokens whose keys and values were found in the cache."
    )


class Drafting(Reply):
    """Statistics of drafting, summed over the choices."""

    passes: int = Field(description="Forward passes of the model, without prefill.")
    accepted: int = Field(description="Draft tokens that were accepted.")
    accepted_by_position: list[int] = Field(
        description="Accepted draft tokens by position in their pass: first, second, ..."
    )
    tokens_per_pass: float
    decode_seconds: float = Field(description="Time spent in these passes.")


class Usage(Reply):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    passlm: Drafting


class Shown(Reply):
    """How each token of one pass was obtained."""

    positions: list[int] = Field(
        description="Position in its pass at which each token was accepted, from 1; 0 if drawn."
    )
    texts: list[str] = Field(description="Text that each token adds.")


class CompletionLogprobs(Reply):
    """Natural log-probabilities under the model itself, one list entry per token."""

    text_offset: list[int] = Field(
        description="Offset in `text` at which each token begins, in characters."
    )
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class CompletionChoice(Reply):
    """One generated text."""

    finish_reason: FinishReason
    index: int
    logprobs: CompletionLogprobs | None
    text: str


class Completion(Reply):
    """Response to a completion request."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionPiece(Reply):
    """What a chunk adds to one choice."""

    finish_reason: FinishReason | None
    index: int
    logprobs: CompletionLogprobs | None
    text: str
    passlm: Shown | None = None


class CompletionChunk(Reply):
    """One chunk of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionPiece]
    usage: Usage | None = None


class TopLogprob(Reply):
    """One of the most probable tokens at a position."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A generated token, and the most probable tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Natural log-probabilities under the model itself."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Reply):
    """The message that the model generated."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One generated answer."""

    finish_reason: FinishReason
    index: int
    logprobs: ChatLogprobs | None
    message: AnswerMessage


class ChatCompletion(Reply):
    """Response to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Reply):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatPiece(Reply):
    """What a chunk adds to one choice."""

    delta: Delta
    finish_reason: FinishReason | None
    index: int
    logprobs: ChatLogprobs | None
    passlm: Shown | None = None


class ChatChunk(Reply):
    """One chunk of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatPiece]
    usage: Usage | None = None
