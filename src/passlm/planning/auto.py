"""Adaptive planning: choose the plan with the highest throughput before every pass.

`cost_curve.CostCurve` gives the cost of a pass on this machine, `acceptance.Observed` the
acceptance rates of the sequence. Plain decoding is one of the choices. Measuring the curve is left
to `measure.py`.

Nothing here reads a clock. Choices depend only on a stored curve, on the candidates that the
sequence accepted and on the target's confidence, so a seed repeats the text under either judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import get_args

from passlm.decoding.strategies import Choice, Limits, PassSize
from passlm.plan import Chain, Guessing, Plan, Source
from passlm.planning.acceptance import NO_CHAIN, Key, Observed, expected_length, kind_of, levels
from passlm.planning.cost_curve import CostCurve

LONGEST_LOOKUP = 12  # most candidates of a lookup chain
# Plans are updated from the counts after this many passes, times the batch size up to a limit,
# since the whole batch waits for an update. In batches, only every second update also values groups
# again, which takes the longest. The first passes change the counts the most, so there are a few
# early updates.
_UPDATE_PASSES = 8
_MAX_UPDATE_FACTOR = 4
_UPDATES_PER_GROUP_UPDATE = 2
_EARLY_UPDATES = (2, 3, 5)
_FIRST_ROUNDS = 3  # of valuing groups by plans and plans by groups, before the first pass
_MEMORY = 0.97  # decay per pass of the rate and of the counts of lookup evidence
_LONG_MEMORY = 0.998  # decay of draft-head gains to their prior, so that the head is tried again
_GAIN_MEMORY = 0.9  # decay of the mean gain of draft-head proposals when more are made
_PRIOR_GAINS = 2.0  # weight of the first estimate of that gain, in proposals
# Factor on the cost of passes of several rows: the best of many estimates is on average too good.
_CAUTION = 1.03
_PRIOR_PASSES = 4.0  # weight of the first estimate of the rate, in passes


@dataclass(frozen=True)
class AutoPlan:
    """Settings of adaptive planning, shared by the choosers of all sequences.

    Attributes:
        curve: cost of a pass at the current batch size.
        prior: probability that each look-ahead candidate is accepted if those before it are, from
            the look-ahead files' card. Empty where no look-ahead rows may be used.
        lookup: whether candidates copied from the sequence are used.
        curves: function that returns the cost curve of a batch size, None where it is not known;
            without a function, `curve` is used for all batch sizes.
        head: probability that each token of the draft head is accepted if those before it are.
            Empty where no draft head may be used.
        sizes: cache of `resized`, by cost curve; shared by the settings of all batch sizes.

    Raises:
        ValueError: there is a `prior`, but the curve has no costs of look-ahead groups.
    """

    curve: CostCurve
    prior: tuple[float, ...] = ()
    lookup: bool = True
    curves: Callable[[int], CostCurve | None] | None = field(
        default=None, repr=False, compare=False
    )
    head: tuple[float, ...] = ()
    sizes: dict[CostCurve, AutoPlan] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prior and not self.curve.groups:
            raise ValueError(
                "look-ahead rows need a cost curve with the costs of groups: this one was measured "
                "without look-ahead files"
            )

    @cached_property
    def cost(self) -> Callable[[int, int, int, PassSize | None], float]:
        """Function `cost(real, look_ahead, drafted, shared)` that returns the seconds of a pass.

        Its results are cached. They are infinite for a pass that does not fit into the one that
        the batch agreed on. The first three arguments are those of `CostCurve.of`.
        """
        return lru_cache(maxsize=4096)(self._cost)

    def _cost(self, real: int, look_ahead: int, drafted: int, shared: PassSize | None) -> float:
        seconds = self._seconds(real, look_ahead, drafted, shared)
        rows = real + look_ahead if shared is None else shared.rows
        return seconds if rows == 1 else seconds * _CAUTION

    def _seconds(self, real: int, look_ahead: int, drafted: int, shared: PassSize | None) -> float:
        if shared is None:
            return self.curve.of(real, look_ahead, drafted)
        if real + look_ahead > shared.rows or (look_ahead and not shared.look_ahead):
            return math.inf
        if look_ahead:
            return self.curve.of(shared.rows - look_ahead, look_ahead, drafted)
        return self.curve.of(shared.rows) + (self._least_group if shared.look_ahead else 0.0)

    @property
    def _least_group(self) -> float:
        """Seconds that a pass's look-ahead rows cost the sequences that have none in it."""
        return min(self.curve.group_seconds, default=0.0)

    @property
    def passes(self) -> tuple[PassSize, ...]:
        """Sizes of passes that a batch can agree on, with and without look-ahead rows.

        The numbers of rows are those that were measured.
        """
        kinds = (False, True) if self.prior else (False,)
        rows = self.curve.rows
        return tuple(PassSize(n, kind) for kind in kinds for n in rows if n > 1 or not kind)

    @property
    def head_depths(self) -> int:
        """Number of tokens that the draft head may propose: those whose cost was measured."""
        return min(len(self.head), len(self.curve.head_seconds))

    def resized(self, batch_size: int) -> AutoPlan:
        """Return the settings for a batch size, or these where its costs are not known."""
        curve = None if self.curves is None else self.curves(batch_size)
        if curve is None or curve == self.curve:
            return self
        if curve not in self.sizes:
            self.sizes.update({self.curve: self, curve: replace(self, curve=curve)})
        return self.sizes[curve]

    @cached_property
    def first_values(self) -> tuple[list[float], list[float]]:
        """Gains of draft-head proposals and values of groups, in tokens, from the priors alone."""
        chooser = AutoChooser(self, values=([], [0.0] * (1 + len(self.prior))))
        for _ in range(_FIRST_ROUNDS):
            chooser.update_first_values()
        return chooser.values

    @property
    def first_rate(self) -> float:
        """Tokens per second of the best fixed method, by the prior."""
        rates = [self.curve.plain()]
        for rows in range(1, 1 + len(self.prior)):
            expected = expected_length(self.prior[:rows])
            rates += [self.curve.two_pass(expected, rows), self.curve.one_pass(expected, rows)]
        for tokens in range(1, 1 + self.head_depths):
            rates.append(self.curve.by_head(expected_length(self.head[:tokens]), tokens))
        return max(rates)

    def begin(self, guessing: Guessing = "likeliest") -> AutoChooser:
        """Return a chooser for one sequence, whose candidates are chosen as `guessing` says."""
        return AutoChooser(self._by_guessing[guessing], known=guessing == "knowing")

    @cached_property
    def _by_guessing(self) -> dict[Guessing, AutoPlan]:
        return {guessing: self._for_guessing(guessing) for guessing in get_args(Guessing)}

    def _for_guessing(self, guessing: Guessing) -> AutoPlan:
        """Return the settings with the costs of a way of guessing, which may be higher."""
        curve, curves = self.curve.for_guessing(guessing), self.curves
        if curve == self.curve:
            return self

        def curves_for_guessing(batch_size: int) -> CostCurve | None:
            known = None if curves is None else curves(batch_size)
            return None if known is None else known.for_guessing(guessing)

        return replace(self, curve=curve, curves=curves and curves_for_guessing, sizes={})


