"""A GPU that is none: tensors that say they lie on one, and are computed where they are.

What a real one refuses is refused: operations between tensors of two devices. So a place that
forgets to move a tensor is found on machines without a GPU. Nothing is learnt of speed, of kernels
or of their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

M = TypeVar("M", bound=nn.Module)
GPU = torch.device("meta")  # one that torch moves tensors to without a driver
_ATEN = torch.ops.aten
# These take tensors of any device, or indices that lie on the CPU.
_ACROSS = (_ATEN._to_copy, _ATEN.to, _ATEN.copy_, _ATEN.index, _ATEN.index_put, _ATEN.index_put_)
_MATH = 0  # which of torch's ways to compute attention: the one for all devices


class OnGpu(Tensor):
    """A tensor that says so.

    Args:
        inner: where its numbers are.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def tolist(self) -> Any:
        """Numbers; a wrapper has to say itself how."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _PretendedGpu(TorchDispatchMode):
    """Sees what is made from nothing as well."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = list(tree_iter((args, kwargs)))
    tensors = [one for one in given if isinstance(one, Tensor)]
    if func.overloadpacket not in _ACROSS:
        # A number may lie on the CPU.
        places = {isinstance(one, OnGpu) for one in tensors if one.ndim or isinstance(one, OnGpu)}
        if len(places) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if func is _ATEN._fused_sdp_choice.default:
        return _MATH
    asked = [one for one in given if isinstance(one, torch.device)]
    inner = tree_map(_inner, (tuple(args), dict(kwargs)))
    out = func(*inner[0], **inner[1])
    written = [at for at, one in enumerate(func._schema.arguments) if _is_written(one)]
    if written and func._schema.returns:  # in place: it gives what it was given
        return args[written[0]]
    decides = tensors[-1:] if func is _ATEN.to.other else tensors
    if func.overloadpacket in (_ATEN.index, _ATEN.index_put):
        decides = tensors[:1]
    there = asked[0].type == GPU.type if asked else any(isinstance(t, OnGpu) for t in decides)
    return tree_map(lambda one: OnGpu(one) if type(one) is Tensor else one, out) if there else out


def _inner(one: Any) -> Any:
    if isinstance(one, torch.device):
        return torch.device("cpu")
    return one.inner if isinstance(one, OnGpu) else one


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class _MadeThere(TorchFunctionMode):
    """Sees what is made of Python's numbers, which torch does by itself."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and given.get("device") is not None:
            device = torch.device(given.pop("device"))
            made = torch.tensor(*args, **given)
            return OnGpu(made) if device.type == GPU.type else made
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnGpu):
            args = args[0], _indices(args[1]), *args[2:]
        return func(*args, **given)


def _indices(index: Any) -> Any:
    """Lists in an index as tensors: what torch makes of them lies with the tensor."""
    if isinstance(index, list):
        return OnGpu(torch.tensor(index))
    return tuple(map(_indices, index)) if isinstance(index, tuple) else index


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """`GPU` is there until the block is left, and nothing keeps what gradients would need."""
    with torch.inference_mode(), _MadeThere(), _PretendedGpu():
        yield


def moved(model: M) -> M:
    """The same module with its weights there."""
    there: dict[int, OnGpu] = {}  # shared ones stay so

    def on_gpu(tensor: Tensor) -> OnGpu:
        return there.setdefault(id(tensor), OnGpu(tensor.detach()))

    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = nn.Parameter(on_gpu(weight), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = on_gpu(buffer)
    return model
