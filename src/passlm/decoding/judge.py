"""The two judges: which candidates are accepted, and which token is drawn after them.

Pure functions on small tensors. Under both judges, every settled token has the target's own
distribution. They read a pass's rows in order and none after the first refusal, so rows may be
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
    """Values over the vocabulary, `[V]`, by row of the pass: a tensor, or computed on demand."""

    def __getitem__(self, row: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Computed:
    """Rows that are computed on demand."""

    row: Callable[[int], Tensor]

    def __getitem__(self, row: int) -> Tensor:
        return self.row(row)


@dataclass(frozen=True)
class Verdict:
    """The number of accepted candidates, and the token that settles after them."""

    accepted: int
    token: int


def draw(probabilities: Tensor, exponential: Tensor | None) -> Tensor:
    """Draw token ids by the exponential race.

    Args:
        probabilities: `[..., V]`.
        exponential: standard exponential noise, `[..., V]`; None for one-hot rows, which noise
            does not change.

    Returns:
        `[...]`.
    """
    if exponential is None:
        return probabilities.argmax(-1)
    return (probabilities / exponential.to(probabilities)).argmax(-1)


def guess(q: Tensor, exponential: Tensor, weight: float) -> Tensor:
    """Guess the tokens that the coupled judge will draw, from a draft's `q` and the known noise.

    `argmax(q / e)` would be right if `q` were `p`. Since it is not, a race with less noise,
    `argmax(q / e^w)`, guesses the judge's token more often; see docs/log.md.

    Args:
        q: the draft's probabilities, `[..., V]`.
        exponential: the noise of the positions, `[..., V]`.
        weight: `w`.

    Returns:
        `[...]`.
    """
    return draw(q, exponential.pow(weight))


def greedy(settled: Sequence[int], candidates: Sequence[int]) -> Verdict:
    """Accept candidates that equal the target's tokens: both judges for a one-hot `p`.

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

    A candidate is accepted if it is that token.

    Gumbel coupling, drafter-invariant speculative decoding (Daliri, Musco, Suresh,
    arXiv 2408.07978): the settled token at each position depends on `p` and its noise alone.

    Args:
        p: the target's distributions after the root and after each candidate, `[1 + M, V]`.
        candidates: the `M` draft tokens.
        exponential: the positions' own noise, `[1 + M, V]`; None where `p` is one-hot.
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
    """Return the distribution to draw from after a refusal, `norm(max(p - q, 0))`.

    Args:
        p: the target's distribution, `[V]`.
        q: the refused candidate's, `[V]`.
    """
    excess = (p - q).clamp(min=0.0)
    total = excess.sum()
    # p and q are equal up to rounding: a refusal had a probability of about 1e-7; p is the limit.
    return excess / total if total > 0 else p


def rejection(
    p: Rows,
    q: Rows | None,
    candidates: Sequence[int],
    uniform: Tensor,
    exponential: Rows | None,
) -> Verdict:
    """Accept each candidate with its probability, in order; draw the residual at a refusal.

    Args:
        p: the target's distributions after the root and after each candidate, `[1 + M, V]`.
        q: the distributions the candidates were drawn from, `[M, V]`; None without candidates.
        candidates: the `M` draft tokens.
        uniform: one number of `[0, 1)` for each candidate, `[M]`.
        exponential: noise for the drawn token, `[1 + M, V]`; None where `p` is one-hot.
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
