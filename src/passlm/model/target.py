"""The frozen model: prefill, and a pass over a plan.

Rows, positions and visibility are handed to the model's own `forward`, eagerly (`eager.py`) or
compiled (`compiled.py`). The model's weights and configuration are not changed. Judging and
drafting are left to `decoding/decoder.py`, passes for training to `training.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from passlm.drafts.sampler_head import Embeddings
from passlm.layers.fingerprint import Fingerprint, fingerprint_of
from passlm.layers.int8 import is_quantized
from passlm.layers.lora import PROBE_ROWS
from passlm.layers.packed import PackedLinears, can_pack
from passlm.layers.swapped import head_left_out, lock_of
from passlm.model.cache import RowCache
from passlm.model.compiled import CompiledPasses, CompileError, Shapes
from passlm.model.eager import EagerPasses, logits_of, output_layer
from passlm.model.pass_inputs import InputBuilder
from passlm.model.pass_records import LookAheadRows, PassOutput, PassRow
from passlm.model.supported import UnsupportedModelError, check_supported, longrope_switch
from passlm.plan import Plan

PREFILL_CHUNK = 512  # prompt tokens a pass: bounds the memory of activations and masks

_log = logging.getLogger(__name__)


class Target:
    """A causal language model of transformers, used as it is.

    Args:
        model: the model; its weights, configuration and hooks are left alone.
        pack: keep a second copy of its linear layers in a faster layout, where that pays; see
            `layers/packed.py`.
        compiled: folder for compiled passes, which are made there when first needed; see
            `compiled.py`. None computes eagerly.

    Attributes:
        model: the model.
        config: the configuration of its text decoder.
        lock: held while a pass alters the model for a moment.
        inputs: builds the inputs of passes.
        eager: runs passes that are not compiled.

    Raises:
        UnsupportedModelError: the model cannot be decoded by plans, with the reason.
    """

    def __init__(
        self, model: PreTrainedModel, pack: bool = False, compiled: Path | None = None
    ) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.lock = lock_of(model)
        with self.lock:  # passes of another thread may have altered it for a moment
            self._prepare(pack, compiled)

    def _prepare(self, pack: bool, compiled: Path | None) -> None:
        model = self.model
        check_supported(model)
        # Kept, since other threads may ask for sizes while `logits` has the model's body replaced.
        embedding: Any = model.get_input_embeddings()
        self._embedding: nn.Embedding = embedding
        self._quantized = is_quantized(model)
        self.inputs = InputBuilder(model, embedding)
        self.eager = EagerPasses(model, self.inputs, self._call)
        self._compiled = None if compiled is None else self._compilable(compiled)
        if pack and can_pack(model):
            self.eager.packed = PackedLinears(self.output_layer if self._compiled else model)

    def expect(self, look_ahead: LookAheadRows | None) -> None:
        """Set the look-ahead rows that passes are going to have, for which passes are compiled."""
        if self._compiled is not None:
            self._compiled.expect(None if look_ahead is None else look_ahead.lora)

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the input embeddings."""
        return self._embedding.weight.dtype

    @property
    def engine(self) -> str:
        """How passes are computed. Costs of different engines cannot be compared."""
        passes = "eager" if self.eager.packed is None else "eager, packed"
        if self._compiled is not None:
            passes = "compiled"
        return f"{passes}, int8" if self._quantized else passes

    @property
    def in_line(self) -> bool:
        """Whether the cost of a pass depends on its number of rows alone.

        Elsewhere every sequence of a batch costs as much as the one with the longest plan.
        """
        return self._compiled is not None and self._compiled.in_line

    @property
    def d_model(self) -> int:
        """Size of an input embedding."""
        return int(self._embedding.weight.shape[1])

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._embedding.weight.shape[0])

    @property
    def context(self) -> int | None:
        """The longest sequence that the model can take, in tokens; None where it states none.

        Longrope rotates all keys differently from one position on, also those in the cache. A model
        with it is decoded up to there.
        """
        limit = longrope_switch(self.config)
        if limit is None:
            limit = getattr(self.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def fingerprint(self) -> Fingerprint:
        """Identifies the model's weights."""
        with self.lock:
            return fingerprint_of(self.model, self._embedding)

    @property
    def embeddings(self) -> Embeddings:
        """The tables that a sampler head and a draft head share with the model.

        Raises:
            UnsupportedModelError: the output layer's weights cannot be read.
        """
        outputs: Any = getattr(self.output_layer, "weight", None)
        if outputs is None or not outputs.is_floating_point() or outputs.ndim != 2:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no output layer with plain weights, which a "
                "sampler head and a draft head need: do without them"
            )
        return Embeddings(self._embedding.weight, outputs)

    @property
    def output_layer(self) -> nn.Module:
        """The layer that makes logits."""
        return output_layer(self.model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return input embeddings of token ids, `[..., d_model]`."""
        embedded: Tensor = self._embedding(tokens)
        return embedded

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits of last hidden states, `[..., d_model]` to `[..., V]`.

        Raises:
            UnsupportedModelError: the model does not show its body.
        """
        with self.lock:
            return logits_of(self.model, hidden)

    def new_cache(self, batch: int = 1) -> RowCache:
        """Return an empty cache of `batch` rows."""
        return RowCache(int(self.config.num_hidden_layers), batch)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> RowCache:
        """Return the keys and values of a sequence, computed chunk by chunk.

        Args:
            tokens: token ids; may be empty.
        """
        cache = self.new_cache()
        for start in range(0, len(tokens), PREFILL_CHUNK):
            self.extend(cache, tokens[start : start + PREFILL_CHUNK])
        return cache

    @torch.inference_mode()
    def extend(self, cache: RowCache, tokens: Sequence[int]) -> None:
        """Run further tokens of a sequence behind those in its cache, in one pass.

        Args:
            cache: the cache of one sequence.
            tokens: token ids, at least one.
        """
        causal = Plan(len(tokens) - 1, (0,) * len(tokens))
        self._pass(cache, [PassRow(tokens, causal)], None, last_logits_only=True)
        cache.settle(0, len(tokens))

    @torch.inference_mode()
    def run(
        self, cache: RowCache, rows: Sequence[PassRow], look_ahead: LookAheadRows | None
    ) -> PassOutput:
        """Run one forward pass over each batch row's plan.

        Args:
            cache: a cache with one batch row for each of `rows`; its lengths stay as they are.
            rows: tokens and plan of each batch row.
            look_ahead: look-ahead rows; None where no plan has a group.
        """
        keep = look_ahead is not None and look_ahead.reads_hidden
        if not any(max(row.plan.groups) for row in rows):
            keep = look_ahead is not None and look_ahead.head is not None
            look_ahead = None  # a pass of real rows alone is the target's own
        return self._pass(cache, rows, look_ahead, keep_hidden=keep)

    def probe(self) -> RowCache:
        """Run `PROBE_ROWS` tokens, for hooks to see which layers are called; return the cache."""
        rows = PassRow([0] * PROBE_ROWS, Plan(PROBE_ROWS - 1, (0,) * PROBE_ROWS))
        cache = self.new_cache()
        with self.lock, torch.no_grad(), head_left_out(self.output_layer):
            self.eager(cache, [rows], None)
        return cache

    def _pass(
        self,
        cache: RowCache,
        rows: Sequence[PassRow],
        look_ahead: LookAheadRows | None,
        last_logits_only: bool = False,
        keep_hidden: bool = False,
    ) -> PassOutput:
        """Run a pass compiled where that was asked for and works here, else eagerly."""
        if self._compiled is not None:
            try:
                inputs = self.inputs.build(cache, rows, look_ahead, whole_cache=True)
                lora = None if look_ahead is None else look_ahead.lora
                hidden = self._compiled.run(cache, rows, inputs, lora, self._call)
                return PassOutput(None, hidden, self._packed_logits)
            except CompileError as error:
                _log.warning("passes cannot be compiled, so they run eagerly: %s", error)
                self._compiled = None
                self.eager.packed = PackedLinears(self.model) if self.eager.packed else None
        with self.lock:
            return self.eager(cache, rows, look_ahead, last_logits_only, keep_hidden)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model's forward or its compiled pass; a subclass can time it here."""
        return function(*args, **kwargs)

    def _compilable(self, folder: Path) -> CompiledPasses | None:
        if self.device.type != "cpu":
            _log.warning("passes are compiled for CPUs alone: on %s they run eagerly", self.device)
            return None
        layers = self.probe().sizes  # configurations name them in many ways
        if layers is None:
            _log.warning("passes run eagerly: keys and values of this model are of unlike sizes")
            return None
        shapes = Shapes(self.d_model, layers, self.inputs.kinds, self.inputs.mask_type)
        return CompiledPasses(self.model, shapes, folder, self.probe)

    def _packed_logits(self, hidden: Tensor) -> Tensor:
        """Return logits of hidden states, computed with packed weights where there are some."""
        with ExitStack() as stack:
            stack.enter_context(self.lock)  # before the other one, as in a pass
            if self.eager.packed is not None:
                stack.enter_context(self.eager.packed.applied())
            return self.logits(hidden)
