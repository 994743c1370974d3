"""What a pass computes: how many candidates it verifies and which real rows carry look-ahead.

A `Plan` says it, its `Layout` spells it out as positions and visibility, for decoding and for
training alike. The strategies below choose a plan for each pass.
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
    """The rows of one pass in order: the real rows, then group after group.

    Attributes:
        offset: position of each row relative to the root, `[Q]`.
        look_ahead: 0 for a real row, `j` for a row with the input embedding `LA_j`, `[Q]`.
        visible: row `q` sees row `k` of the same pass where `visible[q, k]`, `[Q, Q]` bool.
        real: number of real rows.
    """

    offset: Tensor
    look_ahead: Tensor
    visible: Tensor
    real: int


@dataclass(frozen=True)
class Plan:
    """One pass: the root, `candidates` draft tokens, and a look-ahead group on each real row.

    Attributes:
        candidates: number of draft tokens to verify, `M`.
        groups: length of the look-ahead group on each of the `1 + M` real rows.
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
        """Rows of the pass, real and look-ahead."""
        return 1 + self.candidates + sum(self.groups)

    def group(self, real_row: int) -> slice:
        """The rows of the group that hangs on `real_row`."""
        start = 1 + self.candidates + sum(self.groups[:real_row])
        return slice(start, start + self.groups[real_row])

    def layout(self) -> Layout:
        """Positions and visibility of METHOD's single step; see `Layout`."""
        return _remembered_layout(self)


def make_layout(plan: Plan) -> Layout:
    """`Plan.layout`, without being remembered."""
    real = 1 + plan.candidates
    lengths = torch.tensor(plan.groups)
    owner = torch.repeat_interleave(torch.arange(real), lengths)  # real row a look-ahead row is on
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    depth = torch.arange(len(owner)) - first + 1  # j of row (i, j)
    # A real row is its own owner at depth 0, so one rule covers both kinds: a row sees the real
    # rows up to its owner, and of its owner's group the rows up to its own depth.
    owners = torch.cat([torch.arange(real), owner])
    depths = torch.cat([torch.zeros(real, dtype=torch.long), depth])
    sees_real = (depths[None, :] == 0) & (owners[None, :] <= owners[:, None])
    same_group = (depths[None, :] > 0) & (owners[None, :] == owners[:, None])
    visible = sees_real | (same_group & (depths[None, :] <= depths[:, None]))
    return Layout(owners + depths, depths, visible, real)


_remembered_layout = lru_cache(maxsize=64)(make_layout)


Source = str
"""Name of a drafter: one of `SOURCES`, or that of another drafter that the decoder was given."""

SOURCES: tuple[Source, ...] = ("look-ahead", "head", "lookup")
"""Names of our own drafters: look-ahead rows, the draft head, prompt lookup."""


