"""Passes with known tokens, for training: look-ahead rows with gradients, and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from passlm.layers.lora import RowSplit
from passlm.layers.swapped import checkpointed, head_left_out
from passlm.model.cache import RowCache, as_prefix
from passlm.model.pass_records import Hung, LookAheadRows, PassRow
from passlm.model.target import Target
from passlm.plan import Layout, Plan


def look_ahead_pass(
    target: Target,
    tokens: Tensor,
    layouts: Sequence[Layout],
    look_ahead: LookAheadRows,
    checkpointing: bool = False,
) -> Hung:
    """Run look-ahead rows of known sequences, with gradients to `look_ahead` alone.

    The sequences go through once, without gradients. Then all groups of a layout go through in one
    pass, each seeing its sequence up to its own real row, and itself.

    Args:
        target: the frozen model.
        tokens: token ids, `[B, S]`.
        layouts: one for each sequence, of a plan with `S` real rows; equal numbers of rows.
        look_ahead: receives the gradients.
        checkpointing: compute each layer again for its gradients, to save memory.
    """
    cache = target.new_cache(len(tokens))
    rows = tokens.shape[1]
    own_hidden = _read(target, tokens, cache)
    for index in range(len(tokens)):
        cache.settle(index, rows)
    device = target.device
    depth = torch.stack([layout.look_ahead[rows:] for layout in layouts]).to(device)
    offset = torch.stack([layout.offset[rows:] for layout in layouts]).to(device)
    seen = torch.stack([layout.visible[rows:] for layout in layouts]).to(device)
    cache.filled = seen.shape[2]
    with ExitStack() as stack:
        stack.enter_context(target.lock)
        if look_ahead.lora is not None:
            stack.enter_context(look_ahead.lora.applied(RowSplit()))
        if checkpointing:
            stack.enter_context(checkpointed(target.model, look_ahead.lora))
        hidden = stack.enter_context(head_left_out(target.output_layer))
        embeddings = look_ahead.inputs.to(target.dtype)[depth - 1]
        mask = target.inputs.masks(seen, cache, offset)
        target.eager.forward(as_prefix(cache), embeddings, offset, mask)
    sequences = torch.arange(len(tokens), device=device)[:, None].expand_as(depth)
    return Hung(hidden[0], own_hidden, depth, offset, sequences)


def hidden_states(target: Target, tokens: Tensor) -> Tensor:
    """Return the inputs of the output layer for known sequences, `[B, S, d_model]`, no gradients.

    Args:
        target: the model.
        tokens: token ids, `[B, S]`.
    """
    return _read(target, tokens, target.new_cache(len(tokens)))


def _read(target: Target, tokens: Tensor, cache: RowCache) -> Tensor:
    rows = tokens.shape[1]
    causal = Plan(rows - 1, (0,) * rows)
    with target.lock, torch.no_grad(), head_left_out(target.output_layer) as hidden:
        target.eager(cache, [PassRow(own, causal) for own in tokens.tolist()], None)
    return hidden[0]
