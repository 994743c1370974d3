"""Build and load our C++ operators (`cpp/`): compiled on first use and kept in the cache folder.

They need a CPU with AVX2 or AVX-512. The modules that call them say what they compute:
`linear.py`, `philox.py`, `aot_package.py`, `layers/attention.py`, `drafts/draft_head.py` and
`drafts/sampler_head.py`.
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
_LANES = {"AVX512": 16, "AVX2": 8}  # 32-bit numbers in a register
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
"""C declarations through which compiled passes call each operator."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_loaded: ctypes.CDLL | bool | None = None  # None: not tried yet; False: not available


def available() -> bool:
    """Return whether this machine has the operators; the first call compiles them, some seconds.

    Logs one warning if they cannot be compiled or loaded, for example without a C++ compiler.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = capability() in _LANES and _load()
        return _loaded is not False


def library() -> ctypes.CDLL | None:
    """Return the loaded library; None before the first call of `available` or without operators."""
    return _loaded if isinstance(_loaded, ctypes.CDLL) else None


def version() -> str | None:
    """Return a hash of the operators' sources, on which costs depend; None without operators."""
    if not available():
        return None
    sources = "\0".join(source.read_text() for source in SOURCES)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def lanes() -> int:
    """Return how many 32-bit numbers a register holds; only where operators are available."""
    return _LANES[capability()]


def capability() -> str:
    """Return torch's name of the vector instructions in use."""
    return str(torch.backends.cpu.get_cpu_capability())


def compiler() -> str | None:
    """Return the path of the C++ compiler, from the variable `CXX` or `PATH`; None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))), None)


def _load() -> ctypes.CDLL | Literal[False]:
    """Load the library, after compiling it if needed; return False if that fails."""
    using = compiler()
    if using is None:
        _log.warning("no C++ compiler found, so passes are slower: install g++")
        return False
    command = _command(using)
    made_for = torch.__version__, str(environment()["machine"]["processor"])
    key = "\0".join((*command, *made_for, *(source.read_text() for source in SOURCES)))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = cache_folder() / "native" / f"{name}.so"
    try:
        if not path.is_file():
            _log.info("compiling the C++ operators once, to %s", path)
            _build(command, path)
        try:
            # Global, because compiled passes look up its symbols.
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            path.unlink()  # a truncated file: the next start compiles it again
            raise
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "the C++ operators cannot be used, so passes are slower: %s", said.split("\n")[0]
        )
        return False


def _command(using: str) -> list[str]:
    """Return the compiler command without file names."""
    torch_folder = Path(torch.__file__).parent
    flags = f"-std=c++20 -O3 -march=native -mprefer-vector-width={32 * lanes()} -ffp-contract=off"
    folders = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    return [using, *shlex.split(flags), f"-DLANES={lanes()}", "-fopenmp", "-fPIC", *folders]


def _build(command: Sequence[str], library: Path) -> None:
    """Compile the library; it appears at its path complete or not at all.

    Raises:
        OSError, subprocess.SubprocessError: the library cannot be compiled or written.
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
        with ThreadPoolExecutor() as pool:  # each compiler process uses one core
            list(pool.map(lambda s, part: run("-c", str(s), "-o", part), code, parts))
        run("-shared", *parts, "-ltorch_cpu", "-o", str(staged))
        os.replace(staged, library)
