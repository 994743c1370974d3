"""A key-value cache in which every row of the batch has its own length.

A pass writes its rows after each batch row's length. Settling rows adds to the length; slots after
it are overwritten by the next pass. Capacity grows in blocks. Masks, which hide the slots that a
row may not see, are left to `pass_inputs.py`.

All layers share one block of memory. Many smaller blocks of sequences that come and go would
fragment it. Batch rows that leave make room for those that join.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

BLOCK = 128  # slots by which capacity grows: one copy every 128 tokens, little unused memory


class RowLayer(StaticLayer):  # type: ignore[no-untyped-call]  # its base's hook
    """Keys and values of one layer, `[B, heads, capacity, d_head]`."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__(max_cache_len=0)
        # A weak reference, so that memory is freed as soon as the cache is dropped.
        self._cache = weakref.ref(cache)
        self.stored: tuple[Tensor, Tensor] | None = None  # of all `held` rows

    @property
    def cache(self) -> RowCache:
        """The cache that the layer belongs to."""
        cache = self._cache()
        assert cache is not None, "a layer is used as a part of its cache"
        return cache

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Store keys and values in these tensors, `[held, heads, capacity, d_head]`."""
        self.stored = keys, values
        self.show()

    def show(self) -> None:
        """Set `keys` and `values` to views of the current batch rows."""
        if self.stored is not None:
            count = len(self.cache.lengths)
            self.keys, self.values = self.stored[0][:count], self.stored[1][:count]
            self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values `[B, heads, Q, d_head]`; return all filled slots."""
        if self.stored is None:
            self.hold(self._empty(key_states), self._empty(value_states))
        assert self.keys is not None, "just made"
        assert self.values is not None, "just made"
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        filled = self.cache.filled
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def _empty(self, states: Tensor) -> Tensor:
        _, heads, _, d_head = states.shape
        # Zeros, not garbage: a masked slot has weight 0, and 0 times a NaN would be a NaN.
        return states.new_zeros(self.cache.held, heads, self.cache.capacity, d_head)

    def _write(self, stored: Tensor, states: Tensor) -> None:
        start, slots = self.cache.write_slots
        if slots is None:
            stored[:, :, start : start + states.shape[2]] = states
        else:
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            stored[rows, :, slots] = states.transpose(1, 2)

    def get_seq_length(self) -> int:
        """Return the longest settled length in the batch."""
        return max(self.cache.lengths, default=0)

    def get_max_length(self) -> int:
        """Return the number of slots allocated now; more are added as needed."""
        return self.cache.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a pass reads, and the first one's slot."""
        return self.cache.filled, 0


@dataclass(frozen=True)
class _Shape:
    """Sizes of a layer, and a tensor of its type and device."""

    heads: int
    d_head: int
    like: Tensor


