"""Losses of look-ahead rows, and accepted lengths.

All losses are sums over rows, so that rows can be processed in parts. Logits over the whole
vocabulary for all rows of a step would take most of the memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from passlm.drafts.sampler_head import Embeddings, SamplerHead, weighed
from passlm.model.pass_records import Hung
from passlm.model.target import Target
from passlm.train.config import Loss

PART_NUMBERS = 2**23  # logits in memory at once: 32 MiB in float32


@dataclass(frozen=True)
class Guess:
    """Predictions of rows: logits over the vocabulary or over each row's own shortlist.

    Attributes:
        logits: `[R, N]` float32.
        tokens: Ids of the tokens that the logits belong to, `[R, N]`; None for the whole vocabulary
            in order.
    """

    logits: Tensor
    tokens: Tensor | None = None

    def best(self) -> Tensor:
        """Return the most likely token of each row, `[R]`."""
        best = self.logits.argmax(-1, keepdim=True)
        return (best if self.tokens is None else self.tokens.gather(1, best)).squeeze(1)


@dataclass(frozen=True)
class KnownRows(ABC):
    """Complete groups of rows that predict tokens of known sequences.

    Attributes:
        hidden: Hidden states, `[R, d_model]`.
        depth: Depth `j` of each row, `[R]`; 1 starts a group.
        text: Token ids of the sequences, `[T, S]`.
        at: Sequence index and position of each row, both `[R]`.
    """

    hidden: Tensor
    depth: Tensor
    text: Tensor
    at: tuple[Tensor, Tensor]

    @abstractmethod
    def taught(self, guess: Guess) -> Tensor:
        """Return the target's probabilities of the guess's tokens at each row, `[R, N]`."""

    @property
    def wanted(self) -> Tensor:
        """Token after each row's position, which the row predicts, `[R]`."""
        return self.text[self.at[0], self.at[1] + 1]

    def before(self, tokens: int) -> Tensor:
        """Return the tokens up to each row's position, latest first, `[R, tokens]`.

        The first token of a sequence is repeated where the sequence is too short.
        """
        back = torch.arange(tokens, device=self.text.device)
        return self.text[self.at[0][:, None], (self.at[1][:, None] - back).clamp(min=0)]


@dataclass(frozen=True)
class Part(KnownRows):
    """Rows with the target's own logits; training needs the gradient of `hidden`.

    Attributes:
        teacher: The target's logits at each row's position, `[R, V]` float32.
    """

    teacher: Tensor

    def taught(self, guess: Guess) -> Tensor:
        """Return the target's probabilities of the guess's tokens at each row, `[R, N]`."""
        return self.chances if guess.tokens is None else self.chances.gather(1, guess.tokens)

    def guess(self, target: Target) -> Guess:
        """Return the rows' predictions without the sampler head."""
        return Guess(target.logits(self.hidden).float())

    def weighed(self, guess: Guess, head: SamplerHead, tables: Embeddings) -> Guess:
        """Return the predictions rescored by the sampler head from the preceding tokens."""
        before = self.before(head.tokens)
        tokens, logits = weighed(head, tables, guess.logits, self.hidden, before)
        return Guess(logits.float(), tokens)

    @cached_property
    def chances(self) -> Tensor:
        """The target's distribution at each row's position, `[R, V]`."""
        return self.teacher.softmax(-1)

    def hits(self, guess: Guess) -> Tensor:
        """Return True for rows whose most likely token is the target's own, `[R]`."""
        return guess.best() == self.teacher.argmax(-1)


