"""Decides from a pilot run whether PaSS speeds up a user's prompts, and gives the reasons.

All functions are pure functions of measured figures. `measuring/measure.py` does the measuring;
`cli/advise.py` prints the verdict.
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

WORTH = 1.05  # smallest speed-up that is worth a change of method
# Minimum number of prompts for a verdict: with fewer, all of them favour one side by chance in more
# than 5 % of cases.
LEAST_PROMPTS = 6
_STEEP = (
    0.7  # highest acceptance rate to hope for; first drafts of shipped files reach 0.56 to 0.70
)
_MUCH_READING = 0.5  # share of the time spent on prefill that is worth a remark
_SHORT = 16  # mean number of new tokens below which outputs count as short
_OUT_OF_REACH = 10_000  # more additional prompts than this are not suggested


@dataclass(frozen=True)
class Measured:
    """Measured figures of a drafting plan.

    Attributes:
        method: name of the method, one of `methods.METHODS`.
        lookahead_tokens: length of the look-ahead groups; 0 if not fixed.
        tokens_per_second: throughput, prefill included.
        speedup: speed-up over plain decoding.
        interval: 95 % confidence interval of `speedup`; None with a single prompt.
        tokens_per_pass: mean number of new tokens per decoding pass.
        pass_cost: measured mean time of a pass, relative to a pass of plain decoding.
        rows_per_pass: mean number of rows that a pass computes.
        accepted_length: mean number of candidates accepted per pass with candidates.
        chances: acceptance rate by position, of the candidates that were reached.
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
        """Create it from the entries of a run and of plain decoding, see `measure.summarize`."""
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
        """Name of the plan in printed text."""
        if self.method == "lookup":
            return "prompt lookup alone"
        return f"{self.method} {self.lookahead_tokens or ''}".strip()

    @property
    def accepted(self) -> float:
        """Mean accepted candidates per pass with candidates; per pass, if plans vary by pass."""
        return self.accepted_length if self.lookahead_tokens else self.tokens_per_pass - 1

    def flags(self, lookahead: str | None) -> str:
        """Return the flags that make `passlm generate` use this plan.

        Args:
            lookahead: the look-ahead files of the user; None for those shipped with passlm.
        """
        if self.method == "lookup":
            return "--method auto --lookahead none"
        named = "" if lookahead is None else f" --lookahead {shlex.quote(lookahead)}"
        length = f" --lookahead-tokens {self.lookahead_tokens}" if self.lookahead_tokens else ""
        return f"--method {self.method}{length}{named}"


@dataclass(frozen=True)
class Pilot:
    """Measured figures of all plans.

    Attributes:
        plans: the drafting plans, at least one.
        prompts: number of prompts that each plan ran.
        tokens: number of new tokens of plain decoding.
        reading: share of plain decoding's time spent on prefill.
        curve: cost curve at batch size 1.
    """

    plans: tuple[Measured, ...]
    prompts: int
    tokens: int
    reading: float
    curve: CostCurve

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]], curve: CostCurve) -> Pilot:
        """Create it from the entries of all runs, plain decoding included."""
        plain = next(run for run in runs if run["method"] == BASELINE)
        plans = tuple(Measured.of(run, plain) for run in runs if run is not plain)
        reading = plain["prefill_seconds"] / plain["seconds"]
        return cls(plans, plain["prompts"], plain["tokens"], reading, curve)


@dataclass(frozen=True)
class Reason:
    """A reason why PaSS is not faster, or why the verdict is open: its kind, and a sentence."""

    cause: Cause
    text: str


@dataclass(frozen=True)
class Advice:
    """The verdict with its reasons.

    Attributes:
        verdict: whether PaSS is faster.
        best: the fastest plan.
        interval: confidence interval of the best plan's speed-up, widened because it is the best
            of several plans; None with one prompt.
        more_prompts: number of additional similar prompts that would decide an open verdict; 0 if
            the verdict is decided, None if too many would be needed.
        reasons: the most important reason first; empty if PaSS is faster.
    """

    verdict: Verdict
    best: Measured
    interval: tuple[float, float] | None
    more_prompts: int | None
    reasons: tuple[Reason, ...]


