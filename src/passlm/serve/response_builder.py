"""Build the responses of the API from the outputs of the worker, streamed or complete.

Both kinds use the same state per choice, so that the chunks of a stream, joined, equal the complete
response.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from passlm import __version__
from passlm.outputs import Stats
from passlm.serve.protocol import Job, SequenceOutput, Token
from passlm.serve.requests import GenerationRequest
from passlm.serve.response_schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatPiece,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionPiece,
    Delta,
    Drafting,
    FinishReason,
    PromptDetails,
    Reply,
    Shown,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from passlm.serve.token_bytes import TokenBytes

FINGERPRINT = f"passlm-{__version__}"
_MIN_LOGPROB = -9999.0  # OpenAI's API reports this value for probability 0
_REASONS: dict[str, FinishReason] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "time": "length",
}


@dataclass
class _Choice:
    """State of one choice of the response while it is generated.

    Attributes:
        text: text so far.
        tokens: tokens that make up `text`.
        finish_reason: why it ended; None before.
        started: the first chunk of a stream was made.
        held: tokens that are not part of `tokens` yet, because they show no text so far.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    started: bool = False
    held: list[Token] = field(default_factory=list)

    def push(self, output: SequenceOutput) -> tuple[str, list[Token]]:
        """Add an output, and return the text and the tokens that the choice gains.

        Tokens without text are held until one with text follows: they may belong to a stop string
        or to an incomplete character. Tokens still held when a stop string or the end of sequence
        ends the text are dropped.
        """
        text = "".join(token.text for token in output.tokens)
        tokens = [*self.held, *output.tokens]
        if output.finish_reason == "eos" and output.tokens:  # the end token is not part of the text
            end = tokens.pop()
            if tokens and not tokens[-1].text:
                tokens[-1] = replace(tokens[-1], text=end.text)  # text that was held back
        complete = max((at for at, token in enumerate(tokens, start=1) if token.text), default=0)
        gained, self.held = tokens[:complete], tokens[complete:]
        if output.finish_reason is not None:
            self.finish_reason = _REASONS[output.finish_reason]
            if self.finish_reason == "length":
                gained += self.held
            self.held = []
        self.text += text
        self.tokens += gained
        return text, gained


class ResponseBuilder(ABC):
    """Builds the response or the stream of one request.

    Args:
        request: the request.
        model: name of the model in the API.
        token_bytes: bytes and text of the model's tokens.
        usage: the chunks of a stream have a field `usage`, which is null in all but the last.
    """

    kind: str
    prefix: str

    def __init__(
        self, request: GenerationRequest, model: str, token_bytes: TokenBytes, usage: bool
    ) -> None:
        self.request = request
        self.token_bytes = token_bytes
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._open_usage: dict[str, Any] = {"usage": None} if usage else {}
        self.choices = [_Choice() for _ in request.sequences]

    def add(self, index: int, output: SequenceOutput) -> None:
        """Add an output of a request that is not streamed."""
        self.choices[index].push(output)

    def chunks(self, index: int, output: SequenceOutput) -> list[str]:
        """Return the chunks of a stream for an output, as JSON."""
        state = self.choices[index]
        text, tokens = state.push(output)
        choices: list[Reply] = []
        if not state.started:
            state.started = True
            choices += self._first_choices(index)
        if text or tokens or (self.request.show and output.tokens):
            choice = self._choice(index, text, tokens)
            choices.append(self._with_show(choice, output) if self.request.show else choice)
        if state.finish_reason is not None:
            choices.append(self._last_choice(index, state.finish_reason))
        return [self._chunk([choice], self._open_usage) for choice in choices]

    def usage_chunk(self, usage: Usage) -> str:
        """Return the last chunk of a stream, which reports the usage."""
        return self._chunk([], {"usage": usage})

    def _chunk(self, choices: Sequence[Reply], usage: dict[str, Any]) -> str:
        chunk = self._new_chunk(object=self.kind, choices=choices, **self._head, **usage)
        return chunk.model_dump_json(exclude_unset=True)

    @staticmethod
    def _with_show(choice: Reply, output: SequenceOutput) -> Reply:
        shown = Shown(
            positions=[token.position for token in output.tokens],
            texts=[token.text for token in output.tokens],
        )
        return choice.model_copy(update={"passlm": shown})

    @abstractmethod
    def response(self, usage: Usage) -> Reply:
        """Return the response of a request that is not streamed, after all outputs were added."""

    @abstractmethod
    def _new_chunk(self, **content: Any) -> Reply:
        """Return one chunk of a stream."""

    @abstractmethod
    def _first_choices(self, index: int) -> list[Reply]:
        """Return what a stream sends of a choice before its first output."""

    @abstractmethod
    def _choice(self, index: int, text: str, tokens: Sequence[Token]) -> Reply:
        """Return what a choice gained."""

    @abstractmethod
    def _last_choice(self, index: int, reason: FinishReason) -> Reply:
        """Return the end of a choice."""


