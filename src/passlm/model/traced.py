"""Trace a model's pass with torch.export and compile it with torch's inductor into a package.

The body of the model, from input embeddings to the last hidden states, is traced for any number of
sequences, rows and cache slots. Its weights are frozen in the layout that is multiplied fastest on
this machine. Keeping and loading packages is left to `compiled.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from passlm.kernels import linear, native
from passlm.layers.attention import can_group, grouped
from passlm.layers.fused import JoinedLinears
from passlm.layers.lora import AppliedLora, RowSplit
from passlm.layers.packed import PackedLinears
from passlm.model.compat import cache_name
from passlm.provenance import staging

MOST_ROWS = 2**16  # of one pass, all sequences together
_MOST_SEQUENCES = 256
_MOST_SLOTS = 2**20
_EXAMPLE = (2, 5, 256)  # sequences, rows and slots to trace with; the result serves any numbers

_log = logging.getLogger(__name__)


class CompileError(Exception):
    """Passes cannot be compiled or loaded here; the message gives the reason in one line."""


class _SlotLayer(StaticLayer):  # type: ignore[no-untyped-call]  # its base's hook
    """A cache layer whose tensors are inputs of the traced pass.

    Args:
        keys: `[B, heads, S, d_head]`.
        values: like `keys`.
        slots: slot that each row writes, `[B, Q]`, or `[1, N]` for rows packed into one line.
        batch_rows: index of the batch row that each packed row belongs to, `[N]`; None where rows
            are not packed.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, slots: Tensor, batch_rows: Tensor | None
    ) -> None:
        super().__init__(max_cache_len=0)
        self.keys, self.values = keys, values
        self.slots, self.batch_rows = slots, batch_rows
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values, `[B, heads, Q, d_head]`; return those of all slots."""
        assert self.keys is not None, "set in __init__"
        assert self.values is not None, "set in __init__"
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            if (stored.shape[1], stored.shape[3]) != (states.shape[1], states.shape[3]):
                raise CompileError("keys and values differ from the cache in heads or head size")
            if self.batch_rows is None:
                places = self.slots[:, None, :, None].expand_as(states)
                stored.scatter_(2, places, states)
            else:
                heads = torch.arange(stored.shape[1])
                rows = self.batch_rows[:, None], heads[None], self.slots[0][:, None]
                stored.index_put_(rows, states[0].transpose(0, 1))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return 0, since positions are inputs of the pass."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of all slots, and the first of them."""
        assert self.keys is not None, "set in __init__"
        return int(self.keys.shape[2]), 0


class _GatedSplit(RowSplit):
    """Adds to every row its LoRA update times `gate`, which is 0 for real rows.

    Args:
        gate: `[B, Q]`.
    """

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "gate", gate.reshape(-1, 1))  # [B * Q, 1]

    gate: Tensor

    def take(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, rows.shape[-1]) * self.gate

    def add(self, rows: Tensor, update: Tensor) -> Tensor:
        return (rows + update.view(rows.shape)).to(rows.dtype)


class _Body(nn.Module):
    """A pass of the model's body as a function of tensors alone, so that it can be traced."""

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
        self.lora = lora  # of layers that are not fused
        self.in_line = in_line
        self.cache_name = str(cache_name(self.body.forward))
        self._model = [model]  # in a list, so that it is not a submodule

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        mask: Any,
        slots: Tensor,
        batch_rows: Tensor,
        gate: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        line = batch_rows[0] if self.in_line else None
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
    """Shapes of the inputs of a traced pass.

    Attributes:
        d_model: size of an input embedding.
        layers: number of key and value heads, and size of a head, for each layer.
        mask_kinds: kinds of layers with a mask of their own; a single mask is passed as a tensor,
            several as a dictionary.
        mask_type: type of the masks.
    """

    d_model: int
    layers: tuple[tuple[int, int], ...]
    mask_kinds: tuple[str, ...]
    mask_type: torch.dtype


@dataclass(frozen=True)
class Trace:
    """A pass to be traced with example inputs.

    Attributes:
        model: the model.
        shapes: shapes of the inputs.
        lora: updates of look-ahead rows; None without.
        probe: runs the model on a short sequence; see `lora.groups_of`.
        in_line: whether the rows of all sequences are packed into one line.
    """

    model: PreTrainedModel
    shapes: Shapes
    lora: AppliedLora | None
    probe: Callable[[], object]
    in_line: bool

    def exported(self) -> torch.export.ExportedProgram:
        """Return the pass, exported for any number of sequences, rows and slots."""
        sequences = torch.export.Dim("sequences", min=1, max=_MOST_SEQUENCES)
        rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
        slots = torch.export.Dim("slots", min=2, max=_MOST_SLOTS)
        layers = len(self.shapes.layers)
        batch: dict[int, Any] = {} if self.in_line else {0: sequences}
        mask = {**batch, 2: rows, 3: slots}
        by_row = {**batch, 1: rows}
        kinds = self.shapes.mask_kinds
        stored = [{0: sequences, 2: slots}] * layers
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
        """Return example arguments of `_Body.forward`."""
        sequences, rows, slots = _EXAMPLE
        shapes, weight = self.shapes, next(self.model.parameters())
        new = weight.new_zeros
        batch = 1 if self.in_line else sequences
        positions = torch.arange(rows).repeat(batch, 1)
        mask = torch.ones(batch, 1, rows, slots, dtype=torch.bool).to(shapes.mask_type)
        masks = {kind: mask.clone() for kind in shapes.mask_kinds}
        keys, values = ([new(sequences, h, slots, d) for h, d in shapes.layers] for _ in range(2))
        return (
            new(batch, rows, shapes.d_model),
            positions,
            masks if len(masks) > 1 else mask,
            positions.clone(),
            torch.zeros_like(positions),
            new(batch, rows),
            keys,
            values,
        )


def compile_to(trace: Trace, path: Path) -> None:
    """Compile a pass into a package at `path`, written atomically.

    Raises:
        CompileError: there is no compiler, or tracing, compiling or writing fails.
    """
    _log.info("compiling passes, which takes minutes, once; they are kept as %s", path)
    try:
        with staging(path.parent) as folder, torch.no_grad(), _settings():
            staged = folder / path.name
            torch._inductor.aoti_compile_and_package(trace.exported(), package_path=str(staged))
            os.replace(staged, path)
    except Exception as error:  # torch, transformers, the compiler and the disk raise many types
        _log.debug("compiling failed", exc_info=True)
        raise CompileError(first_line(error)) from error


@contextmanager
def _settings() -> Iterator[None]:
    """Set the options of inductor and of tracing inside a `with` block.

    Raises:
        CompileError: there is no compiler.
    """
    import torch._inductor.config as inductor
    import torch.fx.experimental._config as symbols

    if native.compiler() is None:
        raise CompileError("there is no C++ compiler here: install g++")
    tracing: Any = symbols
    # Concatenate linear layers that share an input.
    options: dict[str, Any] = {"freezing": True, "cpp.enable_concat_linear": True}
    if native.available():
        options["aot_inductor.custom_ops_to_c_shims"] = {
            getattr(torch.ops.passlm, name).default: [shim] for name, shim in native.C_SHIMS.items()
        }
    # Size-oblivious: a graph traced with 2 sequences and 5 rows also serves 1 of each.
    with inductor.patch(options), tracing.patch(backed_size_oblivious=True):
        yield


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
