"""The tensors of a pass: input embeddings, positions and attention masks, from plans and a cache.

Eager and compiled passes are built here alike. Running them is left to `eager.py` and
`compiled.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from passlm.layers.attention import can_group
from passlm.masks import visibility, within_window
from passlm.model.cache import RowCache
from passlm.model.pass_records import LookAheadRows, PassRow
from passlm.model.supported import attention, layer_kinds, window_of
from passlm.plan import Layout


@dataclass(frozen=True)
class PassInputs:
    """The inputs of one pass of a batch; `Q` is the number of rows of the longest plan.

    Attributes:
        layouts: layout of each batch row.
        embeddings: `[B, Q, d_model]`.
        lengths: settled tokens of each batch row, `[B, 1]`.
        positions: `[B, Q]`.
        mask: as the model's `forward` takes it: None for a single row that sees every slot, one
            `[B, 1, Q, S]` mask, or one for each kind of layer.
    """

    layouts: Sequence[Layout]
    embeddings: Tensor
    lengths: Tensor
    positions: Tensor
    mask: Any

    @property
    def longest(self) -> int:
        """`Q`."""
        return self.positions.shape[1]


class InputBuilder:
    """Builds the inputs of passes for one model.

    Args:
        model: the model.
        embedding: its input embeddings.

    Attributes:
        kinds: kinds of attention that its layers have.
        grouped: whether its passes compute attention by `layers/attention.py`.
        additive: whether masks are added to scores. Torch's CPU kernel would convert a boolean mask
            in every layer; here it is converted once.
    """

    def __init__(self, model: PreTrainedModel, embedding: nn.Embedding) -> None:
        config = model.config.get_text_config()
        self._embedding = embedding
        self._window = window_of(config)
        self.kinds = layer_kinds(config, self._window)
        self.grouped = can_group(model)
        self.additive = attention(model) == "eager" or self.grouped

    @property
    def mask_type(self) -> torch.dtype:
        """The type of the masks."""
        return self._embedding.weight.dtype if self.additive else torch.bool

    def build(
        self,
        cache: RowCache,
        rows: Sequence[PassRow],
        look_ahead: LookAheadRows | None,
        whole_cache: bool = False,
    ) -> PassInputs:
        """Make room in the cache for a pass and return its inputs.

        Args:
            cache: a cache with one batch row for each of `rows`.
            rows: tokens and plan of each batch row.
            look_ahead: look-ahead rows; None where no plan has a group.
            whole_cache: give masks for every slot of the cache, not only for those in use. Compiled
                passes read whole blocks.
        """
        device = self._embedding.weight.device
        layouts = [row.plan.layout() for row in rows]
        longest = max(len(layout.offset) for layout in layouts)
        cache.begin(longest, device)
        if whole_cache:
            cache.filled = cache.capacity
        offsets = padded([layout.offset for layout in layouts], longest).to(device)
        lengths = torch.tensor(cache.lengths, device=device)[:, None]
        positions = lengths + offsets
        if whole_cache or len(layouts) > 1 or longest > 1 or self._windowed(cache) or self.grouped:
            visible = [layout.visible for layout in layouts]
            slots = cache.capacity if whole_cache else None
            full = visibility(cache.lengths, visible, device, slots)
            mask = self.masks(full, cache, positions)
        else:
            mask = None
        embeddings = self._embeddings(rows, longest, look_ahead)
        return PassInputs(layouts, embeddings, lengths, positions, mask)

    def masks(self, full: Tensor, cache: RowCache, positions: Tensor) -> Any:
        """Return masks as the model's `forward` takes them: one, or one for each kind of layer.

        Args:
            full: slots that rows of full attention see, `[B, Q, S]` bool.
            cache: the cache of the pass.
            positions: `[B, Q]`.
        """
        masks = {}
        for kind in self.kinds:
            seen = full if kind == "full_attention" else self._within_window(full, cache, positions)
            masks[kind] = self._as_model_takes(seen)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _embeddings(
        self, rows: Sequence[PassRow], longest: int, look_ahead: LookAheadRows | None
    ) -> Tensor:
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        inputs: Tensor = self._embedding(tokens.to(self._embedding.weight.device))
        for index, row in enumerate(rows):
            group_rows = row.plan.layout().look_ahead[len(row.tokens) :]
            if len(group_rows):
                assert look_ahead is not None, "a plan has look-ahead rows, but none were given"
                start = len(row.tokens)
                inputs[index, start : start + len(group_rows)] = look_ahead.inputs[
                    (group_rows - 1).to(look_ahead.inputs.device)
                ].to(inputs)
        return inputs

    def _windowed(self, cache: RowCache) -> bool:
        return self._window is not None and cache.filled > self._window

    def _within_window(self, full: Tensor, cache: RowCache, positions: Tensor) -> Tensor:
        if self._window is None or not self._windowed(cache):
            return full
        return full & within_window(cache.lengths, positions, cache.filled, self._window)

    def _as_model_takes(self, seen: Tensor) -> Tensor:
        mask = seen[:, None]  # [B, 1, Q, S]
        if not self.additive:
            return mask
        dtype = self._embedding.weight.dtype
        blocked = torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, blocked)


def padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Return rows of integers as one tensor, `[B, length]`, filled up with 0."""
    filled = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = row
    return filled
