"""What passes cost on this machine: measured once with the model itself, kept in the user's cache.

A kept curve is used as long as model, type, device, threads, versions and look-ahead files are the
same; plans made from it do not depend on the clock of the moment. Choosing plans is left to
`auto.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from passlm.decoding.decoder import Decoder
from passlm.decoding.text import Request
from passlm.kernels import linear, native
from passlm.layers.int8 import Int8Linear
from passlm.lookahead.trained import LookAhead
from passlm.model.cache import RowCache
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target
from passlm.params import SamplingParams
from passlm.plan import (
    Chain,
    Choice,
    Chooser,
    Guessing,
    Limits,
    Plan,
    Shared,
    Source,
    verifying,
)
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import BATCHES, CostCurve
from passlm.provenance import cache_folder, environment, provenance, write_atomically

REAL_ROWS = (1, 2, 3, 5, 9, 13)
GROUPS = (1, 2, 3, 4, 6, 8)
_WIDE = (4, 2)  # candidates, and rows of a group on each: tells what more groups cost
_LEAST_ROUNDS = 6
_MOST_ROUNDS = 24
_ENOUGH_SECONDS = 3.0  # of measuring one curve, once there are the least rounds
_ROUNDS_A_SITTING = 3  # behind texts that are read anew
CONTEXTS = (128, 512, 2048, 8192)  # a curve is measured behind so many tokens
_MARGIN = 192  # tokens that one sitting may need behind them
_GREEDY = SamplingParams()
_SAMPLED: dict[Guessing, SamplingParams] = {
    "drawn": SamplingParams(temperature=1.0, seed=0, judge="rejection"),
    "knowing": SamplingParams(temperature=1.0, seed=0),
}
_STAGGER = 3  # tokens by which the texts of a batch differ in length

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Timed:
    """A step that is timed.

    Attributes:
        plan: its pass; candidates are any token.
        guessed: tokens that the draft head guesses before it.
    """

    plan: Plan
    guessed: int = 0


class _Script:
    """Gives every row the step that is to be timed."""

    passes = ()

    def __init__(self) -> None:
        self.timed = _Timed(Plan(0, (0,)))

    def begin(self, guessing: Guessing = "likeliest") -> Chooser:
        return self

    def resize(self, texts: int) -> None:
        pass

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        return self.timed.guessed if source == "head" else 0

    def worth(self, chains: Sequence[Chain], shared: Shared) -> float:
        return 0.0

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        count = self.timed.plan.candidates
        return Choice(Chain((0,) * count) if count else None, self.timed.plan)

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        pass


def measure(
    target: Target,
    rows: LookAheadRows | None,
    batch: int = 1,
    context: int = CONTEXTS[0],
    rounds: int | None = None,
) -> CostCurve:
    """Time steps of decoding, plans interleaved in random order; medians that rise with the rows.

    Args:
        target: the model.
        rows: its look-ahead rows; None for the costs of real rows alone.
        batch: texts decoded at a time.
        context: tokens before them; fewer where the model takes no more.
        rounds: how often each plan is timed, after one round to warm up; None for as often as some
            seconds allow.
    """
    context = _fitting(target, context)
    longest = 0 if rows is None else len(rows.inputs)
    groups = [length for length in GROUPS if length <= longest]
    plans = [verifying(count - 1) for count in REAL_ROWS]
    plans += [Plan(0, (length,)) for length in groups]
    wide = Plan(_WIDE[0], (min(_WIDE[1], longest),) * (1 + _WIDE[0])) if groups else None
    plans += [wide] if wide else []
    depths = 0 if rows is None or rows.head is None else rows.head.depths
    guesses = [_Timed(verifying(count), count) for count in range(1, 1 + depths)]
    timed = [*map(_Timed, plans), *guesses]
    drawn = [_Timed(verifying(0)), _Timed(Plan(0, (groups[-1],)))] if groups else []
    seconds: dict[_Timed, list[float]] = {step: [] for step in timed}
    drawing = {guessing: {step: list[float]() for step in drawn} for guessing in _SAMPLED}
    prompt = [1 + place % (target.vocabulary - 1) for place in range(context)]
    read = target.prefill(prompt[:-1])
    begun, done = time.perf_counter(), 0
    while done <= (_LEAST_ROUNDS if rounds is None else rounds) or (
        rounds is None and done <= _MOST_ROUNDS and time.perf_counter() - begun < _ENOUGH_SECONDS
    ):
        for step, took in _sitting(target, rows, timed, batch, prompt, read, done, _GREEDY):
            seconds[step].append(took)
        for guessing, sampling in _SAMPLED.items() if drawn else ():
            for step, took in _sitting(target, rows, drawn, batch, prompt, read, done, sampling):
                drawing[guessing][step].append(took)
        done += _ROUNDS_A_SITTING
    known = {step: median(took[1:]) for step, took in seconds.items() if len(took) > 1}
    medians = {step.plan: took for step, took in known.items() if not step.guessed}
    real = {
        count: medians[plan]
        for count, plan in zip(REAL_ROWS, plans, strict=False)
        if plan in medians
    }
    curve = CostCurve(tuple(real), rising(list(real.values())))
    hung = {n: medians[Plan(0, (n,))] for n in groups if Plan(0, (n,)) in medians}
    risen = zip(hung, rising(list(hung.values())), strict=True)
    dearer = [max(0.0, took - curve.of(1 + n)) for n, took in risen]
    timed_guesses = list(takewhile(known.__contains__, guesses))
    dearer_by = [max(0.0, known[step] - curve.of(1 + step.guessed)) for step in timed_guesses]
    curve = replace(
        curve, groups=tuple(hung), group_seconds=tuple(dearer), head_seconds=rising(dearer_by)
    )
    if groups:
        more = {kind: _draw_seconds(own, known) / groups[-1] for kind, own in drawing.items()}
        curve = replace(curve, draw_seconds=more["drawn"], know_seconds=more["knowing"])
    if wide is None or wide not in medians:
        return curve
    rest = medians[wide] - curve.of(1 + wide.candidates, sum(wide.groups), wide.groups[0])
    return replace(curve, row_seconds=max(0.0, rest / sum(wide.groups[1:])))


def _draw_seconds(
    drawing: Mapping[_Timed, Sequence[float]], greedy: Mapping[_Timed, float]
) -> float:
    """What drawing a group takes more than taking its likeliest tokens; 0 if it was not measured.

    Args:
        drawing: seconds of a step without a group and of one with it, their tokens drawn.
        greedy: medians of the same steps, and others, of greedy text.
    """
    if any(len(took) < 2 or step not in greedy for step, took in drawing.items()):
        return 0.0
    alone, group = (median(took[1:]) - greedy[step] for step, took in drawing.items())
    return max(0.0, group - alone)


def _sitting(
    target: Target,
    rows: LookAheadRows | None,
    steps: Sequence[_Timed],
    batch: int,
    prompt: Sequence[int],
    read: RowCache,
    seed: int,
    sampling: SamplingParams,
) -> list[tuple[_Timed, float]]:
    """Each step some times, rounds in orders of their own, once a first pass has made room.

    The texts differ in length, as those of a batch do.

    Args:
        target: the model.
        rows: its look-ahead rows.
        steps: to time.
        batch: texts decoded at a time.
        prompt: what they follow, or its beginning.
        read: keys and values of all of it but the last token.
        seed: of the orders.
        sampling: how tokens are drawn.
    """
    script, draw = _Script(), random.Random(seed)
    order = [step for _ in range(_ROUNDS_A_SITTING) for step in draw.sample(steps, len(steps))]
    settled = sum(1 + step.plan.candidates for step in order)
    needed = 1 + settled + max(step.plan.rows for step in steps)
    decoder = Decoder(target, rows)
    for text in range(batch):
        count = max(1, len(prompt) - _STAGGER * text)
        request = Request.of(prompt[:count], sampling, needed, script)
        decoder.admit(decoder.begin(request, read.copied(0, count - 1)))
    decoder.step()
    taken = []
    for step in order:
        if len(decoder.rows) < batch:  # the model's context is full
            break
        script.timed = step
        begun = time.perf_counter()
        decoder.step()
        taken.append((step, time.perf_counter() - begun))
    return taken


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest numbers that never fall: neighbours in the wrong order become their mean.

    Isotonic regression by pooling adjacent violators (Ayer et al., 1955): a pass of more rows takes
    no less time, whatever a busy machine says.
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return tuple(mean(pool) for pool in pools for _ in pool)


@dataclass
class Costs:
    """The cost curves of one model with its look-ahead files, each measured when first needed.

    Attributes:
        target: the model.
        look_ahead: its files; None without.
        rows: what decoding takes of them.
    """

    target: Target
    look_ahead: LookAhead | None = None
    rows: LookAheadRows | None = None

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, int], CostCurve] = {}
        self._unknown: set[tuple[int, int]] = set()  # looked for in vain
        self._plans: dict[tuple[AutoPlan, int], AutoPlan] = {}  # by themselves and their context

    def curve(self, batch: int, context: int, anew: bool = False) -> CostCurve:
        """What passes cost for so many texts behind so many tokens.

        Args:
            batch: texts decoded at a time; a near size stands for it.
            context: tokens of the longest; a near number stands for it.
            anew: measure even where a curve is kept.
        """
        batch, context = _nearest(batch, context)
        if anew or (batch, context) not in self._known:
            self._known[batch, context] = self._kept_or_measured(batch, context, anew)
        return self._known[batch, context]

    def size(self, batch: int, context: int) -> tuple[int, int]:
        """The batch and context that are measured in the place of these."""
        batch, context = _nearest(batch, context)
        return batch, _fitting(self.target, context)

    def auto(
        self, batch: int, context: int, longest: int | None = None, lookup: bool = True
    ) -> AutoPlan:
        """Plans chosen from the curve for this batch, and from those kept for others.

        Where the batch shrinks or grows, a text goes on with the curve for its size if there is one
        already: nothing is measured while texts are written.

        Args:
            batch: texts decoded at a time, to begin with.
            context: tokens of the longest.
            longest: rows of the longest look-ahead group; None allows all, 0 none, and no draft
                head either.
            lookup: whether chains copied from the text are candidates.
        """
        card = None if self.look_ahead is None else self.look_ahead.card
        prior = () if card is None else card.prior[:longest]
        head = () if card is None or longest == 0 else card.head_prior

        def of(texts: int) -> CostCurve | None:
            return self.known(texts, context)

        made = AutoPlan(self.curve(batch, context), prior, lookup, of, head)
        return self._plans.setdefault((made, _near(context, CONTEXTS)), made)  # weighed once

    def known(self, batch: int, context: int) -> CostCurve | None:
        """As `curve`, but only what was measured before."""
        size = _nearest(batch, context)
        if size not in self._known and size not in self._unknown:
            key = {**self._identity(), "batch": size[0], "context": size[1]}
            kept = _read(_place(key), key)
            if kept is None:
                self._unknown.add(size)
            else:
                self._known[size] = kept
        return self._known.get(size)

    def _kept_or_measured(self, batch: int, context: int, anew: bool) -> CostCurve:
        key = {**self._identity(), "batch": batch, "context": context}
        kept = None if anew else _read(_place(key), key)
        if kept is not None:
            return kept
        _log.info("measuring what passes cost on this machine, once: it takes some seconds")
        curve = measure(self.target, self.rows, batch, context)
        key["engine"] = self.target.engine  # passes may have turned out not to compile here
        path = _place(key)
        content = {"key": key, "curve": asdict(curve), "provenance": provenance([])}
        try:
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            _log.warning("cannot keep the measured costs in %s: %s", path.parent, error.strerror)
        return curve

    def _identity(self) -> dict[str, Any]:
        """Everything that a curve depends on but batch and context."""
        card = None if self.look_ahead is None else self.look_ahead.card
        head = None if self.look_ahead is None else self.look_ahead.head
        shape = head and head.description()
        return {
            "model": asdict(self.target.fingerprint),
            "engine": self.target.engine,
            "in_line": self.target.in_line,
            "products": linear.described(),
            "operators": native.version(),
            "dtype": str(self.target.dtype),
            "device": str(self.target.device),
            "environment": environment(),
            "sittings": [_STAGGER, _ROUNDS_A_SITTING, _MARGIN, "drawn", "knowing"],
            "look_ahead": card and [card.look_ahead_tokens, card.lora, card.sampler, shape],
        }


def _place(key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "costs" / f"{name}.json"


def _read(path: Path, key: dict[str, Any]) -> CostCurve | None:
    """The curve kept for this key; None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != json.loads(json.dumps(key)):
            return None
        fields = content["curve"]
        kept: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else float(value)
            for name, value in fields.items()
        }
        return CostCurve(**kept)
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        _log.warning("%s is damaged: measuring anew", path)
        return None


def _nearest(batch: int, context: int) -> tuple[int, int]:
    return _near(batch, BATCHES), _near(context, CONTEXTS)


def _near(wanted: int, known: Sequence[int]) -> int:
    """The known size nearest by ratio."""
    return min(known, key=lambda size: max(size / max(1, wanted), max(1, wanted) / size))


def _fitting(target: Target, context: int) -> int:
    """So many tokens, or as many as leave a sitting room in the model's context."""
    return context if target.context is None else max(1, min(context, target.context - _MARGIN))


def weight_bytes(target: Target) -> int:
    """Bytes of weights that a pass reads: of the input embeddings only a row for each token."""
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
    """Bytes a second that this machine reads from memory; the best of some rounds.

    Args:
        device: where.
        size: bytes to read each time: far more than caches hold.
        rounds: how often.
    """
    block = torch.ones(size // 4, device=device)
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        float(block.sum())  # waits for the device
        taken.append(time.perf_counter() - begun)
    return block.nbytes / min(taken)
