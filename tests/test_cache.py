"""The cache: each batch row's slots at its own length, through passes, joins and leaves.

A pass here writes keys that say who wrote them; what is read back shows where they went.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from passlm.model.cache import BLOCK, RowCache, as_prefix

LAYERS, HEADS, D_HEAD = 2, 2, 3
CPU = torch.device("cpu")


def write(cache: RowCache, marks: Sequence[Sequence[float]]) -> list[tuple[Tensor, Tensor]]:
    """A pass that writes `marks[row][i]` as its row `i`; layer `n` adds `100 * n`, values 1000.

    Returns:
        What each layer's `update` gave.
    """
    states = torch.tensor(marks, dtype=torch.float32)[:, None, :, None].expand(
        -1, HEADS, -1, D_HEAD
    )
    cache.begin(states.shape[2], CPU)
    given = []
    for number, layer in enumerate(cache.row_layers):
        own = states + 100 * number
        given.append(layer.update(own, own + 1000))
    return given


def settled(cache: RowCache, layer: int = 0) -> list[list[float]]:
    """The marks of each batch row's settled slots; all heads and numbers of a slot agree."""
    stored = cache.row_layers[layer]
    assert stored.keys is not None
    assert stored.values is not None
    rows = []
    for index, length in enumerate(cache.lengths):
        slots = stored.keys[index, :, :length] - 100 * layer
        assert torch.equal(slots, slots[:1, :, :1].expand_as(slots))
        values = stored.values[index, :, :length]
        assert torch.equal(values, stored.keys[index, :, :length] + 1000)
        rows.append(slots[0, :, 0].tolist())
    return rows


def keep_counts(cache: RowCache, counts: Sequence[int]) -> None:
    """Settle so many rows of each batch row."""
    for row, count in enumerate(counts):
        cache.settle(row, count)


def ragged() -> RowCache:
    """Three batch rows of lengths 3, 1 and 2, with refused rows behind them."""
    cache = RowCache(LAYERS, batch=3)
    write(cache, [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]])
    keep_counts(cache, [3, 1, 2])
    return cache


@pytest.mark.parametrize("layer", range(LAYERS))
def test_rows_advance_at_their_own_pace(layer: int) -> None:
    """Catches rows written behind the longest length, or behind another row's."""
    cache = ragged()
    write(cache, [[5, 6], [15, 16], [25, 26]])
    keep_counts(cache, [1, 2, 0])
    assert cache.lengths == [4, 3, 2]
    write(cache, [[7], [17], [27]])
    keep_counts(cache, [1, 1, 1])
    assert settled(cache, layer) == [[1, 2, 3, 5, 7], [11, 15, 16, 17], [21, 22, 27]]


def test_refused_rows_are_overwritten() -> None:
    """Catches a refused candidate that stays in the cache: the next pass must take its slot."""
    cache = RowCache(LAYERS)
    write(cache, [[1, 2, 3]])
    keep_counts(cache, [1])
    write(cache, [[4, 5]])
    keep_counts(cache, [2])
    assert settled(cache) == [[1, 4, 5]]


def test_a_pass_meets_all_slots_up_to_its_own() -> None:
    """Catches keys cut too short, so that the mask and the keys differ in length."""
    cache = ragged()
    for keys, values in write(cache, [[5, 6], [15, 16], [25, 26]]):
        assert keys.shape == values.shape == (3, HEADS, 3 + 2, D_HEAD)
    assert cache.filled == 5
    assert cache.row_layers[0].get_mask_sizes(2) == (5, 0)
    assert cache.get_seq_length() == 3


def test_equal_lengths_take_the_same_slots_as_unequal_ones() -> None:
    """Catches the two ways of writing, by slice and by index, drifting apart."""
    equal, unequal = RowCache(LAYERS, batch=2), RowCache(LAYERS, batch=2)
    for cache in (equal, unequal):
        write(cache, [[1, 2], [11, 12]])
    keep_counts(equal, [1, 1])
    keep_counts(unequal, [1, 2])
    for cache in (equal, unequal):
        write(cache, [[3, 4], [13, 14]])
        keep_counts(cache, [2, 2])
    assert equal.write_slots[1] is None
    assert unequal.write_slots[1] is not None
    assert settled(equal) == [[1, 3, 4], [11, 13, 14]]
    assert settled(unequal) == [[1, 3, 4], [11, 12, 13, 14]]


