"""Passes compiled once by torch's inductor and kept on disk, for a CPU.

The body of the model, from input embeddings to the last hidden states, is exported with any number
of texts, rows and cache slots, its weights frozen into the layout the machine multiplies fastest,
and packed into a file that a later start only loads (AOTInductor). The output layer is left out:
which rows need logits is known only to `decoding/decoder.py`.

Where look-ahead rows are to be expected, the package computes their LoRA as well, multiplied by 0
for real rows: that adds an exact zero to what the untouched weights give. Our own products skip it
in passes without such rows; where a machine has others, those passes have a package of their own.

Where our own attention computes them, the rows of all texts stand in one line, and a text costs its
own rows; elsewhere every text has as many as the longest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

import passlm.kernels.linear
import passlm.layers.attention
import passlm.layers.fused
import passlm.layers.int8
import passlm.layers.lora
import passlm.layers.packed
from passlm.kernels import aot_package, linear, native
from passlm.layers.attention import can_group, can_stand_in_line, grouped
from passlm.layers.fused import JoinedLinears, joinable
from passlm.layers.lora import AppliedLora, RowSplit
from passlm.layers.packed import PackedLinears
from passlm.model.compat import cache_name
from passlm.provenance import environment, staging

MOST_ROWS = 2**16  # of one pass, all texts together
_MOST_TEXTS = 256
_MOST_SLOTS = 2**20
_PARTS = (
    *(passlm.layers.attention, passlm.layers.fused, passlm.layers.lora),
    *(passlm.layers.packed, passlm.kernels.linear, passlm.layers.int8),
)
_TRACED = (__file__, *(str(part.__file__) for part in _PARTS))  # what a package is made by
_EXAMPLE = (2, 5, 256)  # texts, rows and slots to trace with: any would do

_log = logging.getLogger(__name__)


class CompileError(Exception):
    """Passes that cannot be compiled here, and why; one line."""


class _SlotLayer(StaticLayer):  # type: ignore[no-untyped-call]  # its base's hook
    """A cache layer of tensors that are inputs of the traced pass.

    Args:
        keys: `[B, heads, S, d_head]`.
        values: likewise.
        slots: where each row is written, `[B, Q]`, or `[1, N]` in one line.
        texts: which text each row of one line is of, `[N]`; None where each text has a line.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, texts: Tensor | None) -> None:
        super().__init__(max_cache_len=0)
        self.keys, self.values = keys, values
        self.slots, self.texts = slots, texts
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values `[B, heads, Q, d_head]`; give all slots."""
        assert self.keys is not None, "made with tensors"
        assert self.values is not None, "made with tensors"
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            if (stored.shape[1], stored.shape[3]) != (states.shape[1], states.shape[3]):
                raise CompileError("keys and values are not of the sizes that the cache has")
            if self.texts is None:
                places = self.slots[:, None, :, None].expand_as(states)
                stored.scatter_(2, places, states)
            else:
                heads = torch.arange(stored.shape[1])
                rows = self.texts[:, None], heads[None], self.slots[0][:, None]
                stored.index_put_(rows, states[0].transpose(0, 1))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions are given, so nothing is counted."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All slots, from the first."""
        assert self.keys is not None, "made with tensors"
        return int(self.keys.shape[2]), 0


class _GatedSplit(RowSplit):
    """All rows get the update of theirs times `gate`, 0 for real ones."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "gate", gate.reshape(-1, 1))  # [B * Q, 1]

    gate: Tensor

    def take(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, rows.shape[-1]) * self.gate

    def add(self, rows: Tensor, update: Tensor) -> Tensor:
        return (rows + update.view(rows.shape)).to(rows.dtype)


class _Body(nn.Module):
    """The pass as a function of tensors alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        joined: JoinedLinears,
        lora: AppliedLora | None,
        in_line: bool,
    ) -> None:
        super().__init__()
        self.body: nn.Module = getattr(model, str(model.base_model_prefix))
        self.joined = joined
        self.lora = lora  # of layers that are not joined
        self.in_line = in_line
        self.cache_name = str(cache_name(self.body.forward))
        self._model = [model]  # no part of it

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        mask: Any,
        slots: Tensor,
        texts: Tensor,
        gate: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        line = texts[0] if self.in_line else None
        layers = [_SlotLayer(k, v, slots, line) for k, v in zip(keys, values, strict=True)]
        with ExitStack() as stack:
            if can_group(self._model[0]):
                stack.enter_context(grouped(self._model[0], line))
            if self.lora is not None:
                stack.enter_context(self.lora.applied(_GatedSplit(gate)))
            stack.enter_context(self.joined.applied(gate))
            output = self.body(
                inputs_embeds=inputs,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **{self.cache_name: Cache(layers=list(layers))},
            )
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True)
class Shapes:
    """What a traced pass is given.

    Attributes:
        d_model: numbers in an input embedding.
        layers: heads of keys and values, and numbers in each, for each layer.
        mask_kinds: names of the masks; one alone is given without its name.
        mask_type: of the masks.
    """

    d_model: int
    layers: tuple[tuple[int, int], ...]
    mask_kinds: tuple[str, ...]
    mask_type: torch.dtype


