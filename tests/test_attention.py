"""Attention without copies of shared keys and values gives the same results as transformers'
own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_llama import small_llama
from torch import nn

from passlm.kernels import native
from passlm.layers import attention
from passlm.layers.attention import can_group, can_stand_in_line, grouped, grouped_attention
from passlm.model.pass_records import PassRow
from passlm.model.target import Target
from passlm.plan import Plan

sdpa = attention.sdpa_attention_forward
AVAILABLE = native.available()


class Layer(nn.Module):
    """The attributes of a layer that transformers' function reads."""

    num_key_value_groups = 3
    is_causal = True


def drawn(rows: int, masked: bool = True) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(2, 6, rows, 8, generator=generator)
    key, value = (torch.randn(2, 2, 20, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, rows, 20, generator=generator) > 0.5
    mask[..., 0] = True
    return query, key, value, mask if masked else None


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_it_gives_what_transformers_gives(
    rows: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches heads that get the keys of another head, and rows that get the mask of another
    row."""
    monkeypatch.setattr(native, "available", lambda: own and AVAILABLE)
    given = drawn(rows)
    expected, _ = sdpa(Layer(), *given, scaling=0.3)
    found, weights = grouped_attention(Layer(), *given, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    additive = torch.zeros(given[3].shape).masked_fill(~given[3], torch.finfo(torch.float32).min)
    found, _ = grouped_attention(Layer(), *given[:3], additive, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_head", [False, True])
def test_what_it_does_not_know_goes_to_transformers(per_head: bool) -> None:
    """Catches a mask for each head treated as one for all heads, and causal rows without a mask
    that see later rows."""
    query, key, value, mask = drawn(4)
    mask = mask.expand(2, 6, 4, 20) if per_head else None
    expected, _ = sdpa(Layer(), query, key, value, mask, scaling=0.3)
    found, _ = grouped_attention(Layer(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_a_model_takes_it_for_the_time_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that stays changed, one that never uses our attention, and a different
    result."""
    monkeypatch.setattr(native, "available", lambda: False)
    model = small_llama()
    calls: list[int] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Any, key: Any, *given: Any, **named: Any) -> Any:
        calls.append(key.shape[1])
        return inner(query, key, *given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    target = Target(model)
    heads = model.config.num_key_value_heads
    assert heads < model.config.num_attention_heads
    assert can_group(model)
    rows = [PassRow([5, 6, 7], Plan(2, (0, 0, 0)))]
    with_groups = target.run(target.prefill([1, 2, 3, 4]), rows, None).logits
    assert set(calls) == {heads}, "keys were copied"
    assert model.config._attn_implementation == "sdpa"
    target.inputs.grouped = False
    calls.clear()
    without = target.run(target.prefill([1, 2, 3, 4]), rows, None).logits
    assert set(calls) != {heads}
    torch.testing.assert_close(with_groups, without, rtol=1e-4, atol=1e-5)


def test_a_fault_in_a_pass_leaves_the_model_as_it_was() -> None:
    """Catches a model left with our attention after a pass that raises."""
    model = small_llama()
    with pytest.raises(RuntimeError), grouped(model):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


def test_models_that_gain_nothing_keep_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches our attention used for models that gain nothing or do not read transformers'
    table."""
    model = small_llama()
    model._supports_attention_backend = False
    assert not can_group(model)
    model = small_llama()
    model.config.num_key_value_heads = model.config.num_attention_heads
    monkeypatch.setattr(native, "available", lambda: False)
    assert not can_group(model)


@pytest.mark.skipif(not native.available(), reason="no line without our own attention")
def test_rows_that_our_attention_does_not_know_stand_in_no_line() -> None:
    """Catches a cache that is copied for every row."""
    assert can_stand_in_line(small_llama())
    assert not can_stand_in_line(small_llama().half())


SHAPES = (  # sequences, heads, key heads, rows, slots, d_head
    (1, 9, 3, 1, 256, 64),
    (1, 9, 3, 5, 200, 64),
    (2, 9, 3, 7, 129, 64),
    (3, 4, 4, 20, 64, 128),
    (1, 8, 1, 40, 300, 96),
    (2, 6, 2, 3, 5, 8),
    (1, 2, 2, 4, 17, 80),
)


def asked(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys, values and an additive mask; one row in five sees a single slot."""
    texts, heads, key_heads, rows, slots, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(texts, rows, heads, width, generator=generator).transpose(1, 2)
    key, value = (
        torch.randn(texts, key_heads, slots + 9, width, generator=generator)[:, :, 4 : slots + 4]
        for _ in range(2)
    )
    closed = torch.rand(texts, 1, rows, slots, generator=generator) < 0.4
    closed[:, :, ::5, 1:] = True
    closed[..., 0] = False
    mask = torch.zeros(closed.shape).masked_fill(closed, torch.finfo(dtype).min)
    return query.to(dtype), key.to(dtype), value.to(dtype), mask.to(dtype)


def computed(
    query: Any, key: Any, value: Any, mask: Any, scale: float = 0.2, texts: Any = None
) -> torch.Tensor:
    none = query.new_empty(0)
    found: torch.Tensor = torch.ops.passlm.rows_attention(
        query,
        key,
        value,
        none if mask is None else mask,
        none.long() if texts is None else texts,
        scale,
        torch.get_num_threads(),
    )
    return found


def in_line(query: Any, mask: Any, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack some rows of each sequence into one line, in turns; `texts` holds the sequence of
    each row."""
    places = [(int(text), int((texts[:at] == text).sum())) for at, text in enumerate(texts)]
    line = torch.stack([query[text, :, row] for text, row in places], 1)[None]
    return line, torch.stack([mask[text, 0, row] for text, row in places])[None, None]


needs_operators = pytest.mark.skipif(
    not native.available(), reason="this machine has no AVX2, or no C++ compiler"
)


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_our_own_attention_is_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches heads that get the keys of another head, slots or numbers left out at the ends,
    and a mask of another row or sequence."""
    query, key, value, mask = asked(shape, dtype)
    for given in (mask, mask[:1], None):
        repeats = shape[1] // shape[2]
        keys, values = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
        scores = query.double() @ keys.transpose(2, 3) * 0.2
        scores += 0 if given is None else given.double()
        expected = (scores.softmax(-1) @ values).transpose(1, 2)
        found = computed(query, key, value, given)
        assert found.dtype == dtype
        assert found.is_contiguous()
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_attends_the_same_whatever_is_beside_it(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Catches sums whose order depends on the other rows or on the length of the cache: a
    verified token would differ from plain decoding's where two tokens are almost equally likely."""
    query, key, value, mask = asked(shape, dtype)
    together = computed(query, key, value, mask)
    for row in range(shape[3]):
        part = slice(row, row + 1)
        alone = computed(query[:, :, part], key, value, mask[:, :, part])
        assert torch.equal(alone, together[:, part])
    longer = [
        torch.cat([t, torch.randn_like(t[:, :, :1]).repeat(1, 1, 70, 1)], 2) for t in (key, value)
    ]
    closed = mask.new_full((*mask.shape[:3], 70), torch.finfo(dtype).min)
    assert torch.equal(computed(query, *longer, torch.cat([mask, closed], 3)), together)


TEXTS = [2, 2, 2, 0, 1, 1, 1, 1, 1, 1, 1, 0]


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_one_line_attend_to_their_own_text(dtype: torch.dtype) -> None:
    """Catches rows that get the keys of a neighbouring row's sequence, and sequences that must
    come in the order of the cache or be complete."""
    query, key, value, mask = asked((4, 9, 3, 7, 129, 64), dtype)
    texts = torch.tensor(TEXTS)
    line, own = in_line(query, mask, texts)
    found = computed(line, key, value, own, texts=texts)
    apart = computed(query, key, value, mask)
    expected = [apart[text, TEXTS[:at].count(text)] for at, text in enumerate(TEXTS)]
    assert torch.equal(found, torch.stack(expected)[None])


def test_rows_in_one_line_without_our_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches layers that our operator does not support and that get another sequence's keys."""
    query, key, value, mask = asked((4, 9, 3, 7, 129, 64), torch.float32)
    texts = torch.tensor(TEXTS)
    line, own = in_line(query, mask, texts)
    expected, _ = grouped_attention(Layer(), query, key, value, mask, scaling=0.2)
    monkeypatch.setattr(native, "available", lambda: False)
    model = small_llama()
    with grouped(model, texts):
        found, _ = grouped_attention(Layer(), line, key, value, own, scaling=0.2)
    rows = [expected[text, TEXTS[:at].count(text)] for at, text in enumerate(TEXTS)]
    torch.testing.assert_close(found, torch.stack(rows)[None])


@needs_operators
def test_a_row_that_sees_nothing_gives_zeros() -> None:
    """Catches padding rows that become NaN and spread through the pass."""
    query, key, value, mask = asked(SHAPES[2], torch.float32)
    mask[0, 0, 3] = torch.finfo(torch.float32).min
    found = computed(query, key, value, mask)
    assert not found[0, 3].any()
    assert found[0, 2].all()
    assert found.isfinite().all()


@needs_operators
def test_large_scores_and_far_ones() -> None:
    """Catches an exponential that overflows, and a weight for scores far below the largest."""
    query = torch.full((1, 1, 1, 32), 30.0)
    key = torch.stack([torch.full((32,), x) for x in (1.0, 0.99, -1.0, 0.5)])[None, None]
    value = torch.eye(4, 32)[None, None]
    found = computed(query, key, value, None, 1.0)[0, 0, 0, :4]
    expected = (query @ key.transpose(2, 3)).double().softmax(-1)[0, 0, 0]
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=1e-12)


@needs_operators
@pytest.mark.parametrize(
    "what", ["float16", "mixed", "strided", "boolean", "short", "values", "texts", "many"]
)
def test_what_the_operator_cannot_take_is_refused(what: str) -> None:
    """Catches reads of memory outside the tensors."""
    query, key, value, mask = asked(SHAPES[0], torch.float32)
    if what == "float16":
        query, key, value = query.half(), key.half(), value.half()
    elif what == "mixed":
        key = key.bfloat16()
    elif what == "strided":
        query = query.repeat_interleave(2, -1)[..., ::2]
    elif what == "boolean":
        mask = mask < 0
    elif what == "short":
        mask = mask[..., 1:]
    elif what == "values":
        value = value[:, :, 1:]
    texts = {"texts": torch.ones(1).long(), "many": torch.zeros(2).long()}.get(what)
    with pytest.raises(RuntimeError):
        computed(query, key, value, mask, texts=texts)