@dataclass(frozen=True)
class Chain:
    """Draft tokens for the positions behind the root.

    Attributes:
        tokens: their ids, at least one.
        source: the drafter that proposes them.
        evidence: of a copied one, how many tokens before it agree with the text's last ones.
        sureness: how sure a draft head was of each of its tokens, as probabilities; none of other
            sources, nor where plans may not depend on which tokens were drawn.
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
    """What the texts of a batch agreed on for a pass, which all of them pay for, used or not.

    Attributes:
        rows: that it has for each text.
        look_ahead: whether look-ahead rows may be among them.
    """

    rows: int
    look_ahead: bool = False


@dataclass(frozen=True)
class Limits:
    """What may still be of use to a text near its end.

    Attributes:
        room: tokens that may still be written.
        span: positions behind the root that the model's context has; None without a limit.
        shared: what was agreed on with the other texts of the batch; None for a text alone.
    """

    room: int
    span: int | None = None
    shared: Shared | None = None

    @property
    def candidates(self) -> int:
        """Most candidates to verify: the pass draws one token of its own."""
        most = max(0, self.room - 1)
        return most if self.span is None else min(most, max(0, self.span))

    def group(self, candidates: int) -> int:
        """Longest group to hang: the pass that verifies it draws one token of its own, too."""
        most = max(0, self.room - 2)
        return most if self.span is None else min(most, max(0, self.span - candidates))


@dataclass(frozen=True)
class Choice:
    """What a pass verifies and computes.

    Attributes:
        chain: where the plan's candidates come from, the first ones of it; None for none.
        plan: the pass.
    """

    chain: Chain | None
    plan: Plan

    def within(self, limits: Limits) -> Choice:
        """The same with what is of no use left out."""
        candidates = min(self.plan.candidates, limits.candidates)
        longest = limits.group(candidates)
        groups = tuple(min(rows, longest) for rows in self.plan.groups[: 1 + candidates])
        if groups == self.plan.groups:
            return self
        return Choice(self.chain if candidates else None, Plan(candidates, groups))

    @property
    def candidates(self) -> list[int]:
        """The draft tokens to verify."""
        return [] if self.chain is None else list(self.chain.tokens[: self.plan.candidates])


class Chooser(Protocol):
    """Chooses the passes of one text."""

    @property
    def passes(self) -> tuple[Shared, ...]:
        """Kinds of passes among which the texts of a batch agree; none where plans are fixed."""
        ...

    def resize(self, texts: int) -> None:
        """Hear that the batch has so many texts now."""
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
        """What such a pass would be worth to this text, in tokens."""
        ...

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        """The next pass, given the chains at hand: none, a drafted one, a copied one, or both."""
        ...

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        """Hear what the pass settled.

        Args:
            choice: the pass.
            settled: the candidates accepted and the token drawn behind them.
            confidences: the probability of the likeliest token for each; none in greedy text.
        """
        ...


Guessing = Literal["likeliest", "drawn", "knowing"]
"""How candidates come from the logits of look-ahead rows or of a draft head: their likeliest
tokens, draws from `q`, or what is most likely to be drawn, by who knows the noise of the draws."""


@runtime_checkable
class Adaptive(Protocol):
    """Plans that follow what a text accepts."""

    def begin(self, guessing: Guessing = "likeliest") -> Chooser:
        """A chooser for one text, whose candidates are made so."""
        ...


Strategy = Callable[[int, int], Plan]
"""Given the number of candidates at hand and the longest group allowed, the next pass."""


@dataclass(frozen=True)
class FixedChooser:
    """The passes of a strategy, whatever is accepted.

    Attributes:
        strategy: gives each pass.
        guesses: tokens that the draft head guesses before each pass.
    """

    strategy: Strategy
    guesses: int = 0
    passes: tuple[Shared, ...] = ()

    def resize(self, texts: int) -> None:
        """Nothing changes."""

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        """Return `guesses` for the draft head, 0 for prompt lookup, `most` for other drafters."""
        return min({"head": self.guesses, "lookup": 0}.get(source, most), most)

    def worth(self, chains: Sequence[Chain], shared: Shared) -> float:
        """Nothing to choose."""
        return 0.0

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        """See `Chooser`."""
        chain = chains[0] if chains else None
        candidates = 0 if chain is None else min(len(chain.tokens), limits.candidates)
        plan = self.strategy(candidates, limits.group(candidates))
        return Choice(chain if plan.candidates else None, plan)

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        """Nothing to learn."""


_FIXED = tuple(method for method in METHODS if method != "auto")


def autoregressive(candidates: int, longest_group: int) -> Plan:
    """Plain decoding: one real row, no group."""
    return Plan(0, (0,))


@dataclass(frozen=True)
class TwoPass:
    """The paper's PaSS: a drafting pass, then a validating pass of `look_ahead` candidates."""

    look_ahead: int

    def __call__(self, candidates: int, longest_group: int) -> Plan:
        """See `Strategy`."""
        if candidates:
            return verifying(candidates)
        return Plan(0, (min(self.look_ahead, longest_group),))


@dataclass(frozen=True)
class OnePass:
    """Every pass verifies the candidates at hand and drafts `look_ahead` new ones."""

    look_ahead: int

    def __call__(self, candidates: int, longest_group: int) -> Plan:
        """See `Strategy`."""
        return Plan(candidates, (min(self.look_ahead, longest_group),) * (1 + candidates))


@dataclass(frozen=True)
class ByHead:
    """Every pass verifies what the draft head guessed: so many tokens."""

    guesses: int

    def begin(self, guessing: Guessing = "likeliest") -> Chooser:
        """See `Adaptive`."""
        return FixedChooser(verifying, self.guesses)


def verifying(candidates: int, longest_group: int = 0) -> Plan:
    """The candidates at hand, and no groups."""
    return Plan(candidates, (0,) * (1 + candidates))


def strategy(method: str, look_ahead: int) -> Strategy:
    """The strategy that a method's name stands for; `auto` has none, see `costs.Costs.auto`.

    Raises:
        InputError: an unknown method, or a drafting one without look-ahead tokens.
    """
    if method not in _FIXED:
        raise InputError(f"method is {method!r}: it must be one of {', '.join(_FIXED)}")
    if method == "ar":
        return autoregressive
    if look_ahead < 1:
        raise InputError(f"method {method} needs 1 or more look-ahead tokens, not {look_ahead}")
    return TwoPass(look_ahead) if method == "two-pass" else OnePass(look_ahead)
