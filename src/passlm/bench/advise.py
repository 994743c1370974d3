"""Whether PaSS pays for somebody's own prompts: the verdict on what a pilot measured, and why.

Pure functions of the measured figures. Measuring is left to `measuring/measure.py`, what is printed
to `cli/advise.py`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

from passlm.bench.engines.decoding import PlanDecoding
from passlm.bench.engines.methods import BASELINE, Method
from passlm.bench.measuring.intervals import COVERAGE
from passlm.decoding.strategies import strategy
from passlm.planning.acceptance import expected_length
from passlm.planning.cost_curve import CostCurve

Verdict = Literal["yes", "no", "undecided"]
Cause = Literal["few prompts", "reading", "short texts", "costs", "acceptance", "curve"]

WORTH = 1.05  # a speed-up below which it is not worth while to decode otherwise
LEAST_PROMPTS = 6  # of fewer, all favour one side by chance alone more than once in 20 times
_STEEP = 0.7  # shipped files have 0.56 to 0.70 of their first drafts accepted
_MUCH_READING = 0.5  # share of the time that prompts take
_SHORT = 16  # new tokens of a text
_OUT_OF_REACH = 10_000  # prompts


@dataclass(frozen=True)
class Measured:
    """A drafting plan as the pilot found it.

    Attributes:
        method: its name among `methods.METHODS`.
        lookahead_tokens: length of the look-ahead groups; 0 where none is given.
        tokens_per_second: prefill included.
        speedup: over plain decoding.
        interval: 95 % confidence of it; None with a single prompt.
        tokens_per_pass: of decoding.
        pass_cost: seconds of its passes, as measured, in passes of plain decoding.
        rows_per_pass: rows that a pass computes.
        accepted_length: candidates accepted in a pass that has some.
        chances: share of candidates accepted by position, of those reached.
    """

    method: str
    lookahead_tokens: int
    tokens_per_second: float
    speedup: float
    interval: tuple[float, float] | None
    tokens_per_pass: float
    pass_cost: float
    rows_per_pass: float
    accepted_length: float
    chances: tuple[float, ...]

    @classmethod
    def of(cls, run: Mapping[str, Any], plain: Mapping[str, Any]) -> Measured:
        """From a run's entry as `measure.summarize` makes it, and plain decoding's."""
        ends = run["speedup_interval"]
        shares = run["accepted_of_judged_by_position"]
        seconds, plain_seconds = (r["decode_seconds"] / r["passes"] for r in (run, plain))
        return cls(
            run["method"],
            run["lookahead_tokens"],
            run["tokens_per_second"],
            run["speedup_vs_ar"],
            None if ends is None else (ends[0], ends[1]),
            run["tokens_per_pass"],
            seconds / plain_seconds,
            run["rows_per_token"] * run["tokens_per_pass"],
            run["accepted_length"],
            tuple(share for share in shares if share is not None),
        )

    @property
    def title(self) -> str:
        """For people."""
        if self.method == "lookup":
            return "prompt lookup alone"
        return f"{self.method} {self.lookahead_tokens or ''}".strip()

    @property
    def accepted(self) -> float:
        """Candidates accepted in a pass that has some; in any pass, of plans chosen one by one."""
        return self.accepted_length if self.lookahead_tokens else self.tokens_per_pass - 1

    def flags(self, lookahead: str | None) -> str:
        """What makes `passlm generate` decode by it.

        Args:
            lookahead: the look-ahead files asked for; None for those that ship.
        """
        if self.method == "lookup":
            return "--method auto --lookahead none"
        named = "" if lookahead is None else f" --lookahead {shlex.quote(lookahead)}"
        length = f" --lookahead-tokens {self.lookahead_tokens}" if self.lookahead_tokens else ""
        return f"--method {self.method}{length}{named}"


@dataclass(frozen=True)
class Pilot:
    """What was measured.

    Attributes:
        plans: the drafting ones, at least one.
        prompts: how many each of them wrote.
        tokens: new ones of plain decoding.
        reading: share of plain decoding's time that prompts took.
        curve: what passes cost a text alone.
    """

    plans: tuple[Measured, ...]
    prompts: int
    tokens: int
    reading: float
    curve: CostCurve

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]], curve: CostCurve) -> Pilot:
        """From the runs' entries as `measure.summarize` makes them, plain decoding among them."""
        plain = next(run for run in runs if run["method"] == BASELINE)
        plans = tuple(Measured.of(run, plain) for run in runs if run is not plain)
        reading = plain["prefill_seconds"] / plain["seconds"]
        return cls(plans, plain["prompts"], plain["tokens"], reading, curve)


