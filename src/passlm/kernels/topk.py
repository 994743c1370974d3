"""The likeliest tokens of rows over a whole vocabulary.

On a CPU torch's `argmax` and `topk` take 2 to 5 times as long as the largest number of each block
of tokens and a search among those blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64  # tokens; vocabularies are mostly a multiple


def likeliest(logits: Tensor) -> Tensor:
    """The best token of each row, `[R, V]` to `[R]`; of equal ones the first."""
    logits = logits.float()
    if not _in_blocks(logits):
        return logits.argmax(-1)
    blocks = logits.view(len(logits), -1, _BLOCK)
    block = blocks.amax(-1).argmax(-1)
    within = blocks[torch.arange(len(logits)), block].argmax(-1)
    return block * _BLOCK + within


def shortlist(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best tokens of each row, best first: their logits and ids, both `[R, count]`.

    Args:
        logits: `[R, V]`.
        count: at most `V`; of equal tokens at the end of the list any may be left out.
    """
    logits = logits.float()
    if not _in_blocks(logits) or count * _BLOCK >= logits.shape[1]:
        best, tokens = logits.topk(count)
        return best, tokens
    blocks = logits.view(len(logits), -1, _BLOCK)
    # No token is among the best unless its block is, by its largest one.
    chosen = blocks.amax(-1).topk(count, sorted=False).indices
    among = blocks.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    best, places = among.topk(count)
    tokens = chosen.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK
    return best, tokens


def _in_blocks(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.shape[1] % _BLOCK == 0
