"""Products of a few rows with a matrix of weights, on a CPU (`cpp/products.cpp`).

A pass of decoding reads every weight for some one to twenty rows. torch's libraries lay bfloat16
weights out for many rows and multiply few of them at the price of twice reading the weights; here
a pass costs little more than reading them once, and rows cost little beside each other. An output
is summed up in one order whatever the number of rows, so that a row's result does not depend on
the rows beside it.

CPUs with matrix instructions (AMX) multiply bfloat16 faster in torch's libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passlm import native

_WORD = 4  # bytes
_TYPES = (torch.bfloat16, torch.float32, torch.int8)  # of weights
_OPERATOR = "passlm::rows_product"

torch.library.define(
    _OPERATOR,
    "(Tensor rows, Tensor more, Tensor packed, Tensor scale, Tensor bias, int width, int threads)"
    " -> Tensor",
)


@torch.library.register_fake(_OPERATOR)  # type: ignore[untyped-decorator]
def _shape(
    rows: Tensor,
    more: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    width: int,
    threads: int,
) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


class RowsProduct(nn.Module):
    """A linear layer with a copy of its weights, laid out for few rows.

    Args:
        weight: `[out, in]` on the CPU, bfloat16, float32 or int8.
        scale: what one of an output's weights is worth, `[out]`, float32; 1 if not given.
        bias: `[out]`, of the type of the rows.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self._width = len(weight)
        self._weight = weight.detach() if scale is None else None  # to be extended
        none = torch.empty(0)
        self.register_buffer("packed", _packed(weight.detach()))
        self.register_buffer("scale", none if scale is None else scale.detach().contiguous())
        self.register_buffer("bias", none if bias is None else bias.detach().contiguous())
        self.register_buffer("none", none)

    def forward(self, rows: Tensor, more: Tensor | None = None) -> Tensor:
        """`[..., in]`, bfloat16 or float32, to `[..., out]` in the same type.

        Args:
            rows: the rows.
            more: their further inputs, where the layer was `extended`, `[..., columns]`.
        """
        made: Tensor = torch.ops.passlm.rows_product(
            rows,
            self.none if more is None else more,
            self.packed,
            self.scale,
            self.bias,
            self._width,
            torch.get_num_threads(),
        )
        return made

    def extended(self, columns: Tensor) -> RowsProduct:
        """A layer that takes further inputs, with these weights, `[out, columns]`.

        Raises:
            ValueError: its weights are rounded, so there is no common scale.
        """
        if self._weight is None:
            raise ValueError("a layer with scales has no further inputs")
        weight = torch.cat([self._weight, columns.to(self._weight)], 1)
        return RowsProduct(weight, bias=self.bias if self.bias.numel() else None)


def preferred() -> bool:
    """Whether they are the fastest products of floating-point weights on this machine."""
    return not torch.cpu._is_amx_tile_supported() and native.available()


def described() -> str:
    """Which products floating-point weights are multiplied by: what passes are told apart by."""
    return f"of few rows, {native.capability()}" if preferred() else "torch"


def _packed(weight: Tensor) -> Tensor:
    """Blocks of weights as the source says: `[blocks, in, lanes, weights in a word]`."""
    assert weight.dtype in _TYPES, f"no products with weights of {weight.dtype}"
    lanes, together = native.lanes(), _WORD // weight.itemsize
    outputs, inputs = weight.shape
    missing = -outputs % (lanes * together)
    padded = torch.cat([weight, weight.new_zeros(missing, inputs)]) if missing else weight
    blocks = padded.reshape(-1, together, lanes, inputs)
    return blocks.permute(0, 3, 2, 1).contiguous()
