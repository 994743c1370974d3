"""Replace the forward of layers for a while, and put it back.

The only module that swaps a layer's forward: packed weights, fused layers, LoRA and the swaps below
all use `Swap`. Which pass needs which swap is left to `model/target.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

if TYPE_CHECKING:  # `lora` imports this module
    from passlm.layers.lora import AppliedLora

Forward = Callable[..., Any]


class SwapError(RuntimeError):
    """A swap that cannot be applied or undone in this order."""


class Swap:
    """Forwards that stand in for those of some modules, until they are undone.

    Use it as a context manager, or call `apply` and `undo`. It stores each forward in the module's
    own `__dict__`, where torch looks it up in any case, so a call costs nothing extra.

    Swaps of one module may be nested and are undone last first. A swap is not safe against other
    threads that use the same modules: hold `lock_of` the model from `apply` to `undo`.

    Args:
        forwards: the new forward of each module.
        by: who swaps, for `swapped_layers` and error messages.
    """

    def __init__(self, forwards: Mapping[nn.Module, Forward], by: str) -> None:
        self.by = by
        self._forwards = dict(forwards)
        self._before: dict[nn.Module, Forward | None] | None = None  # None while not applied

    def __contains__(self, module: object) -> bool:
        return module in self._forwards

    def apply(self) -> None:
        """Replace the forwards.

        Raises:
            SwapError: the swap is applied already.
        """
        if self._before is not None:
            raise SwapError(f"the swap by {self.by!r} is applied already: undo it first")
        # A forward that another library set lies in the module's `__dict__`, too.
        self._before = {module: vars(module).get("forward") for module in self._forwards}
        try:
            for module, forward in self._forwards.items():
                vars(module)["forward"] = forward
            _applied.append(self)
        except BaseException:  # a KeyboardInterrupt, too
            self._restore()
            raise

    def undo(self) -> None:
        """Put back what was there before; does nothing if the swap is not applied.

        Raises:
            SwapError: a forward was replaced again since. Nothing is changed then, so `undo` can be
                called again once the later swap is undone.
        """
        if self._before is None:
            return
        over = [m for m, forward in self._forwards.items() if vars(m).get("forward") is not forward]
        if over:
            later = _applied[_applied.index(self) + 1 :]
            names = [swap.by for swap in later if any(module in swap for module in over)]
            raise SwapError(
                f"cannot undo the swap by {self.by!r}: {len(over)} of its {len(self._forwards)} "
                f"modules ({type(over[0]).__name__}, ...) have had their forward replaced again by "
                f"{', '.join(map(repr, names)) or 'other code'}; undo that first"
            )
        self._restore()

    def _restore(self) -> None:
        for module, forward in (self._before or {}).items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
        self._before = None
        if self in _applied:
            _applied.remove(self)

    def __enter__(self) -> Self:
        self.apply()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


_applied: list[Swap] = []  # in the order of `apply`


def swapped_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the name of each swapped module of a model and who swapped it, the latest last.

    Forwards that other libraries replaced are not listed.
    """
    swaps = list(_applied)
    found = {
        name: tuple(swap.by for swap in swaps if module in swap)
        for name, module in model.named_modules()
    }
    return {name: by for name, by in found.items() if by}


@contextmanager
def head_kept(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of the output layer, which computes logits as usual."""
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    try:
        yield kept
    finally:
        hook.remove()


@contextmanager
def head_left_out(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of the output layer, which returns logits of no token, `[..., 0]`."""
    kept: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden[..., :0]

    with Swap({layer: forward}, by="output layer left out"):
        yield kept


@contextmanager
def checkpointed(model: PreTrainedModel, lora: AppliedLora | None) -> Iterator[None]:
    """Drop the activations inside decoder layers and recompute them for the backward pass.

    Args:
        model: the model.
        lora: updates to apply again while recomputing, to every row.
    """

    def again() -> tuple[Any, Any]:
        return nullcontext(), nullcontext() if lora is None else lora.applied()

    layers = [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == model.config.num_hidden_layers
        for layer in stack
    ]
    forwards = {
        layer: partial(checkpoint, layer.forward, use_reentrant=False, context_fn=again)
        for layer in layers
    }
    with Swap(forwards, by="checkpointing"):
        yield


class GivenBody(nn.Module):
    """A stand-in for a model's body that returns hidden states it was given.

    Args:
        hidden: the hidden states, `[B, Q, d_model]`.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    @property
    def decoder(self) -> GivenBody:
        """The same object: some models call their body's decoder directly."""
        return self

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the given hidden states."""
        return self._output


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """Return the lock to hold while a model is altered for a pass.

    All targets of one model share it, so that no other thread decodes the altered model.
    """
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())
