"""Plans: what one forward pass computes.

A `Plan` states how many candidates a pass verifies and how many look-ahead rows each real row
carries. Its `Layout` gives the positions and visibility of these rows, for decoding and for
training. A `Chooser` chooses the plan of each pass. This module defines the protocol and the fixed
strategies; choosing plans by cost is left to `planning/auto.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from passlm.errors import InputError
from passlm.params import METHODS


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


@dataclass(frozen=True)
class Shared:
    """Size of a pass that all sequences of a batch agreed on.

    Every sequence pays for this size, whether it uses all rows or not.

    Attributes:
        rows: number of rows per sequence.
        look_ahead: whether the pass may contain look-ahead rows.
    """

    rows: int
    look_ahead: bool = False


@dataclass(frozen=True)
class Limits:
    """Limits on the next pass of a sequence near its end.

    Attributes:
        room: number of tokens that may still be generated.
        span: number of positions after the root within the model's context; None if unlimited.
        shared: pass that the sequences of the batch agreed on; None for a sequence that decodes
            alone.
    """

    room: int
    span: int | None = None
    shared: Shared | None = None

    @property
    def candidates(self) -> int:
        """Largest useful number of candidates.

        It is less than `room`, because a pass also draws a token of its own.
        """
        most = max(0, self.room - 1)
        return most if self.span is None else min(most, max(0, self.span))

    def group(self, candidates: int) -> int:
        """Return the largest useful length of a look-ahead group.

        It is one less than what remains after this pass, because the pass that verifies the group's
        candidates also draws a token of its own.
        """
        most = max(0, self.room - 2)
        return most if self.span is None else min(most, max(0, self.span - candidates))


@dataclass(frozen=True)
class Choice:
    """Plan chosen for a pass, with its candidates.

    Attributes:
        chain: draft tokens, of which the plan verifies the first ones; None without candidates.
        plan: plan of the pass.
    """

    chain: Chain | None
    plan: Plan

    def within(self, limits: Limits) -> Choice:
        """Return the choice reduced to what is useful within `limits`."""
        candidates = min(self.plan.candidates, limits.candidates)
        longest = limits.group(candidates)
        groups = tuple(min(rows, longest) for rows in self.plan.groups[: 1 + candidates])
        if groups == self.plan.groups:
            return self
        return Choice(self.chain if candidates else None, Plan(candidates, groups))

    @property
    def candidates(self) -> list[int]:
        """Draft tokens to verify."""
        return [] if self.chain is None else list(self.chain.tokens[: self.plan.candidates])


class Chooser(Protocol):
    """Chooses the plan of each pass of one sequence."""

    @property
    def passes(self) -> tuple[Shared, ...]:
        """Kinds of passes that the sequences of a batch choose from; empty if plans are fixed."""
        ...

    def resize(self, texts: int) -> None:
        """Update the batch size."""
        ...

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        """Return the number of tokens a drafter should propose for the next pass (0: none).

        Args:
            source: the drafter.
            chains: what other drafters have proposed.
            most: candidates that the next pass can verify.
        """
        ...

    def worth(self, chains: Sequence[Chain], shared: Shared) -> float:
        """Return the value of such a pass to this sequence, in tokens."""
        ...

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        """Return the next pass, given the available chains.

        Args:
            chains: none, a drafted chain, a copied chain or both.
            limits: limits on the pass.
        """
        ...

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        """Update the estimates with the result of a pass.

        Args:
            choice: the pass.
            settled: the accepted candidates and the token drawn after them.
            confidences: probability of the most likely token at each position; empty for greedy
                decoding.
        """
        ...


Guessing = Literal["likeliest", "drawn", "knowing"]
"""Method of choosing candidates from the logits of look-ahead rows or of a draft head.

