"""Cost of a pass by its number of rows, and the throughput of fixed methods that follows from it.

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
    """Seconds of one pass, including judging and drafting, for one batch size on one machine.

    Candidates are the likeliest tokens, unless stated otherwise.

    Attributes:
        rows: numbers of real rows of the measured passes, in rising order from 1.
        seconds: seconds of each of these passes, without look-ahead rows.
        groups: lengths of the look-ahead groups, measured on the root alone; empty without
            look-ahead files.
        group_seconds: extra seconds of each of these over a pass with the same number of real rows
            only.
        row_seconds: extra seconds of each look-ahead row in a group that is not used, over a real
            row.
        head_seconds: seconds of a draft head for 1, 2, ... tokens; empty without one.
        draw_seconds: extra seconds for one more candidate of each sequence if candidates are drawn.
        know_seconds: the same if they are guessed with the sampling noise.

    Raises:
        ValueError: two fields that belong together differ in length, `rows` or `groups` are not in
            rising order, or there are no `rows`.
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
                "a cost curve needs one time for each number of rows, and these in rising order"
            )

    def for_guessing(self, guessing: Guessing) -> CostCurve:
        """Return the curve with the costs of a way of guessing candidates."""
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
            drafted: number of rows of the group that the next candidates come from.
        """
        seconds = _interpolated(self.rows, self.seconds, real + look_ahead)
        if look_ahead:
            seconds += _interpolated(self.groups, self.group_seconds, drafted)
            seconds += self.row_seconds * max(0, look_ahead - drafted)
        return seconds

    def head(self, tokens: int) -> float:
        """Return the seconds that a draft head takes for a number of tokens."""
        return self.head_seconds[tokens - 1] if tokens else 0.0

    def plain(self) -> float:
        """Return the tokens per second of plain decoding."""
        return 1 / self.of(1)

    def two_pass(self, expected: float, rows: int) -> float:
        """Return the tokens per second of two-pass decoding, `(2 + E(L)) / (c(draft) + c(1 + L))`.

        Args:
            expected: expected accepted length, `E`.
            rows: length of the look-ahead group, `L`.
        """
        return (2 + expected) / (self.of(1, rows, rows) + self.of(1 + rows))

    def one_pass(self, expected: float, rows: int) -> float:
        """Return the tokens per second of one-pass decoding, `(1 + E(M)) / c((1 + M)(1 + L))`.

        Args:
            expected: expected accepted length, `E`.
            rows: number of candidates and length of each group, `M = L`.
        """
        return (1 + expected) / self.of(1 + rows, (1 + rows) * rows, rows)

    def by_head(self, expected: float, tokens: int) -> float:
        """Return the tokens per second with a draft head, `(1 + E(k)) / (h(k) + c(1 + k))`.

        Args:
            expected: expected accepted length, `E`.
            tokens: number of tokens that the head proposes, `k`; it takes `h(k)` seconds.
        """
        return (1 + expected) / (self.head(tokens) + self.of(1 + tokens))


def _interpolated(known: Sequence[int], values: Sequence[float], wanted: int) -> float:
    """Interpolate linearly between measured points; extrapolate above from the last two."""
    if len(known) == 1:
        return values[0]
    at = min(max(bisect_right(known, wanted), 1), len(known) - 1)
    left, right = known[at - 1], known[at]
    share = max(0.0, (wanted - left) / (right - left))
    return values[at - 1] + share * (values[at] - values[at - 1])
