"""One prompt decoded and timed: what is kept of it, and how our own methods do it.

Which methods there are is left to `methods.py`, how others decode to `hugging_face.py` and
`external.py`.
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
from passlm.decoding.strategies import Adaptive, Strategy
from passlm.decoding.text import Request, Row
from passlm.errors import InputError
from passlm.model.cache import RowCache
from passlm.model.pass_records import LookAheadRows, PassOutput, PassRow
from passlm.model.target import Target
from passlm.outputs import Stats, Step
from passlm.params import SamplingParams
from passlm.planning.kept_costs import Costs


class MethodError(InputError):
    """A method that does not exist or cannot run with this model; one line."""


@dataclass(frozen=True)
class Record:
    """One prompt decoded by one method.

    Attributes:
        tokens: the new ids.
        seconds: from the prompt's ids to the last new id, prefill included; of a batch, its equal
            share.
        stats: counts of the passes; None for methods that are not ours.
        forward_seconds: time of the decoding passes inside the target's forward; None where it
            cannot be told without disturbing the run.
        first_token_seconds: until the first new id, prefill included.
        rows: that were computed after the prompt, for each text as many as for the longest; None
            for methods that are not ours.
        turns: of a chat, for each turn behind the first, its ids and how many new ids lie before
            its answer.
        positions: of each new id, where it stood among the candidates, 0 for one that was drawn;
            none for methods that are not ours.
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
        """The new ids of each turn."""
        starts = [0, *(start for _, start in self.turns), len(self.tokens)]
        return [self.tokens[start:end] for start, end in pairwise(starts)]

    def then(self, prompt: Sequence[int], later: Record) -> Record:
        """This and a further turn of the chat as one record.

        Args:
            prompt: ids of the further turn, those of this one included.
            later: what was made of it.
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
"""Decodes one prompt: its ids, how to draw, and at most how many new tokens."""


class TimedTarget(Target):
    """A target that adds up the `seconds` spent in the model's own forward.

    Attributes:
        seconds: so far.
        rows: computed for each text in the last pass, what fills it up included.
    """

    def __init__(self, model: PreTrainedModel, pack: bool, compiled: Path | None = None) -> None:
        self.seconds = 0.0
        self.rows: list[int] = []
        super().__init__(model, pack, compiled)  # which may run passes
        self.seconds = 0.0

    def run(
        self, cache: RowCache, rows: Sequence[PassRow], look_ahead: LookAheadRows | None
    ) -> PassOutput:
        """See `Target`."""
        self.rows = [row.plan.rows for row in rows]
        if not self.in_line:
            self.rows = [max(self.rows)] * len(rows)
        return super().run(cache, rows, look_ahead)

    @property
    def can_time(self) -> bool:
        """Whether a pass is over when `run` returns; elsewhere waiting for it would slow it."""
        return self.device.type == "cpu"

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        output = super()._call(function, *args, **kwargs)
        self.seconds += time.perf_counter() - begun
        return output


@dataclass
class _Text:
    """What a text of a batch has given so far."""

    stats: Stats
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: int = 0
    first_token_seconds: float | None = None

    def count(self, step: Step, rows: int, seconds: float) -> None:
        """Add a pass that had so many rows for the text and ended after so many seconds."""
        if self.first_token_seconds is None:
            self.first_token_seconds = seconds
        self.tokens += step.tokens
        self.positions += range(1, 1 + step.accepted)
        self.positions += [0] * (len(step.tokens) - step.accepted)
        self.rows += rows
        self.stats.count(step)

    def record(self, seconds: float, forward: float | None) -> Record:
        """All of it, once the text has ended."""
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
    """Decoding by plans: every method of ours.

    Attributes:
        target: the model, which counts and times.
        plans: given how many texts there are, and how many tokens the longest has half-way.
        look_ahead: look-ahead rows; None for plans without.
        eos: ids that end a text.
        ignore_eos: they do not.
        costs: what the plans are chosen from.
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
        """See `Decode`."""
        return self.batch([prompt], [sampling], max_new_tokens)[0]

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        max_new_tokens: int,
    ) -> list[Record]:
        """Decode prompts together; each record has an equal share of the batch's seconds."""
        longest = max(map(len, prompts)) + max_new_tokens // 2
        plans = self.plans(len(prompts), longest)  # may measure what passes cost
        texts: dict[Row, _Text] = {}
        begun = time.perf_counter()
        decoder = Decoder(self.target, self.look_ahead)
        for prompt, drawn in zip(prompts, sampling, strict=True):
            request = Request.of(prompt, drawn, max_new_tokens, plans, self.eos, self.ignore_eos)
            texts[decoder.join(request)] = _Text(Stats(prompt_tokens=len(prompt)))
        in_forward = self.target.seconds
        prefilled = time.perf_counter()
        while decoder.rows:
            settled = decoder.step()
            seconds = time.perf_counter() - begun
            for (row, step), rows in zip(settled, self.target.rows, strict=True):
                texts[row].count(step, rows, seconds)
        ended, count = time.perf_counter(), len(prompts)
        for text in texts.values():
            text.stats.prefill_seconds = (prefilled - begun) / count
            text.stats.decode_seconds = (ended - prefilled) / count
        timed = self.target.can_time
        forward = (self.target.seconds - in_forward) / count if timed else None
        return [text.record((ended - begun) / count, forward) for text in texts.values()]
