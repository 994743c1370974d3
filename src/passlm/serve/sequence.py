"""One sequence of the server, from its request to its outputs.

Holds the state of a single sequence: decoding request, detokenizer, stop strings, log-probabilities
and statistics. Scheduling and batching are left to `scheduler.py`.
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
    """A sequence from its acceptance by the scheduler to its last output.

    Args:
        job: the request, and the subscriber of its events.
        lm: model and tokenizer.
        plans: returns the plan chooser of `auto` for a maximum number of look-ahead tokens.
        max_length: maximum length of the sequence, prompt and answer, in tokens.
        seconds: time limit, waiting included.

    Attributes:
        started: time of acceptance, later the time at which it joined the batch (monotonic clock).
        row: its state in the decoder; None before it joins the batch.
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
        """Maximum length that it can reach, in tokens."""
        return len(self.prompt) + self.new_tokens

    @property
    def expired(self) -> bool:
        """True if the time limit has passed."""
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
        """Store the log-probabilities of the tokens that a pass settles, if they were requested.

        Args:
            logits: logits of the sequence's real rows, `[1 + M, V]`.
            settled: ids of the settled tokens, at most one per row.
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
        """Return the output of a pass and update the statistics.

        Args:
            step: the tokens that the pass settled.
            seconds: duration of the pass.
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
        """Deliver a last output without tokens."""
        self.job.notify(SequenceOutput((), reason))

    def fail(self) -> None:
        """Deliver the event that an internal error ended the sequence."""
        self.job.notify(Failed(INTERNAL_ERROR))
