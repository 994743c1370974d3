"""Attention without copies of shared keys and values: the same numbers as transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_llama import small_llama
from torch import nn

from passlm import attention
from passlm.attention import can_group, grouped, grouped_attention
from passlm.passes import PassRow
from passlm.plan import Plan
from passlm.target import Target

sdpa = attention.sdpa_attention_forward


class Layer(nn.Module):
    """What transformers' function asks of a layer."""

    num_key_value_groups = 3
    is_causal = True


def drawn(rows: int, masked: bool = True) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(2, 6, rows, 8, generator=generator)
    key, value = (torch.randn(2, 2, 20, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, rows, 20, generator=generator) > 0.5
    mask[..., 0] = True
    return query, key, value, mask if masked else None


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_heads_below_each_other_are_heads_apart(rows: int) -> None:
    """Catches heads given another's keys, and rows given another's mask."""
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
    """Catches masks of each head taken for one of all, and causal rows without a mask that see
    those behind them."""
    query, key, value, mask = drawn(4)
    mask = mask.expand(2, 6, 4, 20) if per_head else None
    expected, _ = sdpa(Layer(), query, key, value, mask, scaling=0.3)
    found, _ = grouped_attention(Layer(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_a_model_takes_it_for_the_time_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that is changed for good, one that never takes it, and another result."""
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
    target._grouped = False
    calls.clear()
    without = target.run(target.prefill([1, 2, 3, 4]), rows, None).logits
    assert set(calls) != {heads}
    torch.testing.assert_close(with_groups, without, rtol=1e-4, atol=1e-5)


def test_a_fault_in_a_pass_leaves_the_model_as_it_was() -> None:
    """Catches a model left with our attention by a pass that raises."""
    model = small_llama()
    with pytest.raises(RuntimeError), grouped(model):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


def test_models_without_shared_keys_keep_their_attention() -> None:
    """Catches models that have nothing to gain, or do not look into transformers' table."""
    model = small_llama()
    model.config.num_key_value_heads = model.config.num_attention_heads
    assert not can_group(model)
    model = small_llama()
    model._supports_attention_backend = False
    assert not can_group(model)
