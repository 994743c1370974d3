"""The cost of a pass by its number of rows, and the throughput that the method's formulas predict.

Measuring a curve is left to `measure.py`, choosing plans by it to `auto.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from passlm.plan import Guessing

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # batch sizes that costs are measured for


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one pass, with judging and drafting, on one machine.

    Attributes:
        rows: numbers of real rows of the measured passes, from 1 up.
        seconds: seconds of each, without look-ahead rows.
        groups: lengths of the look-ahead groups measured on a single root; empty without files.
        group_seconds: extra seconds of each over a pass of as many real rows.
        row_seconds: extra seconds of one more look-ahead row over a real one, where several groups
            are computed and one is used.
        head_seconds: seconds of a draft head for 1, 2, ... tokens; empty without one.
        draw_seconds: extra seconds of a candidate of each sequence if it is drawn; the other times
            are those of likeliest tokens.
        know_seconds: extra seconds of a candidate that is guessed with the sampling noise.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    groups: tuple[int, ...] = ()
    group_seconds: tuple[float, ...] = ()
    row_seconds: float = 0.0
    head_seconds: tuple[float, ...] = ()
    draw_seconds: float = 0.0
    know_seconds: float = 0.0

    def __post_init__(self) -> None:
        pairs = (self.rows, self.seconds), (self.groups, self.group_seconds)
        if any(len(x) != len(y) or list(x) != sorted(set(x)) for x, y in pairs) or not self.rows:
            raise ValueError(
                "a cost curve needs as many times as rows, and the rows in rising order"
            )

    def drawing(self, guessing: Guessing) -> CostCurve:
        """Return the costs for a way of guessing candidates."""
        kinds = {"likeliest": 0.0, "drawn": self.draw_seconds, "knowing": self.know_seconds}
        more = kinds[guessing]
        groups = tuple(s + more * n for n, s in zip(self.groups, self.group_seconds, strict=True))
        head = tuple(s + more * n for n, s in enumerate(self.head_seconds, start=1))
        return replace(self, group_seconds=groups, head_seconds=head)

    def of(self, real: int, look_ahead: int = 0, drafted: int = 0) -> float:
        """Return the seconds of a pass.

        Args:
            real: number of real rows.
            look_ahead: number of look-ahead rows in all groups.
            drafted: number of rows of the group that is used.
        """
        seconds = _between(self.rows, self.seconds, real + look_ahead)
        if look_ahead:
            seconds += _between(self.groups, self.group_seconds, drafted)
            seconds += self.row_seconds * max(0, look_ahead - drafted)
        return seconds

    def head(self, tokens: int) -> float:
        """Return the seconds that a draft head takes for a number of tokens."""
        return self.head_seconds[tokens - 1] if tokens else 0.0

    def plain(self) -> float:
        """Return the tokens per second of plain decoding."""
        return 1 / self.of(1)

    def two_pass(self, expected: float, rows: int) -> float:
        """Return the tokens per second of two-pass decoding.

        `(2 + E(L)) / (c(drafting) + c(1 + L))` for `L` rows and an expected accepted length `E`.
        """
        return (2 + expected) / (self.of(1, rows, rows) + self.of(1 + rows))

    def one_pass(self, expected: float, rows: int) -> float:
        """Return the tokens per second of one-pass decoding.

        `(1 + E(M)) / c((1 + M)(1 + L))` with `M = L` rows.
        """
        return (1 + expected) / self.of(1 + rows, (1 + rows) * rows, rows)

    def by_head(self, expected: float, tokens: int) -> float:
        """Return the tokens per second with a draft head, `(1 + E(k)) / (h(k) + c(1 + k))`."""
        return (1 + expected) / (self.head(tokens) + self.of(1 + tokens))


def _between(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """Interpolate linearly, and extrapolate from the last two measured places."""
    if len(places) == 1:
        return values[0]
    at = min(max(bisect_right(places, place), 1), len(places) - 1)
    left, right = places[at - 1], places[at]
    share = max(0.0, (place - left) / (right - left))
    return values[at - 1] + share * (values[at] - values[at - 1])
