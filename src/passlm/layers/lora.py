"""Gated LoRA: low-rank updates of linear layers that act on look-ahead rows alone.

Real rows go through the layers as they are, and outside a `with` block nothing is changed. Which
rows of a pass are look-ahead is left to `model/target.py`, what the updates hold to training.

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
"""Names of the layers that take one and the same input, in the order they are called in."""


class LoraError(InputError):
    """Layers or a rank that cannot be had; one line."""


@dataclass(frozen=True)
class RowSplit:
    """The look-ahead rows among the rows of a pass, `[B, Q, ...]`.

    Attributes:
        start: for a single text, they are the rows from here on.
        index: for several, their places in the rows of all texts, `[N]`; None for a single one.
    """

    start: int = 0
    index: Tensor | None = None

    def take(self, rows: Tensor) -> Tensor:
        """The look-ahead rows, `[N, d]`."""
        flat = rows.reshape(-1, rows.shape[-1])  # some models flatten them before
        return flat[self.start :] if self.index is None else flat.index_select(0, self.index)

    def add(self, rows: Tensor, update: Tensor) -> Tensor:
        """`rows` with `update`, `[N, d]`, added to the look-ahead ones; in place where it may."""
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
        groups: the layers, by the input they share; see `groups_of`.
        down: `A` of each group, those of its layers joined, `[layers * rank, in]`.
        up: `B` of each layer, `[out, rank]`.

    Raises:
        LoraError: the tensors do not fit the groups or each other.
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
        """Updates that change nothing yet: `A` random, `B` zero.

        Raises:
            LoraError: the rank is not between 1 and the layers' own.
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
        """What a look-ahead card says of it."""
        return {"rank": self.rank, "groups": [list(group) for group in self.groups]}

    def tensors(self) -> dict[str, Tensor]:
        """All parameters by the name they are stored under."""
        down = {f"lora.A.{group[0]}": t for group, t in zip(self.groups, self.down, strict=True)}
        return down | {f"lora.B.{name}": t for name, t in zip(self.names, self.up, strict=True)}

    @classmethod
    def of_tensors(cls, groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> GatedLora:
        """The inverse of `tensors`.

        Raises:
            LoraError: one is missing, or they do not fit each other.
        """
        if not groups or not all(groups):
            raise LoraError("the groups of layers are empty or name one twice")
        try:
            down = [tensors[f"lora.A.{group[0]}"] for group in groups]
            up = {name: tensors[f"lora.B.{name}"] for group in groups for name in group}
        except KeyError as error:
            raise LoraError(f"tensor {error} is missing") from error
        return cls(groups, down, up)

    def check(self, model: nn.Module) -> None:
        """Make sure that the model has these layers, in these sizes.

        Raises:
            LoraError: it has not; names the first that differs.
        """
        layers = dict(model.named_modules())
        for group, down in zip(self.groups, self.down, strict=True):
            for name in group:
                size = features(layers[name]) if name in layers else None
                wanted = int(down.shape[1]), int(self.up[self.names.index(name)].shape[0])
                if size != wanted:
                    found = "is no linear layer of it" if size is None else f"has {size}"
                    raise LoraError(f"layer {name!r} of {wanted} inputs and outputs {found}")

    def on(self, model: nn.Module, dtype: torch.dtype | None = None) -> AppliedLora:
        """These updates bound to a model's layers; the model keeps no trace of it.

        Args:
            model: the model.
            dtype: for decoding: copies in this type, where the layers lie. None for training:
                the parameters themselves, which get gradients.
        """
        return AppliedLora(model, self, dtype)


def _check_tensors(
    groups: Sequence[Group], down: Sequence[Tensor], up: Mapping[str, Tensor]
) -> None:
    names = [name for group in groups for name in group]
    if not names or len(set(names)) < len(names) or not all(groups):
        raise LoraError("the groups of layers are empty or name one twice")
    ranks = {t.shape[1] for t in up.values() if t.ndim == 2}
    whole = len(ranks) == 1 and all(t.ndim == 2 for t in (*down, *up.values()))
    rank = next(iter(ranks), 0)
    if not whole or [len(t) for t in down] != [rank * len(group) for group in groups]:
        raise LoraError("the shapes of A and B do not fit each other")


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
        self._updates: list[tuple[nn.Module, _Shared, int]] = []  # the last: which of its group
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
        """The same updates in words for a compiler, of all layers but some."""
        model, lora = self._bound
        return AppliedLora(model, lora, None, traced=True, without=without)

    def of_layers(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """`A`, `[rank, in]`, and `B`, `[out, rank]`, of each layer."""
        model, lora = self._bound
        ups = iter(lora.up)
        return {
            model.get_submodule(name): (down.detach(), next(ups).detach())
            for group, joined in zip(lora.groups, lora.down, strict=True)
            for name, down in zip(group, joined.chunk(len(group)), strict=True)
        }

    @property
    def tensors(self) -> list[Tensor]:
        """The matrices, those that layers share once."""
        own = {id(shared): shared for _, shared, _ in self._updates}
        return [t for one in own.values() for t in (one.down, *one.ups)]

    @contextmanager
    def applied(self, split: RowSplit = _EVERY_ROW) -> Iterator[None]:
        """The layers add their updates to the look-ahead rows until the block is left.

        A layer whose `forward` somebody has replaced, for the time being or for good, is taken as
        it is then and left so.
        """
        with self._lock:  # a second thread would take the forwards away in mid-pass
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
    """The updates of the layers of one group, computed once for an input.

    Attributes:
        down: the joined `A`.
        ups: `B` of each layer.
    """

    down: Tensor
    ups: list[Tensor]
    _seen: Tensor | None = field(default=None, init=False)
    _updates: Sequence[Tensor] = field(default=(), init=False)

    def copied(self, device: torch.device, dtype: torch.dtype) -> _Copied:
        """For decoding: without gradients, the `B` of several layers in one matrix."""
        if device.type == "cpu":
            dtype = torch.float32  # products this small take a sixth of bfloat16's time there
        down = self.down.detach().to(device, dtype)
        ups = [up.detach().to(device, dtype) for up in self.ups]
        block = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        columns = [t.T.clone(memory_format=torch.contiguous_format) for t in (down, block)]
        return _Copied(columns[0], columns[1:], [len(up) for up in ups])

    def of(self, rows: Tensor, split: RowSplit) -> Sequence[Tensor]:
        """The update of each layer, `[N, out]`; `rows` is the input of all of them."""
        if self._seen is not rows:
            self._seen, self._updates = rows, self._computed(split.take(rows))
        return self._updates

    def around(
        self, forward: Callable[[Tensor], Tensor], split: RowSplit, at: int
    ) -> Callable[[Tensor], Tensor]:
        """The forward of the `at`th layer, with its update."""

        def updated(rows: Tensor) -> Tensor:
            return split.add(forward(rows), self.of(rows, split)[at])

        return updated

    def _computed(self, taken: Tensor) -> Sequence[Tensor]:
        low = nn.functional.linear(taken, self.down.to(taken))
        parts = low.chunk(len(self.ups), dim=1)
        return [nn.functional.linear(p, up.to(p)) for p, up in zip(parts, self.ups, strict=True)]

    def forget(self) -> None:
        """Keep no input alive once its pass is over."""
        self._seen, self._updates = None, ()


@dataclass
class _Copied(_Shared):
    """The same for decoding: `down` transposed, and all `B` in one matrix, so in one product.

    Attributes:
        sizes: numbers that each layer gives.
    """

    sizes: list[int]

    def _computed(self, taken: Tensor) -> Sequence[Tensor]:
        low = torch.mm(taken.to(self.down), self.down)
        return torch.split(torch.mm(low, self.ups[0]), self.sizes, dim=1)


class _Traced(_Shared):
    """The same for a compiler, in float32 and as sums.

    Library calls for products this small cost more than the products; loops are fused with what
    comes before and after them.
    """

    def _computed(self, taken: Tensor) -> Sequence[Tensor]:
        low = (taken.float()[:, None] * self.down[None]).sum(-1)  # [N, layers * rank]
        parts = low.chunk(len(self.ups), dim=1)
        return [(p[:, :, None] * up.T[None]).sum(1) for p, up in zip(parts, self.ups, strict=True)]


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Numbers that a linear layer takes and gives; None where it is none.

    Knows torch's own layers and those made after them (of quantised models, too), and the
    transposed one of gpt2.
    """
    names = ("nx", "nf") if type(layer).__name__ == "Conv1D" else ("in_features", "out_features")
    sizes = [getattr(layer, name, None) for name in names]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]


def _device(layer: nn.Module) -> torch.device:
    held = chain(layer.parameters(), layer.buffers())  # quantised weights are no parameters
    return next(held).device


def _checked_size(model: nn.Module, name: str, rank: int) -> tuple[int, int]:
    size = features(model.get_submodule(name))
    assert size is not None, f"{name} is no linear layer"
    if not 1 <= rank <= min(size):
        raise LoraError(
            f"lora-rank is {rank}: layer {name} of {size[0]} inputs and {size[1]} outputs takes 1 "
            f"to {min(size)}"
        )
    return size


def groups_of(
    model: nn.Module, probe: Callable[[], object], patterns: Sequence[str] = ()
) -> list[Group]:
    """The linear layers that match, by the input they share, in the order they are called in.

    Args:
        model: the model; its output layer gets no update, since it is not run for every row.
        probe: runs the model on a text of `PROBE_ROWS` tokens; the layers that get all of them
            count (an expert of a mixture does not).
        patterns: shell patterns of names, whole or of their last parts (`q_proj`,
            `layers.[0-9].mlp.*`); none takes all.

    Raises:
        LoraError: a pattern matches nothing; names the nearest layers.
    """
    called: dict[str, int] = {}
    inputs: list[Any] = []  # kept alive, so that no two have the same id

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
