"""Measure what decoding steps cost on this machine: the cost curve of a batch size and context.

Steps with different plans are timed in random order, in rounds, so that a slow moment of the
machine hits all of them alike. Keeping curves is left to `kept_costs.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import mean, median
from typing import Any

import torch

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import Choice, Chooser, Limits, PassSize, verifying
from passlm.layers.int8 import Int8Linear
from passlm.model.cache import RowCache
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target
from passlm.params import SamplingParams
from passlm.plan import Chain, Guessing, Plan, Source
from passlm.planning.cost_curve import CostCurve

REAL_ROWS = (1, 2, 3, 5, 9, 13)
GROUPS = (1, 2, 3, 4, 6, 8)
_WIDE = (4, 2)  # candidates, and rows of a group on each: shows the cost of further groups
_MIN_ROUNDS = 6
_MAX_ROUNDS = 24
_ENOUGH_SECONDS = 3.0  # of measuring one curve, once there are `_MIN_ROUNDS`
_ROUNDS_PER_RUN = 3  # after which the prompts are read anew
_MARGIN = 192  # tokens that one run may need behind the context
_STAGGER = 3  # tokens by which the sequences of a batch differ in length
METHOD = (_STAGGER, _ROUNDS_PER_RUN, _MARGIN, "drawn", "knowing")  # curves of others do not compare
_GREEDY = SamplingParams()
_SAMPLED: dict[Guessing, SamplingParams] = {
    "drawn": SamplingParams(temperature=1.0, seed=0, judge="rejection"),
    "knowing": SamplingParams(temperature=1.0, seed=0),
}


@dataclass(frozen=True)
class _Timed:
    """A step to be timed.

    Attributes:
        plan: its pass; its candidates may be any tokens.
        guessed: tokens that the draft head proposes before it.
    """

    plan: Plan
    guessed: int = 0


@dataclass(frozen=True)
class _Steps:
    """The steps that a cost curve is made from.

    Attributes:
        real: passes of real rows alone, one for each of `REAL_ROWS`.
        groups: lengths of the look-ahead groups.
        guesses: steps in which the draft head proposes 1, 2, ... tokens.
        wide: a pass with groups on several real rows; None without look-ahead rows.
    """

    real: Sequence[_Timed]
    groups: Sequence[int]
    guesses: Sequence[_Timed]
    wide: _Timed | None

    @classmethod
    def for_rows(cls, rows: LookAheadRows | None) -> _Steps:
        """Return the steps that look-ahead rows allow."""
        longest = 0 if rows is None else len(rows.inputs)
        depths = 0 if rows is None or rows.head is None else rows.head.depths
        candidates, length = _WIDE
        wide = _Timed(Plan(candidates, (min(length, longest),) * (1 + candidates)))
        return cls(
            [_Timed(verifying(count - 1)) for count in REAL_ROWS],
            [length for length in GROUPS if length <= longest],
            [_Timed(verifying(count), count) for count in range(1, 1 + depths)],
            wide if longest else None,
        )

    @property
    def greedy(self) -> list[_Timed]:
        """Steps to time with greedy decoding."""
        groups = [_group(length) for length in self.groups]
        return [*self.real, *groups, *([self.wide] if self.wide else []), *self.guesses]

    @property
    def sampled(self) -> list[_Timed]:
        """Steps to time with sampling: without a group, and with the longest one."""
        return [_Timed(verifying(0)), _group(self.groups[-1])] if self.groups else []


def _group(length: int) -> _Timed:
    return _Timed(Plan(0, (length,)))


def measure(
    target: Target,
    rows: LookAheadRows | None,
    batch: int = 1,
    context: int = 128,
    rounds: int | None = None,
) -> CostCurve:
    """Time decoding steps and return their cost curve: medians that rise with the rows.

    Args:
        target: the model.
        rows: its look-ahead rows; None for the costs of real rows alone.
        batch: batch size.
        context: tokens of each sequence; fewer where the model takes no more.
        rounds: number of times to time each plan, after one round to warm up; None for as many as
            a few seconds allow.
    """
    steps = _Steps.for_rows(rows)
    bench = _Bench(target, rows, batch, fitting(target, context))
    greedy: dict[_Timed, list[float]] = {step: [] for step in steps.greedy}
    sampled = {guessing: {step: list[float]() for step in steps.sampled} for guessing in _SAMPLED}
    begun, done = time.perf_counter(), 0
    while done <= (_MIN_ROUNDS if rounds is None else rounds) or (
        rounds is None and done <= _MAX_ROUNDS and time.perf_counter() - begun < _ENOUGH_SECONDS
    ):
        _add(greedy, bench.run(steps.greedy, done, _GREEDY))
        for guessing, sampling in _SAMPLED.items() if steps.sampled else ():
            _add(sampled[guessing], bench.run(steps.sampled, done, sampling))
        done += _ROUNDS_PER_RUN
    # The first time of each step warms up.
    medians = {step: median(took[1:]) for step, took in greedy.items() if len(took) > 1}
    return _curve(steps, medians, sampled)


def _add(seconds: Mapping[_Timed, list[float]], taken: Iterable[tuple[_Timed, float]]) -> None:
    for step, took in taken:
        seconds[step].append(took)


def _curve(
    steps: _Steps,
    medians: Mapping[_Timed, float],
    sampled: Mapping[Guessing, Mapping[_Timed, Sequence[float]]],
) -> CostCurve:
    """Return the curve of what could be measured: the model's context may have been too short."""
    real = {1 + step.plan.candidates: medians[step] for step in steps.real if step in medians}
    curve = CostCurve(tuple(real), rising(list(real.values())))
    hung = {n: medians[_group(n)] for n in steps.groups if _group(n) in medians}
    risen = zip(hung, rising(list(hung.values())), strict=True)
    more = [max(0.0, took - curve.of(1 + n)) for n, took in risen]
    guesses = list(takewhile(medians.__contains__, steps.guesses))
    by_head = [max(0.0, medians[step] - curve.of(1 + step.guessed)) for step in guesses]
    curve = replace(
        curve, groups=tuple(hung), group_seconds=tuple(more), head_seconds=rising(by_head)
    )
    if steps.groups:
        drawn = {kind: _draw_seconds(took, medians) for kind, took in sampled.items()}
        each = {kind: seconds / steps.groups[-1] for kind, seconds in drawn.items()}
        curve = replace(curve, draw_seconds=each["drawn"], know_seconds=each["knowing"])
    if steps.wide is None or steps.wide not in medians:
        return curve
    wide = steps.wide.plan
    rest = medians[steps.wide] - curve.of(1 + wide.candidates, sum(wide.groups), wide.groups[0])
    return replace(curve, row_seconds=max(0.0, rest / sum(wide.groups[1:])))


