"""A fixed-capacity key-value cache in which every row of the batch has its own length.

A pass writes its rows behind each batch row's length; settling is setting the length, and what
lies behind it is overwritten by the next pass. Capacity grows in blocks. Which slots a row may
see is left to `target.py`, which makes the masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

BLOCK = 128  # slots by which capacity grows: a copy every 128 tokens, little memory unused


class RowLayer(StaticLayer):  # type: ignore[no-untyped-call]  # its base's hook
    """Keys and values of one layer, `[B, heads, capacity, d_head]`, written where it is told."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__(max_cache_len=0)
        self.cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values `[B, heads, Q, d_head]`; give all filled slots."""
        if self.keys is None or self.values is None:
            self.keys = self._empty(key_states)
            self.values = self._empty(value_states)
            self.is_initialized = True
        self.keys = self._grown(self.keys)
        self.values = self._grown(self.values)
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        filled = self.cache.filled
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def slots(self, heads: int, d_head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `RowCache.slots`."""
        if self.keys is None or self.values is None:
            none = torch.empty(len(self.cache.lengths), heads, 0, d_head, dtype=dtype)
            self.keys, self.values = self._empty(none), self._empty(none)
            self.is_initialized = True
        self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        return self.keys, self.values

    def _empty(self, states: Tensor) -> Tensor:
        batch, heads, _, d_head = states.shape
        # Zeros, not garbage: a masked slot has weight 0, and 0 times a NaN would be a NaN.
        return states.new_zeros(batch, heads, self.cache.capacity, d_head)

    def _grown(self, stored: Tensor) -> Tensor:
        missing = self.cache.capacity - stored.shape[2]
        return stored if missing <= 0 else torch.nn.functional.pad(stored, (0, 0, 0, missing))

    def _write(self, stored: Tensor, states: Tensor) -> None:
        start, slots = self.cache.write_slots
        if slots is None:
            stored[:, :, start : start + states.shape[2]] = states
        else:
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            stored[rows, :, slots] = states.transpose(1, 2)

    def get_seq_length(self) -> int:
        """The longest settled length in the batch."""
        return max(self.cache.lengths, default=0)

    def get_max_length(self) -> int:
        """Slots allocated now; more are added as needed."""
        return self.cache.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys a pass of `query_length` rows meets, and the first one's slot."""
        return self.cache.filled, 0


class RowCache(Cache):
    """The cache of a batch whose rows advance at their own pace.

    Attributes:
        lengths: settled rows of each batch row; slots at and behind it are free.
        capacity: slots allocated for each batch row.
        filled: slots in use by the pass under way.
    """

    def __init__(self, layers: int, batch: int = 1) -> None:
        self.lengths = [0] * batch
        self.capacity = 0
        self.filled = 0
        self.write_slots: tuple[int, Tensor | None] = (0, None)
        self.row_layers = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.row_layers))

    def begin(self, rows: int, device: torch.device) -> None:
        """Make room for a pass of `rows` rows behind every batch row's length."""
        self.filled = max(self.lengths) + rows
        self.capacity = max(self.capacity, _blocks(self.filled))
        start = self.lengths[0]
        if all(length == start for length in self.lengths):
            self.write_slots = (start, None)  # one slice: no index to build, no gather
        else:
            lengths = torch.tensor(self.lengths, device=device)
            self.write_slots = (0, lengths[:, None] + torch.arange(rows, device=device))

    def slots(
        self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, `[B, heads, capacity, d_head]`, for others to write to.

        Args:
            sizes: heads and `d_head` of each layer.
            dtype: of layers never written before.
        """
        return [
            layer.slots(heads, d_head, dtype)
            for layer, (heads, d_head) in zip(self.row_layers, sizes, strict=True)
        ]

    def settle(self, row: int, count: int) -> None:
        """Keep the first `count` rows that the last pass wrote for batch row `row`."""
        self.lengths[row] += count

    def append(self, other: RowCache) -> None:
        """Take over the batch rows of `other`, which must not be used any more."""
        self.capacity = max(self.capacity, other.capacity)
        counts = len(self.lengths), len(other.lengths)
        for mine, theirs in zip(self.row_layers, other.row_layers, strict=True):
            mine.keys = _joined((mine.keys, theirs.keys), counts, self.capacity)
            mine.values = _joined((mine.values, theirs.values), counts, self.capacity)
            mine.is_initialized = mine.keys is not None
        self.lengths += other.lengths

    def copied(self, row: int, count: int) -> RowCache:
        """The first `count` settled slots of one batch row, as a cache of its own."""
        copy = RowCache(len(self.row_layers))
        copy.lengths, copy.capacity = [count], _blocks(count)
        for mine, theirs in zip(self.row_layers, copy.row_layers, strict=True):
            if mine.keys is not None and mine.values is not None:
                theirs.keys = _first(mine.keys[row : row + 1], count, copy.capacity)
                theirs.values = _first(mine.values[row : row + 1], count, copy.capacity)
                theirs.is_initialized = True
        return copy

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these batch rows, in this order, and the blocks that they fill."""
        self.lengths = [self.lengths[row] for row in rows]
        self.capacity = _blocks(max(self.lengths, default=0))
        for layer in self.row_layers:
            if layer.keys is not None and layer.values is not None:
                index = torch.tensor(list(rows), device=layer.keys.device, dtype=torch.long)
                layer.keys = layer.keys[:, :, : self.capacity].index_select(0, index)
                layer.values = layer.values[:, :, : self.capacity].index_select(0, index)


class PrefixLayer(StaticLayer):  # type: ignore[no-untyped-call]  # its base's hook
    """Keys and values of a text that rows are hung on without being kept: for training."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.prefix = keys, values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The text's keys and values followed by those given, `[B, heads, S + R, d_head]`."""
        keys, values = self.prefix
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self) -> int:
        """Tokens of the text, `S`."""
        return int(self.prefix[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass of `query_length` rows meets, and the first one's slot."""
        return self.get_seq_length() + query_length, 0


def as_prefix(cache: RowCache) -> Cache:
    """The settled rows of a batch of equal lengths, to hang look-ahead rows on with gradients."""
    length = cache.lengths[0]
    layers = []
    for layer in cache.row_layers:
        assert layer.keys is not None, "the texts were not run"
        assert layer.values is not None, "the texts were not run"
        layers.append(PrefixLayer(layer.keys[:, :, :length], layer.values[:, :, :length]))
    return Cache(layers=list(layers))


def _blocks(slots: int) -> int:
    """The least capacity that holds so many slots."""
    return -(-slots // BLOCK) * BLOCK


def _first(stored: Tensor, count: int, capacity: int) -> Tensor:
    """A copy of the first slots, with free ones behind them."""
    return torch.nn.functional.pad(stored[:, :, :count], (0, 0, 0, capacity - count)).clone()


def _joined(
    parts: tuple[Tensor | None, Tensor | None], counts: tuple[int, int], capacity: int
) -> Tensor | None:
    """Both parts along the batch, at one capacity; a part never written counts as zeros."""
    written = [part for part in parts if part is not None]
    if not written:
        return None
    padded = []
    for part, count in zip(parts, counts, strict=True):
        if part is None:
            part = written[0].new_zeros(count, *written[0].shape[1:])
        padded.append(torch.nn.functional.pad(part, (0, 0, 0, capacity - part.shape[2])))
    return torch.cat(padded)
