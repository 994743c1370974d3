"""The plan that writes most tokens a second, chosen from measured costs and counted acceptance.

`curve.CostCurve` is what a pass takes on this machine, `acceptance.Observed` how often candidates
are accepted, and `AutoPlan` weighs one against the other before every pass, plain decoding among
its choices. Measuring the curve is left to `kept_costs.py`, where lookup chains come from to
`drafts/prompt_lookup.py`.

Nothing here looks at a clock: choices follow from a stored curve, from what the text accepted and
from how confident the target was of it, so a seed gives the same text again under either judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import get_args

from passlm.decoding.strategies import Choice, Limits, Shared
from passlm.plan import Chain, Guessing, Plan, Source
from passlm.planning.acceptance import NO_CHAIN, Key, Observed, expected_length, kind_of, levels
from passlm.planning.cost_curve import CostCurve

LONGEST_LOOKUP = 12  # candidates of a lookup chain
_PASSES_A_LOOK = 8  # passes between two looks at the counts, for each text of the batch,
_MOST_LOOKS_APART = 4  # up to so many: looking takes time that all of them wait for
_LOOKS_A_WORTH = 2  # of these, what groups are worth is reckoned anew at one: it takes the longest
_EARLY_LOOKS = (2, 3, 5)  # passes at which it is looked besides: the first ones tell the most
_FIRST_ROUNDS = 3  # of weighing groups by plans and plans by groups, before the first pass
_MEMORY = 0.97  # what the rate, and how often there were which chains, keep from pass to pass
_LONG_MEMORY = 0.998  # and what guesses of a draft head are worth: what failed once is tried again
_GAIN_MEMORY = 0.9  # what the mean worth of a draft head's guesses keeps when some more are made
_PRIOR_GAINS = 2.0  # guesses that the first estimate of that worth counts for
_CAUTION = 1.03  # times what a pass of several rows is said to cost: the best of many estimates is
# on average one that is too good
_PRIOR_PASSES = 4.0  # that the first guess of the rate is worth


@dataclass(frozen=True)
class AutoPlan:
    """Settings of adaptive planning; every sequence has a chooser of its own.

    Attributes:
        curve: cost of a pass at the current batch size.
        prior: probability that each look-ahead candidate is accepted if those before it are, from
            the look-ahead files' card. Empty where no look-ahead rows may be used.
        lookup: whether candidates copied from the sequence are used.
        curves: returns the costs for a batch size, None where they are not known; no function for
            sequences that stay with `curve`.
        head: probability that each token of the draft head is accepted if those before it are.
            Empty where no draft head may be used.
        sizes: plans made by `resized`, by their curve; shared among them.
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
            raise ValueError("a cost curve without groups cannot say what look-ahead rows cost")

    @cached_property
    def cost(self) -> Callable[[int, int, int, Shared | None], float]:
        """`cost(real, look_ahead, drafted, shared)`: seconds of a pass, remembered.

        Infinite for a pass that does not fit what the batch agreed on.
        """
        return lru_cache(maxsize=4096)(self._cost)

    def _cost(self, real: int, look_ahead: int, drafted: int, shared: Shared | None) -> float:
        seconds = self._seconds(real, look_ahead, drafted, shared)
        rows = real + look_ahead if shared is None else shared.rows
        return seconds if rows == 1 else seconds * _CAUTION

    def _seconds(self, real: int, look_ahead: int, drafted: int, shared: Shared | None) -> float:
        if shared is None:
            return self.curve.of(real, look_ahead, drafted)
        if real + look_ahead > shared.rows or (look_ahead and not shared.look_ahead):
            return math.inf
        if look_ahead:
            return self.curve.of(shared.rows - look_ahead, look_ahead, drafted)
        return self.curve.of(shared.rows) + (self._least_group if shared.look_ahead else 0.0)

    @property
    def _least_group(self) -> float:
        """Cost of look-ahead rows in a pass for the sequences that have none."""
        return min(self.curve.group_seconds, default=0.0)

    @property
    def passes(self) -> tuple[Shared, ...]:
        """Kinds of passes to agree on, with the numbers of rows that were measured."""
        kinds = (False, True) if self.prior else (False,)
        rows = self.curve.rows
        return tuple(Shared(n, kind) for kind in kinds for n in rows if n > 1 or not kind)

    @property
    def head_depths(self) -> int:
        """Number of tokens that the draft head may propose: those whose cost was measured."""
        return min(len(self.head), len(self.curve.head_seconds))

    def resized(self, texts: int) -> AutoPlan:
        """Return the plan for another batch size, or this one where its costs are not known."""
        curve = None if self.curves is None else self.curves(texts)
        if curve is None or curve == self.curve:
            return self
        if curve not in self.sizes:
            self.sizes.update({self.curve: self, curve: replace(self, curve=curve)})
        return self.sizes[curve]

    @cached_property
    def first_weighing(self) -> tuple[list[float], list[float]]:
        """Values of draft-head guesses and of groups, in tokens, before anything is counted."""
        chooser = AutoChooser(self, weighed=([], [0.0] * (1 + len(self.prior))))
        for _ in range(_FIRST_ROUNDS):
            chooser.weigh_first()
        return chooser.weighed

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
        """Return the chooser of one sequence whose candidates are made in this way."""
        return AutoChooser(self._by_guessing[guessing], known=guessing == "knowing")

    @cached_property
    def _by_guessing(self) -> dict[Guessing, AutoPlan]:
        return {guessing: self._drawing(guessing) for guessing in get_args(Guessing)}

    def _drawing(self, guessing: Guessing) -> AutoPlan:
        """Return the plan with the costs of a way of guessing, which may be higher."""
        curve, curves = self.curve.drawing(guessing), self.curves
        if curve == self.curve:
            return self

        def of(texts: int) -> CostCurve | None:
            known = None if curves is None else curves(texts)
            return None if known is None else known.drawing(guessing)

        return replace(self, curve=curve, curves=curves and of, sizes={})


