"""Decode prompts with passlm's own methods, time them and record the results.

`methods.py` lists the methods. `hugging_face.py` and `external.py` decode with transformers and
other engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import Adaptive, Strategy
from passlm.decoding.text import Row
from passlm.errors import InputError
from passlm.model.cache import RowCache
from passlm.model.pass_records import LookAheadRows, PassOutput, PassRow
from passlm.model.target import Target
from passlm.outputs import Stats, Step
from passlm.params import SamplingParams
from passlm.planning.kept_costs import Costs


class MethodError(InputError):
    """A method does not exist or cannot run with this model; the message is one line."""


@dataclass(frozen=True)
class Record:
    """The result of one method on one prompt.

    Attributes:
        tokens: the new token ids; of a chat, those of all answers.
        seconds: time from the prompt's ids to the last new id, including prefill. For a batch, an
            equal share of the batch's time.
        stats: counts of the passes; None for methods other than passlm's own.
        forward_seconds: time that the decoding passes spent inside the target's forward; None if
            measuring it would slow the run.
        first_token_seconds: time to first token, including prefill; None if unknown.
        rows: number of rows computed after the prompt. If a batch is padded, each sequence counts
            as many rows as the longest. None for methods other than passlm's own.
        turns: for each turn of a chat after the first, its prompt ids and the number of new ids
            before its answer.
        positions: for each new id, its position among the candidates, from 1, or 0 if it was drawn
            from the target; empty for methods other than passlm's own.
    """

    tokens: tuple[int, ...]
    seconds: float
    stats: Stats | None = None
    forward_seconds: float | None = None
    first_token_seconds: float | None = None
    rows: int | None = None
    turns: tuple[tuple[tuple[int, ...], int], ...] = ()
    positions: tuple[int, ...] = ()

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """New token ids of each turn."""
        starts = [0, *(start for _, start in self.turns), len(self.tokens)]
        return [self.tokens[start:end] for start, end in pairwise(starts)]

    def then(self, prompt: Sequence[int], later: Record) -> Record:
        """Return a record that combines this one with the next turn of the chat.

        Args:
            prompt: prompt ids of the next turn, including the conversation so far.
            later: the record of the next turn.
        """
        stats = None
        if self.stats is not None and later.stats is not None:
            stats = Stats.total([self.stats, later.stats])
        return Record(
            self.tokens + later.tokens,
            self.seconds + later.seconds,
            stats,
            _sum(self.forward_seconds, later.forward_seconds),
            self.first_token_seconds,
            _sum(self.rows, later.rows),
            (*self.turns, (tuple(prompt), len(self.tokens))),
            self.positions + later.positions,
        )


N = TypeVar("N", int, float)


def _sum(a: N | None, b: N | None) -> N | None:
    return None if a is None or b is None else a + b


Decode = Callable[[Sequence[int], SamplingParams, int], Record]
"""Decodes one prompt, given its ids, sampling parameters and the maximum number of new tokens."""


class TimedTarget(Target):
    """A target that measures the time spent in the model's own forward.

    Attributes:
        seconds: total time so far.
        rows: number of rows computed for each sequence in the last pass, including padding.
    """

    def __init__(self, model: PreTrainedModel, pack: bool, compiled: Path | None = None) -> None:
        self.seconds = 0.0
        self.rows: list[int] = []
        super().__init__(model, pack, compiled)  # may run passes, which are not counted
        self.seconds = 0.0

    def run(
        self, cache: RowCache, rows: Sequence[PassRow], look_ahead: LookAheadRows | None
    ) -> PassOutput:
        """Run a pass as `Target.run` does, and note its rows."""
        self.rows = [row.plan.rows for row in rows]
        if not self.in_line:
            self.rows = [max(self.rows)] * len(rows)
        return super().run(cache, rows, look_ahead)

    @property
    def can_time(self) -> bool:
        """True if `run` returns only when the pass is complete, as on the CPU.

        On other devices, waiting for the pass would slow decoding.
        """
        return self.device.type == "cpu"

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        output = super()._call(function, *args, **kwargs)
        self.seconds += time.perf_counter() - begun
        return output


@dataclass
class _Progress:
    """The results so far of one sequence in a batch."""

    stats: Stats
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: int = 0
    first_token_seconds: float | None = None

    def count(self, step: Step, rows: int, seconds: float) -> None:
        """Add a pass.

        Args:
            step: what the pass settled.
            rows: number of rows computed for this sequence.
            seconds: time from the start of the batch to the end of the pass.
        """
        if self.first_token_seconds is None:
            self.first_token_seconds = seconds
        self.tokens += step.tokens
        self.positions += range(1, 1 + step.accepted)
        self.positions += [0] * (len(step.tokens) - step.accepted)
        self.rows += rows
        self.stats.count(step)

    def record(self, seconds: float, forward: float | None) -> Record:
        """Return the complete record, once the sequence has ended."""
        return Record(
            tuple(self.tokens),
            seconds,
            self.stats,
            forward,
            self.first_token_seconds,
            self.rows,
            positions=tuple(self.positions),
        )


@dataclass(frozen=True)
class PlanDecoding:
    """Decoding with passlm: all of its own methods.

    Attributes:
        target: the model, which also counts rows and measures time.
        plans: returns a strategy, given the batch size and the context length that the longest
            sequence has halfway through its new tokens.
        look_ahead: the look-ahead rows; None for plans without them.
        eos: token ids that end a sequence.
        ignore_eos: whether to continue after these ids.
        costs: measured costs from which plans are chosen; None if the plan is fixed.
    """

    target: TimedTarget
    plans: Callable[[int, int], Strategy | Adaptive]
    look_ahead: LookAheadRows | None
    eos: frozenset[int]
    ignore_eos: bool
    costs: Costs | None = None

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_new_tokens: int
    ) -> Record:
        """Decode one prompt; see `Decode`."""
        return self.batch([prompt], [sampling], max_new_tokens)[0]

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        max_new_tokens: int,
    ) -> list[Record]:
        """Decode prompts as one batch.

        Args:
            prompts: token ids of each prompt.
            sampling: sampling parameters of each prompt.
            max_new_tokens: maximum number of new tokens per sequence.

        Returns:
            A record for each prompt, each with an equal share of the batch's time.
        """
        longest = max(map(len, prompts)) + max_new_tokens // 2
        plans = self.plans(len(prompts), longest)  # not timed: may measure the cost curve
        sequences: dict[Row, _Progress] = {}
        begun = time.perf_counter()
        decoder = Decoder(self.target, self.look_ahead)
        for prompt, drawn in zip(prompts, sampling, strict=True):
            request = Request.of(prompt, drawn, max_new_tokens, plans, self.eos, self.ignore_eos)
            sequences[decoder.join(request)] = _Progress(Stats(prompt_tokens=len(prompt)))
        in_forward = self.target.seconds
        prefilled = time.perf_counter()
        while decoder.rows:
            settled = decoder.step()
            seconds = time.perf_counter() - begun
            for (row, step), rows in zip(settled, self.target.rows, strict=True):
                sequences[row].count(step, rows, seconds)
        ended, count = time.perf_counter(), len(prompts)
        for sequence in sequences.values():
            sequence.stats.prefill_seconds = (prefilled - begun) / count
            sequence.stats.decode_seconds = (ended - prefilled) / count
        timed = self.target.can_time
        forward = (self.target.seconds - in_forward) / count if timed else None
        return [
            sequence.record((ended - begun) / count, forward) for sequence in sequences.values()
        ]
