"""A server's memory: what texts leave behind goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from passlm.serve import memory

HOLES = """
import sys, psutil, torch
from passlm.serve import memory
if sys.argv[1] == "apart":
    memory.keep_large_blocks_apart()
def resident():
    return psutil.Process().memory_info().rss >> 20
size = 2**19 if sys.argv[1] == "apart" else 2**14
kept, others = [], []
start = resident()
for _ in range(2**28 // size // 4):
    kept.append(torch.ones(64))
    others.append(torch.ones(size))
full = resident()
others.clear()
if sys.argv[1] == "trim":
    memory.release_free_memory()
print(full - start, resident() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told")
@pytest.mark.parametrize("how", ["apart", "trim"])
def test_freed_blocks_go_back(how: str) -> None:
    """Catches a process that stays as large as it ever was: small tensors between the large ones
    keep their pages."""
    if memory._glibc_function("malloc_trim") is None:
        pytest.skip("another C library")
    done = subprocess.run(
        [sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True, timeout=120
    )
    full, left = map(int, done.stdout.split())
    assert full > 200
    assert left < full / 4