class Given(NamedTuple):
    """What a pass is given of its rows.

    Attributes:
        inputs: input embeddings, `[B, Q, d_model]`.
        positions: `[B, Q]`.
        mask: `[B, 1, Q, S]`, or one for each kind of layers.
        slots: where each row is written, `[B, Q]`.
        texts: which text each row is of, `[B, Q]`.
        gate: 1 for a look-ahead row and 0 for a real one, `[B, Q]`; None without such rows.
    """

    inputs: Tensor
    positions: Tensor
    mask: Any
    slots: Tensor
    texts: Tensor
    gate: Tensor | None

    def in_line(self, numbers: Sequence[int], longest: int) -> Given:
        """The first so many rows of each text in one line, without those that fill up others."""
        starts = range(0, len(numbers) * longest, longest)
        pairs = zip(starts, numbers, strict=True)
        kept = torch.cat([torch.arange(start, start + number) for start, number in pairs])

        def line(rows: Tensor) -> Tensor:
            return rows.flatten(0, 1)[kept][None]

        def seen(mask: Tensor) -> Tensor:
            return mask.flatten(0, 2)[kept][None, None]

        masks = self.mask
        return Given(
            line(self.inputs),
            line(self.positions),
            {k: seen(m) for k, m in masks.items()} if isinstance(masks, dict) else seen(masks),
            line(self.slots),
            line(self.texts),
            None if self.gate is None else line(self.gate),
        )


