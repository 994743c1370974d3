"""Products of few rows: right for every size and type, and no row depends on another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from passlm.kernels import native
from passlm.kernels.linear import RowsProduct, Update

pytestmark = pytest.mark.skipif(
    not native.available(), reason="this machine has no AVX2, or no C++ compiler"
)

EVERY_TILE = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 29, 64)
# Outputs and inputs: whole blocks, partial blocks, and very few.
SIZES = ((64, 48), (70, 33), (5, 3), (200, 1))
KINDS = ("float32", "bfloat16", "int8")


def layer_of(kind: str, outputs: int, inputs: int, bias: bool) -> tuple[RowsProduct, Tensor]:
    """Return a layer and its matrix in float64; the bias, if any, is 1 to `outputs`."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
    added = torch.arange(1.0, outputs + 1) if bias else None
    if kind != "int8":
        weight = weight.to(getattr(torch, kind))
        own = None if added is None else added.to(weight.dtype)
        return RowsProduct(weight, bias=own), weight.double()
    scale = torch.rand(outputs) + 0.5
    whole = (weight * 40).round().clamp(-128, 127).to(torch.int8)
    return RowsProduct(whole, scale, added), whole.double() * scale.double()[:, None]


def rows_of(number: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(100, inputs, generator=torch.Generator().manual_seed(inputs))
    return drawn[:number].to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_matrix(kind: str, size: tuple[int, int], bias: bool) -> None:
    """Catches weights unpacked for another output, blocks truncated or read beyond their end, a
    scale or bias of another output, and a number of rows without a kernel."""
    layer, matrix = layer_of(kind, *size, bias)
    for number in EVERY_TILE:
        rows = rows_of(number, size[1], torch.bfloat16 if kind == "bfloat16" else torch.float32)
        expected = rows.double() @ matrix.T
        if bias:
            expected += torch.arange(1.0, size[0] + 1)
        found = layer.forward(rows)
        assert found.dtype == rows.dtype
        tolerance = 0.005 if kind == "bfloat16" else 1e-5
        torch.testing.assert_close(
            found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [8, 24, 200])
def test_a_row_gives_the_same_bits_whatever_is_beside_it(
    kind: str, dtype: torch.dtype, outputs: int
) -> None:
    """Catches sums whose order depends on the number of rows, and multiply-adds that a compiler
    fuses only in some loops, depending on the registers they use: a verified token would differ
    from plain decoding's where two tokens are almost equally likely."""
    layer, _ = layer_of(kind, outputs, 96, bias=False)
    alone = torch.cat([layer.forward(row[None]) for row in rows_of(64, 96, dtype)])
    for number in EVERY_TILE:
        assert torch.equal(layer.forward(rows_of(number, 96, dtype)), alone[:number])


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """Catches truncation, ties rounded up, and NaN turned into a number."""
    layer = RowsProduct(torch.eye(16))
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-15, -1 - 2**-8, 3e38, 1e-40])
    rows = torch.zeros(3, 16)
    rows[0, :6] = values
    rows[1] = torch.inf
    rows[2] = torch.nan
    halves = RowsProduct(torch.eye(16, dtype=torch.bfloat16))
    given = torch.cat([rows[:1], torch.zeros(2, 16)])
    assert torch.equal(layer.forward(given)[0, :6], values)
    summed = RowsProduct(torch.ones(16, 2)).forward(torch.tensor([[1.0, 2**-8]]))
    assert torch.equal(summed, torch.full((1, 16), 1 + 2**-8))
    wide = RowsProduct(torch.ones(16, 2, dtype=torch.bfloat16))
    ties = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [1.0, 2**-7]]).bfloat16()
    assert torch.equal(wide.forward(ties), ties.float().sum(1).bfloat16()[:, None].expand(3, 16))
    assert wide.forward(torch.full((1, 2), torch.nan).bfloat16()).isnan().all()
    assert (wide.forward(torch.full((1, 2), torch.inf).bfloat16()) == torch.inf).all()
    assert halves.forward(rows[1:2].bfloat16()).isnan().all(), "0 times infinity is no number"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_lie_in_memory_as_they_like(dtype: torch.dtype) -> None:
    """Catches rows of a slice, a transpose or an expanded tensor read as if they were
    contiguous."""
    layer, _ = layer_of("bfloat16" if dtype == torch.bfloat16 else "float32", 40, 24, bias=True)
    base = torch.randn(4, 6, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = (
        base[:, :, 24:],
        base[:, :, ::2],
        base[..., :24].transpose(0, 1),
        base[1:2, :, :24].expand(3, 6, 24),
        base[0, 0, :24],
    )
    for view in views:
        found = layer.forward(view)
        assert found.shape == (*view.shape[:-1], 40)
        assert torch.equal(found, layer.forward(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_and_their_updates(kind: str) -> None:
    """Catches look-ahead rows that get another layer's update, real rows changed by the updates
    of others, a scale or bias of another layer, and updates lost for the rows of a second tile."""
    widths, rank, inputs = (64, 128, 70), 5, 48
    pairs = [layer_of(kind, width, inputs, bias=width != 128) for width in widths]
    layers = [layer for layer, _ in pairs]
    drawn = torch.Generator().manual_seed(3)
    down = [torch.randn(rank, inputs, generator=drawn).bfloat16().float() for _ in widths]
    up = [torch.randn(width, rank, generator=drawn).bfloat16().float() for width in widths]
    joined = RowsProduct.joined(layers, Update(down, up))
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    for number in EVERY_TILE:
        rows = rows_of(number, inputs, dtype)
        alone = torch.cat([layer.forward(rows) for layer in layers], -1)
        assert torch.equal(joined.forward(rows), alone)
        assert torch.equal(joined.forward(rows, torch.zeros(number)), alone)
        gate = (torch.arange(number) % 3 > 0).to(dtype)
        found = joined.forward(rows.view(1, number, inputs), gate)[0]
        assert torch.equal(found[gate == 0], alone[gate == 0])
        low = [rows.double() @ one.double().T for one in down]
        update = torch.cat([a @ b.double().T for a, b in zip(low, up, strict=True)], -1)
        expected = alone.double() + gate[:, None].double() * update
        size = float(expected.abs().max())
        tolerance = 0.01 if kind == "bfloat16" else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * size)
    with pytest.raises(RuntimeError, match="gate is not one number for each row"):
        joined.forward(rows_of(3, inputs, dtype), torch.ones(2))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.zeros(2, 24, dtype=torch.float64), "must be bfloat16 or float32"),
        (torch.zeros(2, 23), "not as many inputs"),
        (torch.zeros(2, 24, dtype=torch.bfloat16), "bias is not of the rows' type"),
    ],
)
def test_what_does_not_fit_is_refused(rows: Tensor, said: str) -> None:
    """Catches reads of memory outside the tensors."""
    layer, _ = layer_of("float32", 40, 24, bias=True)
    with pytest.raises(RuntimeError, match=said):
        layer.forward(rows)


def test_no_rows_and_many_threads() -> None:
    """Catches a division by a row count of zero, and threads without a block to compute."""
    layer, _ = layer_of("float32", 5, 24, bias=False)
    assert layer.forward(torch.zeros(0, 24)).shape == (0, 5)
    before = torch.get_num_threads()
    expected = layer.forward(rows_of(3, 24))
    try:
        torch.set_num_threads(5)
        assert torch.equal(layer.forward(rows_of(3, 24)), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_shorter_registers() -> None:
    """Catches a layout or a kernel that works with AVX-512 only."""
    check = f"{__file__}::{test_products_are_those_of_the_matrix.__name__}"
    other = f"{__file__}::{test_a_row_gives_the_same_bits_whatever_is_beside_it.__name__}"
    attention = os.path.join(os.path.dirname(__file__), "test_attention.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", check, other, attention],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " skipped" not in done.stdout
