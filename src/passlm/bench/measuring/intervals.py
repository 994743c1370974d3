"""How far a figure of some prompts may be from that of all such prompts: bootstrap intervals.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), the percentile interval, which is
too narrow for few observations; Hesterberg, "What Teachers Should Know about the Bootstrap" (The
American Statistician 69, 2015) expands it until it is as wide as Student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 10_000
COVERAGE = 0.95

Array = np.ndarray[Any, Any]


def interval(count: int, figure: Callable[[Array], Array], seed: int) -> tuple[float, float] | None:
    """Where a figure lies with 95 % confidence.

    Args:
        count: observations.
        figure: that of each set of observations, given their numbers `[sets, count]`.
        seed: of the draws with replacement.

    Returns:
        Low and high end; None with fewer than two observations, which say nothing of the spread.
    """
    if count < 2:
        return None
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    tail = expanded_tail(count)
    low, high = np.quantile(figure(drawn), [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(count: int) -> float:
    """What is left out at each end of the resampled figures: Hesterberg's expanded percentile.

    A mean's spread over the resamples is smaller than its standard error by the square root of
    `(n - 1) / n`, and a normal quantile smaller than Student's with `n - 1` degrees of freedom.
    """
    wide = student_quantile(1 - (1 - COVERAGE) / 2, count - 1) * math.sqrt(count / (count - 1))
    return NormalDist().cdf(-wide)


def student_quantile(level: float, freedom: int) -> float:
    """Student's t, by Abramowitz and Stegun (1964), 26.7.5: within 1 % from 2 degrees on."""
    z = NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
