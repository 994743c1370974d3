"""A model's own forward with a part of it replaced for the time of a call.

Which calls need that is left to `model/target.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from passlm.layers.lora import AppliedLora, RowSplit


@contextmanager
def head_kept(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Keeps what the output layer is given by the model's forward."""
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    try:
        yield kept
    finally:
        hook.remove()


@contextmanager
def head_left_out(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Keeps what the output layer is given; it gives logits of no token."""
    kept: list[Tensor] = []
    own = vars(layer)
    before = own.get("forward")

    def forward(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden[..., :0]

    own["forward"] = forward
    try:
        yield kept
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


@contextmanager
def checkpointed(model: PreTrainedModel, lora: AppliedLora | None) -> Iterator[None]:
    """Decoder layers forget what they computed, and compute it anew for gradients."""

    def again() -> tuple[Any, Any]:
        return nullcontext(), nullcontext() if lora is None else lora.applied(RowSplit())

    layers = [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == model.config.num_hidden_layers
        for layer in stack
    ]
    own = [(vars(layer), vars(layer).get("forward")) for layer in layers]
    try:
        for layer, (attributes, _) in zip(layers, own, strict=True):
            attributes["forward"] = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=again
            )
        yield
    finally:
        for attributes, forward in own:
            if forward is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = forward


class GivenBody(nn.Module):
    """In the place of a model's body: gives the hidden states it was made with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    @property
    def decoder(self) -> GivenBody:
        """Some models call their body's decoder themselves."""
        return self

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPastAndCrossAttentions:
        """See the class."""
        return self._output


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """Held while a model is altered for a pass: others who decode it must not see that."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())
