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
_UNTHINKABLE = -9999.0  # OpenAI's logarithm of 0
_REASONS: dict[str, FinishReason] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "time": "length",
}


@dataclass
class _Text:
    """One text as it grows.

    Attributes:
        shown: its text so far.
        tokens: those that the text was made of.
        finish_reason: why it ended; None before.
    """

    shown: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    begun: bool = False
    held: list[Token] = field(default_factory=list)

    def push(self, piece: SequenceOutput) -> tuple[str, list[Token]]:
        """What a piece lets show, and the tokens it was made of.

        Tokens that show nothing wait for one that does: they may belong to a stop string, or to an
        unfinished character. What waits at the end of a text that was stopped is no part of it.
        """
        text = "".join(token.text for token in piece.tokens)
        tokens = [*self.held, *piece.tokens]
        if piece.finish_reason == "eos" and piece.tokens:  # the end is no part of the text either
            end = tokens.pop()
            if tokens and not tokens[-1].text:
                tokens[-1] = replace(tokens[-1], text=end.text)  # what was held back until then
        whole = max((at for at, token in enumerate(tokens, start=1) if token.text), default=0)
        told, self.held = tokens[:whole], tokens[whole:]
        if piece.finish_reason is not None:
            self.finish_reason = _REASONS[piece.finish_reason]
            if self.finish_reason == "length":
                told += self.held
            self.held = []
        self.shown += text
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
        self, wanted: GenerationRequest, model: str, spelling: TokenBytes, usage: bool
    ) -> None:
        self.wanted = wanted
        self.spelling = spelling
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._open: dict[str, Any] = {"usage": None} if usage else {}
        self.texts = [_Text() for _ in wanted.sequences]

    def take(self, index: int, piece: SequenceOutput) -> None:
        """A piece of a reply that is told whole."""
        self.texts[index].push(piece)

    def chunks(self, index: int, piece: SequenceOutput) -> list[str]:
        """What a piece comes to in a stream, as JSON."""
        text = self.texts[index]
        shown, tokens = text.push(piece)
        parts: list[Reply] = []
        if not text.begun:
            text.begun = True
            parts += self._opening(index)
        if shown or tokens or (self.wanted.show and piece.tokens):
            part = self._part(index, shown, tokens)
            parts.append(self._with_show(part, piece) if self.wanted.show else part)
        if text.finish_reason is not None:
            parts.append(self._closing(index, text.finish_reason))
        return [self._chunk([part], self._open) for part in parts]

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk of a stream that tells its usage."""
        return self._chunk([], {"usage": usage})

    def _chunk(self, parts: Sequence[Reply], usage: dict[str, Any]) -> str:
        chunk = self._event(object=self.kind, choices=parts, **self.head, **usage)
        return chunk.model_dump_json(exclude_unset=True)

    @staticmethod
    def _with_show(part: Reply, piece: SequenceOutput) -> Reply:
        shown = Shown(
            positions=[token.position for token in piece.tokens],
            texts=[token.text for token in piece.tokens],
        )
        return part.model_copy(update={"passlm": shown})

    @abstractmethod
    def whole(self, usage: Usage) -> Reply:
        """The reply of a request that is not streamed, all of it taken."""

    @abstractmethod
    def _event(self, **content: Any) -> Reply:
        """One event of a stream."""

    @abstractmethod
    def _opening(self, index: int) -> list[Reply]:
        """What a text begins with in a stream."""

    @abstractmethod
    def _part(self, index: int, text: str, tokens: Sequence[Token]) -> Reply:
        """What a text gained."""

    @abstractmethod
    def _closing(self, index: int, reason: FinishReason) -> Reply:
        """That a text is over."""


class CompletionBuilder(ResponseBuilder):
    """Replies to completion requests."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(
        self, wanted: GenerationRequest, model: str, spelling: TokenBytes, usage: bool
    ) -> None:
        super().__init__(wanted, model, spelling, usage)
        self._told = [0] * len(self.texts)  # characters of each text whose tokens were told

    def whole(self, usage: Usage) -> Completion:
        """See `Composer`."""
        choices = [
            CompletionChoice(
                finish_reason=_ended(text),
                index=index,
                logprobs=self._logprobs(index, text.tokens),
                text=self._echo(index) + text.shown,
            )
            for index, text in enumerate(self.texts)
        ]
        return Completion(choices=choices, usage=usage, **self.head)

    def _event(self, **content: Any) -> CompletionChunk:
        return CompletionChunk(**content)

    def _echo(self, index: int) -> str:
        return self.wanted.echoes[index // self.wanted.texts]

    def _opening(self, index: int) -> list[Reply]:
        echo = self._echo(index)
        return [self._part(index, echo, ())] if echo else []

    def _part(self, index: int, text: str, tokens: Sequence[Token]) -> CompletionPiece:
        return CompletionPiece(
            finish_reason=None, index=index, logprobs=self._logprobs(index, tokens), text=text
        )

    def _closing(self, index: int, reason: FinishReason) -> CompletionPiece:
        return CompletionPiece(finish_reason=reason, index=index, logprobs=None, text="")

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        count = self.wanted.sequences[index].logprobs
        if count is None:
            return None
        ends = accumulate(self._lengths(tokens), initial=self._told[index])
        *offsets, self._told[index] = ends
        tops = [
            {self._name(other): _told(logprob) for other, logprob in (*token.top, _itself(token))}
            for token in tokens
        ]
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[_told(token.logprob) for token in tokens],
            tokens=[self._name(token.id) for token in tokens],
            top_logprobs=tops if count else None,
        )

    def _lengths(self, tokens: Sequence[Token]) -> Iterator[int]:
        """Characters of each token, also of those whose text came with a later one's."""
        waiting: list[Token] = []
        for token in tokens:
            waiting.append(token)
            if token.text:
                texts = [self.spelling(each.id)[0] for each in waiting]
                if "".join(texts) != token.text:  # a torn character, or cut where a stop begins
                    texts = [*("" for _ in waiting[1:]), token.text]
                yield from map(len, texts)
                waiting.clear()
        yield from (0 for _ in waiting)

    def _name(self, token: int) -> str:
        text, spelt = self.spelling(token)
        return text if text.encode() == spelt else f"bytes:{text}"