@dataclass(frozen=True)
class Reason:
    """Why it does not pay, or cannot be told: the kind of reason, and a sentence."""

    cause: Cause
    text: str


@dataclass(frozen=True)
class Advice:
    """The verdict.

    Attributes:
        verdict: whether it pays.
        best: the fastest plan measured.
        interval: of its speed-up, wider since it is the best of several; None with one prompt.
        more_prompts: how many more would settle it, if they are like these; 0 where it is settled,
            None where it is out of reach.
        reasons: none where it pays; the weightiest first.
    """

    verdict: Verdict
    best: Measured
    interval: tuple[float, float] | None
    more_prompts: int | None
    reasons: tuple[Reason, ...]


def advise(pilot: Pilot) -> Advice:
    """The verdict on a pilot.

    It pays if the fastest plan is surely faster than plain decoding, and does not if no plan can
    be as much as `WORTH` times as fast.
    """
    best = max(pilot.plans, key=lambda plan: plan.speedup)
    ends = [widened(plan, len(pilot.plans)) for plan in pilot.plans]
    interval = ends[pilot.plans.index(best)]
    verdict: Verdict = "undecided"
    if interval is not None and pilot.prompts >= LEAST_PROMPTS:
        if interval[0] > 1:
            return Advice("yes", best, interval, 0, ())
        if all(end is not None and end[1] <= WORTH for end in ends):
            verdict = "no"
    more = 0 if verdict == "no" else missing_prompts(best.speedup, interval, pilot.prompts)
    return Advice(verdict, best, interval, more, reasons(pilot, best))


def widened(plan: Measured, plans: int) -> tuple[float, float] | None:
    """The interval that holds for all of so many plans together, so also for the best of them.

    Bonferroni's, with the logarithm of a speed-up taken as normal.
    """
    if plan.interval is None:
        return None
    tail = (1 - COVERAGE) / 2
    factor = NormalDist().inv_cdf(1 - tail / plans) / NormalDist().inv_cdf(1 - tail)
    low, high = (plan.speedup * (end / plan.speedup) ** factor for end in plan.interval)
    return low, high


def missing_prompts(
    speedup: float, interval: tuple[float, float] | None, prompts: int
) -> int | None:
    """How many prompts more would settle it, if the speed-up stays and the interval narrows.

    Its width goes down with the square root of their number. Settled is that it pays once 1 lies
    outside, or that it does not once `WORTH` does.

    Args:
        speedup: measured.
        interval: of it.
        prompts: that it comes from.
    """
    least = max(1, LEAST_PROMPTS - prompts)
    if interval is None:
        return least
    half = math.log(interval[1] / interval[0]) / 2
    away = max(math.log(speedup), math.log(WORTH / speedup))  # from the nearer verdict's bound
    needed = math.ceil(prompts * (half / away) ** 2) - prompts
    return None if needed > _OUT_OF_REACH else max(least, needed)


# Why


def reasons(pilot: Pilot, best: Measured) -> tuple[Reason, ...]:
    """What keeps the best plan from paying more, the weightiest first."""
    found = []
    if pilot.prompts < LEAST_PROMPTS:
        found.append(
            Reason(
                "few prompts",
                f"{pilot.prompts} prompts are too few to tell: {LEAST_PROMPTS} at least",
            )
        )
    if best.tokens_per_pass < WORTH * best.pass_cost:
        found.append(_why_passes_do_not_pay(pilot))
    if pilot.reading >= _MUCH_READING:
        found.append(
            Reason(
                "reading",
                f"prompts take {pilot.reading:.0%} of the time, which drafting does not shorten: "
                f"{1 / pilot.reading:.1f} times is the most, however well it drafts",
            )
        )
    if pilot.tokens < _SHORT * pilot.prompts:
        found.append(
            Reason(
                "short texts",
                f"texts have {pilot.tokens / pilot.prompts:.0f} new tokens on average: the first "
                "pass drafts, and there are few behind it",
            )
        )
    return tuple(found)