class CompletionBuilder(ResponseBuilder):
    """Builds responses to completion requests."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(
        self, request: GenerationRequest, model: str, token_bytes: TokenBytes, usage: bool
    ) -> None:
        super().__init__(request, model, token_bytes, usage)
        self._text_offsets = [0] * len(self.choices)  # where each choice's next token begins

    def response(self, usage: Usage) -> Completion:
        """See `ResponseBuilder`."""
        choices = [
            CompletionChoice(
                finish_reason=_finish_reason(choice),
                index=index,
                logprobs=self._logprobs(index, choice.tokens),
                text=self._echo(index) + choice.text,
            )
            for index, choice in enumerate(self.choices)
        ]
        return Completion(choices=choices, usage=usage, **self._head)

    def _new_chunk(self, **content: Any) -> CompletionChunk:
        return CompletionChunk(**content)

    def _echo(self, index: int) -> str:
        return self.request.echoes[index // self.request.n]

    def _first_choices(self, index: int) -> list[Reply]:
        echo = self._echo(index)
        return [self._choice(index, echo, ())] if echo else []

    def _choice(self, index: int, text: str, tokens: Sequence[Token]) -> CompletionPiece:
        return CompletionPiece(
            finish_reason=None, index=index, logprobs=self._logprobs(index, tokens), text=text
        )

    def _last_choice(self, index: int, reason: FinishReason) -> CompletionPiece:
        return CompletionPiece(finish_reason=reason, index=index, logprobs=None, text="")

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        count = self.request.sequences[index].logprobs
        if count is None:
            return None
        ends = accumulate(self._lengths(tokens), initial=self._text_offsets[index])
        *offsets, self._text_offsets[index] = ends
        tops = [
            {
                self._token_name(other): _finite(logprob)
                for other, logprob in (*token.top, _own_logprob(token))
            }
            for token in tokens
        ]
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[_finite(token.logprob) for token in tokens],
            tokens=[self._token_name(token.id) for token in tokens],
            top_logprobs=tops if count else None,
        )

    def _lengths(self, tokens: Sequence[Token]) -> Iterator[int]:
        """Yield the number of characters of each token, also if a later token shows its text."""
        waiting: list[Token] = []
        for token in tokens:
            waiting.append(token)
            if token.text:
                texts = [self.token_bytes(each.id)[0] for each in waiting]
                if "".join(texts) != token.text:  # a split character, or cut before a stop string
                    texts = [*("" for _ in waiting[1:]), token.text]
                yield from map(len, texts)
                waiting.clear()
        yield from (0 for _ in waiting)

    def _token_name(self, token: int) -> str:
        text, raw = self.token_bytes(token)
        return text if text.encode() == raw else f"bytes:{text}"


def _own_logprob(token: Token) -> tuple[int, float | None]:
    return token.id, token.logprob


def _finite(logprob: float | None) -> float:
    """Return a log-probability that JSON can represent: it has no infinity."""
    return _MIN_LOGPROB if logprob is None else max(logprob, _MIN_LOGPROB)


class ChatBuilder(ResponseBuilder):
    """Builds responses to chat requests."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def response(self, usage: Usage) -> ChatCompletion:
        """See `ResponseBuilder`."""
        choices = [
            ChatChoice(
                finish_reason=_finish_reason(choice),
                index=index,
                logprobs=self._logprobs(index, choice.tokens),
                message=AnswerMessage(content=choice.text),
            )
            for index, choice in enumerate(self.choices)
        ]
        return ChatCompletion(choices=choices, usage=usage, **self._head)

    def _new_chunk(self, **content: Any) -> ChatChunk:
        return ChatChunk(**content)

    def _first_choices(self, index: int) -> list[Reply]:
        return [self._delta(index, Delta(role="assistant", content=""), None)]

    def _choice(self, index: int, text: str, tokens: Sequence[Token]) -> ChatPiece:
        return self._delta(index, Delta(content=text), self._logprobs(index, tokens))

    def _last_choice(self, index: int, reason: FinishReason) -> ChatPiece:
        return self._delta(index, Delta(), None, reason)

    @staticmethod
    def _delta(
        index: int, delta: Delta, logprobs: ChatLogprobs | None, reason: FinishReason | None = None
    ) -> ChatPiece:
        return ChatPiece(delta=delta, finish_reason=reason, index=index, logprobs=logprobs)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if self.request.sequences[index].logprobs is None:
            return None
        return ChatLogprobs(content=[self._entry(token) for token in tokens], refusal=None)

    def _entry(self, token: Token) -> TokenLogprob:
        text, raw = self.token_bytes(token.id)
        top = [self._top(*other) for other in token.top]
        return TokenLogprob(
            token=text, bytes=list(raw), logprob=_finite(token.logprob), top_logprobs=top
        )

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text, raw = self.token_bytes(token)
        return TopLogprob(token=text, bytes=list(raw), logprob=_finite(logprob))


def _finish_reason(choice: _Choice) -> FinishReason:
    assert choice.finish_reason is not None, "the response is built before all sequences ended"
    return choice.finish_reason


def usage(request: GenerationRequest, jobs: Sequence[Job]) -> Usage:
    """Return the usage of a request, after all its sequences have ended."""
    stats = Stats.total([job.stats for job in jobs])
    prompt = request.prompt_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=stats.tokens,
        total_tokens=prompt + stats.tokens,
        prompt_tokens_details=PromptDetails(
            cached_tokens=sum(job.reused for job in jobs[:: request.n])
        ),
        passlm=Drafting(
            passes=stats.passes,
            accepted=stats.accepted,
            accepted_by_position=stats.accepted_by_position,
            tokens_per_pass=stats.tokens_per_pass,
            decode_seconds=stats.decode_seconds,
        ),
    )
