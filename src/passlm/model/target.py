"""The frozen model: prefill, and a pass over a plan.

The only file that knows transformers' modelling internals. It never changes the model: rows,
positions and visibility are handed to the model's own `forward`. Judging and drafting are left to
`decoding/decoder.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from passlm.drafts.sampler_head import Embeddings
from passlm.layers.attention import can_group, grouped
from passlm.layers.fingerprint import Fingerprint, fingerprint_of
from passlm.layers.int8 import is_quantized
from passlm.layers.lora import PROBE_ROWS, RowSplit
from passlm.layers.packed import PackedLinears, can_pack
from passlm.layers.swapped import GivenBody, checkpointed, head_kept, head_left_out, lock_of
from passlm.masks import visibility, within_window
from passlm.model.cache import RowCache, as_prefix
from passlm.model.compat import cache_name, newer_than_tested
from passlm.model.compiled import CompiledPasses, CompileError, Given, Shapes
from passlm.model.pass_records import Hung, LookAheadRows, PassOutput, PassRow
from passlm.model.supported import (
    UnsupportedModelError,
    attention,
    check_supported,
    layer_kinds,
    longrope_switch,
    window_of,
)
from passlm.plan import Layout, Plan

PREFILL_CHUNK = 512  # prompt tokens a pass: bounds the memory of activations and masks

_log = logging.getLogger(__name__)


class Target:
    """A causal language model of transformers, used as it is.

    Args:
        model: the model; its weights, configuration and hooks are left alone.
        pack: keep a second copy of its linear layers in a faster layout, where that pays; see
            `layers/packed.py`.
        compiled: a folder for compiled passes, which are made there when first needed; see
            `compiled.py`. None computes eagerly.

    Raises:
        UnsupportedModelError: the model cannot be decoded by plans, with the reason.
    """

    def __init__(
        self, model: PreTrainedModel, pack: bool = False, compiled: Path | None = None
    ) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self._lock = lock_of(model)
        with self._lock:  # passes of another thread may have altered it for a moment
            self._prepare(pack, compiled)

    def _prepare(self, pack: bool, compiled: Path | None) -> None:
        model = self.model
        check_supported(model)
        # Kept, since other threads may ask for sizes while `logits` has the model's body replaced.
        embedding: Any = model.get_input_embeddings()
        self._embedding: nn.Embedding = embedding
        self._window = window_of(self.config)
        self._kinds = layer_kinds(self.config, self._window)
        self._grouped = can_group(model)
        # What torch's kernel on a CPU would make of a boolean mask in every layer is made once.
        self._additive = attention(model) == "eager" or self._grouped
        self._quantized = is_quantized(model)
        self._cache_name = str(cache_name(model.forward))  # `check_supported` found one
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._packed: PackedLinears | None = None
        self._compiled = None if compiled is None else self._compilable(compiled)
        if pack and can_pack(model):
            self._packed = PackedLinears(self._output_layer if self._compiled else model)

    def expect(self, look_ahead: LookAheadRows | None) -> None:
        """Hear which look-ahead rows passes are going to have: compiled ones are made for them."""
        if self._compiled is not None:
            self._compiled.expect(None if look_ahead is None else look_ahead.lora)

    @property
    def device(self) -> torch.device:
        """Where the input embeddings lie."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the input embeddings."""
        return self._embedding.weight.dtype

    @property
    def engine(self) -> str:
        """How passes are computed: what makes their costs comparable."""
        passes = "eager" if self._packed is None else "eager, packed"
        if self._compiled is not None:
            passes = "compiled"
        return f"{passes}, int8" if self._quantized else passes

    @property
    def in_line(self) -> bool:
        """Whether a pass costs what its rows cost, however unlike their numbers are by text.

        Elsewhere every text of a batch costs as much as the one with the longest plan.
        """
        return self._compiled is not None and self._compiled.in_line

    @property
    def d_model(self) -> int:
        """Numbers in an input embedding."""
        return int(self._embedding.weight.shape[1])

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._embedding.weight.shape[0])

    @property
    def context(self) -> int | None:
        """The longest text the model can take, in tokens; None where it states none.

        Longrope turns all keys differently from one position on, also those in the cache: up to
        there the model is decoded.
        """
        limit = longrope_switch(self.config)
        if limit is None:
            limit = getattr(self.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def fingerprint(self) -> Fingerprint:
        """What tells this model from another one."""
        with self._lock:
            return fingerprint_of(self.model, self._embedding)

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings of token ids, `[..., d_model]`."""
        embedded: Tensor = self._embedding(tokens)
        return embedded

    def new_cache(self, batch: int = 1) -> RowCache:
        """An empty cache of `batch` rows."""
        return RowCache(int(self.config.num_hidden_layers), batch)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> RowCache:
        """Keys and values of a text, chunk by chunk.

        Args:
            tokens: token ids; may be empty.
        """
        cache = self.new_cache()
        for start in range(0, len(tokens), PREFILL_CHUNK):
            self.extend(cache, tokens[start : start + PREFILL_CHUNK])
        return cache

    @torch.inference_mode()
    def extend(self, cache: RowCache, tokens: Sequence[int]) -> None:
        """Run further tokens of a text behind those in its cache, in one pass.

        Args:
            cache: of one text.
            tokens: token ids, at least one.
        """
        causal = Plan(len(tokens) - 1, (0,) * len(tokens))
        self._pass(cache, [PassRow(tokens, causal)], None, last_logits_only=True)
        cache.settle(0, len(tokens))

    @torch.inference_mode()
    def run(
        self, cache: RowCache, rows: Sequence[PassRow], look_ahead: LookAheadRows | None
    ) -> PassOutput:
        """One forward pass over each batch row's plan.

        Args:
            cache: a cache with one batch row for each of `rows`; its lengths stay as they are.
            rows: tokens and plan of each batch row.
            look_ahead: look-ahead rows; None where no plan has a group.
        """
        keep = look_ahead is not None and look_ahead.reads_hidden
        if not any(max(row.plan.groups) for row in rows):
            keep = look_ahead is not None and look_ahead.head is not None
            look_ahead = None  # a pass of real rows alone is the target's own
        return self._pass(cache, rows, look_ahead, last_logits_only=False, keep_hidden=keep)

    def hang(
        self,
        text: Tensor,
        layouts: Sequence[Layout],
        look_ahead: LookAheadRows,
        checkpointing: bool = False,
    ) -> Hung:
        """Look-ahead rows of known texts, with gradients to `look_ahead` alone: for training.

        The texts go through once, without gradients; then all groups of a layout go through in
        one pass, each seeing its text up to its own real row, and itself.

        Args:
            text: token ids, `[B, S]`.
            layouts: one for each text, of a plan with `S` real rows; equal numbers of rows.
            look_ahead: what gets the gradients.
            checkpointing: compute each layer anew for its gradients, to save memory.
        """
        cache = self.new_cache(len(text))
        rows = text.shape[1]
        text_hidden = self._read(text, cache)
        for index in range(len(text)):
            cache.settle(index, rows)
        depth = torch.stack([layout.look_ahead[rows:] for layout in layouts]).to(self.device)
        offset = torch.stack([layout.offset[rows:] for layout in layouts]).to(self.device)
        seen = torch.stack([layout.visible[rows:] for layout in layouts]).to(self.device)
        cache.filled = seen.shape[2]
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            if look_ahead.lora is not None:
                stack.enter_context(look_ahead.lora.applied(RowSplit()))
            if checkpointing:
                stack.enter_context(checkpointed(self.model, look_ahead.lora))
            hidden = stack.enter_context(head_left_out(self._output_layer))
            self.model(
                inputs_embeds=look_ahead.inputs.to(self.dtype)[depth - 1],
                position_ids=offset,
                attention_mask=self._by_kind(seen, cache, offset),
                use_cache=True,
                **{self._cache_name: as_prefix(cache)},
            )
        texts = torch.arange(len(text), device=self.device)[:, None].expand_as(depth)
        return Hung(hidden[0], text_hidden, depth, offset, texts)

    def hidden(self, text: Tensor) -> Tensor:
        """What the output layer is given for known texts, without gradients, `[B, S, d_model]`.

        Args:
            text: token ids, `[B, S]`.
        """
        return self._read(text, self.new_cache(len(text)))

    def _read(self, text: Tensor, cache: RowCache) -> Tensor:
        rows = text.shape[1]
        causal = Plan(rows - 1, (0,) * rows)
        with self._lock, torch.no_grad(), head_left_out(self._output_layer) as hidden:
            passes = [PassRow(tokens, causal) for tokens in text.tolist()]
            self._forward(cache, passes, None, last_logits_only=False)
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of hidden states that `hang` gave, `[..., d_model]` to `[..., V]`.

        Goes through the model's own forward, so that whatever it does to logits is done.

        Raises:
            UnsupportedModelError: the model does not show its body.
        """
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        name = self.model.base_model_prefix
        modules: dict[str, Any] = self.model._modules
        if name not in modules:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not show its body as {name!r}: look-ahead rows "
                "cannot be trained for it"
            )
        with self._lock:
            body = modules[name]
            modules[name] = GivenBody(rows)
            try:
                logits: Tensor = self.model(inputs_embeds=rows[..., :1], use_cache=False).logits
            finally:
                modules[name] = body
        return logits.view(*hidden.shape[:-1], -1)

    @property
    def embeddings(self) -> Embeddings:
        """The tables that a sampler head and a draft head share with the model.

        Raises:
            UnsupportedModelError: the output layer's weights cannot be read.
        """
        outputs: Any = getattr(self._output_layer, "weight", None)
        if outputs is None or not outputs.is_floating_point() or outputs.ndim != 2:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no output layer with plain weights, which a "
                "sampler head and a draft head need: do without them"
            )
        return Embeddings(self._embedding.weight, outputs)

    def probe(self) -> RowCache:
        """`PROBE_ROWS` tokens through the model, for hooks to see what is called; their cache."""
        text = PassRow([0] * PROBE_ROWS, Plan(PROBE_ROWS - 1, (0,) * PROBE_ROWS))
        cache = self.new_cache()
        with self._lock, torch.no_grad(), head_left_out(self._output_layer):
            self._forward(cache, [text], None, last_logits_only=False)
        return cache

    @property
    def _output_layer(self) -> nn.Module:
        model: Any = self.model
        layer: nn.Module = model.get_output_embeddings()
        return layer

    def _pass(
        self,
        cache: RowCache,
        rows: Sequence[PassRow],
        look_ahead: LookAheadRows | None,
        last_logits_only: bool,
        keep_hidden: bool = False,
    ) -> PassOutput:
        """Compiled where that was asked for and works here, else eager."""
        if self._compiled is not None:
            try:
                return self._run_compiled(self._compiled, cache, rows, look_ahead)
            except CompileError as error:
                _log.warning("passes cannot be compiled, so they run eagerly: %s", error)
                self._compiled = None
                self._packed = PackedLinears(self.model) if self._packed else None
        with self._lock:
            return self._forward(cache, rows, look_ahead, last_logits_only, keep_hidden)

    def _compilable(self, folder: Path) -> CompiledPasses | None:
        if self.device.type != "cpu":
            _log.warning("passes are compiled for CPUs alone: on %s they run eagerly", self.device)
            return None
        layers = self.probe().sizes  # configurations name them in many ways
        if layers is None:
            _log.warning("passes run eagerly: keys and values of this model are of unlike sizes")
            return None
        mask_type = self.dtype if self._additive else torch.bool
        shapes = Shapes(self.d_model, layers, self._kinds, mask_type)
        return CompiledPasses(self.model, shapes, folder, self.probe)

    def _run_compiled(
        self,
        compiled: CompiledPasses,
        cache: RowCache,
        rows: Sequence[PassRow],
        look_ahead: LookAheadRows | None,
    ) -> PassOutput:
        layouts, longest, lengths, positions = self._laid_out(cache, rows)
        cache.filled = cache.capacity  # the graph sees whole blocks; masks close what is empty
        gate = None
        if look_ahead is not None:
            gate = _padded([layout.look_ahead for layout in layouts], longest) > 0
        full = visibility(
            cache.lengths, [layout.visible for layout in layouts], self.device, cache.capacity
        )
        numbers = [row.plan.rows for row in rows]
        given = Given(
            self._inputs(rows, longest, look_ahead),
            positions,
            self._by_kind(full, cache, positions),
            lengths + torch.arange(longest),
            torch.arange(len(rows))[:, None].expand(-1, longest).contiguous(),
            gate,
        )
        if compiled.in_line and len(rows) > 1:
            given = given.in_line(numbers, longest)
        hidden = self._call_compiled(
            compiled,
            given,
            None if look_ahead is None else look_ahead.lora,
            cache.slots(compiled.shapes.layers, self.model.dtype),
        )
        if compiled.in_line:
            own = list(torch.split(hidden[0], numbers))
        else:
            own = [text[:number] for text, number in zip(hidden, numbers, strict=True)]
        return PassOutput(None, own, self._head)

    def _call_compiled(self, compiled: CompiledPasses, *inputs: Any) -> Tensor:
        """The compiled pass, alone: what a stopwatch is put around."""
        return compiled(*inputs)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, packed where that is so."""
        with ExitStack() as stack:
            stack.enter_context(self._lock)  # before the other one, as in a pass
            if self._packed is not None:
                stack.enter_context(self._packed.applied())
            return self.logits(hidden)

    def _forward(
        self,
        cache: RowCache,
        rows: Sequence[PassRow],
        look_ahead: LookAheadRows | None,
        last_logits_only: bool,
        keep_hidden: bool = False,
    ) -> PassOutput:
        layouts, longest, _, positions = self._laid_out(cache, rows)
        options: dict[str, Any] = {}
        if last_logits_only and self._takes_logits_to_keep:
            options["logits_to_keep"] = 1
        with ExitStack() as stack:
            # Packed products have no gradients, which training needs and decoding does not; and
            # training has many rows, which attention as it is takes as well.
            if self._packed is not None and torch.is_inference_mode_enabled():
                stack.enter_context(self._packed.applied())
            if self._grouped and torch.is_inference_mode_enabled():
                stack.enter_context(grouped(self.model))
            hidden: list[Tensor] = []
            if look_ahead is not None and look_ahead.lora is not None:
                stack.enter_context(look_ahead.lora.applied(_split(layouts, longest, self.device)))
            if keep_hidden:
                hidden = stack.enter_context(head_kept(self._output_layer))
            output = self._call_model(
                inputs_embeds=self._inputs(rows, longest, look_ahead),
                position_ids=positions,
                attention_mask=self._masks(cache, layouts, longest, positions),
                use_cache=True,
                **{self._cache_name: cache},
                **options,
            )
        if not cache.written:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} is not supported: it wrote no keys and values to the "
                f"cache that its forward was given as {self._cache_name}{newer_than_tested()}"
            )
        return PassOutput(output.logits, list(hidden[0]) if hidden else None)

    def _laid_out(
        self, cache: RowCache, rows: Sequence[PassRow]
    ) -> tuple[list[Layout], int, Tensor, Tensor]:
        """Layouts, the longest one's rows, settled lengths `[B, 1]` and positions `[B, Q]`."""
        layouts = [row.plan.layout() for row in rows]
        longest = max(len(layout.offset) for layout in layouts)
        cache.begin(longest, self.device)
        offsets = _padded([layout.offset for layout in layouts], longest).to(self.device)
        lengths = torch.tensor(cache.lengths, device=self.device)[:, None]
        return layouts, longest, lengths, lengths + offsets

    def _call_model(self, **inputs: Any) -> Any:
        """The model's own forward, alone: what a stopwatch is put around."""
        return self.model(**inputs)

    def _inputs(
        self, rows: Sequence[PassRow], longest: int, look_ahead: LookAheadRows | None
    ) -> Tensor:
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        inputs = self.embed(tokens.to(self.device))
        for index, row in enumerate(rows):
            group_rows = row.plan.layout().look_ahead[len(row.tokens) :]
            if len(group_rows):
                assert look_ahead is not None, "a plan has look-ahead rows, but none were given"
                start = len(row.tokens)
                inputs[index, start : start + len(group_rows)] = look_ahead.inputs[
                    (group_rows - 1).to(look_ahead.inputs.device)
                ].to(inputs)
        return inputs

    def _masks(
        self, cache: RowCache, layouts: Sequence[Layout], longest: int, positions: Tensor
    ) -> Any:
        """What the model's `forward` takes as its mask: none, one, or one for each layer kind."""
        if len(layouts) == longest == 1 and not self._windowed(cache) and not self._grouped:
            return None  # one row that sees all that is filled; transformers makes a boolean of it
        full = visibility(cache.lengths, [layout.visible for layout in layouts], self.device)
        return self._by_kind(full, cache, positions)

    def _by_kind(self, full: Tensor, cache: RowCache, positions: Tensor) -> Any:
        masks = {}
        for kind in self._kinds:
            seen = full if kind == "full_attention" else self._within_window(full, cache, positions)
            masks[kind] = self._as_model_takes(seen)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _windowed(self, cache: RowCache) -> bool:
        return self._window is not None and cache.filled > self._window

    def _within_window(self, full: Tensor, cache: RowCache, positions: Tensor) -> Tensor:
        if self._window is None or not self._windowed(cache):
            return full
        return full & within_window(cache.lengths, positions, cache.filled, self._window)

    def _as_model_takes(self, seen: Tensor) -> Tensor:
        mask = seen[:, None]  # [B, 1, Q, S]
        if not self._additive:
            return mask
        blocked = torch.finfo(self.dtype).min
        return torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill_(
            ~mask, blocked
        )


def _split(layouts: Sequence[Layout], longest: int, device: torch.device) -> RowSplit:
    """Where the look-ahead rows of a pass lie."""
    if len(layouts) == 1:
        return RowSplit(layouts[0].real)
    places = [
        torch.arange(layout.real, len(layout.offset)) + row * longest
        for row, layout in enumerate(layouts)
    ]
    return RowSplit(index=torch.cat(places).to(device))


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    padded = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
