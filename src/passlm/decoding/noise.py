"""The sampling noise of a sequence: random numbers by seed, position and purpose.

The numbers come from a counter-based generator, `kernels/philox.py`. Using them is left to
`judge.py` and to the drafters.
"""

from __future__ import annotations

import secrets
from enum import IntEnum

import torch
from torch import Tensor

from passlm.kernels import philox


class Purpose(IntEnum):
    """Use of a position's random numbers; each use has a stream of its own."""

    SETTLE = 0
    DRAFT = 1
    ACCEPT = 2


class Noise:
    """Random numbers that depend on a seed, a position and a purpose alone.

    No state is carried from one draw to the next, so the numbers of a position are the same under
    any plan, alone or in a batch.

    Args:
        seed: 0 to 2**64 - 1; None for a random seed.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = secrets.randbits(64) if seed is None else seed

    def exponential(self, position: int, purpose: Purpose, size: int) -> Tensor:
        """Return standard exponential numbers, `[size]` float32.

        `argmax(p / e)` is a draw from `p`. This exponential race is equivalent to the Gumbel-max
        trick with `g = -log e`.
        """
        return philox.uniform(self.seed, position, purpose, size).neg_().log1p_().neg_()

    def exponentials(self, start: int, count: int, purpose: Purpose, size: int) -> Tensor:
        """Return `exponential` for `count` positions from `start` on, `[count, size]` float32."""
        return torch.stack([self.exponential(start + i, purpose, size) for i in range(count)])

    def uniform(self, start: int, count: int, purpose: Purpose) -> Tensor:
        """Return numbers in `[0, 1)` for `count` positions from `start` on, `[count]` float64."""
        drawn = [philox.fine(self.seed, start + i, purpose) for i in range(count)]
        return torch.tensor(drawn, dtype=torch.float64)


class SettlingNoise:
    """The noise that settles a sequence's positions.

    Noise that a drafter has read is kept, so that the judge need not compute it again.

    Args:
        noise: the noise of the sequence.

    Attributes:
        kept: the kept noise by position, `[size]` float32 each.
    """

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self.kept: dict[int, Tensor] = {}

    def ahead(self, start: int, count: int, size: int, listed: Tensor | None = None) -> Tensor:
        """Return and keep the noise of `count` positions from `start` on, `[count, K]` float32.

        Args:
            start: the first position.
            count: number of positions.
            size: number of tokens that noise is computed for.
            listed: ids of the `K` tokens to return; None for all.
        """
        positions = range(start, start + count)
        for position in positions:
            self.kept[position] = self.at(position, size)
        noise = [self.kept[position] for position in positions]
        return torch.stack(noise if listed is None else [own[listed] for own in noise])

    def at(self, position: int, size: int) -> Tensor:
        """Return the noise that settles a position, `[size]` float32.

        A token's noise does not depend on `size`, which differs between drafts and judge where a
        model has more logits than embeddings.
        """
        known = self.kept.get(position)
        if known is None or len(known) < size:
            return self._noise.exponential(position, Purpose.SETTLE, size)
        return known[:size]

    def drop(self, before: int) -> None:
        """Drop the noise of positions before this one."""
        self.kept = {at: noise for at, noise in self.kept.items() if at >= before}
