"""Weights packed once for passes of few rows on a CPU.

Torch hands oneDNN a plain weight matrix, which oneDNN packs again in every product of more than one
row: in bfloat16, five rows then cost 1.7 times as much as one. Here weights are packed once: for
our own products (`kernels/linear.py`) where the machine supports them, else, in bfloat16, for
oneDNN's. This takes a second copy of the weights. The model's own weights are not changed: layers
compute with the copies inside a `with` block only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from passlm.kernels import linear
from passlm.layers.swapped import Forward, Swap

_ROWS = 4  # rows to choose oneDNN's layout for; measured to be good from 1 row to 25


def can_pack(model: nn.Module) -> bool:
    """Return whether a model has layers on a CPU in a type with faster packed products."""
    return any(_packable(module) for module in model.modules())


class PackedLinears:
    """Packed copies of a model's linear layers.

    Args:
        model: the model. Its plain `nn.Linear` layers are packed where that pays; others are left
            alone.
        without: further layers to leave alone.
    """

    def __init__(self, model: nn.Module, without: Collection[nn.Module] = ()) -> None:
        others = set(without)
        found = [module for module in model.modules() if _packable(module)]
        self._layers = [layer for layer in found if layer not in others]
        self._forwards: list[Callable[[Tensor], Tensor]] = []
        self._packed_from: list[tuple[int, int, int]] = []
        self._lock = threading.RLock()  # another thread would undo the swap during a pass
        self._pack()

    def _pack(self) -> None:
        self._packed_from = self._weights()
        with torch.no_grad():
            self._forwards = [_packed_forward(layer) for layer in self._layers]

    def _weights(self) -> list[tuple[int, int, int]]:
        """Return a key of each weight that changes when it is replaced, moved or written to."""
        weights = [layer.weight for layer in self._layers]
        # Inference tensors have no version.
        return [(id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the model compute with its packed weights inside a `with` block.

        Weights that have changed since the last time are packed again. A layer whose `forward` has
        been replaced already keeps that one.
        """
        with self._lock:
            if self._weights() != self._packed_from:
                self._pack()
            ours: dict[nn.Module, Forward] = {
                layer: forward
                for layer, forward in zip(self._layers, self._forwards, strict=True)
                if "forward" not in vars(layer)
            }
            with Swap(ours, by="packed weights"):
                yield


def has_product(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is plain and our product for few rows is the fastest for it here."""
    return _packable(layer) and linear.preferred()


def packed_product(layer: nn.Linear) -> linear.RowsProduct:
    """Return our product with the weights of a layer that `has_product`."""
    return linear.RowsProduct(layer.weight, bias=layer.bias)


def _packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or module.weight.device.type != "cpu":
        return False
    dtype = module.weight.dtype
    if dtype in (torch.bfloat16, torch.float32) and linear.preferred():
        return True
    return dtype == torch.bfloat16 and _has_onednn()


def _has_onednn() -> bool:
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    if has_product(layer):
        return packed_product(layer).forward
    bias = layer.bias
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
    product = torch.ops.mkldnn._linear_pointwise.default

    def forward(rows: Tensor) -> Tensor:
        computed: Tensor = product(rows, packed, bias, "none", [], "")
        return computed

    return forward
