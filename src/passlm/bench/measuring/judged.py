"""Judged tokens against the model's own probabilities: what few samples show of a judge.

Given the text before it, a settled token should have the target's distribution, whatever was
drafted. So the count of those that fall into a set chosen before differs from the sum of the set's
probabilities by chance alone. That takes `p` as the pass gave it; whether that is plain decoding's
is left to `distribution.py`.
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
    """Counts judged tokens that fall where the draft is likelier than the target.

    There a judge that favours drafts puts too many, and by no other set is the excess larger: for
    one that accepts too often its mean is the total variation of the two distributions. Under the
    coupled judge drafts share the noise of their place, and `q` is not kept: the set is then the
    target's likeliest token. Where a draft head knows that noise and plans go by what it is sure
    of, which places are judged follows from what they settle: such texts are not counted. Looks on
    as a `Decoder`'s observer.

    Attributes:
        count: of judged tokens.
        excess: how many more fell into their sets than was to be expected.
        variance: of that number, if the judge is right.
    """

    count: int = 0
    excess: float = 0.0
    variance: float = 0.0

    def __call__(self, row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        """See `decode.Observer`."""
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
        """Count those of another run as well."""
        self.count += other.count
        self.excess += other.excess
        self.variance += other.variance

    @property
    def p_value(self) -> float:
        """The chance of an excess or want as large; by the normal distribution, for many tokens."""
        if self.variance <= 0:
            return 1.0
        return math.erfc(abs(self.excess) / math.sqrt(2 * self.variance))

    def least_shift(self, level: float, chance: float) -> float | None:
        """The mean excess of a token that would be noticed; None where none was judged.

        Args:
            level: at which it is refused.
            chance: of being refused.
        """
        if not self.count:
            return None
        normal = NormalDist()
        errors = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(chance)
        return errors * math.sqrt(self.variance) / self.count


def _favoured(row: Row, p: Tensor, at: int) -> Tensor:
    """The tokens that are likelier in the draft than in `p`, as far as may be known, `[V]` bool.

    It may depend on nothing that the noise of this place has made.
    """
    chain, request = row.choice.chain, row.request
    assert chain is not None, "judged are candidates"
    drawn = chain.source != "lookup" and request.draft == "sampled"
    if drawn and chain.q is not None:
        return chain.q[at].to(p) > p
    # What is no draw was copied, or is the likeliest: its `q` is one-hot.
    single = int(p.argmax()) if drawn else row.candidates[at]
    favoured = torch.zeros_like(p, dtype=torch.bool)
    favoured[single] = True
    return favoured