def test_texts_come_and_go_in_the_same_memory() -> None:
    """Catches a batch copied as a whole for each text that joins or leaves, rows moved over others
    that are still to be moved, and one written over by the text that joins."""
    cache = ragged()
    cache.append(ragged())  # grows: room for six
    memory = cache.row_layers[0].keys
    assert memory is not None
    cache.keep([1, 2, 3, 5])
    joining = RowCache(LAYERS)
    write(joining, [[31, 32]])
    keep_counts(joining, [2])
    cache.append(joining)
    last = cache.row_layers[0].keys
    assert last is not None
    assert last.data_ptr() == memory.data_ptr()
    for layer in range(LAYERS):
        assert settled(cache, layer) == [[11], [21, 22], [1, 2, 3], [21, 22], [31, 32]]
    write(cache, [[12], [23], [4], [23], [33]])
    keep_counts(cache, [1] * 5)
    assert settled(cache) == [[11, 12], [21, 22, 23], [1, 2, 3, 4], [21, 22, 23], [31, 32, 33]]


def test_the_last_row_fills_a_gap() -> None:
    """Catches a batch copied as a whole for one text that leaves, and a row that fills two gaps."""
    cache = ragged()
    cache.append(ragged())
    memory = cache.row_layers[0].keys
    assert memory is not None
    cache.keep([0, 5, 2, 3])
    assert cache.lengths == [3, 2, 2, 3]
    for layer in range(LAYERS):
        assert settled(cache, layer) == [[1, 2, 3], [21, 22], [21, 22], [1, 2, 3]]
    kept = cache.row_layers[0].keys
    assert kept is not None
    assert kept.data_ptr() == memory.data_ptr()


def test_all_layers_lie_in_one_block() -> None:
    """Catches a tensor for each layer: what texts of all lengths leave would fit nothing later."""
    cache = RowCache(LAYERS, batch=0)
    cache.append(ragged())
    cache.append(ragged().copied(1, 1))
    stored = [one for layer in cache.row_layers for one in layer.stored or ()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in stored}) == 1
    cache.keep([])
    assert sum(one.numel() for layer in cache.row_layers for one in layer.stored or ()) == 0


def test_without_memory_all_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a batch row without keys, for which all later passes fail."""
    cache = ragged()
    before = settled(cache)

    def none_left(*_: object, **__: object) -> Tensor:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", none_left)
        for grow in (
            lambda: cache.append(ragged()),
            lambda: cache.keep([2, 0]),
            lambda: cache.begin(1000, CPU),
        ):
            with pytest.raises(RuntimeError, match="not enough memory"):
                grow()
    assert cache.lengths == [3, 1, 2]
    assert cache.capacity == BLOCK
    assert settled(cache) == before


def test_keep_takes_rows_in_the_order_asked() -> None:
    """Catches lengths and keys that are re-ordered differently."""
    cache = ragged()
    cache.keep([2, 0])
    assert cache.lengths == [2, 3]
    assert settled(cache) == [[21, 22], [1, 2, 3]]
    write(cache, [[28], [8]])
    keep_counts(cache, [1, 1])
    assert settled(cache, 1) == [[21, 22, 28], [1, 2, 3, 8]]


def test_keep_none_then_append() -> None:
    """Catches a batch that cannot be filled again once its last text has left."""
    cache = ragged()
    cache.keep([])
    assert cache.lengths == []
    assert cache.get_seq_length() == 0
    cache.append(ragged())
    assert settled(cache) == [[1, 2, 3], [11], [21, 22]]


def test_append_joins_batches() -> None:
    """Catches a newcomer whose slots are shifted, or that takes another row's length."""
    cache = RowCache(LAYERS, batch=0)
    cache.append(ragged())
    newcomer = RowCache(LAYERS)
    write(newcomer, [[31, 32]])
    keep_counts(newcomer, [2])
    cache.append(newcomer)
    assert cache.lengths == [3, 1, 2, 2]
    write(cache, [[9], [19], [29], [39]])
    keep_counts(cache, [1] * 4)
    assert settled(cache, 1) == [[1, 2, 3, 9], [11, 19], [21, 22, 29], [31, 32, 39]]


@pytest.mark.parametrize("newcomer_first", [False, True])
def test_append_a_row_that_was_never_written(newcomer_first: bool) -> None:
    """Catches a prompt of one token, which needs no prefill, that has no keys to be joined."""
    empty, filled = RowCache(LAYERS), ragged()
    cache = empty if newcomer_first else filled
    cache.append(filled if newcomer_first else empty)
    expected: list[list[float]] = [[1, 2, 3], [11], [21, 22]]
    expected.insert(0 if newcomer_first else 3, [])
    assert settled(cache) == expected
    write(cache, [[50], [51], [52], [53]])
    keep_counts(cache, [1] * 4)
    assert settled(cache) == [[*row, 50 + index] for index, row in enumerate(expected)]


def test_append_two_empty_caches() -> None:
    """Catches the same where nothing has been written yet."""
    cache = RowCache(LAYERS)
    cache.append(RowCache(LAYERS))
    write(cache, [[1], [11]])
    keep_counts(cache, [1, 1])
    assert settled(cache) == [[1], [11]]


