"""C++ operators: compiled once, and a warning instead of them where that is not possible."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch
from small_llama import small_llama

from passlm.kernels import native
from passlm.layers import int8
from passlm.layers.int8 import QuantizeError, quantized
from passlm.layers.packed import can_pack


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Reset the module as in a new process, with a cache folder of its own."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    return tmp_path / "native"


def test_the_library_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches seconds of compiling in every process, and an incomplete library left in the
    folder."""
    if native.compiler() is None or native.capability() not in ("AVX2", "AVX512"):
        pytest.skip("there is no C++ compiler here")
    built: list[Path] = []

    def build(command: list[str], library: Path) -> None:
        built.append(library)
        library.parent.mkdir(exist_ok=True)
        library.write_bytes(b"")

    opened: list[str] = []
    monkeypatch.setattr(native, "_build", build)

    def load(path: str, mode: int) -> object:
        opened.append(path)
        return object()

    monkeypatch.setattr(native.ctypes, "CDLL", load)
    for _ in range(2):
        monkeypatch.setattr(native, "_loaded", None)
        assert native.available()
    assert native.available()
    assert len(built) == 1
    assert opened == [str(built[0])] * 2


def test_without_a_compiler_passes_run_by_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a crash, a warning for every layer, and int8 accepted where it cannot work."""
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    with caplog.at_level(logging.WARNING, "passlm"):
        assert not native.available()
        can_pack(small_llama())
        with pytest.raises(QuantizeError, match="install g\\+\\+"):
            quantized(small_llama())
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert "install g++" in warnings[0]
    assert not can_pack(small_llama())


def test_a_compiler_that_fails_is_told(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a traceback, a silent fallback, and files left behind by a failed build."""
    if native.capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")

    def run(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="cpp: error: no such header\nmore")

    monkeypatch.setattr(native, "compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(native.subprocess, "run", run)
    with caplog.at_level(logging.WARNING, "passlm"):
        assert not native.available()
        assert not native.available()
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == ["no such header"]
    assert os.listdir(fresh) == []


def test_a_library_that_cannot_be_loaded_is_told(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a file truncated by a full disk that breaks every later start."""
    if native.compiler() is None or native.capability() not in ("AVX2", "AVX512"):
        pytest.skip("there is no C++ compiler here")

    def build(command: list[str], library: Path) -> None:
        library.parent.mkdir(exist_ok=True)
        library.write_bytes(b"half a library")

    monkeypatch.setattr(native, "_build", build)
    with caplog.at_level(logging.WARNING, "passlm"):
        assert not native.available()
    assert "cannot be used" in caplog.text
    assert list(fresh.iterdir()) == [], "the next start would fail as well"


def test_other_processors_do_without(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    """Catches a compiler run, or a warning, on a CPU that the operators do not support."""
    monkeypatch.setattr(native, "capability", lambda: "DEFAULT")
    monkeypatch.setattr(native, "compiler", lambda: pytest.fail("asked for a compiler"))
    assert not native.available()
    assert not can_pack(small_llama())
    assert int8.QUANTIZED == ("int8",)
    assert torch.get_num_threads() >= 1