class CompiledPasses:
    """The compiled passes of one model: loaded from `folder`, or made there when first needed.

    Args:
        model: its weights are copied into what is compiled; later changes do not reach it.
        shapes: of what a pass is given.
        folder: where packages are kept.
        probe: runs the model on a short text; see `lora.groups_of`.

    Attributes:
        shapes: the same.
        in_line: whether the rows of all texts are given in one line, as `B = 1` and `Q = N`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: Shapes,
        folder: Path,
        probe: Callable[[], object],
    ) -> None:
        self.shapes = shapes
        self.in_line = can_stand_in_line(model)
        self._model = model
        self._folder = folder
        self._probe = probe
        self._expected: AppliedLora | None = None
        self._digest: str | None = None
        self._packages: dict[str, aot_package.Run] = {}
        self._loaded: dict[int, tuple[AppliedLora | None, aot_package.Run]] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        given: Given,
        lora: AppliedLora | None,
        layers: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Hidden states, `[B, Q, d_model]`, as the output layer takes them.

        Args:
            given: the rows, those of all texts in one line where `in_line` says so.
            lora: what acts on look-ahead rows.
            layers: keys and values, `[B, heads, S, d_head]`; written to.

        Raises:
            CompileError: it has to be compiled and cannot be.
        """
        gate = given.gate
        if gate is None or lora is None:
            lora, gate = self._expected, torch.zeros_like(given.positions)
        run = self._package(lora)
        keys, values = ([layer[at] for layer in layers] for at in (0, 1))
        by_kind, kinds = given.mask, self.shapes.mask_kinds  # traced in this order
        masks = [by_kind[kind] for kind in kinds] if isinstance(by_kind, dict) else [by_kind]
        before, after = (given.inputs, given.positions), (given.slots, given.texts)
        return run([*before, *masks, *after, gate.to(given.inputs.dtype), *keys, *values])

    def expect(self, lora: AppliedLora | None) -> None:
        """Hear what acts on look-ahead rows to come: its package then serves all passes."""
        skipped = lora is not None and all(map(joinable, lora.of_layers()))
        self._expected = lora if skipped else None

    def _package(self, lora: AppliedLora | None) -> aot_package.Run:
        with self._lock:
            known = self._loaded.get(id(lora))
            if known is None:
                key = self._key(lora)
                if key not in self._packages:
                    self._packages[key] = self._made(lora, self._folder / f"{key}.pt2")
                known = self._loaded[id(lora)] = lora, self._packages[key]  # keeps the id its own
            return known[1]

    def _made(self, lora: AppliedLora | None, path: Path) -> aot_package.Run:
        if not path.is_file():
            _compile(self._example(lora), path)
        try:
            return aot_package.opened(path)
        except Exception as error:  # of torch's loader: a file cut short, or no room for its parts
            what = ""
            if not zipfile.is_zipfile(path):
                path.unlink(missing_ok=True)
                what = ", deleted"
            raise CompileError(f"cannot load {path}{what}: {_first_line(error)}") from error

    def _key(self, lora: AppliedLora | None) -> str:
        if self._digest is None:
            self._digest = _digest(self._model.state_dict().values())
        parts = {
            "weights": self._digest,
            "config": self._model.config.to_json_string(),
            "shapes": repr(self.shapes),
            "in_line": self.in_line,
            "lora": None if lora is None else _digest(lora.tensors),
            "products": linear.described(),
            "traced": [hashlib.sha256(Path(m).read_bytes()).hexdigest() for m in _TRACED],
            "environment": environment(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _example(self, lora: AppliedLora | None) -> _Traced:
        return _Traced(self._model, self.shapes, lora, self._probe, self.in_line)


@dataclass(frozen=True)
class _Traced:
    """What is traced, with example inputs."""

    model: PreTrainedModel
    shapes: Shapes
    lora: AppliedLora | None
    probe: Callable[[], object]
    in_line: bool

    def exported(self) -> torch.export.ExportedProgram:
        """The pass for any number of texts, rows and slots."""
        texts = torch.export.Dim("texts", min=1, max=_MOST_TEXTS)
        rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
        slots = torch.export.Dim("slots", min=2, max=_MOST_SLOTS)
        layers = len(self.shapes.layers)
        lines: dict[int, Any] = {} if self.in_line else {0: texts}
        mask = {**lines, 2: rows, 3: slots}
        by_row = {**lines, 1: rows}
        kinds = self.shapes.mask_kinds
        stored = [{0: texts, 2: slots}] * layers
        dynamic = (
            by_row,
            by_row,
            mask if len(kinds) == 1 else dict.fromkeys(kinds, mask),
            by_row,
            by_row,
            by_row,
            stored,
            stored,
        )
        joined = JoinedLinears(self.model, self.probe, self.lora)
        lora = self.lora and self.lora.traced(without=joined.layers)
        body = _Body(self.model, joined, lora, self.in_line)
        with ExitStack() as stack:
            if linear.preferred():
                stack.enter_context(PackedLinears(body.body, without=joined.layers).applied())
            return torch.export.export(
                body,
                self._inputs(),
                dynamic_shapes=dynamic,
                strict=False,
            )

    def _inputs(self) -> tuple[Any, ...]:
        texts, rows, slots = _EXAMPLE
        shapes, weight = self.shapes, next(self.model.parameters())
        new = weight.new_zeros
        lines = 1 if self.in_line else texts
        places = torch.arange(rows).repeat(lines, 1)
        mask = torch.ones(lines, 1, rows, slots, dtype=torch.bool).to(shapes.mask_type)
        masks = {kind: mask.clone() for kind in shapes.mask_kinds}
        keys, values = ([new(texts, h, slots, d) for h, d in shapes.layers] for _ in range(2))
        return (
            new(lines, rows, shapes.d_model),
            places,
            masks if len(masks) > 1 else mask,
            places.clone(),
            torch.zeros_like(places),
            new(lines, rows),
            keys,
            values,
        )


def _compile(traced: _Traced, path: Path) -> None:
    """Make the package; there whole or not at all.

    Raises:
        CompileError: there is no compiler, or the model cannot be traced.
    """
    _log.info("compiling passes, once: it takes minutes; kept as %s", path)
    try:
        with staging(path.parent) as folder, torch.no_grad(), _settings():
            staged = folder / path.name
            torch._inductor.aoti_compile_and_package(traced.exported(), package_path=str(staged))
            os.replace(staged, path)
    except Exception as error:  # whatever torch, transformers, the compiler or the disk raise
        _log.debug("compiling failed", exc_info=True)
        raise CompileError(_first_line(error)) from error


@contextmanager
def _settings() -> Iterator[None]:
    """Inductor's settings while it compiles."""
    import torch._inductor.config as inductor
    import torch.fx.experimental._config as symbols

    if native.compiler() is None:
        raise CompileError("there is no C++ compiler here: install g++")
    oblivious: Any = symbols
    # Layers of one input are computed in one call.
    options: dict[str, Any] = {"freezing": True, "cpp.enable_concat_linear": True}
    if native.available():
        options["aot_inductor.custom_ops_to_c_shims"] = {
            getattr(torch.ops.passlm, name).default: [shim] for name, shim in native.C_SHIMS.items()
        }
    with inductor.patch(options), oblivious.patch(backed_size_oblivious=True):
        yield  # oblivious: a graph traced with 2 texts and 5 rows serves 1 of each as well


def _digest(tensors: Any) -> str:
    """Of all bytes: a package holds copies of them."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
