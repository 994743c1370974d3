"""Where a file or figure came from, and writing files so that a reader never meets half of one."""

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
    """Versions, commit, machine, arguments and time, as JSON-ready values.

    Args:
        arguments: the command's arguments; those of this process if not given.
    """
    return {
        **environment(),
        "commit": commit(),
        "python": platform.python_version(),
        "arguments": list(sys.argv[1:] if arguments is None else arguments),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def environment() -> dict[str, Any]:
    """What speed depends on: versions and machine, as JSON-ready values."""
    import torch  # here: versions and threads are all that is wanted of it

    return {
        # By name: the package's own file counts as above this one. Its version is there where
        # nothing is installed, as in a checkout.
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
    """The commit of the checkout this runs from, marked where it has changes; None outside one."""
    try:
        # Installed inside somebody else's repository, git would answer for that one.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=12") or None
    except (OSError, subprocess.SubprocessError):
        return None


def cache_folder() -> Path:
    """The folder for what can be made again: the `PASSLM_CACHE` variable, or the user's own."""
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
    """A folder within another one, to make something in that is then moved out; gone afterwards.

    What a process that was killed left in its own goes as well, once it is a day old.

    Raises:
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as made:
        yield Path(made)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there whole or not at all.

    Args:
        path: the file; its folder is made if missing.
        content: bytes, or text for UTF-8.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file stays as it was.
    """
    write_together({path: content})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together, so that the last is never there beside older others.

    Args:
        files: content of each, as `write_atomically` takes it. Cut off between two of them, the
            last is missing.

    Raises:
        OSError: the disk is full or a folder cannot be written; the old files stay as they were.
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