def advise(pilot: Pilot) -> Advice:
    """Return the verdict on a pilot.

    It is "yes" if the whole interval of the fastest plan lies above 1, and "no" if the intervals of
    all plans lie below `WORTH`. It is "undecided" otherwise and with few prompts.
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
    """Return an interval that is valid for the best of `plans` plans.

    This is the Bonferroni correction; the logarithm of a speed-up is taken as normally distributed.
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
    """Estimate the number of additional prompts that would decide the verdict.

    The estimate assumes that the speed-up stays the same and that the interval narrows with the
    square root of the number of prompts. The verdict is decided when the interval lies above 1 or
    below `WORTH`.

    Args:
        speedup: measured speed-up.
        interval: its confidence interval.
        prompts: number of prompts measured.

    Returns:
        The number of prompts, or None if it is too large.
    """
    least = max(1, LEAST_PROMPTS - prompts)
    if interval is None:
        return least
    half = math.log(interval[1] / interval[0]) / 2
    away = max(math.log(speedup), math.log(WORTH / speedup))  # distance to the nearer bound
    needed = math.ceil(prompts * (half / away) ** 2) - prompts
    return None if needed > _OUT_OF_REACH else max(least, needed)


# Reasons


def reasons(pilot: Pilot, best: Measured) -> tuple[Reason, ...]:
    """Return the reasons why the best plan is not faster, the most important first."""
    found = []
    if pilot.prompts < LEAST_PROMPTS:
        found.append(
            Reason(
                "few prompts",
                f"{pilot.prompts} prompts are too few for a verdict: use at least {LEAST_PROMPTS}",
            )
        )
    if best.tokens_per_pass < WORTH * best.pass_cost:
        found.append(_why_passes_do_not_pay(pilot))
    if pilot.reading >= _MUCH_READING:
        found.append(
            Reason(
                "reading",
                f"prefill takes {pilot.reading:.0%} of the time, which drafting does not shorten: "
                f"the speed-up cannot exceed {1 / pilot.reading:.1f}, however good the drafts",
            )
        )
    if pilot.tokens < _SHORT * pilot.prompts:
        found.append(
            Reason(
                "short texts",
                f"outputs have {pilot.tokens / pilot.prompts:.0f} new tokens on average: the first "
                "pass only drafts, and few passes follow that could profit",
            )
        )
    return tuple(found)


def _why_passes_do_not_pay(pilot: Pilot) -> Reason:
    """Return why the fastest fixed plan is slow: costly rows, or too few accepted drafts."""
    fixed = [plan for plan in pilot.plans if plan.lookahead_tokens]
    plan = max(fixed or pilot.plans, key=lambda plan: plan.speedup)
    candidates = plan.lookahead_tokens or max(1, round(plan.rows_per_pass) - 1)
    needed = break_even_length(plan, pilot.curve)
    chance = break_even_chance(needed, candidates)
    if chance is None or chance > _STEEP:
        wanted = (
            "more accepted drafts than it makes"
            if chance is None
            else f"an acceptance rate of {chance:.2f}"
        )
        return Reason(
            "costs",
            f"rows are expensive on this machine: a pass of 5 rows takes "
            f"{relative_cost(pilot.curve, 5):.2f} times as long as a pass of 1, so {plan.title} "
            f"would need {wanted} to break even",
        )
    shares = ", ".join(f"{share:.2f}" for share in plan.chances)
    if plan.accepted < needed:
        return Reason(
            "acceptance",
            f"too few drafts are accepted: {plan.title} accepts {plan.accepted:.2f} per pass "
            f"(rates by position: {shares}) and needs {needed:.2f} (a rate of "
            f"{chance:.2f}) to break even",
        )
    return Reason(
        "curve",
        f"{plan.title} accepts {plan.accepted:.2f} per pass, enough by the cost curve, but its "
        f"passes took {plan.pass_cost:.2f} times as long as plain ones, not the predicted "
        f"{plan_cost(plan, pilot.curve):.2f}: measure the curve again with 'passlm profile'",
    )


