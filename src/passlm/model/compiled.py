"""Run passes that torch's inductor compiled once and that are kept on disk, for CPUs.

A package contains the compiled body of the model; later starts only load it (AOTInductor). The
output layer is left out, since only `decoding/decoder.py` knows which rows need logits. Tracing and
compiling are in `traced.py`.

Where look-ahead rows are expected, the package computes their LoRA as well, multiplied by 0 for
real rows, which adds an exact zero. Our own products skip it in passes without such rows. With
other products, those passes have a package of their own.

Where our own attention is available, the rows of all sequences are packed into one line, and a
sequence costs its own rows only. Elsewhere every sequence is padded to as many rows as the longest.
"""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import passlm.kernels.linear
import passlm.layers.attention
import passlm.layers.fused
import passlm.layers.int8
import passlm.layers.lora
import passlm.layers.packed
from passlm.kernels import aot_package, linear
from passlm.layers.attention import can_stand_in_line
from passlm.layers.fused import joinable
from passlm.layers.lora import AppliedLora
from passlm.model import traced
from passlm.model.cache import RowCache
from passlm.model.pass_inputs import PassInputs, padded
from passlm.model.pass_records import PassRow
from passlm.model.traced import CompileError, Shapes, Trace, compile_to, first_line
from passlm.provenance import environment

_PARTS = (
    *(passlm.layers.attention, passlm.layers.fused, passlm.layers.lora),
    *(passlm.layers.packed, passlm.kernels.linear, passlm.layers.int8, traced),
)
_SOURCES = (__file__, *(str(part.__file__) for part in _PARTS))  # code that a package depends on

__all__ = ["CompileError", "CompiledPasses", "Given", "Shapes"]


class Given(NamedTuple):
    """Inputs of a compiled pass, by row.

    Attributes:
        inputs: input embeddings, `[B, Q, d_model]`.
        positions: position of each row, `[B, Q]`.
        mask: mask over the cache's slots, `[B, 1, Q, S]`; a dictionary by kind of layer where
            layers differ.
        slots: cache slot that each row writes, `[B, Q]`.
        batch_rows: index of the batch row that each row belongs to, `[B, Q]`.
        gate: 1 for a look-ahead row and 0 for a real one, `[B, Q]`; None without look-ahead rows.
    """

    inputs: Tensor
    positions: Tensor
    mask: Any
    slots: Tensor
    batch_rows: Tensor
    gate: Tensor | None

    def in_line(self, numbers: Sequence[int], longest: int) -> Given:
        """Return the inputs with the rows of all sequences packed into one line, without padding.

        In the result, `B` is 1 and `Q` is the total number of rows, `N`.

        Args:
            numbers: number of rows of each sequence.
            longest: number of rows of each sequence with padding, `Q`.
        """
        starts = range(0, len(numbers) * longest, longest)
        pairs = zip(starts, numbers, strict=True)
        kept = torch.cat([torch.arange(start, start + number) for start, number in pairs])  # [N]

        def packed(rows: Tensor) -> Tensor:
            return rows.flatten(0, 1)[kept][None]

        def packed_mask(mask: Tensor) -> Tensor:
            return mask.flatten(0, 2)[kept][None, None]

        if isinstance(self.mask, dict):
            mask: Any = {kind: packed_mask(one) for kind, one in self.mask.items()}
        else:
            mask = packed_mask(self.mask)
        return Given(
            packed(self.inputs),
            packed(self.positions),
            mask,
            packed(self.slots),
            packed(self.batch_rows),
            None if self.gate is None else packed(self.gate),
        )


