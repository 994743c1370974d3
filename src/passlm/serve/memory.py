"""Return freed memory to the operating system.

Sequences of all lengths start and finish, and with them tensors of a hundred kilobytes to some
megabytes. glibc keeps the freed memory in fragments that later tensors do not fit into: a process
with half a gigabyte of keys and values grows to several gigabytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LARGE = 2**20  # bytes


def keep_large_blocks_apart() -> None:
    """Let glibc return every large block to the system when it is freed.

    Does nothing with another C library.
    """
    mallopt = _glibc_function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)  # a fixed threshold: glibc raises the default one


def release_free_memory() -> None:
    """Return free pages between small blocks to the system, which takes some milliseconds.

    Does nothing with another C library.
    """
    trim = _glibc_function("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _glibc_function(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another operating system or C library
        return None
    return found
