"""Visibility masks: the cache slots that each row of a pass may attend to.

Supports full and sliding-window attention. Pure functions of lengths and layouts; converting a mask
to the format that a model expects is left to `model/target.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def visibility(
    lengths: Sequence[int],
    visible: Sequence[Tensor],
    device: torch.device,
    slots: int | None = None,
) -> Tensor:
    """Return the cache slots that each row of a pass may attend to.

    Args:
        lengths: number of settled slots of each batch row; the rows of the pass follow them.
        visible: visibility within the pass, `[Q_b, Q_b]` for each batch row, from its layout.
        device: device of the result.
        slots: total number of slots, `S`; None for `max(lengths) + Q`, the slots in use.

    Returns:
        `[B, Q, S]` bool. Padding rows, which fill up shorter batch rows, see only
        themselves, so that no row of the softmax is empty.
    """
    rows = max(len(own) for own in visible)
    slots = max(lengths) + rows if slots is None else slots
    seen = torch.zeros(len(lengths), rows, slots, dtype=torch.bool)
    filler = torch.eye(rows, dtype=torch.bool)
    for index, (length, own) in enumerate(zip(lengths, visible, strict=True)):
        used = len(own)
        seen[index, :used, :length] = True
        seen[index, :used, length : length + used] = own
        if used < rows:
            seen[index, used:, length : length + rows] = filler[used:]
    return seen.to(device)


def within_window(lengths: Sequence[int], positions: Tensor, filled: int, window: int) -> Tensor:
    """Return the slots inside each row's sliding window, by position.

    Args:
        lengths: number of settled slots of each batch row; slot `s` below it holds position `s`.
        positions: position of each row of the pass, `[B, Q]`.
        filled: number of slots, `S`.
        window: number of positions that a row sees, including its own.

    Returns:
        `[B, Q, S]` bool.
    """
    slots = torch.arange(filled, device=positions.device).repeat(len(lengths), 1)
    for index, length in enumerate(lengths):
        slots[index, length : length + positions.shape[1]] = positions[index]
    return positions[:, :, None] - slots[:, None, :] < window