class CompiledPasses:
    """The compiled passes of one model: loaded from a folder, or compiled when first needed.

    A lock guards compiling and loading.

    Args:
        model: the model; its weights are copied into the package, so later changes have no effect.
        shapes: shapes of the inputs of a pass.
        folder: folder of the packages.
        probe: runs the model on a short sequence; see `lora.groups_of`.

    Attributes:
        shapes: the same.
        in_line: whether the rows of all sequences are packed into one line; see `Given.in_line`.
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
        """Run a pass and return the inputs of the output layer, `[B, Q, d_model]`.

        Args:
            given: the inputs of the pass, packed into one line where `in_line` is true.
            lora: updates of look-ahead rows; None without such rows.
            layers: keys and values of each layer, `[B, heads, S, d_head]`; written to.

        Raises:
            CompileError: the pass has to be compiled and cannot be, or its package cannot be
                loaded.
        """
        gate = given.gate
        if gate is None or lora is None:
            lora, gate = self._expected, torch.zeros_like(given.positions)
        run = self._package(lora)
        keys, values = ([layer[at] for layer in layers] for at in (0, 1))
        by_kind, kinds = given.mask, self.shapes.mask_kinds  # traced in this order
        masks = [by_kind[kind] for kind in kinds] if isinstance(by_kind, dict) else [by_kind]
        before, after = (given.inputs, given.positions), (given.slots, given.batch_rows)
        return run([*before, *masks, *after, gate.to(given.inputs.dtype), *keys, *values])

    def run(
        self,
        cache: RowCache,
        rows: Sequence[PassRow],
        inputs: PassInputs,
        lora: AppliedLora | None,
        call: Callable[..., Any],
    ) -> list[Tensor]:
        """Run a pass and return each sequence's inputs of the output layer, `[Q_b, d_model]`.

        Args:
            cache: a cache with one batch row for each of `rows`; written to.
            rows: tokens and plan of each batch row.
            inputs: inputs of the pass, built for the whole cache.
            lora: updates of look-ahead rows; None without such rows.
            call: called as `call(self, given, lora, layers)` to run the pass, so that it can be
                timed.

        Raises:
            CompileError: see `__call__`.
        """
        longest, numbers = inputs.longest, [row.plan.rows for row in rows]
        gate = None
        if any(max(row.plan.groups) for row in rows):
            gate = padded([layout.look_ahead for layout in inputs.layouts], longest) > 0
        given = Given(
            inputs.embeddings,
            inputs.positions,
            inputs.mask,
            inputs.lengths + torch.arange(longest),
            torch.arange(len(rows))[:, None].expand(-1, longest).contiguous(),
            gate,
        )
        if self.in_line and len(rows) > 1:
            given = given.in_line(numbers, longest)
        layers = cache.slots(self.shapes.layers, self._model.dtype)
        hidden: Tensor = call(self, given, lora, layers)
        if self.in_line:
            return list(torch.split(hidden[0], numbers))
        return [own[:number] for own, number in zip(hidden, numbers, strict=True)]

    def expect(self, lora: AppliedLora | None) -> None:
        """Set the updates of later look-ahead rows, so that one package serves all passes.

        Has no effect where products are not our own, which cannot skip the LoRA.
        """
        can_skip = lora is not None and all(map(joinable, lora.of_layers()))
        self._expected = lora if can_skip else None

    def _package(self, lora: AppliedLora | None) -> aot_package.Run:
        with self._lock:
            loaded = self._loaded.get(id(lora))
            if loaded is None:
                key = self._key(lora)
                if key not in self._packages:
                    self._packages[key] = self._load_or_compile(lora, self._folder / f"{key}.pt2")
                # The reference to `lora` keeps its id unique.
                loaded = self._loaded[id(lora)] = (lora, self._packages[key])
            return loaded[1]

    def _load_or_compile(self, lora: AppliedLora | None, path: Path) -> aot_package.Run:
        if not path.is_file():
            compile_to(self._trace(lora), path)
        try:
            return aot_package.opened(path)
        except Exception as error:  # of torch's loader: a truncated file, or no disk space
            note = ""
            if not zipfile.is_zipfile(path):
                path.unlink(missing_ok=True)
                note = ", deleted"
            raise CompileError(f"cannot load {path}{note}: {first_line(error)}") from error

    def _key(self, lora: AppliedLora | None) -> str:
        """Return a digest of everything that a package depends on."""
        if self._digest is None:
            self._digest = _digest(self._model.state_dict().values())
        parts = {
            "weights": self._digest,
            "config": self._model.config.to_json_string(),
            "shapes": repr(self.shapes),
            "in_line": self.in_line,
            "lora": None if lora is None else _digest(lora.tensors),
            "products": linear.described(),
            "traced": [hashlib.sha256(Path(m).read_bytes()).hexdigest() for m in _SOURCES],
            "environment": environment(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _trace(self, lora: AppliedLora | None) -> Trace:
        return Trace(self._model, self.shapes, lora, self._probe, self.in_line)


def _digest(tensors: Any) -> str:
    """Return a digest of the bytes of all tensors, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