def test_append_unequal_capacities() -> None:
    """Catches keys lost where a short cache joins a long one, or the other way round."""
    long = RowCache(LAYERS)
    marks = [float(mark) for mark in range(1, BLOCK + 6)]
    write(long, [marks])
    keep_counts(long, [len(marks)])
    cache = ragged()
    cache.append(long)
    assert cache.capacity == 2 * BLOCK
    assert settled(cache) == [[1, 2, 3], [11], [21, 22], marks]
    other = ragged()
    cache.append(other)
    assert settled(cache)[3:] == [marks, [1, 2, 3], [11], [21, 22]]
    write(cache, [[float(70 + row)] for row in range(7)])
    keep_counts(cache, [1] * 7)
    assert settled(cache, 1)[3] == [*marks, 73]


def test_capacity_grows_by_blocks_and_no_sooner() -> None:
    """Catches memory taken for the model's whole context, and slots lost where it grows."""
    cache = RowCache(LAYERS)
    written: list[float] = []
    for mark in range(1, 2 * BLOCK + 2):
        write(cache, [[float(mark)]])
        keep_counts(cache, [1])
        written.append(mark)
        blocks = -(-len(written) // BLOCK)
        assert cache.capacity == blocks * BLOCK
        keys = cache.row_layers[0].keys
        assert keys is not None
        assert keys.shape[2] == blocks * BLOCK
    assert settled(cache) == [written]


def test_a_long_text_gives_its_memory_back() -> None:
    """Catches a capacity that one long text leaves to every short one after it."""
    long = RowCache(LAYERS)
    write(long, [[float(mark) for mark in range(1, 3 * BLOCK)]])
    keep_counts(long, [3 * BLOCK - 1])
    cache = ragged()
    cache.append(long)
    cache.keep([0, 1])
    assert cache.capacity == BLOCK
    write(cache, [[4], [12]])
    keep_counts(cache, [1, 1])
    assert settled(cache) == [[1, 2, 3, 4], [11, 12]]
    cache.keep([])
    assert cache.capacity == 0
    cache.append(ragged())
    assert cache.capacity == BLOCK
    assert settled(cache) == [[1, 2, 3], [11], [21, 22]]


def test_free_slots_hold_no_garbage() -> None:
    """Catches memory that is not cleared: a masked slot weighs 0, but 0 times NaN is NaN. Slots
    are free when new, behind a growth, and in a batch row that never reached them."""
    cache = RowCache(LAYERS, batch=0)
    cache.append(ragged())
    newcomer = RowCache(LAYERS)
    write(newcomer, [[float(mark) for mark in range(1, BLOCK)]])
    keep_counts(newcomer, [BLOCK - 1])
    cache.append(newcomer)
    for keys, values in write(cache, [[5, 6]] * 4):
        assert bool(keys[:3, :, 6:].eq(0).all())
        assert bool(values[:3, :, 6:].eq(0).all())
    for layer in cache.row_layers:
        assert layer.keys is not None
        assert layer.values is not None
        assert bool(layer.keys.isfinite().all())
        assert bool(layer.values.isfinite().all())


def test_prefix_leaves_the_texts_keys_alone() -> None:
    """Catches training rows that are written into the text's cache, or hidden behind it."""
    cache = RowCache(LAYERS, batch=2)
    write(cache, [[1, 2, 3, 4], [11, 12, 13, 14]])
    keep_counts(cache, [3, 3])
    prefix = as_prefix(cache)
    new = torch.full((2, HEADS, 2, D_HEAD), 7.0)
    for _ in range(2):
        keys, values = prefix.layers[1].update(new, new + 1)
        assert keys[:, 0, :, 0].tolist() == [[101, 102, 103, 7, 7], [111, 112, 113, 7, 7]]
        assert values[:, 0, 3:, 0].tolist() == [[8, 8], [8, 8]]
    assert prefix.get_seq_length() == 3
    assert prefix.layers[0].get_mask_sizes(2) == (5, 0)
    assert settled(cache) == [[1, 2, 3], [11, 12, 13]]


def test_memory_is_free_once_nobody_has_the_cache() -> None:
    """Catches a cycle between a cache and its layers: keys and values of texts that are over would
    wait for the collector, gigabytes of them in a server."""
    gc.disable()
    try:
        cache = RowCache(LAYERS)
        write(cache, [[1.0, 2.0]])
        cache.settle(0, 2)
        other = cache.copied(0, 1)
        cache.append(other)
        held = [weakref.ref(one.row_layers[0].stored[0]) for one in (cache, other)]  # type: ignore[index]
        assert all(ref() is not None for ref in held)
        del cache, other
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
