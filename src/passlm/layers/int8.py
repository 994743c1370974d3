"""Int8 weights for a CPU.

Weights are rounded once, with a scale for each output; they are unpacked to float32 in registers
and multiplied with rows as they are (`kernels/linear.py`). Nothing but the weights is rounded, and
what a row gives does not depend on the rows beside it: validated rows give what plain decoding
gives. The rounded model is another model, and decoding is lossless with respect to it.
"""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from passlm.errors import InputError
from passlm.kernels import linear, native
from passlm.layers.fingerprint import sample_weights
from passlm.params import QUANTIZED

_LARGEST = 127  # of a rounded weight
_SMALLEST_SCALE = 1e-12  # of an output of zeros alone
_TYPES = (torch.bfloat16, torch.float32)  # of rows that are multiplied as they are


class QuantizeError(InputError):
    """A model or a machine that int8 weights cannot be had for; one line."""


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8 numbers, `[rows, columns]`, and what one is worth in each row, `[rows]`.

    Args:
        matrix: float32.
    """
    largest = matrix.abs().amax(1, keepdim=True)
    scale = (largest / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (matrix / scale).round().to(torch.int8), scale[:, 0]


class Int8Linear(nn.Module):
    """A linear layer with int8 weights.

    Args:
        layer: the layer it stands for, `nn.Linear` or the transposed `Conv1D` of gpt2.
        keep: keep the layer's own weights as well, as `weight`: for whoever reads rows of them.

    Attributes:
        in_features: numbers that it takes.
        out_features: numbers that it gives.
        product: what multiplies.
        sample: some of the weights as they were, by which a model is known.
    """

    sample: Tensor

    def __init__(self, layer: nn.Module, keep: bool = False) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor), "a linear layer has weights"
        weight = layer.weight.detach()
        matrix = (weight if isinstance(layer, nn.Linear) else weight.T).float().contiguous()
        self.out_features, self.in_features = matrix.shape
        whole, scale = rounded(matrix)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        if bias is not None and bias.dtype not in _TYPES:
            bias = bias.float()
        self.product = linear.RowsProduct(whole, scale, bias)
        self.register_buffer("sample", sample_weights(weight))
        self.weight = layer.weight if keep else None

    @property
    def nbytes(self) -> int:
        """Bytes that a pass reads."""
        return self.in_features * self.out_features + self.product.scale.nbytes

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the type of `rows`."""
        return self.product.forward(rows)


def quantized(model: PreTrainedModel, kind: str = "int8") -> PreTrainedModel:
    """A model with rounded linear layers; all else is shared with the given one, which stays.

    Args:
        model: on a CPU. Layers other than `nn.Linear` and `Conv1D` are taken as they are.
        kind: one of `QUANTIZED`.

    Raises:
        QuantizeError: an unknown kind, a model that is not on a CPU or has no such layers, or a
            machine without `kernels/linear.py`.
    """
    if kind not in QUANTIZED:
        raise QuantizeError(f"quantize is {kind!r}: it must be one of {', '.join(QUANTIZED)}")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise QuantizeError(f"int8 weights are for CPUs alone, the model is on {device}")
    if not native.available():
        raise QuantizeError(
            "int8 weights need a CPU with AVX2 or AVX-512, and a C++ compiler: install g++, or "
            "leave quantize out"
        )
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    made = copy.deepcopy(model, shared)  # new modules around the same tensors
    output: nn.Module = made.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [name for name, module in made.named_modules() if _is_linear(module)]
    if not names:
        raise QuantizeError(f"{type(model).__name__} has no linear layers that int8 is known for")
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = made.get_submodule(name)
        # A sampler head reads rows of the output layer, which mostly is the table of embeddings.
        setattr(made.get_submodule(parent), own, Int8Linear(layer, keep=layer is output))
    return made


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has layers of `quantized`."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"
