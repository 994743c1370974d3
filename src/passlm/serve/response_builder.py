"""From the pieces of texts to the replies of the API, streamed or whole.

Both go through the same texts, so that a stream joined is the whole reply.
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
_MIN_LOGPROB = -9999.0  # OpenAI's logarithm of 0
_REASONS: dict[str, FinishReason] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "time": "length",
}


@dataclass
class _Choice:
    """One text as it grows.

    Attributes:
        shown: its text so far.
        tokens: those that the text was made of.
        finish_reason: why it ended; None before.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    started: bool = False
    held: list[Token] = field(default_factory=list)

    def push(self, output: SequenceOutput) -> tuple[str, list[Token]]:
        """What a piece lets show, and the tokens it was made of.

        Tokens that show nothing wait for one that does: they may belong to a stop string, or to an
        unfinished character. What waits at the end of a text that was stopped is no part of it.
        """
        text = "".join(token.text for token in output.tokens)
        tokens = [*self.held, *output.tokens]
        if output.finish_reason == "eos" and output.tokens:  # the end is no part of the text either
            end = tokens.pop()
            if tokens and not tokens[-1].text:
                tokens[-1] = replace(tokens[-1], text=end.text)  # what was held back until then
        response = max((at for at, token in enumerate(tokens, start=1) if token.text), default=0)
        told, self.held = tokens[:response], tokens[response:]
        if output.finish_reason is not None:
            self.finish_reason = _REASONS[output.finish_reason]
            if self.finish_reason == "length":
                told += self.held
            self.held = []
        self.text += text
        self.tokens += told
        return text, told


class ResponseBuilder(ABC):
    """Makes the replies to one request.

    Args:
        wanted: what it comes to.
        model: the model's name.
        spelling: of its tokens.
        usage: whether each chunk of a stream tells the usage, all but the last as unknown.
    """

    kind: str
    prefix: str

    def __init__(
        self, request: GenerationRequest, model: str, token_bytes: TokenBytes, usage: bool
    ) -> None:
        self.request = request
        self.token_bytes = token_bytes
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._open: dict[str, Any] = {"usage": None} if usage else {}
        self.choices = [_Choice() for _ in request.sequences]

    def add(self, index: int, output: SequenceOutput) -> None:
        """A piece of a reply that is told whole."""
        self.choices[index].push(output)

    def chunks(self, index: int, output: SequenceOutput) -> list[str]:
        """What a piece comes to in a stream, as JSON."""
        text = self.choices[index]
        shown, tokens = text.push(output)
        choices: list[Reply] = []
        if not text.started:
            text.started = True
            choices += self._first_choices(index)
        if shown or tokens or (self.request.show and output.tokens):
            choice = self._choice(index, shown, tokens)
            choices.append(self._with_show(choice, output) if self.request.show else choice)
        if text.finish_reason is not None:
            choices.append(self._last_choice(index, text.finish_reason))
        return [self._chunk([choice], self._open) for choice in choices]

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk of a stream that tells its usage."""
        return self._chunk([], {"usage": usage})

    def _chunk(self, choices: Sequence[Reply], usage: dict[str, Any]) -> str:
        chunk = self._new_chunk(object=self.kind, choices=choices, **self.head, **usage)
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
        """The reply of a request that is not streamed, all of it taken."""

    @abstractmethod
    def _new_chunk(self, **content: Any) -> Reply:
        """One event of a stream."""

    @abstractmethod
    def _first_choices(self, index: int) -> list[Reply]:
        """What a text begins with in a stream."""

    @abstractmethod
    def _choice(self, index: int, text: str, tokens: Sequence[Token]) -> Reply:
        """What a text gained."""

    @abstractmethod
    def _last_choice(self, index: int, reason: FinishReason) -> Reply:
        """That a text is over."""


class CompletionBuilder(ResponseBuilder):
    """Replies to completion requests."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(
        self, request: GenerationRequest, model: str, token_bytes: TokenBytes, usage: bool
    ) -> None:
        super().__init__(request, model, token_bytes, usage)
        self._text_offsets = [0] * len(
            self.choices
        )  # characters of each text whose tokens were told

    def response(self, usage: Usage) -> Completion:
        """See `Composer`."""
        choices = [
            CompletionChoice(
                finish_reason=_finish_reason(text),
                index=index,
                logprobs=self._logprobs(index, text.tokens),
                text=self._echo(index) + text.text,
            )
            for index, text in enumerate(self.choices)
        ]
        return Completion(choices=choices, usage=usage, **self.head)

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
        """Characters of each token, also of those whose text came with a later one's."""
        waiting: list[Token] = []
        for token in tokens:
            waiting.append(token)
            if token.text:
                texts = [self.token_bytes(each.id)[0] for each in waiting]
                if "".join(texts) != token.text:  # a torn character, or cut where a stop begins
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
    """JSON has no infinity."""
    return _MIN_LOGPROB if logprob is None else max(logprob, _MIN_LOGPROB)


class ChatBuilder(ResponseBuilder):
    """Replies to chat requests."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def response(self, usage: Usage) -> ChatCompletion:
        """See `Composer`."""
        choices = [
            ChatChoice(
                finish_reason=_finish_reason(text),
                index=index,
                logprobs=self._logprobs(index, text.tokens),
                message=AnswerMessage(content=text.text),
            )
            for index, text in enumerate(self.choices)
        ]
        return ChatCompletion(choices=choices, usage=usage, **self.head)

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


def _finish_reason(text: _Choice) -> FinishReason:
    assert text.finish_reason is not None, "a text is told before it is over"
    return text.finish_reason


def usage(request: GenerationRequest, jobs: Sequence[Job]) -> Usage:
    """What a request took, once all its texts are over."""
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
