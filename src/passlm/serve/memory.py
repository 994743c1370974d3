"""Freed memory goes back to the system.

Texts of all lengths come and go, and with them tensors of a hundred kilobytes to some megabytes.
glibc keeps what they leave in pieces that fit nothing later: a process that holds half a gigabyte
of keys and values grows to several.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_MMAP_THRESHOLD = -3  # glibc's number for `mallopt`
_LARGE = 2**20  # bytes


def keep_large_blocks_apart() -> None:
    """From now on each large block is the system's own again once it is freed; on glibc alone."""
    mallopt = _glibc_function("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)  # glibc raises it by itself where it is not set


def release_free_memory() -> None:
    """Give whole free pages between the smaller blocks back; some milliseconds; on glibc alone."""
    trim = _glibc_function("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _glibc_function(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return None
    return found
