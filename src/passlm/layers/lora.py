"""Gated LoRA: low-rank updates of linear layers that act on look-ahead rows only.

Real rows pass through the layers unchanged, and outside a `with` block the model is unchanged.
`model/target.py` decides which rows of a pass are look-ahead rows; training makes the updates.

LoRA: Hu et al., arXiv 2106.09685. Gating it by row: Samragh et al., "Your LLM knows the future",
arXiv 2507.11851.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from passlm.errors import InputError
from passlm.layers.swapped import Swap

PROBE_ROWS = 8
Group = tuple[str, ...]
"""Names of layers that share an input, in the order in which they are called."""


class LoraError(InputError):
    """Layers, a rank or tensors that do not fit the model; the message is one line."""


@dataclass(frozen=True)
class RowSplit:
    """Which rows of a pass, `[B, Q, ...]`, are look-ahead rows.

    Attributes:
        start: for a single sequence, the index of the first look-ahead row; the rest are, too.
        index: for several sequences, the indices of the look-ahead rows among the rows of all
            sequences, `[N]`; None for a single one.
    """

    start: int = 0
    index: Tensor | None = None

    def take(self, rows: Tensor) -> Tensor:
        """Return the look-ahead rows, `[N, d]`."""
        flat = rows.reshape(-1, rows.shape[-1])  # some models have flattened them
        return flat[self.start :] if self.index is None else flat.index_select(0, self.index)

    def add(self, rows: Tensor, update: Tensor) -> Tensor:
        """Add `update`, `[N, d]`, to the look-ahead rows; in place for inference tensors."""
        if not rows.is_inference():
            if self.index is None and self.start == 0:
                return rows + update.view(rows.shape)
            rows = rows.clone()
        flat = rows.view(-1, rows.shape[-1])
        if self.index is None:
            flat[self.start :].add_(update)
        else:
            flat.index_add_(0, self.index, update.to(flat))
        return rows


_EVERY_ROW = RowSplit()


class GatedLora(nn.Module):
    """Low-rank updates `B A x` of some linear layers of a model.

    Args:
        groups: the layers, grouped by shared input; see `groups_of`.
        down: for each group, the `A` of its layers joined, `[layers * rank, in]`.
        up: `B` of each layer, `[out, rank]`.

    Raises:
        LoraError: the tensors do not match the groups or each other.
    """

    def __init__(
        self, groups: Sequence[Group], down: Sequence[Tensor], up: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.groups = tuple(tuple(group) for group in groups)
        self.names = tuple(name for group in self.groups for name in group)
        _check_tensors(self.groups, down, up)
        self.down = nn.ParameterList([nn.Parameter(tensor) for tensor in down])
        self.up = nn.ParameterList([nn.Parameter(up[name]) for name in self.names])

    @property
    def rank(self) -> int:
        """Rank of each layer's update."""
        return int(self.up[0].shape[1])

    @classmethod
    def start(
        cls, model: nn.Module, groups: Sequence[Group], rank: int, seed: int = 0
    ) -> GatedLora:
        """Return updates that change nothing yet: `A` is random, `B` zero.

        Raises:
            LoraError: the rank is not between 1 and the smaller side of every layer.
        """
        generator = torch.Generator().manual_seed(seed)
        down: list[Tensor] = []
        up: dict[str, Tensor] = {}
        for group in groups:
            sizes = [_checked_size(model, name, rank) for name in group]
            inputs = sizes[0][0]
            noise = torch.randn(len(group) * rank, inputs, generator=generator)
            down.append(noise / inputs**0.5)
            up |= {
                name: torch.zeros(size[1], rank) for name, size in zip(group, sizes, strict=True)
            }
        return cls(groups, down, up)

    def description(self) -> dict[str, object]:
        """Return the description for a look-ahead card."""
        return {"rank": self.rank, "groups": [list(group) for group in self.groups]}

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters by their names in a file."""
        down = {f"lora.A.{group[0]}": t for group, t in zip(self.groups, self.down, strict=True)}
        return down | {f"lora.B.{name}": t for name, t in zip(self.names, self.up, strict=True)}

    @classmethod
    def of_tensors(cls, groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> GatedLora:
        """Return the updates that `tensors` gave; the inverse of it.

        Raises:
            LoraError: a tensor is missing, or they do not match each other.
        """
        if not groups or not all(groups):
            raise LoraError("there are no layer groups, a group is empty or a layer is named twice")
        try:
            down = [tensors[f"lora.A.{group[0]}"] for group in groups]
            up = {name: tensors[f"lora.B.{name}"] for group in groups for name in group}
        except KeyError as error:
            raise LoraError(f"tensor {error} is missing") from error
        return cls(groups, down, up)

    def check(self, model: nn.Module) -> None:
        """Check that the model has these layers, in these sizes.

        Raises:
            LoraError: it does not; the message names the first layer that differs.
        """
        layers = dict(model.named_modules())
        for group, down in zip(self.groups, self.down, strict=True):
            for name in group:
                size = features(layers[name]) if name in layers else None
                wanted = int(down.shape[1]), int(self.up[self.names.index(name)].shape[0])
                if size != wanted:
                    found = "no linear layer of that name" if size is None else str(size)
                    raise LoraError(
                        f"layer {name!r} of {wanted} inputs and outputs: the model has {found}"
                    )

    def on(self, model: nn.Module, dtype: torch.dtype | None = None) -> AppliedLora:
        """Bind these updates to a model's layers, without changing the model.

        Args:
            model: the model.
            dtype: for decoding: bind copies in this type, on the layers' device. None for training:
                bind the parameters themselves, which get gradients.
        """
        return AppliedLora(model, self, dtype)


def _check_tensors(
    groups: Sequence[Group], down: Sequence[Tensor], up: Mapping[str, Tensor]
) -> None:
    names = [name for group in groups for name in group]
    if not names or len(set(names)) < len(names) or not all(groups):
        raise LoraError("there are no layer groups, a group is empty or a layer is named twice")
    ranks = {t.shape[1] for t in up.values() if t.ndim == 2}
    whole = len(ranks) == 1 and all(t.ndim == 2 for t in (*down, *up.values()))
    rank = next(iter(ranks), 0)
    if not whole or [len(t) for t in down] != [rank * len(group) for group in groups]:
        raise LoraError("the shapes of A and B do not match")


class AppliedLora:
    """Updates bound to a model's layers; see `GatedLora.on`."""

    def __init__(
        self,
        model: nn.Module,
        lora: GatedLora,
        dtype: torch.dtype | None,
        traced: bool = False,
        without: Collection[nn.Module] = (),
    ) -> None:
        layers = dict(model.named_modules())
        self._bound = model, lora
        self._lock = threading.RLock()
        self._updates: list[tuple[nn.Module, _Shared, int]] = []  # with the index in its group
        others = set(without)
        ups = iter(lora.up)
        for group, down in zip(lora.groups, lora.down, strict=True):
            mine: list[Tensor] = [next(ups) for _ in group]
            shared = _Shared(down, mine)
            if traced:
                down, mine = down.detach().clone(), [up.detach().clone() for up in mine]
                shared = _Traced(down, mine)
            elif dtype is not None:
                shared = shared.copied(_device(layers[group[0]]), dtype)
            self._updates += [
                (layers[name], shared, at)
                for at, name in enumerate(group)
                if layers[name] not in others
            ]

    def traced(self, without: Collection[nn.Module] = ()) -> AppliedLora:
        """Return the same updates in a form for a compiler, except those of some layers."""
        model, lora = self._bound
        return AppliedLora(model, lora, None, traced=True, without=without)

    def of_layers(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Return `A`, `[rank, in]`, and `B`, `[out, rank]`, of each layer."""
        model, lora = self._bound
        ups = iter(lora.up)
        return {
            model.get_submodule(name): (down.detach(), next(ups).detach())
            for group, joined in zip(lora.groups, lora.down, strict=True)
            for name, down in zip(group, joined.chunk(len(group)), strict=True)
        }

    @property
    def tensors(self) -> list[Tensor]:
        """All matrices; those that layers share are listed once."""
        own = {id(shared): shared for _, shared, _ in self._updates}
        return [t for one in own.values() for t in (one.down, *one.ups)]

    @contextmanager
    def applied(self, split: RowSplit = _EVERY_ROW) -> Iterator[None]:
        """Make the layers add their updates to the look-ahead rows inside a `with` block.

        A layer whose `forward` has been replaced before is used with that one, and gets it back.

        Args:
            split: the look-ahead rows; by default every row.
        """
        with self._lock:  # another thread would undo the swap during a pass
            forwards = {
                layer: shared.around(layer.forward, split, at)
                for layer, shared, at in self._updates
            }
            try:
                with Swap(forwards, by="LoRA"):
                    yield
            finally:
                for _, shared, _ in self._updates:
                    shared.forget()


@dataclass
class _Shared:
    """Updates of the layers of one group, computed once for each input.

    Attributes:
        down: the joined `A`, `[layers * rank, in]`.
        ups: `B` of each layer, `[out, rank]`.
    """

    down: Tensor
    ups: list[Tensor]
    _seen: Tensor | None = field(default=None, init=False)
    _updates: Sequence[Tensor] = field(default=(), init=False)

    def copied(self, device: torch.device, dtype: torch.dtype) -> _Copied:
        """Return a copy for decoding, without gradients, with all `B` in one matrix."""
        if device.type == "cpu":
            dtype = torch.float32  # there, products this small take a sixth of the time of bfloat16
        down = self.down.detach().to(device, dtype)
        ups = [up.detach().to(device, dtype) for up in self.ups]
        block = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        columns = [t.T.clone(memory_format=torch.contiguous_format) for t in (down, block)]
        return _Copied(columns[0], columns[1:], [len(up) for up in ups])

    def of(self, rows: Tensor, split: RowSplit) -> Sequence[Tensor]:
        """Return the update of each layer, `[N, out]`; `rows` is their shared input."""
        if self._seen is not rows:
            self._seen, self._updates = rows, self._computed(split.take(rows))
        return self._updates

    def around(
        self, forward: Callable[[Tensor], Tensor], split: RowSplit, at: int
    ) -> Callable[[Tensor], Tensor]:
        """Return a forward that adds the update of the layer at index `at` to the given one."""

        def updated(rows: Tensor) -> Tensor:
            return split.add(forward(rows), self.of(rows, split)[at])

        return updated

    def _computed(self, taken: Tensor) -> Sequence[Tensor]:
        low = nn.functional.linear(taken, self.down.to(taken))
        parts = low.chunk(len(self.ups), dim=1)
        return [nn.functional.linear(p, up.to(p)) for p, up in zip(parts, self.ups, strict=True)]

    def forget(self) -> None:
        """Drop the input and updates of the last call, so that they do not outlive the pass."""
        self._seen, self._updates = None, ()


@dataclass
class _Copied(_Shared):
    """Updates for decoding: one product with `A`, and one with the `B` of all layers.

    `down` is transposed, and `ups` holds one transposed block-diagonal matrix.

    Attributes:
        sizes: number of outputs of each layer.
    """

    sizes: list[int]

    def _computed(self, taken: Tensor) -> Sequence[Tensor]:
        low = torch.mm(taken.to(self.down), self.down)
        return torch.split(torch.mm(low, self.ups[0]), self.sizes, dim=1)


class _Traced(_Shared):
    """Updates for a compiler, in float32 and written as sums.

    For products this small, a library call costs more than the product itself; a compiler fuses the
    loops of a sum with the operations around them.
    """

    def _computed(self, taken: Tensor) -> Sequence[Tensor]:
        low = (taken.float()[:, None] * self.down[None]).sum(-1)  # [N, layers * rank]
        parts = low.chunk(len(self.ups), dim=1)
        return [(p[:, :, None] * up.T[None]).sum(1) for p, up in zip(parts, self.ups, strict=True)]


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Return the numbers of inputs and outputs of a linear layer; None for other modules.

    Supports torch's own layers and those with the same attributes (also of quantized models), and
    gpt2's transposed `Conv1D`.
    """
    names = ("nx", "nf") if type(layer).__name__ == "Conv1D" else ("in_features", "out_features")
    sizes = [getattr(layer, name, None) for name in names]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]


