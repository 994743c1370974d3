"""Operators of our own in C++ (`cpp/`), compiled when first used and kept in the cache folder.

They are for CPUs with AVX2 or AVX-512; what they compute is said in `linear.py`,
`layers/attention.py`, `drafts/draft_head.py`, `drafts/sampler_head.py` and `philox.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from passlm.provenance import cache_folder, environment, staging

SOURCES = tuple(sorted((Path(__file__).parent / "cpp").glob("*.[ch]*")))
_LANES = {"AVX512": 16, "AVX2": 8}  # numbers of 32 bits in a register
_BUILD_SECONDS = 300
_COMPILERS = ("g++", "clang++")

C_SHIMS = {
    "rows_product": """AOTITorchError aoti_torch_cpu_rows_product(
        AtenTensorHandle rows, AtenTensorHandle gate, AtenTensorHandle packed,
        AtenTensorHandle scale, AtenTensorHandle bias, AtenTensorHandle down, AtenTensorHandle up,
        AtenTensorHandle parts, int64_t width, int64_t threads, AtenTensorHandle* made)""",
    "rows_attention": """AOTITorchError aoti_torch_cpu_rows_attention(
        AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
        AtenTensorHandle mask, AtenTensorHandle texts, double scale, int64_t threads,
        AtenTensorHandle* made)""",
}
"""How compiled passes call each operator."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_loaded: ctypes.CDLL | bool | None = None  # None before it was asked for, False where it is not


def available() -> bool:
    """Whether this machine has the operators; compiles them, some seconds, the first time.

    Without a C++ compiler they are not there, which is said once as a warning.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = capability() in _LANES and _load()
        return _loaded is not False


def library() -> ctypes.CDLL | None:
    """The library that they are in, if somebody asked before whether they are available."""
    return _loaded if isinstance(_loaded, ctypes.CDLL) else None


def version() -> str | None:
    """What tells the operators from other ones in what they cost; None where there are none."""
    if not available():
        return None
    sources = "\0".join(source.read_text() for source in SOURCES)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def lanes() -> int:
    """Numbers of 32 bits in a register, where the operators are available."""
    return _LANES[capability()]


def capability() -> str:
    """What torch calls the vector instructions that are used."""
    return str(torch.backends.cpu.get_cpu_capability())


def compiler() -> str | None:
    """The C++ compiler: the variable `CXX`, or one that is installed."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))), None)


def _load() -> ctypes.CDLL | Literal[False]:
    """The library, compiled first where it is not there yet; False where it cannot be had."""
    using = compiler()
    if using is None:
        _log.warning("there is no C++ compiler here, so passes take longer: install g++")
        return False
    command = _command(using)
    made_for = torch.__version__, str(environment()["machine"]["processor"])
    key = "\0".join((*command, *made_for, *(source.read_text() for source in SOURCES)))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = cache_folder() / "native" / f"{name}.so"
    try:
        if not path.is_file():
            _log.info("compiling our own operators, once; kept as %s", path)
            _build(command, path)
        try:
            # Global, since compiled passes look for its symbols.
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            path.unlink()  # a file cut short: the next start makes it anew
            raise
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "our own operators cannot be used, so passes take longer: %s", said.split("\n")[0]
        )
        return False


def _command(using: str) -> list[str]:
    """How to compile, without the names of the files."""
    torch_folder = Path(torch.__file__).parent
    flags = f"-std=c++20 -O3 -march=native -mprefer-vector-width={32 * lanes()} -ffp-contract=off"
    folders = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    return [using, *shlex.split(flags), f"-DLANES={lanes()}", "-fopenmp", "-fPIC", *folders]


def _build(command: Sequence[str], library: Path) -> None:
    """Make the library; there whole or not at all.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled or written.
    """

    def run(*arguments: str) -> None:
        subprocess.run(
            [*command, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_SECONDS,
        )

    with staging(library.parent) as folder:
        staged = folder / library.name
        code = [source for source in SOURCES if source.suffix == ".cpp"]
        parts = [str(folder / f"{source.stem}.o") for source in code]
        with ThreadPoolExecutor() as pool:  # a compiler uses one core
            list(pool.map(lambda s, part: run("-c", str(s), "-o", part), code, parts))
        run("-shared", *parts, "-ltorch_cpu", "-o", str(staged))
        os.replace(staged, library)
