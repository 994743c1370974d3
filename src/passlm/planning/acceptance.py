"""How often candidates are accepted in one text: what is believed first, and what is counted.

A candidate's chance depends on where it comes from: on its place in a look-ahead group, on how sure
the draft head was of it, on how much text agreed before it was copied. And it depends on the
target's confidence in the text's own next tokens, which every pass shows. What follows for plans is
left to `auto.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from passlm.drafts.prompt_lookup import LONGEST_MATCH
from passlm.plan import Chain, Source

_MEMORY = 0.97  # what counts keep of their weight when one more is counted
_LONG_MEMORY = 0.998  # and from pass to pass, so that what failed once is tried again
_PRIOR_WEIGHT = 6.0  # how many counted candidates the prior is worth
_CONFIDENCE_MEMORY = 0.9  # what the mean confidence keeps of its weight with every token
# How often the next token is as it was behind the last place where k tokens agreed, k = 1 to 16:
# greedy answers of SmolLM2-135M-Instruct to recipes/make_prompts.py's prompts, 33,000 tokens.
_LOOKUP_PRIOR = (
    *(0.23, 0.57, 0.65, 0.72, 0.76, 0.79, 0.83, 0.85),
    *(0.85, 0.87, 0.90, 0.93, 0.94, 0.94, 0.95, 0.98),
)
# How often a draft head's token is accepted, by the probability that it gave it: below 0.1, 0.2,
# ..., above 0.8; docs/results/priors.json, 12,000 guesses behind answers to prompts that it was not
# trained on, at temperatures from 0 to 1.5, each text's confidence taken into account.
_SURE = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
_HEAD_PRIOR = (0.07, 0.18, 0.30, 0.42, 0.53, 0.66, 0.88)
# The same of a head that knows the noise, at temperatures from 0.2 to 1.5 together: 22,000 guesses.
_KNOWING_PRIOR = (0.09, 0.16, 0.25, 0.36, 0.50, 0.64, 0.87)

# Of a drafter that is not known here, by place: counts take over after a few candidates.
_UNKNOWN_PRIOR = (0.5,) * 12

Key = tuple[str, tuple[int, ...]]
"""A kind of chain: the name its candidates are counted under (its source, or "sureness" for a draft
head's), and the level of each of them."""
NO_CHAIN: Key = ("look-ahead", ())


def expected_length(chances: Sequence[float]) -> float:
    """`E(M)`, the mean accepted length of a chain, from each candidate's chance."""
    reached, total = 1.0, 0.0
    for chance in chances:
        reached *= chance
        total += reached
    return total


def kind_of(chain: Chain) -> Key:
    """Where the candidates of a chain are counted."""
    if chain.sureness and chain.source == "head":
        return "sureness", tuple(bisect_right(_SURE, sure) for sure in chain.sureness)
    return chain.source, levels(chain.source, len(chain.tokens), chain.evidence)


@lru_cache(maxsize=512)
def levels(source: Source, length: int, evidence: int = 0) -> tuple[int, ...]:
    """Levels by place, or by how much text agrees once a candidate is reached."""
    if source == "lookup":
        return tuple(min(evidence + place, LONGEST_MATCH) - 1 for place in range(length))
    if source in ("look-ahead", "head"):
        return tuple(range(length))
    return tuple(min(place, len(_UNKNOWN_PRIOR) - 1) for place in range(length))


class Acceptance:
    """Chances that candidates are accepted, given that those before them were: counted, forgetting.

    Args:
        prior: what is believed of greedy text before anything is counted, and again once it is
            forgotten.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = tuple(prior)
        self._believed = self._prior
        self._hits = [0.0] * len(prior)
        self._trials = [0.0] * len(prior)

    def __getitem__(self, level: int) -> float:
        weight = _PRIOR_WEIGHT + self._trials[level]
        return (_PRIOR_WEIGHT * self._believed[level] + self._hits[level]) / weight

    def believe(self, confidence: float) -> None:
        """Take the prior's odds times a text's confidence for what is believed; see `Observed`."""
        self._believed = tuple(p * confidence / (1 - p + p * confidence) for p in self._prior)

    def count(self, level: int, accepted: bool) -> None:
        """One candidate that was reached."""
        self._hits[level] = self._hits[level] * _MEMORY + accepted
        self._trials[level] = self._trials[level] * _MEMORY + 1

    def forget(self) -> None:
        """Let a pass go by: what is not met any more is believed a little less."""
        for counts in (self._hits, self._trials):
            for level, value in enumerate(counts):
                counts[level] = value * _LONG_MEMORY


class Observed:
    """What one text shows of the candidates at hand, verified or not, and of its own tokens.

    The more evenly the target spreads its probability, the less any guess can be right. From
    temperature 0 to 1.5 the odds of a candidate are close to those that it has in greedy text times
    the text's confidence, the mean probability of its likeliest next tokens: `recipes/priors.py`
    finds it to the power of 0.85 to 1 for the look-ahead rows, for lookup and for the head by how
    sure it is.

    A draft head that knows the noise of the draws has taken that into account: what it is sure of
    is right as often in hot text (the power of the confidence that fits its guesses best is -0.2).

    Args:
        look_ahead: chance of each look-ahead candidate in greedy text.
        head: chance of each of the draft head's tokens, where it is not known how sure it is.
        known: the draft head knows the noise.
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
        self._confident, self._tokens = 1.0, 1.0  # sum of confidences, and of their weights

    @property
    def confidence(self) -> float:
        """Mean probability of the likeliest token, of late; 1 for greedy text."""
        return self._confident / self._tokens

    @property
    def head_confidence(self) -> float:
        """What it makes of the odds of a draft head's guesses."""
        return 1.0 if self._known else self.confidence

    def chances(self, key: Key) -> list[float]:
        """Chance of each candidate of such a chain, once those before it are accepted."""
        counted, at = key
        counts = self._counts_of(counted)
        return [counts[level] for level in at]

    def _counts_of(self, counted: str) -> Acceptance:
        if counted not in self._counts:
            self._counts[counted] = Acceptance(_UNKNOWN_PRIOR)
            self._counts[counted].believe(self.confidence)
        return self._counts[counted]

    def count(
        self, chains: Sequence[Chain], settled: Sequence[int], confidences: Sequence[float]
    ) -> None:
        """Hear what a pass settled.

        Args:
            chains: those that were at hand.
            settled: the candidates accepted and the token drawn behind them.
            confidences: the likeliest token's probability for each of these; none in greedy text.
        """
        for probability in filter(math.isfinite, confidences):  # processors may forbid all tokens
            self._confident = self._confident * _CONFIDENCE_MEMORY + probability
            self._tokens = self._tokens * _CONFIDENCE_MEMORY + 1
        for counted, acceptance in self._counts.items():
            acceptance.forget()
            if confidences:
                by_head = counted == "sureness"
                acceptance.believe(self.head_confidence if by_head else self.confidence)
        for chain in chains:
            kind, at = kind_of(chain)
            counts = self._counts_of(kind)
            for level, guess, token in zip(at, chain.tokens, settled, strict=False):
                counts.count(level, guess == token)
                if guess != token:
                    break
