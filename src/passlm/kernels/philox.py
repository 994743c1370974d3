"""Random numbers as a function of seed, position and purpose (Philox4x32-10).

A block of four numbers is a function of a counter and a key alone (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011). numpy's own Philox generator does not fit: it uses words of
another size, and its exponential numbers are drawn one after the other and consume a variable
number of words. Here `cpp/noise.cpp` computes all blocks of a vocabulary in parallel; where it is
not available, numpy operations compute the same numbers.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passlm.kernels import native

_WORDS = 4  # in a block
_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 2**32 - 1
_MOST = np.float32(1 - 2**-24)  # the largest float32 below 1


def uniform(seed: int, position: int, purpose: int, size: int) -> Tensor:
    """Return uniform random numbers above 0 and below 1, `[size]` float32.

    They are the midpoints of `2**32` equal intervals, so none is 0, and small ones are as fine as
    those intervals.

    Args:
        seed: the key, 0 to 2**64 - 1.
        position: position of the token, 0 to 2**64 - 1.
        purpose: 0 to 2**32 - 1.
        size: number of random numbers; a larger size only appends further ones.
    """
    counter = (*_halves(position), purpose)
    library = native.library()
    if library is None:
        words = blocks(_halves(seed), counter, -(-size // _WORDS))
        middles = (words.reshape(-1)[:size] + 0.5) * 2.0**-32
        return torch.from_numpy(np.minimum(middles.astype(np.float32), _MOST))
    made = torch.empty(size)
    library.passlm_uniform(
        (ctypes.c_uint32 * 2)(*_halves(seed)),
        (ctypes.c_uint32 * 3)(*counter),
        ctypes.c_int64(size),
        ctypes.c_void_p(made.data_ptr()),
    )
    return made


def fine(seed: int, position: int, purpose: int) -> float:
    """Return one number in `[0, 1)` with 53 random bits; arguments as in `uniform`."""
    words = blocks(_halves(seed), (*_halves(position), purpose), 1)[0]
    first, second = int(words[0]), int(words[1])
    return ((first << 32 | second) >> 11) * 2.0**-53


def blocks(
    key: tuple[int, int], counter: tuple[int, int, int], count: int, first: int = 0
) -> NDArray[np.uint64]:
    """Return blocks of 32-bit random numbers, `[count, 4]`.

    Args:
        key: two 32-bit words.
        counter: the last three 32-bit words of the counter; the first is the block's number.
        count: number of blocks.
        first: number of the first block.
    """
    shift, mask = np.uint64(32), np.uint64(_MASK)
    a = np.arange(first, first + count, dtype=np.uint64)
    b, c, d = (np.full(count, word, dtype=np.uint64) for word in counter)
    for turn in range(_ROUNDS):
        keys = [(k + turn * step) & _MASK for k, step in zip(key, _STEPS, strict=True)]
        left, right = a * np.uint64(_FACTORS[0]), c * np.uint64(_FACTORS[1])
        a, b = (right >> shift) ^ b ^ np.uint64(keys[0]), right & mask
        c, d = (left >> shift) ^ d ^ np.uint64(keys[1]), left & mask
    return np.stack([a, b, c, d], axis=1)


def _halves(number: int) -> tuple[int, int]:
    return number & _MASK, number >> 32
