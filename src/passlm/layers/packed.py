"""Linear layers in a layout for passes of few rows on a CPU.

Torch hands oneDNN a plain weight matrix, which is laid out anew in every product of more than one
row: in bfloat16 five rows then cost 1.7 times one row. Weights are laid out once: for our own
products (`kernels/linear.py`) where the machine has them, else, in bfloat16, for oneDNN's. The
price is a second copy of the weights. The weights themselves are not touched: the layers compute
with the copies inside a `with` block only.
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

_ROWS = 4  # what oneDNN's layout is chosen for; measured good from 1 row to 25


def can_pack(model: nn.Module) -> bool:
    """Whether packing pays: weights on a CPU in a type that it has fast products for."""
    return any(_packable(module) for module in model.modules())


class PackedLinears:
    """Packed copies of a model's linear layers.

    Args:
        model: its plain `nn.Linear` layers are packed where `can_pack` says so; others stay as
            they are.
        without: layers of it that stay as they are, too.
    """

    def __init__(self, model: nn.Module, without: Collection[nn.Module] = ()) -> None:
        others = set(without)
        found = [module for module in model.modules() if _packable(module)]
        self._layers = [layer for layer in found if layer not in others]
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
            ours: dict[nn.Module, Forward] = {
                layer: forward
                for layer, forward in zip(self._layers, self._forwards, strict=True)
                if "forward" not in vars(layer)
            }
            with Swap(ours, by="packed weights"):
                yield


def has_product(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain layer with a product of few rows, and no other is faster here."""
    return _packable(layer) and linear.preferred()


def packed_product(layer: nn.Linear) -> linear.RowsProduct:
    """The product of such a layer."""
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
