"""Products of a few rows with a weight matrix on a CPU (`cpp/products.cpp`).

A decoding pass reads every weight for one to about twenty rows. Torch's libraries pack bfloat16
weights for many rows, and multiply a few rows in twice the time that reading the weights takes.
Here a pass takes little more than reading the weights once, and a further row costs little. An
output is summed in the same order for any number of rows, so that a row's result does not depend on
the other rows.

On CPUs with matrix instructions (AMX), torch's libraries multiply bfloat16 faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passlm.kernels import native

_WORD = 4  # bytes
_TYPES = (torch.bfloat16, torch.float32, torch.int8)  # of weights
_OPERATOR = "passlm::rows_product"

torch.library.define(
    _OPERATOR,
    "(Tensor rows, Tensor gate, Tensor packed, Tensor scale, Tensor bias, Tensor down, Tensor up, "
    "Tensor parts, int width, int threads) -> Tensor",
)


@torch.library.register_fake(_OPERATOR)  # type: ignore[untyped-decorator]
def _shape(
    rows: Tensor,
    gate: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    down: Tensor,
    up: Tensor,
    parts: Tensor,
    width: int,
    threads: int,
) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


@dataclass(frozen=True)
class Update:
    """Low-rank updates `B A x` (LoRA) of the layers of a product, for some of its rows.

    Attributes:
        down: `A` of each layer, `[rank, in]`.
        up: `B` of each layer, `[out, rank]`; the number of outputs is a multiple of `block`, except
            in the last layer.
    """

    down: Sequence[Tensor]
    up: Sequence[Tensor]

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return packed bfloat16 `A` and `B`, and where `A x` of each output register begins."""
        down, up = torch.cat(list(self.down)), torch.cat(list(self.up))
        sizes = [-(-len(up) // native.lanes()) for up in self.up]
        starts = torch.arange(len(self.up)) * up.shape[1]
        parts = starts.repeat_interleave(torch.tensor(sizes))
        return _packed(down.detach().bfloat16()), _packed(up.detach().bfloat16()), parts


class RowsProduct(nn.Module):
    """Linear layer with a copy of its weights, packed for few rows.

    Args:
        weight: `[out, in]` on the CPU, bfloat16, float32 or int8.
        scale: factor of each output's weights, `[out]`, float32; 1 if None.
        bias: `[out]`, in the type of the rows.
        update: LoRA that is added to the rows with a gate.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    parts: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        update: Update | None = None,
    ) -> None:
        super().__init__()
        self.width = len(weight)
        none = torch.empty(0)
        down, up, parts = (none, none, none) if update is None else update.packed()
        self.register_buffer("packed", _packed(weight.detach()))
        whole = -(-self.width // block()) * block() - self.width
        scale = none if scale is None else nn.functional.pad(scale.detach(), (0, whole))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", none if bias is None else bias.detach().contiguous())
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.register_buffer("parts", parts)
        self.register_buffer("none", none)

    @classmethod
    def joined(cls, layers: Sequence[RowsProduct], update: Update | None = None) -> RowsProduct:
        """Return layers that share an input as one layer with concatenated outputs.

        Args:
            layers: layers with weights of one type; either all have scales or none has.
            update: LoRA of all layers.
        """
        weight = torch.cat([layer.weight for layer in layers])
        scales = [layer.scale[: layer.width] for layer in layers if layer.scale.numel()]
        biases = [layer.bias for layer in layers if layer.bias.numel()]
        bias = None
        if biases:
            zeros = biases[0].new_zeros
            parts = [one.bias if one.bias.numel() else zeros(one.width) for one in layers]
            bias = torch.cat(parts)
        return cls(weight, torch.cat(scales) if scales else None, bias, update)

    @property
    def weight(self) -> Tensor:
        """A copy of the weights in their original layout, `[out, in]`."""
        inputs = self.packed.shape[1]
        return self.packed.permute(0, 3, 2, 1).reshape(-1, inputs)[: self.width]

    def forward(self, rows: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map rows `[..., in]` to `[..., out]` in the same type; float16 is computed in float32.

        Args:
            rows: the rows.
            gate: factor of each row's update, `[N]`, 0 for rows without one; None if no row has
                one.
        """
        taken = rows.float() if rows.dtype == torch.float16 else rows
        made: Tensor = torch.ops.passlm.rows_product(
            taken,
            self.none if gate is None else gate.to(taken.dtype),
            self.packed,
            self.scale,
            self.bias,
            self.down,
            self.up,
            self.parts,
            self.width,
            torch.get_num_threads(),
        )
        return made.to(rows.dtype)


def block() -> int:
    """Return the number of outputs that is a whole number of blocks for every weight type."""
    return native.lanes() * _WORD


def preferred() -> bool:
    """Return whether our products are the fastest for floating-point weights on this machine."""
    return not torch.cpu._is_amx_tile_supported() and native.available()


def described() -> str:
    """Return which products are used for floating-point weights; part of a package's key."""
    return f"of few rows, {native.capability()}" if preferred() else "torch"


def _packed(weight: Tensor) -> Tensor:
    """Return weights in the blocks of `cpp/products.cpp`, `[blocks, in, lanes, per word]`."""
    assert weight.dtype in _TYPES, f"weights of {weight.dtype} are not supported"
    lanes, together = native.lanes(), _WORD // weight.itemsize
    outputs, inputs = weight.shape
    missing = -outputs % (lanes * together)
    padded = torch.cat([weight, weight.new_zeros(missing, inputs)]) if missing else weight
    blocks = padded.reshape(-1, together, lanes, inputs)
    return blocks.permute(0, 3, 2, 1).contiguous()