class AutoChooser:
    """Chooses the plans of one sequence from the candidates it has accepted so far.

    The value of a pass, in tokens, is its expected number of tokens, plus the value of its groups
    for the next pass, minus its seconds times the current rate of tokens. This is the
    average-reward form of maximizing `tokens / seconds` (Howard, "Dynamic Programming and Markov
    Processes", 1960).

    The gain of a draft-head proposal is the difference it makes to the value of the best pass.

    Args:
        settings: costs, priors and the allowed sources of candidates.
        values: gains of draft-head proposals and values of groups, by their lengths; None for
            the first values of `settings`.
        known: whether the draft head knows the sampling noise.
    """

    def __init__(
        self,
        settings: AutoPlan,
        values: tuple[list[float], list[float]] | None = None,
        known: bool = False,
    ) -> None:
        gains, group_values = settings.first_values if values is None else values
        self._settings = settings
        self._observed = Observed(settings.prior, settings.head, known)
        self._gains = list(gains)  # of 1, 2, ... draft-head tokens, in tokens
        self._proposals = [0] * len(gains)  # number of proposals averaged in each gain
        self._first_gains = list(gains)  # gains before any proposal, for greedy decoding
        # How often lookup chains of each evidence were proposed, decaying; 0 for no chain.
        self._evidence: dict[int, float] = {0: 1.0}
        # Decaying sums over the last passes.
        self._seconds = _PRIOR_PASSES * settings.curve.of(1)
        self._tokens = settings.first_rate * self._seconds
        self._group_values = list(group_values)  # by number of rows, in tokens
        self._group_values_by_curve: dict[CostCurve, list[float]] = {}  # at other batch sizes
        self._best_plans: dict[tuple[Key, PassSize | None], tuple[float, Plan]] = {}
        self._passes = 0
        self._proposed: Sequence[Chain] = ()
        self._head_tokens = 0  # proposed by the draft head for the next pass
        self._batch_size = 1
        self._agreed: PassSize | None = None  # what the batch agreed on for the last pass

    @property
    def values(self) -> tuple[list[float], list[float]]:
        """Gains of draft-head proposals and values of groups, in tokens."""
        return list(self._gains), list(self._group_values)

    def update_first_values(self) -> None:
        """Compute the values of draft-head proposals and of groups from the priors.

        Each depends on the other, so that several calls are needed.
        """
        head = self._settings.head[: self._settings.head_depths]
        alone = self._search(())[0]
        gains = [self._search(head[:count])[0] - alone for count in range(1, 1 + len(head))]
        self._gains, self._first_gains = gains, list(gains)
        self._proposals = [0] * len(gains)
        self._update_values()

    def resize(self, batch_size: int) -> None:
        """Continue with the costs of another batch size; counts are kept.

        Batches change often, and valuing groups takes long. Until the next update, groups keep the
        values they had when the batch last had this size.
        """
        self._batch_size = batch_size
        settings = self._settings.resized(batch_size)
        if settings is not self._settings:
            self._group_values_by_curve[self._settings.curve] = self._group_values
            self._seconds *= settings.curve.of(1) / self._settings.curve.of(1)
            self._settings = settings
            expected, first = settings.first_values
            gains = zip(self._gains, expected, self._first_gains, strict=False)
            factor = self._observed.head_confidence
            self._gains = [gain + factor * (new - old) for gain, new, old in gains]
            self._first_gains = expected[: len(self._gains)]
            known = self._group_values_by_curve.get(settings.curve)
            self._group_values = list(first) if known is None else known
            self._best_plans.clear()
            if known is None and self._passes:
                self._update_values()

    drafts = True

    @property
    def passes(self) -> tuple[PassSize, ...]:
        """See `strategies.Chooser`."""
        return self._settings.passes

    @property
    def rate(self) -> float:
        """Tokens per second over the last passes, by the cost curve."""
        return self._tokens / self._seconds

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        """See `strategies.Chooser`. Draft-head tokens cost time; those of other sources do not."""
        if source == "head":
            return self._head_length(chains, most)
        if source == "lookup" and not self._settings.lookup:
            return 0
        return LONGEST_LOOKUP

    def _head_length(self, chains: Sequence[Chain], most: int) -> int:
        """Return the number of draft-head tokens with the largest net gain beside these chains.

        0 where none gains more than it costs, or another source's chain is worth more.
        """
        net = self._net_gains()[:most]
        self._head_tokens = 0
        if max(net, default=0.0) > 0 and not any(c.source == "look-ahead" for c in chains):
            alone = self._best_value(NO_CHAIN)
            others = max((self._best_value(kind_of(chain)) for chain in chains), default=alone)
            if alone + max(net) > others:
                self._head_tokens = 1 + net.index(max(net))
        return self._head_tokens

    def _net_gains(self) -> list[float]:
        """Return the gains of draft-head proposals minus their costs, in tokens."""
        costs = self._settings.curve.head_seconds
        pairs = zip(self._gains, costs, strict=False)
        return [gain - self.rate * seconds for gain, seconds in pairs]

    def _update_gains(self, chains: Sequence[Chain], shared: PassSize | None) -> None:
        """Update the gains from the value of the draft head's current proposal."""
        for chain in chains:
            if chain.source == "head":
                counted, places = kind_of(chain)
                alone = self._best_plan(NO_CHAIN, shared)[0]
                for at in range(min(len(places), len(self._gains))):
                    value = self._best_plan((counted, places[: 1 + at]), shared)[0]
                    gain = max(0.0, value - alone)
                    self._proposals[at] += 1
                    weight = max(1 - _GAIN_MEMORY, 1 / (_PRIOR_GAINS + self._proposals[at]))
                    self._gains[at] += weight * (gain - self._gains[at])

    def value_of(self, chains: Sequence[Chain], shared: PassSize) -> float:
        """See `strategies.Chooser`."""
        return self._best_choice(chains, shared)[0]

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        """Choose the chain to verify and the plan of the pass."""
        self._passes += 1
        self._proposed, self._agreed = chains, limits.shared
        interval = _UPDATE_PASSES * min(self._batch_size, _MAX_UPDATE_FACTOR)
        due = self._passes in _EARLY_UPDATES or self._passes % interval == 0
        groups_due = self._passes % (interval * _UPDATES_PER_GROUP_UPDATE) == 0
        if groups_due or (self._batch_size == 1 and due):
            self._update_values()
        elif due:
            self._best_plans.clear()
        self._update_gains(chains, limits.shared)
        evidence = max((chain.evidence for chain in chains), default=0)
        self._decay(self._evidence)
        self._evidence[evidence] = self._evidence.get(evidence, 0.0) + 1
        return self._best_choice(chains, limits.shared)[1].within(limits)

    def _best_choice(
        self, chains: Sequence[Chain], shared: PassSize | None
    ) -> tuple[float, Choice]:
        """Return the value of the best choice among the chains, and that choice."""
        value, plan = self._best_plan(NO_CHAIN, shared)
        best = Choice(None, plan)
        for chain in chains:
            other, its_plan = self._best_plan(kind_of(chain), shared)
            if other > value:
                value, best = other, Choice(chain if its_plan.candidates else None, its_plan)
        return value, best

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        """Count how many tokens of each proposed chain agree with the settled tokens.

        Chains that were not verified are counted as well: the settled tokens show whether they
        would have been accepted, so a source with bad luck at first is not excluded for ever. (For
        sampled drafts under the rejection judge this is an underestimate: most are accepted more
        often than the same token is drawn again.)
        """
        plan, accepted = choice.plan, len(settled) - 1
        self._observed.count(self._proposed, settled, confidences)
        factor = self._observed.head_confidence
        firsts = [factor * gain for gain in self._first_gains]
        pairs = zip(self._gains, firsts, strict=True)
        self._gains = [first + _LONG_MEMORY * (gain - first) for gain, first in pairs]
        self._tokens = self._tokens * _MEMORY + 1 + accepted
        cost = self._settings.cost(
            1 + plan.candidates, sum(plan.groups), plan.groups[accepted], self._agreed
        )
        head_cost = self._settings.curve.head(self._head_tokens)
        self._seconds = self._seconds * _MEMORY + cost + head_cost
        self._head_tokens = 0

    @staticmethod
    def _decay(weights: dict[int, float]) -> None:
        for key, weight in weights.items():
            weights[key] = weight * _MEMORY

    def _update_values(self) -> None:
        """Update the plans from the counts, and the values of groups from the plans.

        A group's value is the expected gain of its candidates in the next pass over the candidates
        available without it: those of the draft head, and a lookup chain as often as one was found.
        """
        self._best_plans.clear()
        total = sum(self._evidence.values())
        without = self._best_value(NO_CHAIN) + max([0.0, *self._net_gains()])
        lookups = [
            (
                weight / total,
                self._best_value(("lookup", levels("lookup", LONGEST_LOOKUP, evidence))),
            )
            for evidence, weight in self._evidence.items()
            if evidence
        ]
        no_lookup = 1 - sum(share for share, _ in lookups)
        for rows in range(1, len(self._group_values)):
            with_group = self._best_value(("look-ahead", levels("look-ahead", rows)))
            gains = [share * (max(v, with_group) - max(v, without)) for share, v in lookups]
            self._group_values[rows] = max(0.0, no_lookup * (with_group - without) + sum(gains))
        self._best_plans.clear()

    def _best_value(self, key: Key) -> float:
        """Return the value of the best pass for a kind of chain.

        In a batch that agrees on passes, this assumes that all sequences are like this one.
        """
        passes = [None] if self._agreed is None else self.passes
        return max(self._best_plan(key, shared)[0] for shared in passes)

    def _best_plan(self, key: Key, shared: PassSize | None) -> tuple[float, Plan]:
        """Return the value of the best plan for a kind of chain, in tokens, and the plan."""
        if (key, shared) not in self._best_plans:
            self._best_plans[key, shared] = self._search(self._observed.chances(key), shared)
        return self._best_plans[key, shared]

    def _search(
        self, chances: Sequence[float], shared: PassSize | None = None
    ) -> tuple[float, Plan]:
        """Return the value of the best plan that verifies a chain or its first part, and the plan.

        Args:
            chances: probability that each candidate is accepted if those before it are.
            shared: pass that the batch agreed on; None for a single sequence.
        """
        rate, cost = self.rate, self._settings.cost
        best, chosen = -math.inf, Plan(0, (0,))
        reached, tokens = 1.0, 1.0  # probability that all candidates are accepted; expected tokens
        rejected: list[float] = []  # probability that each candidate is the first one rejected
        longest = len(chances) if shared is None else min(len(chances), shared.rows - 1)
        groups_allowed = shared is None or shared.look_ahead
        for candidates in range(1 + longest):
            if candidates:
                rejected.append(reached * (1 - chances[candidates - 1]))
                reached *= chances[candidates - 1]
                tokens += reached
            ends = [*rejected, reached]  # probability that each real row is the last accepted
            value = tokens - rate * cost(1 + candidates, 0, 0, shared)
            if value > best:
                best, chosen = value, Plan(candidates, (0,) * (1 + candidates))
            if not groups_allowed:
                continue
            likeliest = sorted(range(1 + candidates), key=ends.__getitem__, reverse=True)
            for rows in range(1, len(self._group_values)):
                if self._group_values[rows] <= 0:
                    continue
                bound = (  # the value if a single group were always the one that is used
                    tokens
                    + self._group_values[rows]
                    - rate * cost(1 + candidates, rows, rows, shared)
                )
                if bound <= best:
                    continue
                value, owners = self._best_groups(tokens, rows, ends, likeliest, shared)
                if value > best:
                    groups = [rows if at in owners else 0 for at in range(1 + candidates)]
                    best, chosen = value, Plan(candidates, tuple(groups))
        return best, chosen

    def _best_groups(
        self,
        tokens: float,
        rows: int,
        ends: Sequence[float],
        likeliest: Sequence[int],
        shared: PassSize | None,
    ) -> tuple[float, set[int]]:
        """Return the value of the pass with the best groups, and the real rows that have one.

        Args:
            tokens: expected number of tokens of the pass.
            rows: length of each group.
            ends: probability that each real row is the last accepted one.
            likeliest: the real rows in falling order of that probability.
            shared: pass that the batch agreed on; None for a single sequence.
        """
        best, groups = -math.inf, 0
        for count, at in enumerate(likeliest, start=1):
            tokens += ends[at] * self._group_values[rows]
            price = self._settings.cost(len(ends), count * rows, rows, shared)
            value = tokens - self.rate * price
            if value <= best:
                break  # less likely rows gain even less
            best, groups = value, count
        return best, set(likeliest[:groups])
