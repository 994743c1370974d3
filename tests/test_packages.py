"""Packages of compiled passes: the same results as torch's own loader, without the GIL."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from passlm.kernels import aot_package, native


class _Body(nn.Module):
    """A small pass with several inputs and one output."""

    def forward(self, rows: Tensor, others: list[Tensor]) -> Tensor:
        return torch.tanh(rows @ others[0]) + others[1]


INPUTS = [torch.randn(512, 1024) / 32, torch.randn(1024, 1024), torch.rand(1024)]  # takes 10 ms


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a package of one small pass."""
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler here")
    rows, *others = INPUTS
    exported = torch.export.export(_Body(), (rows, others))
    path = tmp_path_factory.mktemp("packages") / "body.pt2"
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return path


@pytest.fixture
def own_operators() -> None:
    """Skip the test where torch's own loader runs packages."""
    if not native.available():
        pytest.skip("this machine has not our own operators")


@pytest.fixture
def asked_for() -> Iterator[None]:
    """Make threads release the GIL only explicitly, never because their time slice is over."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_what_a_package_gives(package: Path, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches inputs in another order, and a machine without our operators that cannot run it."""
    if not own:
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("this machine has not our own operators")
    rows, *others = INPUTS
    run = aot_package.opened(package)
    for _ in range(2):
        assert torch.allclose(run(list(INPUTS)), _Body()(rows, others), atol=1e-4)


@pytest.mark.slow
def test_other_threads_work_during_a_pass(
    package: Path, own_operators: None, asked_for: None
) -> None:
    """Catches a server that cannot read a request during a pass."""
    run, turns, ended = aot_package.opened(package), 0, threading.Event()

    def work() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            time.sleep(0)  # releases the GIL

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    most = 0  # turns in one pass; torch releases the GIL once as it frees a tensor
    try:
        for _ in range(100):  # the system may not wake the other thread during the first
            before = turns
            run(list(INPUTS))
            most = max(most, turns - before)
            if most > 10:
                break
    finally:
        ended.set()
    thread.join()
    assert most > 10


@pytest.mark.slow
def test_threads_share_a_package(package: Path, own_operators: None) -> None:
    """Catches results mixed up between two threads that run one package without a lock."""
    run, (_, *others) = aot_package.opened(package), INPUTS
    every = [torch.randn(512, 1024) / 32 for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda rows: run([rows, *others]), every))
    for rows, output in zip(every, made, strict=True):
        assert torch.allclose(output, _Body()(rows, others), atol=1e-4)


@pytest.mark.slow
def test_a_package_is_closed(
    package: Path, own_operators: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches files and weights that remain after the last user of a package is gone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    runs = [aot_package.opened(package) for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 2
    del runs[0]
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    runs[0](list(INPUTS))


def test_a_package_that_is_not_open_is_refused(own_operators: None) -> None:
    """Catches a crash of the process instead of an error."""
    with pytest.raises(RuntimeError, match="closed"):
        torch.ops.passlm.run_package(10**6, INPUTS)
