"""Plans: what one forward pass computes.

A `Plan` states how many candidates a pass verifies and how many look-ahead rows each real row
carries. Its `Layout` gives the positions and visibility of these rows, for decoding and for
training. Choosing the plan of a pass is left to `decoding/strategies.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows of one pass in order: the real rows, then the look-ahead groups.

    Attributes:
        offset: position of each row relative to the root, `[Q]`.
        look_ahead: 0 for a real row, `j` for a row with the input embedding `LA_j`, `[Q]`.
        visible: True where row `q` sees row `k` of the same pass, `[Q, Q]` bool.
        real: number of real rows.
    """

    offset: Tensor
    look_ahead: Tensor
    visible: Tensor
    real: int


@dataclass(frozen=True)
class Plan:
    """Plan of one pass: the root, the draft tokens to verify, and the look-ahead groups.

    Attributes:
        candidates: number of draft tokens to verify, `M`.
        groups: length of the look-ahead group on each of the `1 + M` real rows.

    Raises:
        ValueError: a number is negative, or `groups` does not have `1 + M` entries.
    """

    candidates: int
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.candidates < 0 or len(self.groups) != 1 + self.candidates or min(self.groups) < 0:
            raise ValueError(
                f"plan of {self.candidates} candidates and groups {self.groups}: "
                "expected one group length, 0 or more, for the root and each candidate"
            )

    @property
    def rows(self) -> int:
        """Total number of rows, real and look-ahead."""
        return 1 + self.candidates + sum(self.groups)

    def group(self, real_row: int) -> slice:
        """Return the rows of the look-ahead group on `real_row`."""
        start = 1 + self.candidates + sum(self.groups[:real_row])
        return slice(start, start + self.groups[real_row])

    def layout(self) -> Layout:
        """Return the positions and visibility of the rows; see `Layout`. The result is cached."""
        return _cached_layout(self)


def make_layout(plan: Plan) -> Layout:
    """Return the layout of a plan, without caching it."""
    real = 1 + plan.candidates
    lengths = torch.tensor(plan.groups)
    owner = torch.repeat_interleave(torch.arange(real), lengths)  # real row of each look-ahead row
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    depth = torch.arange(len(owner)) - first + 1  # j of row (i, j)
    # A real row counts as its own owner at depth 0, so one rule covers both kinds of rows: a row
    # sees the real rows up to its owner, and the rows of its owner's group up to its own depth.
    owners = torch.cat([torch.arange(real), owner])
    depths = torch.cat([torch.zeros(real, dtype=torch.long), depth])
    sees_real = (depths[None, :] == 0) & (owners[None, :] <= owners[:, None])
    same_group = (depths[None, :] > 0) & (owners[None, :] == owners[:, None])
    visible = sees_real | (same_group & (depths[None, :] <= depths[:, None]))
    return Layout(owners + depths, depths, visible, real)


_cached_layout = lru_cache(maxsize=64)(make_layout)


Source = str
"""Name of a drafter: one of `SOURCES`, or that of another drafter that the decoder was given."""

SOURCES: tuple[Source, ...] = ("look-ahead", "head", "lookup")
"""Names of our own drafters: look-ahead rows, the draft head, prompt lookup."""


@dataclass(frozen=True)
class Chain:
    """Draft tokens for the positions after the root.

    Attributes:
        tokens: their ids, at least one.
        source: the drafter that proposes them.
        evidence: for copied tokens, the number of tokens before the copied ones that match the end
            of the sequence.
        sureness: for tokens of a draft head, the estimated probability that each one is right.
            Empty for other sources, and where plans must not depend on the tokens that were drawn.
        q: the distributions the tokens were drawn from, `[M, V]`, for the rejection judge; None
            where they are one-hot.
    """

    tokens: tuple[int, ...]
    source: Source = "look-ahead"
    evidence: int = 0
    sureness: tuple[float, ...] = ()
    q: Tensor | None = field(default=None, repr=False, compare=False)


Guessing = Literal["likeliest", "drawn", "knowing"]
"""Method of choosing candidates from the logits of look-ahead rows or of a draft head.

`likeliest` takes the most likely tokens. `drawn` samples from `q`. `knowing` takes the token that
is most likely to be sampled, given the predetermined noise of the draw.
"""
