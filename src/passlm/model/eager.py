"""Eager passes: the model's own `forward`, called with the inputs of a pass.

For the duration of a pass, linear layers may compute with packed weights, attention with our own
function, and look-ahead rows with their LoRA. The model is left as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from passlm.layers.attention import grouped
from passlm.layers.lora import RowSplit
from passlm.layers.packed import PackedLinears
from passlm.layers.swapped import GivenBody, head_kept
from passlm.model.cache import RowCache
from passlm.model.compat import cache_name, newer_than_tested
from passlm.model.pass_inputs import InputBuilder
from passlm.model.pass_records import LookAheadRows, PassOutput, PassRow
from passlm.model.supported import UnsupportedModelError
from passlm.plan import Layout

Call = Callable[..., Any]
"""Calls a function with arguments and returns its result; a stopwatch can be put around it."""


class EagerPasses:
    """Runs the passes of one model without compiling them.

    Args:
        model: the model.
        inputs: builds the inputs of its passes.
        call: calls the model's `forward`.

    Attributes:
        packed: packed weights to compute with; None for the model's own.
    """

    def __init__(self, model: PreTrainedModel, inputs: InputBuilder, call: Call) -> None:
        self.packed: PackedLinears | None = None
        self._model = model
        self._inputs = inputs
        self._call = call
        self._cache_name = str(cache_name(model.forward))  # `check_supported` found one
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self,
        cache: RowCache,
        rows: Sequence[PassRow],
        look_ahead: LookAheadRows | None,
        last_logits_only: bool = False,
        keep_hidden: bool = False,
    ) -> PassOutput:
        """Run one pass; the caller holds the model's lock.

        Args:
            cache: a cache with one batch row for each of `rows`.
            rows: tokens and plan of each batch row.
            look_ahead: look-ahead rows; None where no plan has a group.
            last_logits_only: compute logits of the last row alone, where the model can.
            keep_hidden: keep the inputs of the output layer.

        Raises:
            UnsupportedModelError: the model did not write to its cache.
        """
        inputs = self._inputs.build(cache, rows, look_ahead)
        options: dict[str, Any] = {}
        if last_logits_only and self._takes_logits_to_keep:
            options["logits_to_keep"] = 1
        with ExitStack() as stack:
            # Packed products have no gradients, which training needs and decoding does not; and
            # training has many rows, for which the model's own attention is as good.
            if self.packed is not None and torch.is_inference_mode_enabled():
                stack.enter_context(self.packed.applied())
            if self._inputs.grouped and torch.is_inference_mode_enabled():
                stack.enter_context(grouped(self._model))
            hidden: list[Tensor] = []
            if look_ahead is not None and look_ahead.lora is not None:
                split = _look_ahead_rows(inputs.layouts, inputs.longest, inputs.positions.device)
                stack.enter_context(look_ahead.lora.applied(split))
            if keep_hidden:
                hidden = stack.enter_context(head_kept(output_layer(self._model)))
            output = self.forward(
                cache, inputs.embeddings, inputs.positions, inputs.mask, **options
            )
        if not cache.written:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} is not supported: it wrote no keys and values to "
                f"the cache that its forward was given as {self._cache_name}{newer_than_tested()}"
            )
        return PassOutput(output.logits, list(hidden[0]) if hidden else None)

    def forward(
        self, cache: Any, embeddings: Tensor, positions: Tensor, mask: Any, **options: Any
    ) -> Any:
        """Call the model's `forward` with a cache, under the name that the model gives it."""
        return self._call(
            self._model,
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: cache},
            **options,
        )


def output_layer(model: PreTrainedModel) -> nn.Module:
    """Return the layer that makes logits."""
    typed: Any = model
    layer: nn.Module = typed.get_output_embeddings()
    return layer


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return a model's logits of given last hidden states, `[..., d_model]` to `[..., V]`.

    Goes through the model's own `forward` with its body replaced, so that everything that it does
    to logits is done. The caller holds the model's lock.

    Raises:
        UnsupportedModelError: the model does not show its body.
    """
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    name = model.base_model_prefix
    modules: dict[str, Any] = model._modules
    if name not in modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not show its body as {name!r}: look-ahead rows "
            "cannot be trained for it"
        )
    body = modules[name]
    modules[name] = GivenBody(rows)
    try:
        logits: Tensor = model(inputs_embeds=rows[..., :1], use_cache=False).logits
    finally:
        modules[name] = body
    return logits.view(*hidden.shape[:-1], -1)


def _look_ahead_rows(layouts: Sequence[Layout], longest: int, device: torch.device) -> RowSplit:
    """Return where the look-ahead rows of a pass are."""
    if len(layouts) == 1:
        return RowSplit(layouts[0].real)
    places = [
        torch.arange(layout.real, len(layout.offset)) + row * longest
        for row, layout in enumerate(layouts)
    ]
    return RowSplit(index=torch.cat(places).to(device))