def _why_passes_do_not_pay(pilot: Pilot) -> Reason:
    """Whether rows cost too much or too few drafts are accepted, of the fastest fixed plan."""
    fixed = [plan for plan in pilot.plans if plan.lookahead_tokens]
    plan = max(fixed or pilot.plans, key=lambda plan: plan.speedup)
    candidates = plan.lookahead_tokens or max(1, round(plan.rows_per_pass) - 1)
    needed = break_even_length(plan, pilot.curve)
    chance = break_even_chance(needed, candidates)
    if chance is None or chance > _STEEP:
        wanted = "even all of them would not do" if chance is None else f"{chance:.2f} of each"
        return Reason(
            "costs",
            f"rows are dear here: a pass of 5 costs {relative_cost(pilot.curve, 5):.2f} times one, "
            f"so {plan.title} needs more accepted than drafts reach ({wanted})",
        )
    shares = ", ".join(f"{share:.2f}" for share in plan.chances)
    if plan.accepted < needed:
        return Reason(
            "acceptance",
            f"too few drafts are accepted: {plan.title} has {plan.accepted:.2f} a pass "
            f"({shares} by position, once reached) and needs {needed:.2f} ({chance:.2f} of each) "
            "to break even",
        )
    return Reason(
        "curve",
        f"{plan.title} accepts {plan.accepted:.2f} a pass, which pays by the cost curve, but its "
        f"passes took {plan.pass_cost:.2f} times plain ones and not "
        f"{plan_cost(plan, pilot.curve):.2f}: measure the curve again with 'passlm profile'",
    )


def relative_cost(curve: CostCurve, rows: float) -> float:
    """What a pass of real rows costs, in passes of one; between whole numbers, in between."""
    low = math.floor(rows)
    share = rows - low
    return ((1 - share) * curve.of(low) + share * curve.of(low + 1)) / curve.of(1)


def plan_cost(plan: Measured, curve: CostCurve) -> float:
    """What a plan's passes cost on average by a curve, in passes of plain decoding.

    Of plans that are chosen pass by pass only the number of rows is known.
    """
    rows = plan.lookahead_tokens
    if plan.method == "two-pass":
        return (curve.of(1, rows, rows) + curve.of(1 + rows)) / (2 * curve.of(1))
    if plan.method == "one-pass":
        return curve.of(1 + rows, (1 + rows) * rows, rows) / curve.of(1)
    return relative_cost(curve, plan.rows_per_pass)


def break_even_length(plan: Measured, curve: CostCurve) -> float:
    """The accepted length at which a plan is as fast as plain decoding.

    METHOD's formulas solved for `E`: two passes of a two-pass plan give `2 + E` tokens, one of any
    other `1 + E`.
    """
    passes = 2 if plan.method == "two-pass" else 1
    return passes * (plan_cost(plan, curve) - 1)


def break_even_chance(length: float, candidates: int) -> float | None:
    """The chance of each candidate at which so many are accepted; None where all are not enough."""
    if length > candidates:
        return None
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        enough = expected_length((middle,) * candidates) >= length
        low, high = (low, middle) if enough else (middle, high)
    return high


# Batches


def batched(best: Measured, curves: Mapping[int, CostCurve]) -> dict[int, float]:
    """The speed-up to be expected in batches, if passes stay as they were and costs follow curves.

    Args:
        best: the plan, measured on a text alone.
        curves: for each batch size, that of 1 among them.
    """
    alone = plan_cost(best, curves[1])
    return {size: best.speedup * alone / plan_cost(best, curve) for size, curve in curves.items()}


def pays_up_to(speedups: Mapping[int, float]) -> int | None:
    """The largest batch up to which all are faster than plain decoding; None if not even one is."""
    largest = None
    for size, speedup in sorted(speedups.items()):
        if speedup <= 1:
            break
        largest = size
    return largest


# Which plans are measured


def fixed_plans(auto: Method, curve: CostCurve, prior: Sequence[float]) -> list[Method]:
    """The best two-pass and the best one-pass plan, by the cost curve and the files' acceptance.

    Args:
        auto: the method whose model, rows and settings they share.
        curve: what passes cost.
        prior: chance of each look-ahead candidate; none without files.
    """
    if not prior:
        return []
    lengths = range(1, 1 + len(prior))
    expected = {length: expected_length(prior[:length]) for length in lengths}
    two = max(lengths, key=lambda length: curve.two_pass(expected[length], length))
    one = max(lengths, key=lambda length: curve.one_pass(expected[length], length))
    return [_fixed(auto, "two-pass", two), _fixed(auto, "one-pass", one)]


def _fixed(auto: Method, name: str, tokens: int) -> Method:
    assert isinstance(auto.decode, PlanDecoding), "auto is ours"
    plans = strategy(name, tokens)
    decode = replace(auto.decode, plans=lambda *_: plans, costs=None)
    return replace(
        auto, name=name, plan=f"{name}({tokens})", lookahead_tokens=tokens, decode=decode
    )
