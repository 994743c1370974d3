"""Fixtures that more than one test file uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from tiny import ARCHITECTURES, MORE_ARCHITECTURES

from passlm.model.target import Target
from passlm.planning import kept_costs

torch.set_num_threads(1)  # the models are so small that a second thread only costs


@pytest.fixture(scope="session", autouse=True)
def _costs_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What passes of test models cost is no business of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_costs, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_target() -> Callable[[str], Target]:
    """A target by its name in `tiny.py`, built once; tests must leave it as it is."""
    known = ARCHITECTURES | MORE_ARCHITECTURES

    @cache
    def target(name: str) -> Target:
        return Target(known[name].build())

    return target


@pytest.fixture(scope="session")
def llama(tiny_target: Callable[[str], Target]) -> Target:
    """The architecture to take where any will do."""
    return tiny_target("llama")