`likeliest` takes the most likely tokens. `drawn` samples from `q`. `knowing` takes the token that
is most likely to be sampled, given the predetermined noise of the draw.
"""


@runtime_checkable
class Adaptive(Protocol):
    """Strategy that makes a chooser for each sequence.

    The chooser can, for example, adapt its plans to what the sequence accepts.
    """

    def begin(self, guessing: Guessing = "likeliest") -> Chooser:
        """Return a chooser for one sequence, whose candidates are chosen as `guessing` says."""
        ...


Strategy = Callable[[int, int], Plan]
"""Function that returns the next plan, given the number of available candidates and the longest
look-ahead group allowed."""


@dataclass(frozen=True)
class FixedChooser:
    """Chooser that applies a fixed strategy, whatever is accepted.

    Attributes:
        strategy: returns the plan of each pass.
        guesses: number of tokens that the draft head proposes before each pass.
        lookup: see `Chooser`.
        passes: see `Chooser`.
    """

    strategy: Strategy
    guesses: int = 0
    passes: tuple[Shared, ...] = ()

    def resize(self, texts: int) -> None:
        """Do nothing: a fixed plan does not depend on the batch size."""

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        """Return `guesses` for the draft head, 0 for prompt lookup, `most` for other drafters."""
        return min({"head": self.guesses, "lookup": 0}.get(source, most), most)

    def worth(self, chains: Sequence[Chain], shared: Shared) -> float:
        """Return 0: there is nothing to choose from."""
        return 0.0

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        """Return the plan of the strategy for the first chain; see `Chooser`."""
        chain = chains[0] if chains else None
        candidates = 0 if chain is None else min(len(chain.tokens), limits.candidates)
        plan = self.strategy(candidates, limits.group(candidates))
        return Choice(chain if plan.candidates else None, plan)

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        """Do nothing: a fixed plan does not depend on what is accepted."""


_FIXED = tuple(method for method in METHODS if method != "auto")


def autoregressive(candidates: int, longest_group: int) -> Plan:
    """Return the plan of plain decoding: one real row and no look-ahead rows."""
    return Plan(0, (0,))


@dataclass(frozen=True)
class TwoPass:
    """Strategy of the PaSS paper: a drafting pass, then a pass that verifies the candidates.

    Attributes:
        look_ahead: number of look-ahead rows of the drafting pass, `L`.
    """

    look_ahead: int

    def __call__(self, candidates: int, longest_group: int) -> Plan:
        """Return the next plan; see `Strategy`."""
        if candidates:
            return verifying(candidates)
        return Plan(0, (min(self.look_ahead, longest_group),))


@dataclass(frozen=True)
class OnePass:
    """Strategy in which every pass verifies the available candidates and drafts new ones.

    Attributes:
        look_ahead: number of look-ahead rows on each real row, `L`.
    """

    look_ahead: int

    def __call__(self, candidates: int, longest_group: int) -> Plan:
        """Return the next plan; see `Strategy`."""
        return Plan(candidates, (min(self.look_ahead, longest_group),) * (1 + candidates))


@dataclass(frozen=True)
class ByHead:
    """Strategy in which every pass verifies the `guesses` tokens that the draft head proposed."""

    guesses: int

    def begin(self, guessing: Guessing = "likeliest") -> Chooser:
        """Return a chooser with a fixed plan; see `Adaptive`."""
        return FixedChooser(verifying, self.guesses)


def verifying(candidates: int, longest_group: int = 0) -> Plan:
    """Return a plan that verifies the available candidates without look-ahead groups."""
    return Plan(candidates, (0,) * (1 + candidates))


def strategy(method: str, look_ahead: int) -> Strategy:
    """Return the strategy for the name of a method.

    `auto` has no fixed strategy; see `planning.kept_costs.Costs.auto`.

    Raises:
        InputError: the method is unknown, or it drafts and `look_ahead` is below 1.
    """
    if method not in _FIXED:
        raise InputError(f"method is {method!r}: it must be one of {', '.join(_FIXED)}")
    if method == "ar":
        return autoregressive
    if look_ahead < 1:
        raise InputError(f"method {method} needs 1 or more look-ahead tokens, not {look_ahead}")
    return TwoPass(look_ahead) if method == "two-pass" else OnePass(look_ahead)
