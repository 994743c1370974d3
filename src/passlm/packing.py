"""Linear layers in the layout that oneDNN's kernels read best, for passes of few rows on a CPU.

Torch hands oneDNN a plain weight matrix, which is laid out anew in every product of more than one
row: in bfloat16 five rows then cost 1.7 times one row. Laid out once, they cost 1.4 times as much,
and one row costs two thirds. The price is a second copy of the weights. The model itself is not
changed: its layers take their packed weights inside a `with` block only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_ROWS = 4  # what the layout is chosen for; measured good from 1 row to 25


def can_pack(model: nn.Module) -> bool:
    """Whether packing pays: bfloat16 weights on a CPU whose oneDNN computes in it."""
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class PackedLinears:
    """Packed copies of a model's linear layers.

    Args:
        model: its plain `nn.Linear` layers are packed; others, and layers whose `forward` somebody
            replaced, stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear and "forward" not in vars(module)
        ]
        self._forwards: list[Callable[[Tensor], Tensor]] = []
        self._versions: list[int] = []
        self._pack()

    def _pack(self) -> None:
        self._versions = self._current_versions()
        with torch.no_grad():
            self._forwards = [_packed_forward(layer) for layer in self._layers]

    def _current_versions(self) -> list[int]:
        return [layer.weight._version for layer in self._layers]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with its packed weights until the block is left, by whatever way.

        Weights changed in place since the last time are packed anew.
        """
        if self._current_versions() != self._versions:
            self._pack()
        try:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward  # type: ignore[method-assign,assignment]
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
    bias = layer.bias
    product = torch.ops.mkldnn._linear_pointwise.default

    def forward(rows: Tensor) -> Tensor:
        computed: Tensor = product(rows, packed, bias, "none", [], "")
        return computed

    return forward