def _draw_seconds(
    sampled: Mapping[_Timed, Sequence[float]], greedy: Mapping[_Timed, float]
) -> float:
    """Return the extra seconds of drawing a group; 0 if it was not measured.

    Args:
        sampled: seconds of a step without a group and of one with it, under sampling.
        greedy: medians of the same steps, and others, under greedy decoding.
    """
    if any(len(took) < 2 or step not in greedy for step, took in sampled.items()):
        return 0.0
    alone, group = (median(took[1:]) - greedy[step] for step, took in sampled.items())
    return max(0.0, group - alone)


class _Script:
    """A strategy that gives every sequence the step that is to be timed."""

    passes = ()
    drafts = True

    def __init__(self) -> None:
        self.timed = _Timed(Plan(0, (0,)))

    def begin(self, guessing: Guessing = "likeliest") -> Chooser:
        return self

    def resize(self, batch_size: int) -> None:
        pass

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        return self.timed.guessed if source == "head" else 0

    def value_of(self, chains: Sequence[Chain], shared: PassSize) -> float:
        return 0.0

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        count = self.timed.plan.candidates
        return Choice(Chain((0,) * count) if count else None, self.timed.plan)

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        pass


class _Bench:
    """Times steps of a batch of sequences that follow the same prompt.

    Args:
        target: the model.
        rows: its look-ahead rows.
        batch: batch size.
        context: tokens of the prompt.
    """

    def __init__(
        self, target: Target, rows: LookAheadRows | None, batch: int, context: int
    ) -> None:
        self._target = target
        self._rows = rows
        self._batch = batch
        self._prompt = [1 + place % (target.vocabulary - 1) for place in range(context)]
        self._read: RowCache = target.prefill(self._prompt[:-1])

    def run(
        self, steps: Sequence[_Timed], seed: int, sampling: SamplingParams
    ) -> list[tuple[_Timed, float]]:
        """Return the seconds of each step, timed in several rounds of random order.

        A first step, which is not timed, makes room in the cache. The sequences differ in length,
        as those of a batch do.

        Args:
            steps: the steps to time.
            seed: seed of the order.
            sampling: how tokens are drawn.
        """
        script, draw = _Script(), random.Random(seed)
        order = [step for _ in range(_ROUNDS_PER_RUN) for step in draw.sample(steps, len(steps))]
        settled = sum(1 + step.plan.candidates for step in order)
        decoder = self._decoder(script, 1 + settled + max(s.plan.rows for s in steps), sampling)
        decoder.step()
        taken = []
        for step in order:
            if len(decoder.rows) < self._batch:  # the model's context is full
                break
            script.timed = step
            begun = time.perf_counter()
            decoder.step()
            taken.append((step, time.perf_counter() - begun))
        return taken

    def _decoder(self, script: _Script, tokens: int, sampling: SamplingParams) -> Decoder:
        decoder = Decoder(self._target, self._rows)
        for index in range(self._batch):
            count = max(1, len(self._prompt) - _STAGGER * index)
            request = Request.of(self._prompt[:count], sampling, tokens, script)
            decoder.admit(decoder.begin(request, self._read.copied(0, count - 1)))
        return decoder


def fitting(target: Target, context: int) -> int:
    """Return a context length, reduced where the model's context leaves no room to measure."""
    return context if target.context is None else max(1, min(context, target.context - _MARGIN))


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """Return the nearest numbers that never fall: neighbours in the wrong order get their mean.

    Isotonic regression by pooling adjacent violators (Ayer et al., 1955). A pass of more rows takes
    no less time; measurements on a busy machine may say otherwise.
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return tuple(mean(pool) for pool in pools for _ in pool)


def weight_bytes(target: Target) -> int:
    """Return the bytes of weights that a pass reads; it reads few input embeddings."""
    model: Any = target.model
    read = {id(p): p.nbytes for p in model.parameters()}
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = getattr(output, "weight", None) is table
    if not tied or isinstance(output, Int8Linear):
        del read[id(table)]
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            read |= {id(layer): layer.nbytes, id(layer.weight): 0}  # what it keeps is not read
    return sum(read.values())


def read_bandwidth(device: torch.device, size: int = 2**30, rounds: int = 5) -> float:
    """Return the bytes per second that a device reads from memory; the best of several rounds.

    Args:
        device: the device.
        size: bytes to read in each round: far more than caches hold.
        rounds: number of rounds.
    """
    block = torch.ones(size // 4, device=device)
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        float(block.sum())  # waits for the device
        taken.append(time.perf_counter() - begun)
    return block.nbytes / min(taken)
