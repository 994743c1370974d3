"""The two judges: which candidates are accepted, and which token is drawn after them.

Pure functions on small tensors; both give every settled token the target's own distribution.
Probabilities come from `sampling.py`, what is done with the verdict is left to `decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """How many candidates were accepted, and the token that settles behind them."""

    accepted: int
    token: int


def draw(probabilities: Tensor, exponential: Tensor | None) -> Tensor:
    """Token ids drawn by the exponential race.

    Args:
        probabilities: `[R, V]`.
        exponential: standard exponential noise, `[R, V]`; None for one-hot rows, where noise
            changes nothing.

    Returns:
        `[R]`.
    """
    if exponential is None:
        return probabilities.argmax(-1)
    return (probabilities / exponential.to(probabilities)).argmax(-1)


def greedy(settled: Sequence[int], candidates: Sequence[int]) -> Verdict:
    """Accept the candidates that are what settles anyway: both judges where `p` is one-hot.

    Args:
        settled: the target's tokens after the root and after each candidate, `1 + M`.
        candidates: the `M` draft tokens.
    """
    accepted = 0
    while accepted < len(candidates) and candidates[accepted] == settled[accepted]:
        accepted += 1
    return Verdict(accepted, settled[accepted])


def coupled(p: Tensor, candidates: Sequence[int], exponential: Tensor | None) -> Verdict:
    """Settle what plain sampling with the same noise would; a candidate is a guess at it.

    Gumbel coupling, drafter-invariant speculative decoding (Daliri, Musco, Suresh,
    arXiv 2408.07978): the settled token at each position depends on `p` and its noise alone.

    Args:
        p: the target's distributions after the root and after each candidate, `[1 + M, V]`.
        candidates: the `M` draft tokens.
        exponential: the positions' own noise, `[1 + M, V]`; None where `p` is one-hot.
    """
    return greedy(draw(p, exponential).tolist(), candidates)


def acceptance(p: Tensor, q: Tensor, candidates: Tensor) -> Tensor:
    """The chance that each candidate is accepted, `min(1, p(d) / q(d))`, `[M]`.

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
    """What to draw from after a refusal, `norm(max(p - q, 0))`.

    Args:
        p: the target's distribution, `[V]`.
        q: the refused candidate's, `[V]`.
    """
    excess = (p - q).clamp(min=0.0)
    total = excess.sum()
    # p and q equal up to rounding: a refusal had a chance of about 1e-7, and p is the limit.
    return excess / total if total > 0 else p


def rejection(
    p: Tensor,
    q: Tensor | None,
    candidates: Sequence[int],
    uniform: Tensor,
    exponential: Tensor | None,
) -> Verdict:
    """Accept each candidate with its chance, in order; at the first refusal draw the residual.

    Args:
        p: the target's distributions after the root and after each candidate, `[1 + M, V]`.
        q: the distributions the candidates were drawn from, `[M, V]`; None without candidates.
        candidates: the `M` draft tokens.
        uniform: one number of `[0, 1)` for each candidate, `[M]`.
        exponential: noise for the drawn token, `[1 + M, V]`; None where `p` is one-hot.
    """
    accepted = 0
    if q is not None and len(candidates):
        chance = acceptance(p[:-1], q, torch.tensor(candidates, device=p.device))
        passed = (uniform < chance.to(uniform)).tolist()
        accepted = passed.index(False) if False in passed else len(passed)
    refused = accepted < len(candidates)
    last = residual(p[accepted], q[accepted]) if refused and q is not None else p[accepted]
    noise = None if exponential is None else exponential[accepted : accepted + 1]
    return Verdict(accepted, int(draw(last[None], noise)))