def _device(layer: nn.Module) -> torch.device:
    held = chain(layer.parameters(), layer.buffers())  # quantized weights are buffers
    return next(held).device


def _checked_size(model: nn.Module, name: str, rank: int) -> tuple[int, int]:
    size = features(model.get_submodule(name))
    assert size is not None, f"{name} is not a linear layer"
    if not 1 <= rank <= min(size):
        raise LoraError(
            f"lora-rank is {rank}: layer {name} of {size[0]} inputs and {size[1]} outputs takes 1 "
            f"to {min(size)}"
        )
    return size


def groups_of(
    model: nn.Module, probe: Callable[[], object], patterns: Sequence[str] = ()
) -> list[Group]:
    """Return the linear layers that match, grouped by shared input, in the order of their calls.

    Args:
        model: the model. Its output layer is left out, since it does not run for every row.
        probe: runs the model on a sequence of `PROBE_ROWS` tokens. Only layers that get all of them
            are returned, which leaves out the experts of a mixture.
        patterns: shell patterns of whole names or of their last parts (`q_proj`,
            `layers.[0-9].mlp.*`); an empty sequence matches every layer.

    Raises:
        LoraError: a pattern matches nothing; the message names the closest layers.
    """
    called: dict[str, int] = {}
    inputs: list[Any] = []  # kept alive, so that ids stay unique

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if len(arguments) == 1 and arguments[0].shape[:-1].numel() == PROBE_ROWS:
                inputs.append(arguments[0])
                called.setdefault(name, id(arguments[0]))

        return hook

    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if features(module) is not None and module is not head
    ]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linear]
    try:
        probe()
    finally:
        for hook in hooks:
            hook.remove()
    grouped: dict[int, list[str]] = {}
    for name in _matching(list(called), patterns):
        grouped.setdefault(called[name], []).append(name)
    return [tuple(group) for group in grouped.values()]


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
            near = difflib.get_close_matches(pattern, [*ends, *names], 3, cutoff=0.3) or ends
            raise LoraError(
                f"lora-layers {pattern!r} matches no linear layer: the nearest are "
                f"{', '.join(near)}"
            )
    return [n for n in names if not patterns or any(_matches(n, p) for p in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
