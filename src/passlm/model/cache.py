"""A KV cache in which every batch row has its own length.

A pass writes its rows after the settled ones of each batch row. Settling rows adds to the length;
the next pass overwrites the rest. Capacity grows in blocks of slots. Masks, which hide the slots
that a row may not see, are left to `pass_inputs.py`.

All layers and batch rows share one block of memory: with a block for each, sequences that come and
go would fragment it. Memory of batch rows that leave is used again for those that join.
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
    """Keys and values of one layer, `[B, heads, capacity, d_head]`.

    Args:
        cache: the cache that the layer belongs to.

    Attributes:
        stored: keys and values with memory for further batch rows,
            `[held, heads, capacity, d_head]`; None before the first pass.
    """

    def __init__(self, cache: RowCache) -> None:
        super().__init__(max_cache_len=0)
        # A weak reference, so that memory is freed as soon as the cache is dropped.
        self._cache = weakref.ref(cache)
        self.stored: tuple[Tensor, Tensor] | None = None

    @property
    def cache(self) -> RowCache:
        """The cache that the layer belongs to."""
        cache = self._cache()
        assert cache is not None, "the layer's cache was freed"
        return cache

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Use these tensors as memory for keys and values, `[held, heads, capacity, d_head]`."""
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
        """Write a pass's keys and values, `[B, heads, Q, d_head]`, and return those to attend to.

        Returns:
            Keys and values of all slots in use, `[B, heads, filled, d_head]`.
        """
        if self.stored is None:
            self.hold(self._empty(key_states), self._empty(value_states))
        assert self.keys is not None, "allocated above"
        assert self.values is not None, "allocated above"
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        filled = self.cache.filled
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def _empty(self, states: Tensor) -> Tensor:
        _, heads, _, d_head = states.shape
        # Zeros, not uninitialized memory: a masked slot has weight 0, but 0 times NaN is NaN.
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
        """Return the number of slots that a pass reads, and the first of them."""
        return self.cache.filled, 0


@dataclass(frozen=True)
class _Shape:
    """Sizes of a layer.

    Attributes:
        heads: number of key and value heads.
        d_head: size of a head.
        like: a tensor of the layer's type and device.
    """

    heads: int
    d_head: int
    like: Tensor


