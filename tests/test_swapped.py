"""Swapped forwards: in place inside the block only, listed, nested, and gone afterwards."""

from __future__ import annotations

import copy
import pickle
import types
from collections import OrderedDict
from contextlib import ExitStack

import pytest
import torch
from small_llama import small_llama
from torch import Tensor, nn

from passlm.kernels import linear
from passlm.layers.fused import JoinedLinears
from passlm.layers.lora import PROBE_ROWS, GatedLora, RowSplit, groups_of
from passlm.layers.packed import PackedLinears
from passlm.layers.swapped import Swap, SwapError, checkpointed, head_left_out, swapped_layers

ROWS = torch.ones(2, 4)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    return nn.Sequential(layers).requires_grad_(False)


def zeros(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows)


def ones(rows: Tensor) -> Tensor:
    return torch.ones_like(rows)


def own(model: nn.Sequential) -> list[dict[str, object]]:
    """Copies of all that the model and its modules keep in their `__dict__`."""
    return [dict(vars(module)) for module in model.modules()]


def test_a_swap_computes_until_it_is_undone() -> None:
    """Catches a forward that torch does not call, and one that stays."""
    model = small_model()
    plain, before = model(ROWS), own(model)
    swap = Swap({model.second: zeros}, by="zeros")
    assert torch.equal(model(ROWS), plain)
    swap.apply()
    assert not model(ROWS).any()
    swap.undo()
    assert torch.equal(model(ROWS), plain)
    assert own(model) == before


def test_the_call_of_a_swapped_layer_goes_straight_to_its_forward() -> None:
    """Catches a wrapper around the forward, which every pass would pay for."""
    model = small_model()
    with Swap({model.first: zeros}, by="zeros"):
        assert model.first.forward is zeros
        assert set(vars(model.first)) == set(vars(model.second)) | {"forward"}


def test_undoing_twice_does_nothing_and_a_swap_can_be_applied_again() -> None:
    """Catches a second undo that takes away what somebody else has swapped meanwhile."""
    model = small_model()
    with Swap({model.first: zeros}, by="zeros") as swap:
        swap.undo()
        with Swap({model.first: ones}, by="ones"):
            swap.undo()
            assert model.first.forward is ones
    with swap:
        assert model.first.forward is zeros
    assert not swapped_layers(model)
    assert "forward" not in vars(model.first)


def test_a_swap_that_is_applied_is_not_applied_again() -> None:
    """Catches a swap that takes its own forward for the one to put back."""
    model = small_model()
    with Swap({model.first: zeros}, by="zeros") as swap:
        with pytest.raises(SwapError, match="'zeros' is applied already"):
            swap.apply()
        assert model.first.forward is zeros
    assert "forward" not in vars(model.first)


def test_a_forward_that_somebody_else_replaced_is_put_back() -> None:
    """Catches another library's forward lost with ours."""
    model = small_model()
    model.first.forward = ones
    with Swap({model.first: zeros}, by="zeros"):
        assert model.first.forward is zeros
    assert model.first.forward is ones


def test_nested_swaps_are_undone_one_by_one() -> None:
    """Catches an inner swap that puts back the plain forward, and a list in another order."""
    model = small_model()
    with Swap({model.first: zeros, model.second: zeros}, by="zeros"):
        with Swap({model.first: ones}, by="ones"):
            assert swapped_layers(model) == {"first": ("zeros", "ones"), "second": ("zeros",)}
            assert model.first.forward is ones
        assert model.first.forward is zeros
        assert swapped_layers(model) == {"first": ("zeros",), "second": ("zeros",)}
    assert not swapped_layers(model)


def test_swaps_of_other_layers_are_undone_in_any_order() -> None:
    """Catches an order that is asked for where none is needed."""
    model = small_model()
    before = own(model)
    first, second = Swap({model.first: zeros}, by="a"), Swap({model.second: zeros}, by="b")
    first.apply()
    second.apply()
    first.undo()
    assert swapped_layers(model) == {"second": ("b",)}
    second.undo()
    assert own(model) == before


