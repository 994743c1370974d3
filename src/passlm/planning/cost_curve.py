"""What passes of so many rows cost, and the speed that METHOD's formulas predict from it.

Measuring a curve is left to `kept_costs.py`, choosing plans by it to `auto.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from passlm.plan import Guessing

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # texts at a time that costs are measured for


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one pass, judging and drafting included, on one machine.

    Attributes:
        rows: rows of the passes measured, from 1 up.
        seconds: what each took, without look-ahead rows.
        groups: lengths of the look-ahead groups measured on a lone root; none without files.
        group_seconds: what each took more than a pass of as many real rows.
        row_seconds: what one more look-ahead row takes more than a real one, where several groups
            are computed and one is drafted from.
        head_seconds: what a draft head takes for 1, 2, ... tokens; none without one.
        draw_seconds: what a candidate of each text takes more if it is drawn, and not the likeliest
            token, which the other times are of;
        know_seconds: and if it is made knowing the noise of the draws.
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
            raise ValueError("a cost curve needs as many times as rows, and these in order")

    def drawing(self, guessing: Guessing) -> CostCurve:
        """The costs where candidates are made so."""
        kinds = {"likeliest": 0.0, "drawn": self.draw_seconds, "knowing": self.know_seconds}
        more = kinds[guessing]
        groups = tuple(s + more * n for n, s in zip(self.groups, self.group_seconds, strict=True))
        head = tuple(s + more * n for n, s in enumerate(self.head_seconds, start=1))
        return replace(self, group_seconds=groups, head_seconds=head)

    def of(self, real: int, look_ahead: int = 0, drafted: int = 0) -> float:
        """Seconds of a pass.

        Args:
            real: real rows.
            look_ahead: look-ahead rows, of all groups.
            drafted: rows of the group that is drafted from.
        """
        seconds = _between(self.rows, self.seconds, real + look_ahead)
        if look_ahead:
            seconds += _between(self.groups, self.group_seconds, drafted)
            seconds += self.row_seconds * max(0, look_ahead - drafted)
        return seconds

    def head(self, tokens: int) -> float:
        """Seconds that a draft head takes for so many tokens."""
        return self.head_seconds[tokens - 1] if tokens else 0.0

    def plain(self) -> float:
        """Tokens a second of plain decoding."""
        return 1 / self.of(1)

    def two_pass(self, expected: float, rows: int) -> float:
        """Tokens a second of two-pass decoding, `(2 + E(L)) / (c(drafting) + c(1 + L))`."""
        return (2 + expected) / (self.of(1, rows, rows) + self.of(1 + rows))

    def one_pass(self, expected: float, rows: int) -> float:
        """Tokens a second of one-pass decoding, `(1 + E(M)) / c((1 + M)(1 + L))`, `M = L`."""
        return (1 + expected) / self.of(1 + rows, (1 + rows) * rows, rows)

    def by_head(self, expected: float, tokens: int) -> float:
        """Tokens a second with a draft head, `(1 + E(k)) / (h(k) + c(1 + k))` of `k` guesses."""
        return (1 + expected) / (self.head(tokens) + self.of(1 + tokens))


def _between(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """Linear between what was measured, and on beyond the last two."""
    if len(places) == 1:
        return values[0]
    at = min(max(bisect_right(places, place), 1), len(places) - 1)
    left, right = places[at - 1], places[at]
    share = max(0.0, (place - left) / (right - left))
    return values[at - 1] + share * (values[at] - values[at - 1])