@dataclass(frozen=True)
class _Part:
    """Some batch rows of a cache, to be copied.

    Attributes:
        cache: the cache.
        rows: indices of the batch rows.
        slots: number of slots of each, from the first on.
    """

    cache: RowCache
    rows: Sequence[int]
    slots: int

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield runs of consecutive batch rows: index of the first in `rows`, and their slice."""
        start = 0
        for at in range(1, 1 + len(self.rows)):
            if at == len(self.rows) or self.rows[at] != self.rows[at - 1] + 1:
                yield start, slice(self.rows[start], self.rows[at - 1] + 1)
                start = at


class RowCache(Cache):
    """KV cache of a batch whose rows advance independently.

    Args:
        layers: number of layers.
        batch: number of batch rows.

    Attributes:
        lengths: number of settled tokens of each batch row; slots from there on are free.
        held: number of batch rows that memory is allocated for.
        capacity: number of slots allocated for each batch row.
        filled: number of slots in use in the current pass, its own rows included.
        write_slots: where the current pass writes: the first slot and None if it is the same for
            all batch rows; 0 and the slots of each batch row, `[B, Q]`, otherwise.
        row_layers: the layers.
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
        """True if memory for keys and values was allocated in any layer."""
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
        """Return the keys and values of every layer, `[B, heads, capacity, d_head]`.

        These are the cache's own memory, which compiled passes write to.

        Args:
            sizes: heads and `d_head` of each layer.
            dtype: type of layers that were never written.
        """
        if any(layer.stored is None for layer in self.row_layers):
            none = torch.empty(0, dtype=dtype)
            shapes = [_Shape(heads, d_head, none) for heads, d_head in sizes]
            self._reallocate(self.capacity, [self._all()], shapes=shapes)
        layers = []
        for layer in self.row_layers:
            assert layer.keys is not None, "allocated above"
            assert layer.values is not None, "allocated above"
            layers.append((layer.keys, layer.values))
        return layers

    def settle(self, row: int, count: int) -> None:
        """Keep the first `count` slots that the last pass wrote for a batch row."""
        self.lengths[row] += count

    def append(self, other: RowCache) -> None:
        """Move the batch rows of `other` to the end of this cache; do not use `other` again."""
        before, count = len(self.lengths), len(self.lengths) + len(other.lengths)
        joining = other._all()
        capacity = max(self.capacity, _blocks(joining.slots))
        if count > self.held or capacity > self.capacity or not self._has_layers_of(other):
            held = max(count, self.held, 2 * before)  # doubled: few copies while a batch grows
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
        """Return a new cache with a copy of the first `count` settled slots of a batch row.

        It has no free slots, so that keeping a short prefix takes little memory.
        """
        copy = RowCache(len(self.row_layers))
        copy._reallocate(count, [_Part(self, [row], count)], lengths=[count])
        return copy

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these batch rows, in this order; free memory if half of it is no longer needed.

        Args:
            rows: indices of the batch rows to keep.
        """
        lengths = [self.lengths[row] for row in rows]
        part = _Part(self, list(rows), max(lengths, default=0))
        in_place = all(place <= row for place, row in enumerate(rows))
        if not in_place or 2 * _blocks(part.slots) <= self.capacity:
            self._reallocate(_blocks(part.slots), [part], len(rows), lengths)
            return
        self.lengths = lengths
        for layer in self.row_layers:
            if layer.stored is not None:
                with torch.inference_mode(layer.stored[0].is_inference()):
                    # Rows move to lower indices only: none is overwritten before it is moved.
                    _copy(part, layer.stored, layer.stored, 0)
            layer.show()

    def _all(self) -> _Part:
        return _Part(self, range(len(self.lengths)), max(self.lengths, default=0))

    def _has_layers_of(self, other: RowCache) -> bool:
        """Return whether the same layers have memory in both caches."""
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
        """Allocate new memory for all layers and copy these parts into it, one after another.

        If there is not enough memory, the cache is left unchanged.

        Args:
            capacity: number of slots of each batch row.
            parts: the batch rows to keep.
            held: number of batch rows to allocate memory for; None for the present number.
            lengths: lengths of the kept batch rows; None for the present ones.
            shapes: shapes of the layers, where some were never written.
        """
        held = self.held if held is None else held
        known = [self._shape(at, parts, shapes) for at in range(len(self.row_layers))]
        sizes = [0 if s is None else held * s.heads * capacity * s.d_head for s in known]
        like = next((shape.like for shape in known if shape is not None), torch.empty(0))
        with torch.inference_mode(like.is_inference() or torch.is_inference_mode_enabled()):
            # Zeros: see `RowLayer._empty`. One block: see the module's docstring.
            memory = torch.split(
                like.new_zeros(2 * sum(sizes)), [n for n in sizes for _ in range(2)]
            )
            self.capacity, self.held = capacity, held
            self.lengths = self.lengths if lengths is None else list(lengths)
            for at, (layer, shape) in enumerate(zip(self.row_layers, known, strict=True)):
                if shape is None:
                    continue
                size = held, shape.heads, capacity, shape.d_head
                stored = memory[2 * at].view(size), memory[2 * at + 1].view(size)
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
    """Read-only keys and values of a known sequence, for look-ahead rows in training.

    Args:
        keys: `[B, heads, S, d_head]`.
        values: like `keys`.
    """

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
        """Return the number of slots that a pass reads, and the first of them."""
        return self.get_seq_length() + query_length, 0


def as_prefix(cache: RowCache) -> Cache:
    """Return the settled rows as a read-only prefix, for look-ahead rows with gradients.

    All batch rows must have the same length.
    """
    length = cache.lengths[0]
    layers = []
    for layer in cache.row_layers:
        assert layer.keys is not None, "no pass has written the cache"
        assert layer.values is not None, "no pass has written the cache"
        layers.append(PrefixLayer(layer.keys[:, :, :length], layer.values[:, :, :length]))
    return Cache(layers=list(layers))


def _blocks(slots: int) -> int:
    """Return the smallest capacity in whole blocks with at least this number of slots."""
    return -(-slots // BLOCK) * BLOCK


def _copy(
    part: _Part, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], first: int
) -> None:
    """Copy a part's keys and values from `source` to the batch rows of `target` from `first` on."""
    for at, rows in part.runs():
        for mine, theirs in zip(target, source, strict=True):
            to = slice(first + at, first + at + rows.stop - rows.start)
            if mine is not theirs or to != rows:
                _copy_rows(mine, theirs, to, rows, part.slots)


def _copy_rows(target: Tensor, source: Tensor, to: slice, rows: slice, slots: int) -> None:
    if target is source and to.stop > rows.start:  # the slices overlap: copy row by row, in order
        for row in range(rows.stop - rows.start):
            target[to.start + row, :, :slots] = source[rows.start + row, :, :slots]
    else:
        target[to, :, :slots] = source[rows, :, :slots]
