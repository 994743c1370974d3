"""Open and run packages of compiled passes (AOTInductor).

Torch's Python loader holds the GIL while it computes a pass, some 10 ms in which a server cannot
read a request, and flattens its nested arguments at every pass. Where this machine has our own
operators (`native.py`), `cpp/packages.cpp` runs a package without the GIL.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from passlm.kernels import native

Run = Callable[[list[Tensor]], Tensor]
"""A compiled pass: takes its inputs in the order of tracing and returns its one output."""

torch.library.define("passlm::open_package", "(str path) -> int")
torch.library.define("passlm::close_package", "(int package) -> ()")
torch.library.define("passlm::run_package", "(int package, Tensor[] inputs) -> Tensor")


def opened(path: Path) -> Run:
    """Open a package and return its pass; the package is closed when the pass is freed.

    Raises:
        RuntimeError: from torch's loader: the file is truncated or made by another torch version.
    """
    if native.available():
        return _Package(path)
    loader = torch._inductor.aoti_load_package(str(path)).loader

    def run(inputs: list[Tensor]) -> Tensor:
        output: Tensor = loader.boxed_run(inputs)[0]
        return output

    return run


class _Package:
    """Package opened by our own operators."""

    def __init__(self, path: Path) -> None:
        self._number: int = torch.ops.passlm.open_package(str(path))
        weakref.finalize(self, torch.ops.passlm.close_package, self._number)

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        output: Tensor = torch.ops.passlm.run_package(self._number, inputs)
        return output