def _itself(token: Token) -> tuple[int, float | None]:
    return token.id, token.logprob


def _told(logprob: float | None) -> float:
    """JSON has no infinity."""
    return _UNTHINKABLE if logprob is None else max(logprob, _UNTHINKABLE)


class ChatBuilder(ResponseBuilder):
    """Replies to chat requests."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def whole(self, usage: Usage) -> ChatCompletion:
        """See `Composer`."""
        choices = [
            ChatChoice(
                finish_reason=_ended(text),
                index=index,
                logprobs=self._logprobs(index, text.tokens),
                message=AnswerMessage(content=text.shown),
            )
            for index, text in enumerate(self.texts)
        ]
        return ChatCompletion(choices=choices, usage=usage, **self.head)

    def _event(self, **content: Any) -> ChatChunk:
        return ChatChunk(**content)

    def _opening(self, index: int) -> list[Reply]:
        return [self._delta(index, Delta(role="assistant", content=""), None)]

    def _part(self, index: int, text: str, tokens: Sequence[Token]) -> ChatPiece:
        return self._delta(index, Delta(content=text), self._logprobs(index, tokens))

    def _closing(self, index: int, reason: FinishReason) -> ChatPiece:
        return self._delta(index, Delta(), None, reason)

    @staticmethod
    def _delta(
        index: int, delta: Delta, logprobs: ChatLogprobs | None, reason: FinishReason | None = None
    ) -> ChatPiece:
        return ChatPiece(delta=delta, finish_reason=reason, index=index, logprobs=logprobs)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if self.wanted.sequences[index].logprobs is None:
            return None
        return ChatLogprobs(content=[self._entry(token) for token in tokens], refusal=None)

    def _entry(self, token: Token) -> TokenLogprob:
        text, spelt = self.spelling(token.id)
        top = [self._top(*other) for other in token.top]
        return TokenLogprob(
            token=text, bytes=list(spelt), logprob=_told(token.logprob), top_logprobs=top
        )

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text, spelt = self.spelling(token)
        return TopLogprob(token=text, bytes=list(spelt), logprob=_told(logprob))


def _ended(text: _Text) -> FinishReason:
    assert text.finish_reason is not None, "a text is told before it is over"
    return text.finish_reason


def usage(wanted: GenerationRequest, jobs: Sequence[Job]) -> Usage:
    """What a request took, once all its texts are over."""
    stats = Stats.total([job.stats for job in jobs])
    prompt = wanted.prompt_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=stats.tokens,
        total_tokens=prompt + stats.tokens,
        prompt_tokens_details=PromptDetails(
            cached_tokens=sum(job.reused for job in jobs[:: wanted.texts])
        ),
        passlm=Drafting(
            passes=stats.passes,
            accepted=stats.accepted,
            accepted_by_position=stats.accepted_by_position,
            tokens_per_pass=stats.tokens_per_pass,
            decode_seconds=stats.decode_seconds,
        ),
    )
