"""Acceptance rates of candidates in one sequence, estimated from priors and counts.

The estimate for a candidate depends on its source: on its depth in a look-ahead group, on the draft
head's own probability, or on the number of matching tokens before a copied one. It also depends on
the target's confidence, the probability of its likeliest next token, which every pass computes.
Planning with these rates is left to `auto.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from passlm.drafts.prompt_lookup import LONGEST_MATCH
from passlm.plan import Chain, Source

_MEMORY = 0.97  # decay of a level's counts when one more candidate is counted
_LONG_MEMORY = 0.998  # decay of counts per pass, so that a source that failed is tried again
_PRIOR_WEIGHT = 6.0  # weight of the prior, in candidates
_CONFIDENCE_MEMORY = 0.9  # decay of the mean confidence per token
# Probability that the token after k matching tokens is the one that followed them before, k = 1 to
# 16. Counted in greedy answers of SmolLM2-135M-Instruct to recipes/make_prompts.py's prompts,
# 33,000 tokens.
_LOOKUP_PRIOR = (
    *(0.23, 0.57, 0.65, 0.72, 0.76, 0.79, 0.83, 0.85),
    *(0.85, 0.87, 0.90, 0.93, 0.94, 0.94, 0.95, 0.98),
)
# Acceptance rate of a draft head's token by the head's probability: below 0.1, 0.2, ..., above 0.8.
# From docs/results/priors.json: 12,000 guesses in answers to prompts that the head was not trained
# on, at temperatures from 0 to 1.5, corrected for each sequence's confidence.
_SURE = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
_HEAD_PRIOR = (0.07, 0.18, 0.30, 0.42, 0.53, 0.66, 0.88)
# The same for a head that knows the noise, at temperatures from 0.2 to 1.5: 22,000 guesses.
_KNOWING_PRIOR = (0.09, 0.16, 0.25, 0.36, 0.50, 0.64, 0.87)

# Prior of all other drafters, by depth; counts outweigh it after a few candidates.
_UNKNOWN_PRIOR = (0.5,) * 12

Key = tuple[str, tuple[int, ...]]
"""Kind of a chain: the name that its candidates are counted under (its source, or "sureness" for a
draft head's with probabilities), and the level of each candidate, an index into the prior."""
NO_CHAIN: Key = ("look-ahead", ())


def expected_length(chances: Sequence[float]) -> float:
    """Return the expected accepted length of a chain, `E = sum_k prod_{j<=k} a_j`.

    Args:
        chances: `a_j`, the probability that each candidate is accepted if those before it are.
    """
    reached, total = 1.0, 0.0
    for chance in chances:
        reached *= chance
        total += reached
    return total


def kind_of(chain: Chain) -> Key:
    """Return the name and levels under which the candidates of a chain are counted."""
    if chain.sureness and chain.source == "head":
        return "sureness", tuple(bisect_right(_SURE, sure) for sure in chain.sureness)
    return chain.source, levels(chain.source, len(chain.tokens), chain.evidence)


@lru_cache(maxsize=512)
def levels(source: Source, length: int, evidence: int = 0) -> tuple[int, ...]:
    """Return the levels of a chain: by depth or, for copied tokens, by matching tokens before.

    Args:
        source: name of the drafter.
        length: number of candidates.
        evidence: number of matching tokens before the first copied one.
    """
    if source == "lookup":
        return tuple(min(evidence + place, LONGEST_MATCH) - 1 for place in range(length))
    if source in ("look-ahead", "head"):
        return tuple(range(length))
    return tuple(min(place, len(_UNKNOWN_PRIOR) - 1) for place in range(length))


class Acceptance:
    """Acceptance rates by level: a prior, combined with counts that decay.

    A rate is the probability that a candidate is accepted if those before it are. `self[level]` is
    the current estimate.

    Args:
        prior: rates for greedy decoding before anything is counted.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = tuple(prior)
        self._adjusted = self._prior  # to the sequence's confidence
        self._hits = [0.0] * len(prior)
        self._trials = [0.0] * len(prior)

    def __getitem__(self, level: int) -> float:
        weight = _PRIOR_WEIGHT + self._trials[level]
        return (_PRIOR_WEIGHT * self._adjusted[level] + self._hits[level]) / weight

    def adjust(self, confidence: float) -> None:
        """Multiply the odds of the prior by a sequence's confidence; see `Observed`."""
        self._adjusted = tuple(p * confidence / (1 - p + p * confidence) for p in self._prior)

    def count(self, level: int, accepted: bool) -> None:
        """Count one candidate whose predecessors were all accepted."""
        self._hits[level] = self._hits[level] * _MEMORY + accepted
        self._trials[level] = self._trials[level] * _MEMORY + 1

    def decay(self) -> None:
        """Decay all counts by one pass."""
        for counts in (self._hits, self._trials):
            for level, value in enumerate(counts):
                counts[level] = value * _LONG_MEMORY


class Observed:
    """Counts of one sequence: its proposed candidates, verified or not, and its confidence.

    The flatter the target's distribution, the fewer guesses can be right. From temperature 0 to
    1.5, the odds that a candidate is accepted are close to its odds in greedy decoding times the
    sequence's confidence, which is the mean probability of the target's likeliest tokens.
    `recipes/priors.py` fits the exponent of the confidence: 0.85 to 1 for look-ahead rows, for
    lookup, and for the draft head by its own probability.

    For a draft head that knows the sampling noise, its own probability contains this already: its
    confident guesses are right as often at high temperatures (the fitted exponent is -0.2).

    Args:
        look_ahead: acceptance rate of each look-ahead candidate in greedy decoding.
        head: acceptance rate of each draft-head token whose probability is not given.
        known: whether the draft head knows the noise.
    """

    def __init__(
        self, look_ahead: Sequence[float], head: Sequence[float], known: bool = False
    ) -> None:
        self._known = known
        self._counts: dict[str, Acceptance] = {
            "look-ahead": Acceptance(look_ahead),
            "head": Acceptance(head),
            "sureness": Acceptance(_KNOWING_PRIOR if known else _HEAD_PRIOR),
            "lookup": Acceptance(_LOOKUP_PRIOR),
        }
        self._confidences, self._weights = 1.0, 1.0  # decaying sums; their ratio is the mean

    @property
    def confidence(self) -> float:
        """Decaying mean of the likeliest token's probability; 1 for greedy decoding."""
        return self._confidences / self._weights

    @property
    def head_confidence(self) -> float:
        """Factor of the odds that a draft head's guess is accepted."""
        return 1.0 if self._known else self.confidence

    def chances(self, key: Key) -> list[float]:
        """Return the probability of each candidate of a chain if those before it are accepted."""
        counted, at = key
        counts = self._counts_of(counted)
        return [counts[level] for level in at]

    def _counts_of(self, counted: str) -> Acceptance:
        if counted not in self._counts:
            self._counts[counted] = Acceptance(_UNKNOWN_PRIOR)
            self._counts[counted].adjust(self.confidence)
        return self._counts[counted]

    def count(
        self, chains: Sequence[Chain], settled: Sequence[int], confidences: Sequence[float]
    ) -> None:
        """Count the candidates that agree with the tokens that a pass settled.

        A chain is counted up to its first token that differs.

        Args:
            chains: the chains that were proposed, verified or not.
            settled: the accepted candidates and the token drawn after them.
            confidences: probability of the likeliest token at each of these positions; empty for
                greedy decoding.
        """
        for probability in filter(math.isfinite, confidences):  # NaN if all tokens are forbidden
            self._confidences = self._confidences * _CONFIDENCE_MEMORY + probability
            self._weights = self._weights * _CONFIDENCE_MEMORY + 1
        for counted, acceptance in self._counts.items():
            acceptance.decay()
            if confidences:
                by_head = counted == "sureness"
                acceptance.adjust(self.head_confidence if by_head else self.confidence)
        for chain in chains:
            kind, at = kind_of(chain)
            counts = self._counts_of(kind)
            for level, guess, token in zip(at, chain.tokens, settled, strict=False):
                counts.count(level, guess == token)
                if guess != token:
                    break