def parts(
    target: Target, hung: Hung, text: Tensor, temperature: float = 1.0, gradients: bool = False
) -> Iterator[tuple[slice, Part]]:
    """Yield the rows of sequences in parts of complete groups, each with its slice of the rows.

    Args:
        target: Model that the rows are trained for.
        hung: Look-ahead rows of the sequences.
        text: Token ids of the sequences, `[T, S]`. Each row's `position + 1` must lie inside its
            sequence.
        temperature: Divisor of the teacher's logits.
        gradients: Let the hidden states of each part collect a gradient of their own.
    """
    hidden = hung.hidden.detach().flatten(0, 1)
    depth, position, texts = hung.depth.flatten(), hung.position.flatten(), hung.text.flatten()
    most = max(1, PART_NUMBERS // target.vocabulary)
    starts = (depth == 1).nonzero().squeeze(1).tolist()
    for start, end in spans([*starts, len(depth)], most):
        at = texts[start:end], position[start:end]
        with torch.no_grad():
            teacher = target.logits(hung.text_hidden[at]).float() / temperature
        yield (
            slice(start, end),
            Part(
                hidden[start:end].requires_grad_(gradients),
                depth[start:end],
                text,
                at,
                teacher,
            ),
        )


def spans(bounds: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield spans of complete groups of at most `most` rows; a single group may be longer."""
    start = bounds[0]
    for bound, following in zip(bounds[1:], [*bounds[2:], None], strict=True):
        if following is None or following - start > most:
            yield start, bound
            start = bound


def row_losses(kind: Loss, guess: Guess, part: KnownRows) -> Tensor:
    """Compute the loss of the given kind at each row, `[R]`; see the functions below."""
    if kind == "cross-entropy":
        return cross_entropy(guess, part)
    if kind == "distillation":
        return distillation(guess, part)
    return refusal(guess, part)


def cross_entropy(guess: Guess, part: KnownRows) -> Tensor:
    """Compute the negative log-probability of the sequence's token: the paper's loss.

    The loss is 0 at rows whose shortlist does not contain the token.

    Returns:
        `[R]`, in nats.
    """
    log_q = guess.logits.log_softmax(-1)
    if guess.tokens is None:
        return -log_q.gather(1, part.wanted[:, None]).squeeze(1)
    return -(log_q * (guess.tokens == part.wanted[:, None])).sum(-1)


def distillation(guess: Guess, part: KnownRows) -> Tensor:
    """Compute the cross-entropy to the target's own distribution at the row's position.

    With a shortlist, only the tokens on it count.

    Returns:
        `[R]`, in nats. Over the whole vocabulary, the target's entropy is the lower bound.
    """
    teacher = part.taught(guess)
    return -(teacher * guess.logits.log_softmax(-1)).sum(-1)


def refusal(guess: Guess, part: KnownRows) -> Tensor:
    """Compute the probability that a drafted token is rejected, `1 - sum min(p, q)`.

    This loss optimises acceptance directly. Each row is weighted by the probability that decoding
    reaches it, the product of the acceptance rates before it in its group. The gradient comes from
    tokens that both row and target consider likely, so untrained rows learn little from it: start
    with another loss.

    Returns:
        `[R]`, each between 0 and 1.
    """
    teacher = part.taught(guess)
    accepted = torch.minimum(teacher, guess.logits.softmax(-1)).sum(-1)
    return _reached(accepted.detach(), part.depth) * (1 - accepted)


def _reached(accepted: Tensor, depth: Tensor) -> Tensor:
    """Return the product of the acceptance rates before each row in its group, `[R]`."""
    logs = accepted.clamp(min=1e-6).log()
    before = logs.cumsum(0) - logs
    starts = (depth == 1).nonzero().squeeze(1)
    group = (depth == 1).cumsum(0) - 1
    return (before - before[starts][group]).exp()


def accepted_lengths(hits: Tensor, depth: Tensor) -> Tensor:
    """Count the hits of each group before its first miss.

    Args:
        hits: `[R]` bool, group after group.
        depth: Depth `j` of each row, `[R]`; 1 starts a group.

    Returns:
        One count per group, `[groups]`: the accepted length in greedy decoding.
    """
    group = (depth == 1).cumsum(0) - 1
    misses = (~hits).long().cumsum(0)
    groups = int(group[-1]) + 1
    before = torch.zeros(groups, dtype=torch.long, device=hits.device)
    starts = (depth == 1).nonzero().squeeze(1)
    before[group[starts]] = misses[starts] - (~hits[starts]).long()
    alive = misses == before[group]
    return torch.zeros_like(before).index_add_(0, group, alive.long())
