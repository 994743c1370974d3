"""Fixtures that more than one test file uses, and the set-up of a test run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import run_folder
from filelock import FileLock

if TYPE_CHECKING:
    from passlm.model.target import Target

FOLDER = run_folder.enter()  # before torch, transformers and passlm, which read the environment


def pytest_configure(config: pytest.Config) -> None:
    """Prepare a process that runs tests; the one that only distributes them needs no torch."""
    if config.getoption("numprocesses", None):
        return
    # A shell lets its background jobs ignore Ctrl-C, which some tests send.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from passlm.kernels import native
    from passlm.planning import kept_costs

    torch.set_num_threads(1)  # the models are so small that a second thread only costs
    # A test may set `PASSLM_CACHE` to a folder of its own: our own operators are not to be compiled
    # again there. Not in a fixture: some tests ask for the operators as they are collected.
    native._build = _build_once(native._build)
    native.cache_folder = lambda: FOLDER / "passlm"
    # Each worker has cost curves of its own: some tests measure with a clock that they set.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    kept_costs.cache_folder = lambda: FOLDER / worker


def _build_once(build: Callable[[Sequence[str], Path], None]) -> Callable[..., None]:
    """Return a build of our own operators that waits for another worker's."""

    def once(command: Sequence[str], library: Path) -> None:
        with FileLock(FOLDER / "native.lock"):
            if not library.is_file():
                build(command, library)

    return once


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute the tests as `schedule.py` says."""
    from schedule import LongestFirst

    config.option.loadscopereorder = False  # by number of tests
    return LongestFirst(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the groups of tests that take longest first, for a worker of pytest-xdist."""
    if hasattr(config, "workerinput"):
        from schedule import rank

        items.sort(key=lambda item: rank(item.nodeid))


@pytest.fixture(scope="session")
def tiny_target() -> Callable[[str], Target]:
    """A target by its name in `tiny.py`, built once; tests must leave it as it is."""
    from tiny import ARCHITECTURES, MORE_ARCHITECTURES

    from passlm.model.target import Target

    known = ARCHITECTURES | MORE_ARCHITECTURES

    @cache
    def target(name: str) -> Target:
        return Target(known[name].build())

    return target


@pytest.fixture(scope="session")
def llama(tiny_target: Callable[[str], Target]) -> Target:
    """The architecture to take where any will do."""
    return tiny_target("llama")