class AutoChooser:
    """What one text has shown so far, and the plans that follow from it.

    A pass is worth its expected tokens, plus what its groups are worth to the next pass, less its
    seconds at the rate that the text is written at: the average-reward form of
    `tokens / seconds` (Howard, "Dynamic Programming and Markov Processes", 1960).

    Args:
        settings: costs, priors and what may be drafted.
        weighed: what the head's guesses and groups are worth, by their lengths; None for what
            `settings` say.
        known: the draft head knows the noise of the draws.
    """

    def __init__(
        self,
        settings: AutoPlan,
        weighed: tuple[list[float], list[float]] | None = None,
        known: bool = False,
    ) -> None:
        gains, worth = settings.first_weighing if weighed is None else weighed
        self._settings = settings
        self._observed = Observed(settings.prior, settings.head, known)
        self._gains = list(gains)  # tokens that a head's first, first two, ... guesses bring
        self._noted = [0] * len(gains)  # how often they were made
        self._expected = list(gains)  # the same before any was made, in greedy text
        self._offered: dict[int, float] = {0: 1.0}  # how often lookup chains of which evidence
        self._seconds = _PRIOR_PASSES * settings.curve.of(1)
        self._tokens = settings.first_rate * self._seconds
        self._worth = list(worth)  # of a group of so many rows, in tokens
        self._worth_elsewhere: dict[CostCurve, list[float]] = {}  # at batch sizes met before
        self._weighed: dict[tuple[Key, Shared | None], tuple[float, Plan]] = {}
        self._passes = 0
        self._at_hand: Sequence[Chain] = ()
        self._guessed = 0  # tokens that the draft head guessed for the next pass
        self._texts = 1
        self._shared: Shared | None = None  # the last pass, where it was agreed with other texts

    @property
    def weighed(self) -> tuple[list[float], list[float]]:
        """What the draft head's guesses and what groups are worth, in tokens."""
        return list(self._gains), list(self._worth)

    def weigh_first(self) -> None:
        """Weigh guesses and groups as far as priors tell, each by what the other is worth."""
        head = self._settings.head[: self._settings.head_depths]
        alone = self._best(())[0]
        gains = [self._best(head[:count])[0] - alone for count in range(1, 1 + len(head))]
        self._gains, self._expected = gains, list(gains)
        self._noted = [0] * len(gains)
        self._weigh_anew()

    def resize(self, texts: int) -> None:
        """See `strategies.Chooser`: go on with other costs; what was counted is kept.

        Batches change often and weighing takes long: until it is next done, groups are worth what
        they were when the batch last had this size.
        """
        self._texts = texts
        settings = self._settings.resized(texts)
        if settings is not self._settings:
            self._worth_elsewhere[self._settings.curve] = self._worth
            self._seconds *= settings.curve.of(1) / self._settings.curve.of(1)
            self._settings = settings
            expected, first = settings.first_weighing
            rows = zip(self._gains, expected, self._expected, strict=False)
            share = self._observed.head_confidence
            self._gains = [gain + share * (new - old) for gain, new, old in rows]
            self._expected = expected[: len(self._gains)]
            known = self._worth_elsewhere.get(settings.curve)
            self._worth = list(first) if known is None else known
            self._weighed.clear()
            if known is None and self._passes:
                self._weigh_anew()

    drafts = True

    @property
    def passes(self) -> tuple[Shared, ...]:
        """See `strategies.Chooser`."""
        return self._settings.passes

    @property
    def rate(self) -> float:
        """Tokens a second over the last passes, by the cost curve."""
        return self._tokens / self._seconds

    def draft_length(self, source: Source, chains: Sequence[Chain], most: int) -> int:
        """See `strategies.Chooser`; copied tokens are free, draft-head tokens must pay."""
        if source == "head":
            return self._guesses(chains, most)
        if source == "lookup" and not self._settings.lookup:
            return 0
        return LONGEST_LOOKUP

    def _guesses(self, chains: Sequence[Chain], most: int) -> int:
        """Return the number of draft-head tokens that are worth their time beside these chains."""
        net = self._net_gains()[:most]
        self._guessed = 0
        if max(net, default=0.0) > 0 and not any(c.source == "look-ahead" for c in chains):
            alone = self._at_best(NO_CHAIN)
            others = max((self._at_best(kind_of(chain)) for chain in chains), default=alone)
            if alone + max(net) > others:
                self._guessed = 1 + net.index(max(net))
        return self._guessed

    def _net_gains(self) -> list[float]:
        """What guesses of the draft head have been bringing, less their time, in tokens."""
        costs = self._settings.curve.head_seconds
        pairs = zip(self._gains, costs, strict=False)
        return [gain - self.rate * seconds for gain, seconds in pairs]

    def _note_gains(self, chains: Sequence[Chain], shared: Shared | None) -> None:
        """Learn from what the draft head's guesses at hand are worth in such a pass."""
        for chain in chains:
            if chain.source == "head":
                counted, places = kind_of(chain)
                alone = self._weigh(NO_CHAIN, shared)[0]
                for at in range(min(len(places), len(self._gains))):
                    worth = self._weigh((counted, places[: 1 + at]), shared)[0]
                    gain = max(0.0, worth - alone)
                    self._noted[at] += 1
                    share = max(1 - _GAIN_MEMORY, 1 / (_PRIOR_GAINS + self._noted[at]))
                    self._gains[at] += share * (gain - self._gains[at])

    def worth(self, chains: Sequence[Chain], shared: Shared) -> float:
        """See `strategies.Chooser`."""
        return self._preferred(chains, shared)[0]

    def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
        """The chain to verify and the plan of the pass; see `strategies.Chooser`."""
        self._passes += 1
        self._at_hand, self._shared = chains, limits.shared
        apart = _PASSES_A_LOOK * min(self._texts, _MOST_LOOKS_APART)
        early = self._passes in _EARLY_LOOKS
        thorough = self._passes % (apart * _LOOKS_A_WORTH) == 0
        if thorough or (self._texts == 1 and (early or self._passes % apart == 0)):
            self._weigh_anew()
        elif early or self._passes % apart == 0:
            self._weighed.clear()
        self._note_gains(chains, limits.shared)
        evidence = max((chain.evidence for chain in chains), default=0)
        self._fade(self._offered)
        self._offered[evidence] = self._offered.get(evidence, 0.0) + 1
        return self._preferred(chains, limits.shared)[1].within(limits)

    def _preferred(self, chains: Sequence[Chain], shared: Shared | None) -> tuple[float, Choice]:
        """The best of the chains, or none, and what it is worth."""
        value, plan = self._weigh(NO_CHAIN, shared)
        best = Choice(None, plan)
        for chain in chains:
            worth, its_plan = self._weigh(kind_of(chain), shared)
            if worth > value:
                value, best = worth, Choice(chain if its_plan.candidates else None, its_plan)
        return value, best

    def learn(
        self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
    ) -> None:
        """Count how far the chains at hand went along with what was settled.

        Those that were not verified as well: where a token is drawn whatever the candidates are, it
        tells what they would have come to. So what looks bad at first is not given up for ever. (Of
        a sampled draft under the rejection judge it tells too little: most are accepted more often
        than they are drawn again.)
        """
        plan, accepted = choice.plan, len(settled) - 1
        self._observed.count(self._at_hand, settled, confidences)
        share = self._observed.head_confidence
        firsts = [share * gain for gain in self._expected]
        pairs = zip(self._gains, firsts, strict=True)
        self._gains = [first + _LONG_MEMORY * (gain - first) for gain, first in pairs]
        self._tokens = self._tokens * _MEMORY + 1 + accepted
        cost = self._settings.cost(
            1 + plan.candidates, sum(plan.groups), plan.groups[accepted], self._shared
        )
        self._seconds = self._seconds * _MEMORY + cost + self._settings.curve.head(self._guessed)
        self._guessed = 0

    @staticmethod
    def _fade(weights: dict[int, float]) -> None:
        for known, weight in weights.items():
            weights[known] = weight * _MEMORY

    def _weigh_anew(self) -> None:
        """Let plans follow the counts, and the worth of groups those plans."""
        self._weighed.clear()
        total = sum(self._offered.values())
        without = self._at_best(NO_CHAIN) + max([0.0, *self._net_gains()])
        others = [
            (weight / total, self._at_best(("lookup", levels("lookup", LONGEST_LOOKUP, evidence))))
            for evidence, weight in self._offered.items()
            if evidence
        ]
        rest = 1 - sum(share for share, _ in others)
        for rows in range(1, len(self._worth)):
            with_group = self._at_best(("look-ahead", levels("look-ahead", rows)))
            gains = [share * (max(v, with_group) - max(v, without)) for share, v in others]
            self._worth[rows] = max(0.0, rest * (with_group - without) + sum(gains))
        self._weighed.clear()

    def _at_best(self, key: Key) -> float:
        """What a chain of this kind is worth, the other texts of the batch being like this one."""
        passes = [None] if self._shared is None else self.passes
        return max(self._weigh(key, shared)[0] for shared in passes)

    def _weigh(self, key: Key, shared: Shared | None) -> tuple[float, Plan]:
        """The best plan for a chain of this kind, and what it is worth, in tokens."""
        if (key, shared) not in self._weighed:
            self._weighed[key, shared] = self._best(self._observed.chances(key), shared)
        return self._weighed[key, shared]

    def _best(self, chances: Sequence[float], shared: Shared | None = None) -> tuple[float, Plan]:
        """The best plan that verifies a chain of these chances, or some of it.

        Args:
            chances: of each candidate, once those before it are accepted.
            shared: what the texts of a batch agreed on; None for a text alone.
        """
        rate, cost = self.rate, self._settings.cost
        best, chosen = -math.inf, Plan(0, (0,))
        reached, tokens = 1.0, 1.0
        ends: list[float] = []  # chance that a real row is the last one accepted
        longest = len(chances) if shared is None else min(len(chances), shared.rows - 1)
        groups_too = shared is None or shared.look_ahead
        for candidates in range(1 + longest):
            if candidates:
                ends.append(reached * (1 - chances[candidates - 1]))
                reached *= chances[candidates - 1]
                tokens += reached
            here = [*ends, reached]
            value = tokens - rate * cost(1 + candidates, 0, 0, shared)
            if value > best:
                best, chosen = value, Plan(candidates, (0,) * (1 + candidates))
            if not groups_too:
                continue
            likeliest = sorted(range(1 + candidates), key=here.__getitem__, reverse=True)
            for rows in range(1, len(self._worth)):
                if self._worth[rows] <= 0:
                    continue
                most = tokens + self._worth[rows] - rate * cost(1 + candidates, rows, rows, shared)
                if most <= best:
                    continue  # not even if one group were always drafted from
                value, hung = self._groups(tokens, rows, here, likeliest, shared)
                if value > best:
                    groups = [rows if at in hung else 0 for at in range(1 + candidates)]
                    best, chosen = value, Plan(candidates, tuple(groups))
        return best, chosen

    def _groups(
        self,
        tokens: float,
        rows: int,
        ends: Sequence[float],
        likeliest: Sequence[int],
        shared: Shared | None,
    ) -> tuple[float, set[int]]:
        """The real rows that should have a group of `rows`, and the worth of the pass then."""
        best, hung = -math.inf, 0
        for count, at in enumerate(likeliest, start=1):
            tokens += ends[at] * self._worth[rows]
            price = self._settings.cost(len(ends), count * rows, rows, shared)
            value = tokens - self.rate * price
            if value <= best:
                break  # less likely rows pay even less
            best, hung = value, count
        return best, set(likeliest[:hung])
