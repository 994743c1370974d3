"""One text of the server: from what was asked to the pieces that are told.

Holds what belongs to a single text: its request, its characters, its counts. When it
runs, and beside which others, is left to `scheduler.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from passlm.decoding.request import Request
from passlm.decoding.stopping import StopStrings
from passlm.decoding.strategies import Adaptive, Strategy, strategy
from passlm.decoding.text import Row
from passlm.generate import Generator, StreamedText
from passlm.loading.detokenize import Detokenizer
from passlm.outputs import Step
from passlm.planning.auto import AutoPlan
from passlm.serve.protocol import INTERNAL_ERROR, EndReason, Failed, Job, SequenceOutput, Token

Logprobs = list[tuple[float, tuple[tuple[int, float], ...]]]


class ServedSequence:
    """A text from admission to its last piece.

    Args:
        job: what was asked, and whom to tell.
        lm: model and tokenizer.
        plans: for `auto`, by the longest group asked for.
        room: tokens that the text may have in all.
        seconds: that it may take in all.

    Attributes:
        begun: when it was taken on, then when it joined the batch, by the monotonic clock.
        row: its place in the batch; None before it has one.
    """

    def __init__(
        self,
        job: Job,
        lm: Generator,
        plans: Callable[[int], AutoPlan],
        max_length: int,
        seconds: float,
    ) -> None:
        self.job = job
        self.prompt = job.request.prompt
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        asked = job.request.options.stopping.max_new_tokens
        self.new_tokens = min(asked, max_length - len(self.prompt))
        self._limited_by_context = self.new_tokens < asked
        self.request = self._request(lm, plans)
        self.row: Row | None = None
        self._stream = StreamedText(
            job.index,
            Detokenizer(lm.decode, self.prompt),
            StopStrings(job.request.options.stopping.stop),
        )
        self._logprobs: Logprobs = []
        job.stats.prompt_tokens = len(self.prompt)

    @property
    def reserved(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.new_tokens

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline

    def _request(self, lm: Generator, plans: Callable[[int], AutoPlan]) -> Request:
        options = self.job.request.options
        chosen: Strategy | Adaptive
        if options.method == "auto":
            chosen = plans(options.lookahead_tokens)
        else:
            chosen = strategy(options.method, options.lookahead_tokens)
        return Request.of(
            self.prompt,
            options.sampling,
            self.new_tokens,
            chosen,
            lm.eos,
            options.stopping.ignore_eos,
        )

    def observe(self, logits: Tensor, settled: Sequence[int]) -> None:
        """Note the log-probabilities of what a pass settles, where they were asked for.

        Args:
            logits: of its real rows, `[1 + M, V]`.
            settled: ids, as many as rows or fewer.
        """
        self._logprobs = []
        if self.job.request.logprobs is None:
            return
        logprobs = logits[: len(settled)].float().log_softmax(-1)
        likeliest = logprobs.topk(self.job.request.logprobs, dim=-1)
        for row, token in enumerate(settled):
            best = zip(likeliest.indices[row].tolist(), likeliest.values[row].tolist(), strict=True)
            self._logprobs.append((float(logprobs[row, token]), tuple(best)))

    def push(self, step: Step, seconds: float) -> SequenceOutput:
        """What a pass adds to the text.

        Args:
            step: what it settled.
            seconds: that it took.
        """
        if step.finish_reason is None and self.expired:
            step = replace(step, finish_reason="length")
            reason: EndReason | None = "time"
        elif step.finish_reason == "length" and self._limited_by_context:
            reason = "context"
        else:
            reason = cast("EndReason | None", step.finish_reason)
        chunk = self._stream.push(step)
        if chunk.finish_reason in ("eos", "stop"):
            reason = chunk.finish_reason
        self.job.stats.count(self._stream.kept)
        self.job.stats.decode_seconds += seconds
        return SequenceOutput(
            tuple(self._tokens(chunk.texts, chunk.tokens, chunk.accepted)), reason
        )

    def _tokens(self, texts: Sequence[str], ids: Sequence[int], accepted: int) -> list[Token]:
        tokens = []
        for index, (token, text) in enumerate(zip(ids, texts, strict=True)):
            position = index + 1 if index < accepted else 0
            logprob, top = self._logprobs[index] if self._logprobs else (None, ())
            tokens.append(Token(token, text, position, logprob, top))
        return tokens

    def end(self, reason: EndReason) -> None:
        """Say that the text is over without another token."""
        self.job.notify(SequenceOutput((), reason))

    def fail(self) -> None:
        """Say that a fault of ours ended it."""
        self.job.notify(Failed(INTERNAL_ERROR))
