"""Int8 weights for a CPU: linear layers that multiply in 8-bit integers.

Weights are rounded once, with a scale for each output; what a layer is given is written in each
pass as two 8-bit digits, with a scale for each row, which is as good as not rounding it. (One
digit costs ten times the error that the weights' rounding does: a few numbers of a row are far
larger than the rest.) Sums of integers are exact, so a row's result does not depend on the rows
beside it: validated rows give what plain decoding gives. The rounded model is another model, and
decoding is lossless with respect to it.

Rounding by row and by output: Yao et al., "ZeroQuant", arXiv 2206.01861.
"""

from __future__ import annotations

import copy
from itertools import chain

import torch
import torch.ao.quantization.fx._decomposed  # declares the operators of what is traced
from torch import Tensor, nn
from transformers import PreTrainedModel

from passlm.card import SAMPLES, spread
from passlm.errors import InputError
from passlm.params import QUANTIZED

_LARGEST = 127  # of a digit
_DIGIT = 254  # so many of the second digit are one of the first
_ZERO = 128  # what 0 becomes in a row: the integer units take unsigned rows
_SMALLEST_SCALE = 1e-12  # of a row or an output of zeros alone


class QuantizeError(InputError):
    """A model or a machine that int8 weights cannot be had for; one line."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights.

    Args:
        layer: the layer it stands for, `nn.Linear` or the transposed `Conv1D` of gpt2.
        keep: keep the layer's own weights as well, as `weight`: for whoever reads rows of them.

    Attributes:
        in_features: numbers that it takes.
        out_features: numbers that it gives.
        rounded: `[out, in]`, int8; one is worth `scale`.
        scale: of each output, `[out]`, float32.
        sample: some of the weights as they were, by which a model is known.
    """

    rounded: Tensor
    scale: Tensor
    zero: Tensor
    sample: Tensor

    def __init__(self, layer: nn.Module, keep: bool = False) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor), "a linear layer has weights"
        weight = layer.weight.detach()
        matrix = (weight if isinstance(layer, nn.Linear) else weight.T).float().contiguous()
        self.out_features, self.in_features = matrix.shape
        scale = _scale(matrix)
        self.register_buffer("rounded", (matrix / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int32))
        self.register_buffer("sample", spread(weight, SAMPLES // 2))
        self.bias: Tensor | None = layer.bias  # type: ignore[assignment]
        self.weight = layer.weight if keep else None
        self._packed: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a pass reads."""
        return self.rounded.nbytes + self.scale.nbytes

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the type of `rows`."""
        flat = rows.reshape(-1, self.in_features).float()
        scale = _scale(flat)
        units = flat / scale
        first = units.round()
        second = ((units - first) * _DIGIT).round()
        given = torch.cat([(digit + _ZERO).to(torch.uint8) for digit in (first, second)])
        product = self._traced(given) if torch.compiler.is_exporting() else self._product(given)
        products = product.view(2, flat.shape[0], self.out_features)
        product = (products[0] + products[1] / _DIGIT) * scale
        if self.bias is not None:
            product = product + self.bias
        return product.to(rows.dtype).view(*rows.shape[:-1], self.out_features)

    def _product(self, given: Tensor) -> Tensor:
        """The product by oneDNN, `[N, out]`, float32; its layout of the weights is kept."""
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.rounded, None)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(given, 1.0, _ZERO, self._packed, self.scale, self.zero, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return product

    def _traced(self, given: Tensor) -> Tensor:
        """The same in the words that inductor knows an integer product by."""
        operators = torch.ops.quantized_decomposed
        rows = operators.dequantize_per_tensor(given, 1.0, _ZERO, 0, 255, torch.uint8)
        weight = operators.dequantize_per_channel(
            self.rounded, self.scale, self.zero, 0, -_LARGEST - 1, _LARGEST, torch.int8
        )
        return nn.functional.linear(rows, weight)


def _scale(matrix: Tensor) -> Tensor:
    """What one is worth in each row, `[rows, 1]`."""
    return (matrix.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)


def quantized(model: PreTrainedModel, kind: str = "int8") -> PreTrainedModel:
    """A model with rounded linear layers; all else is shared with the given one, which stays.

    Args:
        model: on a CPU. Layers other than `nn.Linear` and `Conv1D` are taken as they are.
        kind: one of `QUANTIZED`.

    Raises:
        QuantizeError: an unknown kind, a model that is not on a CPU or has no such layers, or a
            CPU without 8-bit integer products.
    """
    if kind not in QUANTIZED:
        raise QuantizeError(f"quantize is {kind!r}: it must be one of {', '.join(QUANTIZED)}")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise QuantizeError(f"int8 weights are for CPUs alone, the model is on {device}")
    if not can_quantize():
        raise QuantizeError("int8 weights need a CPU with AVX-512 VNNI: leave quantize out")
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


def can_quantize() -> bool:
    """Whether this machine multiplies 8-bit integers without rounding."""
    return bool(torch.cpu._is_vnni_supported())


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has layers of `quantized`."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def matrices(model: nn.Module) -> list[Tensor | Int8Linear]:
    """The model's weight matrices, in the order of its parameters; each once."""
    found: dict[int, Tensor | Int8Linear] = {}
    for module in model.modules():
        if isinstance(module, Int8Linear):
            # Where two share weights, the first tells the model.
            key = id(module) if module.weight is None else id(module.weight)
            found.setdefault(key, module)
        else:
            own = module.parameters(recurse=False)
            found |= {id(p): p for p in own if p.ndim == 2 and id(p) not in found}
    return list(found.values())


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"
