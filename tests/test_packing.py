"""Packed linear layers: same results, only inside the block, never stale."""

import pytest
import torch
from torch import nn

from passlm.kernels import linear
from passlm.layers.packed import PackedLinears, can_pack


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16, bias=False))
    return layers.to(torch.bfloat16).requires_grad_(False)


@pytest.fixture(params=["own", "oneDNN"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return which products are used: our own or oneDNN's."""
    if request.param == "own" and not linear.preferred():
        pytest.skip("this machine has products of its own, or none")
    if request.param == "oneDNN":
        monkeypatch.setattr(linear, "preferred", lambda: False)
        if not can_pack(small_model()):
            pytest.skip("this CPU's oneDNN does not compute in bfloat16")
    return str(request.param)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_packed_rows_equal_plain_ones_up_to_rounding(rows: int) -> None:
    """Catches a layout that works for one number of rows only, and a lost bias."""
    model = small_model()
    inputs = torch.randn(2, rows, 32, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = model(inputs)
        with PackedLinears(model).applied():
            packed = model(inputs)
    assert packed.shape == plain.shape
    torch.testing.assert_close(packed, plain, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("kind")
def test_the_model_is_its_own_again_after_the_block_and_after_an_exception() -> None:
    """Catches a model that keeps using the packed copies after the block."""
    model = small_model()
    packed = PackedLinears(model)
    with packed.applied():
        assert "forward" in vars(model[0])
    assert "forward" not in vars(model[0])
    with pytest.raises(KeyError), packed.applied():
        raise KeyError
    assert "forward" not in vars(model[0])


@pytest.mark.usefixtures("kind")
def test_weights_changed_in_place_are_packed_anew() -> None:
    """Catches stale copies of weights that have changed."""
    model = small_model()
    packed = PackedLinears(model)
    inputs = torch.randn(1, 2, 32, dtype=torch.bfloat16)
    model[2].weight.zero_()
    with torch.inference_mode(), packed.applied():
        assert not model(inputs).any()


@pytest.mark.usefixtures("kind")
def test_a_layer_whose_forward_somebody_replaced_is_left_alone() -> None:
    """Catches packing that drops another library's forward."""
    model = small_model()
    model[0].forward = lambda rows: rows.new_zeros(*rows.shape[:-1], 64)
    with torch.inference_mode(), PackedLinears(model).applied():
        assert not model(torch.ones(1, 1, 32, dtype=torch.bfloat16)).any()
    assert "forward" in vars(model[0])


def test_types_without_fast_products_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches packing where it does not pay, and layers lost by it."""
    assert not can_pack(small_model().to(torch.float16))
    monkeypatch.setattr(linear, "preferred", lambda: False)
    assert not can_pack(small_model().to(torch.float32))
