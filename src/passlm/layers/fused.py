"""Fuse linear layers that share an input, and their LoRA, into one call, for compiled passes.

A pass of few rows has some hundred matrix products of a few microseconds each, so the overhead of a
call matters. `kernels/linear.py` adds the LoRA of look-ahead rows at the end of an output's sum.
Which layers share an input is found by running the model (`lora.groups_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from passlm.kernels.linear import RowsProduct, Update, block
from passlm.layers.int8 import Int8Linear
from passlm.layers.lora import AppliedLora, groups_of
from passlm.layers.packed import has_product, packed_product
from passlm.layers.swapped import Swap


class JoinedLinears:
    """Fused copies of a model's linear layers.

    Args:
        model: the model. Layers that `kernels/linear.py` supports are fused; others are left alone.
        probe: runs the model on a short sequence; see `lora.groups_of`.
        lora: updates of look-ahead rows, or None.

    Attributes:
        layers: the layers that are fused.
    """

    def __init__(
        self, model: nn.Module, probe: Callable[[], object], lora: AppliedLora | None
    ) -> None:
        updates = {} if lora is None else lora.of_layers()
        self._joined: list[_Joined] = []
        for group in groups_of(model, probe):
            together: list[tuple[nn.Module, RowsProduct]] = []
            for name in group:
                layer = model.get_submodule(name)
                if not joinable(layer):
                    continue
                product = _product(layer)
                if together and not _fit([one for _, one in together], product):
                    self._joined.append(_joined(together, updates))
                    together = []
                together.append((layer, product))
            if together:
                self._joined.append(_joined(together, updates))
        self.layers = [layer for joined in self._joined for layer in joined.layers]

    @contextmanager
    def applied(self, gate: Tensor) -> Iterator[None]:
        """Make the layers compute with the fused copies inside a `with` block.

        Args:
            gate: factor of each row's update, 0 for real rows, `[B, Q]`.
        """
        each = gate.reshape(-1)
        forwards = {
            layer: forward
            for joined in self._joined
            for layer, forward in joined.forwards(each).items()
        }
        try:
            with Swap(forwards, by="fused layers"):
                yield
        finally:
            for joined in self._joined:
                joined.forget()


@dataclass
class _Joined:
    """Layers that share an input, in the order in which they are called.

    The first layer that is called computes the outputs of all.

    Attributes:
        layers: the layers.
        product: the fused product of all layers.
        sizes: number of outputs of each layer.
    """

    layers: list[nn.Module]
    product: RowsProduct
    sizes: list[int]
    _seen: Tensor | None = field(default=None, init=False)
    _made: Sequence[Tensor] = field(default=(), init=False)

    def forwards(self, gate: Tensor) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """Return the forward of each layer; `gate` is `[N]`."""
        return {layer: self._forward(at, gate) for at, layer in enumerate(self.layers)}

    def forget(self) -> None:
        """Drop the input and outputs of the last call."""
        self._seen, self._made = None, ()

    def _forward(self, at: int, gate: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(rows: Tensor) -> Tensor:
            if self._seen is not rows:
                made = self.product.forward(rows, gate)
                self._seen, self._made = rows, torch.split(made, self.sizes, -1)
            return self._made[at]

        return forward


def joinable(layer: nn.Module) -> bool:
    """Return whether `kernels/linear.py` has a product for the layer."""
    return isinstance(layer, Int8Linear) or has_product(layer)


def _product(layer: nn.Module) -> RowsProduct:
    if isinstance(layer, Int8Linear):
        return layer.product
    assert has_product(layer), "only joinable layers are fused"
    return packed_product(layer)


def _fit(products: Sequence[RowsProduct], another: RowsProduct) -> bool:
    """Return whether another layer can be appended: same type, and it begins in a new block."""
    alike = products[0].packed.dtype == another.packed.dtype
    return alike and all(product.width % block() == 0 for product in products)


def _joined(
    together: Sequence[tuple[nn.Module, RowsProduct]],
    updates: dict[nn.Module, tuple[Tensor, Tensor]],
) -> _Joined:
    layers = [layer for layer, _ in together]
    products = [product for _, product in together]
    update = None
    if any(layer in updates for layer in layers):
        rank = next(updates[layer] for layer in layers if layer in updates)[0].shape[0]
        inputs = products[0].packed.shape[1]
        none = [(torch.zeros(rank, inputs), torch.zeros(p.width, rank)) for p in products]
        pairs = [updates.get(layer, zeros) for layer, zeros in zip(layers, none, strict=True)]
        update = Update([down.float() for down, _ in pairs], [up.float() for _, up in pairs])
    product = RowsProduct.joined(products, update)
    return _Joined(layers, product, [one.width for one in products])
