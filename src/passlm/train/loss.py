"""Losses at the look-ahead rows, and the accepted length they stand for.

All of them are sums over rows, so that rows may come in parts: logits of a whole vocabulary for
every row of a step would be most of the memory.
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

PART_NUMBERS = 2**23  # logits held at once: 32 MiB in float32


@dataclass(frozen=True)
class Guess:
    """What rows guess: logits over the vocabulary or over each row's own shortlist.

    Attributes:
        logits: `[R, N]` float32.
        tokens: ids that the logits belong to, `[R, N]`; None for the whole vocabulary in order.
    """

    logits: Tensor
    tokens: Tensor | None = None

    def best(self) -> Tensor:
        """The best token of each row, `[R]`."""
        best = self.logits.argmax(-1, keepdim=True)
        return (best if self.tokens is None else self.tokens.gather(1, best)).squeeze(1)


@dataclass(frozen=True)
class KnownRows(ABC):
    """Some rows that guess tokens of known texts, whole groups.

    Attributes:
        hidden: `[R, d_model]`.
        depth: `j` of each row, `[R]`; 1 starts a group.
        text: token ids of the texts, `[T, S]`.
        at: text and position of each row, both `[R]`.
    """

    hidden: Tensor
    depth: Tensor
    text: Tensor
    at: tuple[Tensor, Tensor]

    @abstractmethod
    def taught(self, guess: Guess) -> Tensor:
        """The target's chances of the tokens guessed among, where each row stands, `[R, N]`."""

    @property
    def wanted(self) -> Tensor:
        """The text's token behind each row's position, which the row predicts, `[R]`."""
        return self.text[self.at[0], self.at[1] + 1]

    def before(self, tokens: int) -> Tensor:
        """The text's tokens up to each row's position, the last one first, `[R, tokens]`.

        Where the text has not so many, its first one is there again.
        """
        back = torch.arange(tokens, device=self.text.device)
        return self.text[self.at[0][:, None], (self.at[1][:, None] - back).clamp(min=0)]


@dataclass(frozen=True)
class Part(KnownRows):
    """Rows with the target's own logits; the gradient of `hidden` is what is wanted.

    Attributes:
        teacher: the target's logits where each row stands, `[R, V]` float32.
    """

    teacher: Tensor

    def taught(self, guess: Guess) -> Tensor:
        """The target's chances of the tokens guessed among, where each row stands, `[R, N]`."""
        return self.chances if guess.tokens is None else self.chances.gather(1, guess.tokens)

    def guess(self, target: Target) -> Guess:
        """What the rows guess by themselves."""
        return Guess(target.logits(self.hidden).float())

    def weighed(self, guess: Guess, head: SamplerHead, tables: Embeddings) -> Guess:
        """The same with the tokens before known."""
        before = self.before(head.tokens)
        tokens, logits = weighed(head, tables, guess.logits, self.hidden, before)
        return Guess(logits.float(), tokens)

    @cached_property
    def chances(self) -> Tensor:
        """The target's own distribution where each row stands, `[R, V]`."""
        return self.teacher.softmax(-1)

    def hits(self, guess: Guess) -> Tensor:
        """Whether each row's best token is the target's own, `[R]`."""
        return guess.best() == self.teacher.argmax(-1)


def parts(
    target: Target, hung: Hung, text: Tensor, temperature: float = 1.0, gradients: bool = False
) -> Iterator[tuple[slice, Part]]:
    """All rows of some texts in parts of whole groups, each with its place among them.

    Args:
        target: the model.
        hung: look-ahead rows of the texts.
        text: token ids of the texts, `[T, S]`; each row's `position + 1` lies inside its own.
        temperature: the teacher's distribution is that of its logits divided by this.
        gradients: give every part hidden states that gather a gradient of their own.
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
    """From bound to bound, as far as `most` goes; a single group may be longer."""
    start = bounds[0]
    for bound, following in zip(bounds[1:], [*bounds[2:], None], strict=True):
        if following is None or following - start > most:
            yield start, bound
            start = bound


def row_losses(kind: Loss, guess: Guess, part: KnownRows) -> Tensor:
    """The loss of that name at each row, `[R]`; see the functions below."""
    if kind == "cross-entropy":
        return cross_entropy(guess, part)
    if kind == "distillation":
        return distillation(guess, part)
    return refusal(guess, part)


def cross_entropy(guess: Guess, part: KnownRows) -> Tensor:
    """Negative log-probability of the text's token: the paper's loss.

    Where the token is not on a row's shortlist, nothing is to be learnt: 0.

    Returns:
        `[R]`, in nats.
    """
    log_q = guess.logits.log_softmax(-1)
    if guess.tokens is None:
        return -log_q.gather(1, part.wanted[:, None]).squeeze(1)
    return -(log_q * (guess.tokens == part.wanted[:, None])).sum(-1)


def distillation(guess: Guess, part: KnownRows) -> Tensor:
    """Cross-entropy to the target's own distribution at the row's position.

    Of a shortlist the part of the distribution that lies on it counts.

    Returns:
        `[R]`, in nats; the target's entropy is the floor over a whole vocabulary.
    """
    teacher = part.taught(guess)
    return -(teacher * guess.logits.log_softmax(-1)).sum(-1)


def refusal(guess: Guess, part: KnownRows) -> Tensor:
    """Chance that a draft drawn from the row is refused, `1 - sum min(p, q)`, where it is reached.

    The loss on the acceptance itself: every row counts by the chance that decoding gets there,
    the product of the acceptances before it in its group. Its gradient comes from the tokens that
    row and target both hold likely, so it teaches little to rows that guess at random: begin with
    another loss.

    Returns:
        `[R]`, each between 0 and 1.
    """
    teacher = part.taught(guess)
    accepted = torch.minimum(teacher, guess.logits.softmax(-1)).sum(-1)
    return _reached(accepted.detach(), part.depth) * (1 - accepted)


def _reached(accepted: Tensor, depth: Tensor) -> Tensor:
    """The product of the acceptances before each row in its group, `[R]`."""
    logs = accepted.clamp(min=1e-6).log()
    before = logs.cumsum(0) - logs
    starts = (depth == 1).nonzero().squeeze(1)
    group = (depth == 1).cumsum(0) - 1
    return (before - before[starts][group]).exp()


def accepted_lengths(hits: Tensor, depth: Tensor) -> Tensor:
    """How many rows of each group hit before the first miss.

    Args:
        hits: `[R]` bool, group after group.
        depth: `j` of each row, `[R]`; 1 starts a group.

    Returns:
        One number a group, `[groups]`: the accepted length greedy decoding would count.
    """
    group = (depth == 1).cumsum(0) - 1
    misses = (~hits).long().cumsum(0)
    groups = int(group[-1]) + 1
    before = torch.zeros(groups, dtype=torch.long, device=hits.device)
    starts = (depth == 1).nonzero().squeeze(1)
    before[group[starts]] = misses[starts] - (~hits[starts]).long()
    alive = misses == before[group]
    return torch.zeros_like(before).index_add_(0, group, alive.long())