def test_the_outer_swap_is_not_undone_before_the_inner_one() -> None:
    """Catches a model left altered by the wrong order: it is refused, and can be made good."""
    model = small_model()
    before = own(model)
    outer = Swap({model.first: zeros, model.second: zeros}, by="outer")
    inner = Swap({model.first: ones}, by="inner")
    outer.apply()
    inner.apply()
    with pytest.raises(SwapError, match=r"'outer': 1 of its 2 modules \(Linear.* by 'inner'; undo"):
        outer.undo()
    assert model.first.forward is ones
    assert model.second.forward is zeros
    assert swapped_layers(model) == {"first": ("outer", "inner"), "second": ("outer",)}
    inner.undo()
    outer.undo()
    assert own(model) == before


def test_a_forward_replaced_inside_the_block_is_reported() -> None:
    """Catches another library's forward thrown away without a word."""
    model = small_model()
    swap = Swap({model.first: zeros}, by="zeros")
    swap.apply()
    model.first.forward = ones
    with pytest.raises(SwapError, match=r"'zeros'.* by other code; undo that first"):
        swap.undo()
    model.first.forward = zeros
    swap.undo()
    assert "forward" not in vars(model.first)


def test_an_exception_inside_the_block() -> None:
    """Catches a model that stays altered after a failed pass, or the failure hidden."""
    model = small_model()
    before = own(model)
    outer, inner = Swap({model.first: zeros}, by="a"), Swap({model.first: ones}, by="b")
    with pytest.raises(KeyError), outer, inner:
        raise KeyError
    assert own(model) == before
    assert not swapped_layers(model)


class _Interrupted(dict[nn.Module, object]):
    """Forwards of which the last cannot be had, as if the user had interrupted."""

    def items(self):  # type: ignore[no-untyped-def]
        yield next(iter(super().items()))
        raise KeyboardInterrupt


def test_an_interrupt_while_forwards_are_replaced() -> None:
    """Catches some of the layers left altered by Ctrl+C at the wrong moment."""
    model = small_model()
    before = own(model)
    swap = Swap({model.first: zeros, model.second: zeros}, by="zeros")
    swap._forwards = _Interrupted(swap._forwards)
    with pytest.raises(KeyboardInterrupt):
        swap.apply()
    assert own(model) == before
    assert not swapped_layers(model)


def test_only_the_layers_of_the_model_are_listed() -> None:
    """Catches another model's swaps in the list; the model itself has an empty name."""
    model, other = small_model(), small_model()
    with Swap({model: zeros, other.first: zeros}, by="zeros"):
        assert swapped_layers(model) == {"": ("zeros",)}
        assert swapped_layers(other) == {"first": ("zeros",)}
        assert swapped_layers(model.first) == {}


def test_a_swapped_model_is_copied_and_pickled_as_any_other() -> None:
    """Catches locks, handles or lists kept on the module, and a copy that is listed as swapped."""
    model = small_model()
    plain = model(ROWS)
    with Swap({model.first: zeros}, by="zeros"):
        swapped = model(ROWS)
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(made(ROWS), swapped)
            assert not swapped_layers(made)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(ROWS), plain)
        assert own(made)[0].keys() == own(model)[0].keys()
    assert isinstance(model.first.forward, types.MethodType)


def test_who_swaps_layers_of_a_model() -> None:
    """Catches a place that alters layers without saying so."""
    model = small_llama()
    before = [dict(vars(module)) for module in model.modules()]
    tokens = torch.zeros(1, PROBE_ROWS, dtype=torch.long)

    def probe() -> None:
        model(tokens)

    groups = groups_of(model, probe, ("q_proj",))
    lora = GatedLora.start(model, groups, 2).on(model)
    expected = {"lm_head": ("output layer left out",)}
    for index in range(model.config.num_hidden_layers):
        expected[f"model.layers.{index}"] = ("checkpointing",)
        expected[f"model.layers.{index}.self_attn.q_proj"] = ("LoRA",)
    with lora.applied(RowSplit()), checkpointed(model, lora), head_left_out(model.lm_head):
        assert swapped_layers(model) == expected
    if linear.preferred():
        linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        with PackedLinears(model).applied():
            assert swapped_layers(model) == dict.fromkeys(linears, ("packed weights",))
        joined = JoinedLinears(model, probe, None)
        with ExitStack() as stack:
            stack.enter_context(joined.applied(torch.zeros(1, PROBE_ROWS)))
            fused = swapped_layers(model)
            assert set(fused.values()) == {("fused layers",)}
            assert len(fused) == len(joined.layers)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert not swapped_layers(model)
