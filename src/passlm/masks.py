"""Which cache slots the rows of a pass may see, for full and for sliding attention.

Pure functions of lengths and layouts; the form a model takes a mask in is left to
`model/target.py`.
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
    """Which cache slot each row of a pass may see.

    Args:
        lengths: settled slots of each batch row; the pass's own rows follow them.
        visible: `[Q_b, Q_b]` of each batch row's layout.
        device: where the result is wanted.
        slots: how many there are, `S`; None for those in use, `max(lengths) + Q`.

    Returns:
        `[B, Q, S]` bool. Rows that only fill up a batch see themselves alone, so
        that no row of the softmax is empty.
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
    """Which slots lie inside each row's sliding window, by position.

    Args:
        lengths: settled slots of each batch row; slot `s` below it holds position `s`.
        positions: position of each row of the pass, `[B, Q]`.
        filled: number of slots, `S`.
        window: how many positions a row sees, itself included.

    Returns:
        `[B, Q, S]` bool.
    """
    slots = torch.arange(filled, device=positions.device).repeat(len(lengths), 1)
    for index, length in enumerate(lengths):
        slots[index, length : length + positions.shape[1]] = positions[index]
    return positions[:, :, None] - slots[:, None, :] < window
