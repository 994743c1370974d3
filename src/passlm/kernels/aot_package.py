"""Packages of compiled passes (AOTInductor), opened and run.

What torch gives Python for it holds Python's lock while a pass is computed, some 10 ms in which a
server cannot read a request; and it reads anew at each pass how its arguments are nested. Where
this machine has our own operators (`native.py`), `cpp/packages.cpp` runs one without the lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from passlm.kernels import native

Run = Callable[[list[Tensor]], Tensor]
"""From the inputs of a pass, in the order they were traced in, to its one output."""

torch.library.define("passlm::open_package", "(str path) -> int")
torch.library.define("passlm::close_package", "(int package) -> ()")
torch.library.define("passlm::run_package", "(int package, Tensor[] inputs) -> Tensor")


def opened(path: Path) -> Run:
    """The pass that a package computes; it is closed when nobody holds that any more.

    Raises:
        RuntimeError: of torch's loader: the file is cut short, or another torch's.
    """
    if native.available():
        return _Package(path)
    loader = torch._inductor.aoti_load_package(str(path)).loader

    def run(inputs: list[Tensor]) -> Tensor:
        output: Tensor = loader.boxed_run(inputs)[0]
        return output

    return run


class _Package:
    """A package that our own operators opened."""

    def __init__(self, path: Path) -> None:
        self._number: int = torch.ops.passlm.open_package(str(path))
        weakref.finalize(self, torch.ops.passlm.close_package, self._number)

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        output: Tensor = torch.ops.passlm.run_package(self._number, inputs)
        return output