@dataclass(frozen=True)
class _Part:
    """Some batch rows of a cache, up to a number of slots."""

    cache: RowCache
    rows: Sequence[int]
    slots: int

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield consecutive rows: the place of the first in `rows`, and a slice of the cache."""
        start = 0
        for at in range(1, 1 + len(self.rows)):
            if at == len(self.rows) or self.rows[at] != self.rows[at - 1] + 1:
                yield start, slice(self.rows[start], self.rows[at - 1] + 1)
                start = at


class RowCache(Cache):
    """KV cache of a batch whose rows advance independently.

    Attributes:
        lengths: settled tokens of each batch row; slots from there on are free.
        held: number of batch rows that memory is allocated for.
        capacity: number of slots allocated for each batch row.
        filled: number of slots in use by the current pass.
        write_slots: first slot that the current pass writes and None, or 0 and the slots of each
            batch row, `[B, Q]`.
    """

    def __init__(self, layers: int, batch: int = 1) -> None:
        self.lengths = [0] * batch
        self.held = batch
        self.capacity = 0
        self.filled = 0
        self.write_slots: tuple[int, Tensor | None] = (0, None)
        self.row_layers = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.row_layers))

    def begin(self, rows: int, device: torch.device) -> None:
        """Make room for a pass of `rows` rows after every batch row's length."""
        self.filled = max(self.lengths) + rows
        if self.filled > self.capacity:
            self._reallocate(_blocks(self.filled), [self._all()])
        start = self.lengths[0]
        if all(length == start for length in self.lengths):
            self.write_slots = (start, None)  # one slice: no index to build, no gather
        else:
            lengths = torch.tensor(self.lengths, device=device)
            self.write_slots = (0, lengths[:, None] + torch.arange(rows, device=device))

    @property
    def written(self) -> bool:
        """Whether any layer holds keys and values."""
        return any(layer.stored is not None for layer in self.row_layers)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...] | None:
        """Heads and `d_head` of each layer; None if a layer is empty or keys and values differ."""
        found = []
        for layer in self.row_layers:
            if layer.stored is None or layer.stored[0].shape != layer.stored[1].shape:
                return None
            found.append((layer.stored[0].shape[1], layer.stored[0].shape[3]))
        return tuple(found)

    def slots(
        self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of every layer, `[B, heads, capacity, d_head]`, to be written to.

        Args:
            sizes: heads and `d_head` of each layer.
            dtype: type of layers that were never written.
        """
        if any(layer.stored is None for layer in self.row_layers):
            none = torch.empty(0, dtype=dtype)
            shapes = [_Shape(heads, d_head, none) for heads, d_head in sizes]
            self._reallocate(self.capacity, [self._all()], shapes=shapes)
        shown = []
        for layer in self.row_layers:
            assert layer.keys is not None, "just made"
            assert layer.values is not None, "just made"
            shown.append((layer.keys, layer.values))
        return shown

    def settle(self, row: int, count: int) -> None:
        """Keep the first `count` rows that the last pass wrote for a batch row."""
        self.lengths[row] += count

    def append(self, other: RowCache) -> None:
        """Move the batch rows of `other` to the end of this cache; do not use `other` again."""
        before, count = len(self.lengths), len(self.lengths) + len(other.lengths)
        joining = other._all()
        capacity = max(self.capacity, _blocks(joining.slots))
        if count > self.held or capacity > self.capacity or not self._alike(other):
            held = max(count, self.held, 2 * before)  # few copies while a batch grows
            parts = [self._all(), joining]
            self._reallocate(capacity, parts, held, [*self.lengths, *other.lengths])
            return
        self.lengths = self.lengths + other.lengths
        for mine, theirs in zip(self.row_layers, other.row_layers, strict=True):
            if mine.stored is not None and theirs.stored is not None:
                with torch.inference_mode(mine.stored[0].is_inference()):
                    _copy(joining, theirs.stored, mine.stored, before)
            mine.show()

    def copied(self, row: int, count: int) -> RowCache:
        """Return the first `count` settled slots of one batch row as a new cache.

        The new cache has no free slots, so that keeping a short prefix takes little memory.
        """
        copy = RowCache(len(self.row_layers))
        copy._reallocate(count, [_Part(self, [row], count)], lengths=[count])
        return copy

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these batch rows, in this order, and free the blocks that none fills."""
        kept = [self.lengths[row] for row in rows]
        part = _Part(self, list(rows), max(kept, default=0))
        moves_down = all(place <= row for place, row in enumerate(rows))
        if not moves_down or 2 * _blocks(part.slots) <= self.capacity:
            self._reallocate(_blocks(part.slots), [part], len(rows), kept)
            return
        self.lengths = kept
        for layer in self.row_layers:
            if layer.stored is not None:
                with torch.inference_mode(layer.stored[0].is_inference()):
                    _copy(
                        part, layer.stored, layer.stored, 0
                    )  # to lower rows: no row is overwritten before it is moved
            layer.show()

    def _all(self) -> _Part:
        return _Part(self, range(len(self.lengths)), max(self.lengths, default=0))

    def _alike(self, other: RowCache) -> bool:
        """Return whether the same layers were written in both caches."""
        pairs = zip(self.row_layers, other.row_layers, strict=True)
        return all((mine.stored is None) == (theirs.stored is None) for mine, theirs in pairs)

    def _reallocate(
        self,
        capacity: int,
        parts: Sequence[_Part],
        held: int | None = None,
        lengths: Sequence[int] | None = None,
        shapes: Sequence[_Shape] | None = None,
    ) -> None:
        """Allocate new memory for the layers and copy these parts into it, one after another.

        If there is not enough memory, nothing is changed.

        Args:
            capacity: number of slots of each row.
            parts: the batch rows to keep.
            held: number of rows to allocate; None for the present number.
            lengths: lengths of the kept batch rows; None for the present ones.
            shapes: shapes of the layers, where some were never written.
        """
        held = self.held if held is None else held
        known = [self._shape(at, parts, shapes) for at in range(len(self.row_layers))]
        sizes = [0 if s is None else held * s.heads * capacity * s.d_head for s in known]
        like = next((shape.like for shape in known if shape is not None), torch.empty(0))
        with torch.inference_mode(like.is_inference() or torch.is_inference_mode_enabled()):
            # Zeros: see `RowLayer._empty`.
            whole = torch.split(
                like.new_zeros(2 * sum(sizes)), [n for n in sizes for _ in range(2)]
            )
            self.capacity, self.held = capacity, held
            self.lengths = self.lengths if lengths is None else list(lengths)
            for at, (layer, shape) in enumerate(zip(self.row_layers, known, strict=True)):
                if shape is None:
                    continue
                size = held, shape.heads, capacity, shape.d_head
                stored = whole[2 * at].view(size), whole[2 * at + 1].view(size)
                first = 0
                for part in parts:
                    theirs = part.cache.row_layers[at].stored
                    if theirs is not None:
                        _copy(part, theirs, stored, first)
                    first += len(part.rows)
                layer.hold(*stored)

    @staticmethod
    def _shape(at: int, parts: Sequence[_Part], shapes: Sequence[_Shape] | None) -> _Shape | None:
        for part in parts:
            stored = part.cache.row_layers[at].stored
            if stored is not None:
                _, heads, _, d_head = stored[0].shape
                return _Shape(heads, d_head, stored[0])
        return None if shapes is None else shapes[at]


class PrefixLayer(StaticLayer):  # type: ignore[no-untyped-call]  # its base's hook
    """Keys and values of a known sequence, for look-ahead rows in training; not written to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.prefix = keys, values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values and the new ones, `[B, heads, S + R, d_head]`."""
        keys, values = self.prefix
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self) -> int:
        """Return the number of stored tokens, `S`."""
        return int(self.prefix[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a pass reads, and the first one's slot."""
        return self.get_seq_length() + query_length, 0


def as_prefix(cache: RowCache) -> Cache:
    """Return the settled rows of a batch of equal lengths, for look-ahead rows with gradients."""
    length = cache.lengths[0]
    layers = []
    for layer in cache.row_layers:
        assert layer.keys is not None, "the sequences were not run"
        assert layer.values is not None, "the sequences were not run"
        layers.append(PrefixLayer(layer.keys[:, :, :length], layer.values[:, :, :length]))
    return Cache(layers=list(layers))


def _blocks(slots: int) -> int:
    """Return the least capacity with at least this number of slots."""
    return -(-slots // BLOCK) * BLOCK


def _copy(
    part: _Part, given: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor], first: int
) -> None:
    """Copy the slots of a part's rows to the rows from `first` on."""
    for at, rows in part.runs():
        for mine, theirs in zip(into, given, strict=True):
            to = slice(first + at, first + at + rows.stop - rows.start)
            if mine is not theirs or to != rows:
                _copy_rows(mine, theirs, to, rows, part.slots)


def _copy_rows(mine: Tensor, theirs: Tensor, to: slice, rows: slice, slots: int) -> None:
    if mine is theirs and to.stop > rows.start:  # source and destination overlap: copy in order
        for row in range(rows.stop - rows.start):
            mine[to.start + row, :, :slots] = theirs[rows.start + row, :, :slots]
    else:
        mine[to, :, :slots] = theirs[rows, :, :slots]
