"""Int8 weight quantization for CPUs.

Weights are rounded once, with one scale for each output. A product unpacks them to float32 in
registers and multiplies them with the unrounded rows (`kernels/linear.py`). Only the weights are
rounded, and the output of a row does not depend on the other rows, so verified rows equal those of
plain decoding. The quantized model is a different model; decoding is lossless with respect to it.
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

_LARGEST = 127  # absolute value of a rounded weight
_SMALLEST_SCALE = 1e-12  # for outputs whose weights are all zero
_TYPES = (torch.bfloat16, torch.float32)  # of rows that products take without conversion


class QuantizeError(InputError):
    """A model or machine that does not support int8 weights; the message is one line."""


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8 with one scale for each row.

    Args:
        matrix: `[rows, columns]`, float32.

    Returns:
        The int8 weights, `[rows, columns]`, and the scales they are multiplied by, `[rows]`.
    """
    largest = matrix.abs().amax(1, keepdim=True)
    scale = (largest / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (matrix / scale).round().to(torch.int8), scale[:, 0]


class Int8Linear(nn.Module):
    """A linear layer with int8 weights.

    Args:
        layer: the layer to replace, an `nn.Linear` or gpt2's transposed `Conv1D`.
        keep: keep the original weights as well, as `weight`, for code that reads rows of them.

    Attributes:
        in_features: number of inputs.
        out_features: number of outputs.
        product: the matrix product.
        sample: sample of the original weights, for the model's fingerprint.
    """

    sample: Tensor

    def __init__(self, layer: nn.Module, keep: bool = False) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor), "a linear layer has a weight"
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
        """Number of bytes that a pass reads."""
        return self.in_features * self.out_features + self.product.scale.nbytes

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows `[..., in]` to `[..., out]`, in the type of `rows`."""
        return self.product.forward(rows)


def quantized(model: PreTrainedModel, kind: str = "int8") -> PreTrainedModel:
    """Return a copy of a model with quantized linear layers.

    The copy shares all other tensors with the given model, which is not changed.

    Args:
        model: a model on a CPU. Only its `nn.Linear` and `Conv1D` layers are quantized.
        kind: one of `QUANTIZED`.

    Raises:
        QuantizeError: the kind is unknown, the model is not on a CPU or has no such layers, or this
            machine lacks the operators of `kernels/linear.py`.
    """
    if kind not in QUANTIZED:
        raise QuantizeError(f"quantize is {kind!r}: it must be one of {', '.join(QUANTIZED)}")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise QuantizeError(f"int8 weights are supported on CPUs only: the model is on {device}")
    if not native.available():
        raise QuantizeError(
            "int8 weights need a CPU with AVX2 or AVX-512, and a C++ compiler: install g++, or "
            "omit quantize"
        )
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    made = copy.deepcopy(model, shared)  # new modules around the same tensors
    output: nn.Module = made.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [name for name, module in made.named_modules() if _is_linear(module)]
    if not names:
        raise QuantizeError(f"{type(model).__name__} has no linear layers that int8 supports")
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = made.get_submodule(name)
        # A sampler head reads rows of the output layer, which often is the embedding table.
        setattr(made.get_submodule(parent), own, Int8Linear(layer, keep=layer is output))
    return made


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model has layers made by `quantized`."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"