def relative_cost(curve: CostCurve, rows: float) -> float:
    """Return the cost of a pass of real rows relative to a pass of one row.

    Fractional numbers of rows are interpolated linearly.
    """
    low = math.floor(rows)
    share = rows - low
    return ((1 - share) * curve.of(low) + share * curve.of(low + 1)) / curve.of(1)


def plan_cost(plan: Measured, curve: CostCurve) -> float:
    """Return the mean cost of a plan's passes by a curve, relative to a pass of plain decoding.

    For plans that vary by pass, the cost is that of the mean number of rows, taken as real rows.
    """
    rows = plan.lookahead_tokens
    if plan.method == "two-pass":
        return (curve.of(1, rows, rows) + curve.of(1 + rows)) / (2 * curve.of(1))
    if plan.method == "one-pass":
        return curve.of(1 + rows, (1 + rows) * rows, rows) / curve.of(1)
    return relative_cost(curve, plan.rows_per_pass)


def break_even_length(plan: Measured, curve: CostCurve) -> float:
    """Return the accepted length at which a plan is as fast as plain decoding.

    With accepted length `E` and relative pass cost `c`, two-pass decoding gives `2 + E` tokens in
    two passes, and other plans `1 + E` in one. The plan breaks even at `E = 2 (c - 1)` and
    `E = c - 1`.
    """
    passes = 2 if plan.method == "two-pass" else 1
    return passes * (plan_cost(plan, curve) - 1)


def break_even_chance(length: float, candidates: int) -> float | None:
    """Return the acceptance rate that gives an accepted length.

    Args:
        length: mean accepted length.
        candidates: number of candidates per pass, all with the same acceptance rate.

    Returns:
        The rate, or None if `length` is larger than `candidates`.
    """
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
    """Estimate the speed-up by batch size, from the cost curves and with unchanged acceptance.

    Args:
        best: the plan, measured at batch size 1.
        curves: cost curves by batch size, including batch size 1.
    """
    alone = plan_cost(best, curves[1])
    return {size: best.speedup * alone / plan_cost(best, curve) for size, curve in curves.items()}


def pays_up_to(speedups: Mapping[int, float]) -> int | None:
    """Return the largest batch size up to which PaSS is faster; None if it is slower at the first.

    Args:
        speedups: speed-up by batch size.
    """
    largest = None
    for size, speedup in sorted(speedups.items()):
        if speedup <= 1:
            break
        largest = size
    return largest


# Plans to measure


def fixed_plans(auto: Method, curve: CostCurve, prior: Sequence[float]) -> list[Method]:
    """Return the best two-pass and the best one-pass plan, by cost curve and acceptance rates.

    Args:
        auto: the method whose model, look-ahead rows and settings the plans share.
        curve: cost curve of passes.
        prior: acceptance rate of each look-ahead candidate, from the look-ahead files; empty
            without files, in which case there are no plans.
    """
    if not prior:
        return []
    lengths = range(1, 1 + len(prior))
    expected = {length: expected_length(prior[:length]) for length in lengths}
    two = max(lengths, key=lambda length: curve.two_pass(expected[length], length))
    one = max(lengths, key=lambda length: curve.one_pass(expected[length], length))
    return [_fixed(auto, "two-pass", two), _fixed(auto, "one-pass", one)]


def _fixed(auto: Method, name: str, tokens: int) -> Method:
    assert isinstance(auto.decode, PlanDecoding), "auto decodes by plans"
    plans = strategy(name, tokens)
    decode = replace(auto.decode, plans=lambda *_: plans, costs=None)
    return replace(
        auto, name=name, plan=f"{name}({tokens})", lookahead_tokens=tokens, decode=decode
    )
