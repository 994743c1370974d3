"""Losses at the look-ahead rows, and the accepted length they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from passlm.target import Hung
from passlm.train.config import Loss


def loss_of(kind: Loss, hung: Hung, text: Tensor) -> Tensor:
    """The loss of that name; see the functions below."""
    if kind == "cross-entropy":
        return cross_entropy(hung, text)
    return distillation(hung) if kind == "distillation" else refusal(hung)


def cross_entropy(hung: Hung, text: Tensor) -> Tensor:
    """Mean negative log-probability of the text's tokens: the paper's loss.

    Args:
        hung: look-ahead rows of the texts.
        text: token ids, `[B, S]`; each row's `position + 1` lies inside it.

    Returns:
        A number, in nats a row.
    """
    wanted = text.gather(1, hung.position + 1)
    return torch.nn.functional.cross_entropy(hung.logits.float().flatten(0, 1), wanted.flatten())


def distillation(hung: Hung) -> Tensor:
    """Mean cross-entropy to the target's own distribution at the row's position.

    Returns:
        A number, in nats a row; the target's entropy is its floor.
    """
    teacher = _at_rows(hung).float().softmax(-1)
    return -(teacher * hung.logits.float().log_softmax(-1)).sum(-1).mean()


def refusal(hung: Hung) -> Tensor:
    """Mean chance that a draft drawn from the row is refused, `1 - sum min(p, q)`.

    The loss on the acceptance itself. Its gradient comes from the tokens that row and target both
    hold likely, so it teaches little to rows that guess at random: begin with another loss.

    Returns:
        A number between 0 and 1.
    """
    teacher = _at_rows(hung).float().softmax(-1)
    return 1 - torch.minimum(teacher, hung.logits.float().softmax(-1)).sum(-1).mean()


def _at_rows(hung: Hung) -> Tensor:
    """The target's logits where each look-ahead row stands, `[B, R, V]`."""
    texts = torch.arange(len(hung.position), device=hung.position.device)[:, None]
    return hung.text_logits[texts, hung.position]


def greedy_hits(hung: Hung) -> Tensor:
    """Whether each look-ahead row's best token is the target's own at its position, `[B, R]`."""
    return hung.logits.argmax(-1) == _at_rows(hung).argmax(-1)


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
