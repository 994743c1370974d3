"""Test a judge by comparing judged tokens with the target's probabilities.

Given the tokens before it, a settled token should have the target's distribution, whatever was
drafted. If a set of tokens is chosen beforehand for each position, the number of settled tokens in
their sets differs from the sum of the sets' probabilities only by chance. This needs few samples.
It takes the distribution `p` as the pass returned it; `distribution.py` tests whether the results
agree with plain decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from passlm.decoding.text import Row


@dataclass
class JudgedTokens:
    """Counts judged tokens to which the draft gives a higher probability than the target.

    An observer of a `Decoder`. The set of a position consists of the tokens with `q > p`. A judge
    that favours drafts settles too many tokens of this set, and no other set has a larger excess:
    for a judge that always accepts, the mean excess is the total variation distance of the two
    distributions.

    With the coupled judge, drafts share the noise of their position and `q` is not kept, so the set
    is the target's most likely token. If a draft head knows the noise and plans depend on its
    confidence, the choice of the judged positions depends on the tokens that they settle. Such
    sequences are not counted.

    Attributes:
        count: number of judged tokens.
        excess: number of tokens in their sets minus the expected number.
        variance: variance of `excess` if the judge is correct.
    """

    count: int = 0
    excess: float = 0.0
    variance: float = 0.0

    def __call__(self, row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        """Count the judged tokens of one pass; see `passlm.decoding.decoder.Observer`."""
        judged = min(len(settled), len(row.candidates))
        if not judged or row.follows_noise:
            return
        p = row.request.distribution(logits[:judged], row.tokens, row.candidates)
        for at in range(judged):
            favoured = _favoured(row, p[at], at)
            chance = float(p[at].double()[favoured].sum())
            self.count += 1
            self.excess += float(favoured[settled[at]]) - chance
            self.variance += chance * (1 - chance)

    def add(self, other: JudgedTokens) -> None:
        """Add the counts of another run."""
        self.count += other.count
        self.excess += other.excess
        self.variance += other.variance

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the excess; by the normal approximation, which needs many tokens."""
        if self.variance <= 0:
            return 1.0
        return math.erfc(abs(self.excess) / math.sqrt(2 * self.variance))

    def least_shift(self, level: float, chance: float) -> float | None:
        """Return the smallest detectable mean excess per token; None if no token was judged.

        Args:
            level: significance level of the two-sided test.
            chance: power, the probability of detection.
        """
        if not self.count:
            return None
        normal = NormalDist()
        errors = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(chance)
        return errors * math.sqrt(self.variance) / self.count


def _favoured(row: Row, p: Tensor, at: int) -> Tensor:
    """Return the tokens that are more likely under the draft than under `p`, `[V]` bool.

    The set must not depend on anything that was made from the noise of this position.
    """
    chain, request = row.choice.chain, row.request
    assert chain is not None, "only candidates are judged"
    drawn = chain.source != "lookup" and request.draft == "sampled"
    if drawn and chain.q is not None:
        return chain.q[at].to(p) > p
    # A candidate that was not drawn was copied or is the most likely one, so its `q` is one-hot.
    single = int(p.argmax()) if drawn else row.candidates[at]
    favoured = torch.zeros_like(p, dtype=torch.bool)
    favoured[single] = True
    return favoured
