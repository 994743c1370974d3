"""Drawing candidates for several sequences at once, shared by the drafters with a trained head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, get_args

import torch
from torch import Tensor

from passlm.drafts.protocol import DraftBuilder, DraftSequence
from passlm.drafts.sampler_head import Draws, Shortlist
from passlm.plan import Guessing, Source


class Sampler(Protocol):
    """Logits of candidates, one depth after the other: `GroupSampler` or `HeadSampler`.

    Attributes:
        lengths: number of candidates of each sequence.
    """

    lengths: list[int]

    def shortlists(
        self, depth: int, groups: Sequence[int], histories: Sequence[Sequence[int]]
    ) -> tuple[list[Shortlist], Tensor]:
        """See `GroupSampler.shortlists`."""
        ...


def by_guessing(
    sequences: Sequence[DraftSequence],
) -> Iterator[tuple[Guessing, list[int]]]:
    """Yield each way of guessing in use with the indices of the sequences that use it."""
    for guessing in get_args(Guessing):
        using = [at for at, sequence in enumerate(sequences) if sequence.guessing == guessing]
        if using:
            yield guessing, using


def draw_together(
    sequences: Sequence[DraftSequence], sampler: Sampler, source: Source, sure: bool = False
) -> list[DraftBuilder]:
    """Draw the first candidate of every sequence, then the second, and so on.

    Args:
        sequences: the sequences, in the sampler's order.
        sampler: gives the logits and the number of candidates of each sequence.
        source: name of the drafter.
        sure: keep the probability of each token.
    """
    drafts = [DraftBuilder(source, sure) for _ in sequences]
    for depth in range(max(sampler.lengths)):
        going = [at for at, length in enumerate(sampler.lengths) if depth < length]
        histories = [[*sequences[at].tokens, *drafts[at].tokens] for at in going]
        shortlists, logits = sampler.shortlists(depth, going, histories)
        for at, among, own in zip(going, shortlists, logits[:, None], strict=True):
            sequences[at].draw(drafts[at], own, among)
    return drafts


def known_noise(
    sequences: Sequence[DraftSequence],
    lengths: Sequence[int],
    vocabulary: int,
    listed: Tensor | None = None,
    sureness: bool = False,
) -> Draws:
    """Return the sampling noise of the next positions of several sequences.

    Args:
        sequences: the sequences.
        lengths: number of candidates wanted of each.
        vocabulary: number of tokens that noise is made for.
        listed: ids of the tokens that may be guessed, on the CPU; None for all.
        sureness: the drafter's sureness will depend on the noise.
    """
    noise = [s.noise_ahead(max(lengths), vocabulary, listed, sureness) for s in sequences]
    weights = [sequence.noise_weight for sequence in sequences]
    return Draws(torch.stack(noise), [sequence.temperature for sequence in sequences], weights)
