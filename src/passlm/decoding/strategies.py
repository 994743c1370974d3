"""Strategies: which plan each pass of a sequence takes.

A fixed strategy gives the plan from the number of candidates alone; an adaptive one has a chooser
for each sequence that learns from what is accepted. Adaptive planning from measured costs is left
to `planning/auto.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from passlm.errors import InputError
from passlm.params import METHODS
from passlm.plan import Chain, Guessing, Plan, Source


@dataclass(frozen=True)
class PassSize:
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
    shared: PassSize | None = None

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
    def drafts(self) -> bool:
        """Whether candidates are of any use; plain decoding needs none."""
        ...

    @property
    def passes(self) -> tuple[PassSize, ...]:
        """Kinds of passes that the sequences of a batch choose from; empty if plans are fixed."""
        ...

    def resize(self, batch_size: int) -> None:
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

    def value_of(self, chains: Sequence[Chain], shared: PassSize) -> float:
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
        passes: see `Chooser`.
    """

    strategy: Strategy
    guesses: int = 0
    passes: tuple[PassSize, ...] = ()

    @property
    def drafts(self) -> bool:
        """Whether the strategy is another one than plain decoding."""
        return self.strategy is not autoregressive

    def resize(self, batch_size: int) -> None:
        """Do nothing: a fixed plan does not depend on the batch size."""

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        """Return `guesses` for the draft head, 0 for prompt lookup, `most` for other drafters."""
        return min({"head": self.guesses, "lookup": 0}.get(source, most), most)

    def value_of(self, chains: Sequence[Chain], shared: PassSize) -> float:
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
