"""Philox4x32-10: known answers, and the same numbers from C++ as from numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from passlm.decoding.judge import draw
from passlm.decoding.noise import Noise, Purpose
from passlm.kernels import native, philox

FULL = 2**32 - 1
# Counter, key and block of the known-answer tests that come with the authors' Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((FULL, FULL, FULL, FULL), (FULL, FULL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN)
def test_blocks_are_the_known_ones(
    counter: tuple[int, int, int, int], key: tuple[int, int], block: str
) -> None:
    """Catches a missing round, swapped keys or words, and sums that keep their 33rd bit."""
    made = philox.blocks(key, counter[1:], 1, counter[0])
    assert [f"{int(word):08x}" for word in made[0]] == block.split()


@pytest.mark.parametrize("size", [1, 3, 255, 256, 257, 49_152])
@pytest.mark.parametrize(
    ("seed", "position", "purpose"), [(0, 0, 0), (2**64 - 1, 2**40 + 7, 2), (12345, 9, 1)]
)
def test_numbers_are_the_same_without_a_compiler(
    size: int, seed: int, position: int, purpose: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a seed whose output differs on a machine without a C++ compiler."""
    if not native.available():
        pytest.skip("there are no operators of our own here")
    own = philox.uniform(seed, position, purpose, size)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(philox.uniform(seed, position, purpose, size), own)
    assert own.shape == (size,)
    assert own.dtype == torch.float32


def test_the_outermost_numbers_are_neither_0_nor_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches infinite noise, and noise of 0, which wins against tokens of any probability:
    `argmax` takes the NaN of 0 / 0 for the largest number."""

    def outermost(*_: object) -> NDArray[np.uint64]:
        return np.array([[0, FULL, 1, FULL - 1]], dtype=np.uint64)

    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(philox, "blocks", outermost)
    noise = Noise(0).exponential(0, Purpose.SETTLE, 4)
    assert float(noise.min()) == pytest.approx(2.0**-33)
    assert 15 < float(noise.max()) < 100
    p = torch.zeros(1, 4)
    p[0, 1] = 1.0
    assert draw(p, noise[None]).tolist() == [1]
    assert 0 <= philox.fine(0, 0, 0) < 1


def test_fine_numbers_take_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches acceptance numbers of only 32 bits, and a number equal to 1."""

    def words(*_: object) -> NDArray[np.uint64]:
        return np.array([[FULL, FULL, 0, 0]], dtype=np.uint64)

    monkeypatch.setattr(philox, "blocks", words)
    assert philox.fine(0, 0, 0) == 1 - 2.0**-53
