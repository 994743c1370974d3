"""The two judges: which candidates are accepted, and which token is drawn after them.

Pure functions on small tensors. Under both judges, every settled token has the target's own
distribution. They read the rows of a pass in order and stop at the first refusal, so rows may be
computed on demand. Probabilities come from `distribution.py`; applying the verdict is left to
`text.py` and `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Vectors over the vocabulary, `[V]`, by real row: a tensor `[R, V]`, or computed on demand."""

    def __getitem__(self, row: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Computed:
    """Rows that are computed on demand.

    Attributes:
        row: function that returns a row, `[V]`, by its index.
    """

    row: Callable[[int], Tensor]

    def __getitem__(self, row: int) -> Tensor:
        return self.row(row)


@dataclass(frozen=True)
class Verdict:
    """Result of judging one pass.

    Attributes:
        accepted: number of accepted candidates.
        token: id of the token that settles after them.
    """

    accepted: int
    token: int


def draw(probabilities: Tensor, exponential: Tensor | None) -> Tensor:
    """Draw token ids by the exponential race, `argmax(p / e)`.

    Args:
        probabilities: `p`, `[..., V]`.
        exponential: standard exponential noise `e`, `[..., V]`; None for one-hot rows, which noise
            does not change.

    Returns:
        Token ids, `[...]`.
    """
    if exponential is None:
        return probabilities.argmax(-1)
    return (probabilities / exponential.to(probabilities)).argmax(-1)


def guess(q: Tensor, exponential: Tensor, weight: float) -> Tensor:
    """Guess the tokens that the coupled judge will draw, from a draft's `q` and the known noise.

    The judge draws `argmax(p / e)`. The draft's `q` differs from `p`, so that a race with less
    noise, `argmax(q / e^w)`, guesses its token more often than `argmax(q / e)`; see docs/log.md.

    Args:
        q: the draft's probabilities, `[..., V]`.
        exponential: the noise of the positions, `e`, `[..., V]`.
        weight: exponent of the noise, `w`, from 0 to 1.

    Returns:
        Token ids, `[...]`.
    """
    return draw(q, exponential.pow(weight))


def greedy(settled: Sequence[int], candidates: Sequence[int]) -> Verdict:
    """Accept candidates that equal the target's tokens: either judge's verdict for a one-hot `p`.

    Args:
        settled: the target's tokens after the root and after each candidate, `1 + M`.
        candidates: the `M` draft tokens.
    """
    accepted = 0
    while accepted < len(candidates) and candidates[accepted] == settled[accepted]:
        accepted += 1
    return Verdict(accepted, settled[accepted])


def coupled(p: Rows, candidates: Sequence[int], exponential: Rows | None) -> Verdict:
    """Settle the tokens that plain sampling with the same noise would draw.

    A candidate is accepted if it is that token. The settled token at each position depends on `p`
    and the position's noise alone: Gumbel coupling, as in drafter-invariant speculative decoding
    (Daliri, Musco, Suresh, arXiv 2408.07978).

    Args:
        p: the target's distributions after the root and after each candidate, `[1 + M, V]`.
        candidates: the `M` draft tokens.
        exponential: standard exponential noise of each position, `[1 + M, V]`; None where `p` is
            one-hot.
    """
    for row, candidate in enumerate(candidates):
        token = _drawn(p[row], exponential, row)
        if token != candidate:
            return Verdict(row, token)
    last = len(candidates)
    return Verdict(last, _drawn(p[last], exponential, last))


def _drawn(p: Tensor, exponential: Rows | None, row: int) -> int:
    return int(draw(p, None if exponential is None else exponential[row]))


def acceptance(p: Tensor, q: Tensor, candidates: Tensor) -> Tensor:
    """Return the probability that each candidate is accepted, `min(1, p(d) / q(d))`, `[M]`.

    Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding"
    (arXiv 2211.17192); Chen et al. (arXiv 2302.01318).

    Args:
        p: the target's distributions at the candidates' positions, `[M, V]`.
        q: the distributions the candidates were drawn from, `[M, V]`; `q(d) > 0`.
        candidates: `[M]`.
    """
    index = candidates[:, None]
    return (p.gather(1, index) / q.gather(1, index)).squeeze(1).clamp(max=1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Return the distribution to draw from after a refusal, `norm(max(p - q, 0))`, `[V]`.

    Args:
        p: the target's distribution, `[V]`.
        q: the distribution that the refused candidate was drawn from, `[V]`.
    """
    excess = (p - q).clamp(min=0.0)
    total = excess.sum()
    # A total of 0 means that p and q are equal up to rounding. A refusal then had a probability of
    # about 1e-7, and p is the limit of the residual.
    return excess / total if total > 0 else p


def rejection(
    p: Rows,
    q: Rows | None,
    candidates: Sequence[int],
    uniform: Tensor,
    exponential: Rows | None,
) -> Verdict:
    """Accept candidates in order with probability `acceptance`; draw from `residual` at a refusal.

    If all are accepted, the next token is drawn from the last row of `p`.

    Args:
        p: the target's distributions after the root and after each candidate, `[1 + M, V]`.
        q: the distributions the candidates were drawn from, `[M, V]`; None without candidates.
        candidates: the `M` draft tokens.
        uniform: a random number in `[0, 1)` for each candidate, `[M]`.
        exponential: standard exponential noise for the drawn token, `[1 + M, V]`; None where `p` is
            one-hot.
    """
    for row, candidate in enumerate(candidates):
        assert q is not None, "candidates come with the distributions they were drawn from"
        here, drafted = p[row], q[row]
        chance = acceptance(
            here[None], drafted[None], torch.tensor([candidate], device=here.device)
        )
        if not bool(uniform[row] < chance[0].to(uniform)):
            return Verdict(row, _drawn(residual(here, drafted), exponential, row))
    last = len(candidates)
    return Verdict(last, _drawn(p[last], exponential, last))
