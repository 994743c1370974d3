"""Linear layers in the layout that oneDNN's kernels read best, for passes of few rows on a CPU.

Torch hands oneDNN a plain weight matrix, which is laid out anew in every product of more than one
row: in bfloat16 five rows then cost 1.7 times one row. Laid out once, they cost 1.4 times as much,
and one row costs two thirds. The price is a second copy of the weights. The weights themselves are
not touched: the layers compute with the copies inside a `with` block only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

_ROWS = 4  # what the layout is chosen for; measured good from 1 row to 25


def can_pack(model: nn.Module) -> bool:
    """Whether packing pays: bfloat16 weights on a CPU whose oneDNN computes in it."""
    return (
        any(_packable(module) for module in model.modules())
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class PackedLinears:
    """Packed copies of a model's linear layers.

    Args:
        model: its plain bfloat16 `nn.Linear` layers on the CPU are packed; others stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if _packable(module)]
        self._forwards: list[Callable[[Tensor], Tensor]] = []
        self._packed_from: list[tuple[int, int, int]] = []
        self._lock = threading.RLock()  # a second thread would take the forwards away in mid-pass
        self._pack()

    def _pack(self) -> None:
        self._packed_from = self._weights()
        with torch.no_grad():
            self._forwards = [_packed_forward(layer) for layer in self._layers]

    def _weights(self) -> list[tuple[int, int, int]]:
        """What changes when a weight is replaced, moved or written to."""
        weights = [layer.weight for layer in self._layers]
        return [
            (id(w), w.data_ptr(), 0 if w.is_inference() else w._version)  # those keep no version
            for w in weights
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with its packed weights until the block is left, by whatever way.

        Weights changed since the last time are packed anew; a layer whose `forward` somebody has
        replaced keeps theirs.
        """
        with self._lock:
            if self._weights() != self._packed_from:
                self._pack()
            ours = [
                (layer, forward)
                for layer, forward in zip(self._layers, self._forwards, strict=True)
                if "forward" not in vars(layer)
            ]
            try:
                for layer, forward in ours:
                    layer.forward = forward  # type: ignore[method-assign,assignment]
                yield
            finally:
                for layer, _ in ours:
                    vars(layer).pop("forward", None)


def _packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
    )


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
    bias = layer.bias
    product = torch.ops.mkldnn._linear_pointwise.default

    def forward(rows: Tensor) -> Tensor:
        computed: Tensor = product(rows, packed, bias, "none", [], "")
        return computed

    return forward
