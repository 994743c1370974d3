"""Provenance of files and results, and atomic file writes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "PASSLM_CACHE"
_UNFINISHED = "unfinished-"
_ABANDONED_SECONDS = 24 * 3600.0
_PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def provenance(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return versions, commit, machine, arguments and time, as JSON-ready values.

    Args:
        arguments: the command's arguments; None for those of this process.
    """
    return {
        **environment(),
        "commit": commit(),
        "python": platform.python_version(),
        "arguments": list(sys.argv[1:] if arguments is None else arguments),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def environment() -> dict[str, Any]:
    """Return the versions and machine that determine speed, as JSON-ready values."""
    import torch  # not at module level: slow to import, and needed only for versions and threads

    return {
        # Imported by name, since the import contract places the package's `__init__` above this
        # module. Unlike the metadata, `__version__` exists in a checkout that is not installed.
        "passlm": import_module("passlm").__version__,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None outside a checkout.

    The string ends in `-dirty` if there are uncommitted changes.
    """
    try:
        # If passlm is installed inside another repository, `git describe` alone would describe
        # that repository.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=12") or None
    except (OSError, subprocess.SubprocessError):
        return None


def cache_folder() -> Path:
    """Return the folder for files that can be recreated.

    It is the value of the environment variable `PASSLM_CACHE`, or else the user's cache folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("passlm")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Create a temporary folder inside `folder`, and delete it at the end.

    Callers build a file or folder there and then move it to its place. Temporary folders that a
    killed process left behind are deleted as well, once they are a day old.

    Raises:
        OSError: the folder cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as made:
        yield Path(made)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that it appears either complete or not at all.

    Args:
        path: the file; its folder is created if missing.
        content: bytes, or a string that is encoded as UTF-8.

    Raises:
        OSError: the disk is full or the folder is not writable; the old file stays unchanged.
    """
    write_together({path: content})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together, so that the last one never appears next to older versions.

    If the process is killed between two of the files, the last one is missing.

    Args:
        files: content of each path, as in `write_atomically`.

    Raises:
        OSError: the disk is full or a folder is not writable; the old files stay unchanged.
    """
    staged: dict[Path, str] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, staged[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(staged[path], 0o644)
        if len(files) > 1:
            list(files)[-1].unlink(missing_ok=True)
        for path in files:
            os.replace(staged[path], path)
            del staged[path]
    except BaseException:
        for name in staged.values():
            os.unlink(name)
        raise
