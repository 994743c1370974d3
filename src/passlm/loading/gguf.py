"""Cache of converted GGUF files in the user's cache folder.

transformers takes far longer to convert a GGUF file than to load a converted one. A copy is keyed
by the content of its GGUF file. It is either complete or absent, even if the process that made it
was killed; a damaged copy is made again. Converting a file and reading a copy are left to
`models.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from passlm.errors import InputError
from passlm.provenance import CACHE_VARIABLE, cache_folder, write_atomically

_COPY_FORMAT = 1  # increase it when copies made by older code must not be used
_MANIFEST = "manifest.json"

_Loaded = TypeVar("_Loaded")
_log = logging.getLogger(__name__)


class ModelError(InputError):
    """Model that cannot be found or used; a one-line message with the cause and the remedy."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, prefixed by its type if the message may need it."""
    text = " ".join(str(error).split()).rstrip(".")
    plain = isinstance(error, OSError | ValueError | ImportError) and text
    return text if plain else f"{type(error).__name__}: {text}"


def load_copy(
    gguf: Path, *, convert: Callable[[Path], None], read: Callable[[Path], _Loaded]
) -> _Loaded:
    """Load the converted copy of a GGUF file; make it if it is missing or damaged.

    Args:
        gguf: Absolute path of the file.
        convert: Function that writes the converted model into an empty folder.
        read: Function that reads the folder of a copy.

    Raises:
        ModelError: The copy cannot be written.
        SafetensorError: The new copy is damaged, too.
    """
    from safetensors import SafetensorError

    copy = _converted(gguf, convert)
    manifest = (copy / _MANIFEST).read_bytes()
    try:
        return read(copy)
    except SafetensorError as error:
        _log.warning("the converted copy of %s is damaged (%s): making a new one", gguf.name, error)
    with _locked(copy):
        if (
            copy / _MANIFEST
        ).read_bytes() == manifest:  # no other process has replaced it meanwhile
            (copy / _MANIFEST).unlink()
    return read(_converted(gguf, convert))


def whole_copy(gguf: Path) -> Path | None:
    """Return the folder of a GGUF file's converted copy; None if it is missing or damaged."""
    copy = _copy_folder(gguf)
    return copy if _is_whole(copy) else None


def _converted(gguf: Path, convert: Callable[[Path], None]) -> Path:
    """Return the folder of a GGUF file's complete converted copy; make it if necessary."""
    from safetensors import SafetensorError

    try:
        copy = _copy_folder(gguf)
        if not _is_whole(copy):
            with _locked(copy):
                if not _is_whole(copy):  # another process may have made it while this one waited
                    _make_copy(gguf, copy, convert)
        return copy
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write the converted copy of {gguf.name} to {cache_folder()}: "
            f"{one_line(error)}; free disk space there or set {CACHE_VARIABLE} to another folder"
        ) from error


def _copy_folder(gguf: Path) -> Path:
    return cache_folder() / "gguf" / f"{_digest(gguf)[:32]}-v{_COPY_FORMAT}"


def _digest(gguf: Path) -> str:
    """Return the file's SHA-256, cached until its path, size or times change."""
    facts = gguf.stat()
    stamp = [str(gguf), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    place = hashlib.sha256(str(gguf).encode()).hexdigest()[:32]
    note = cache_folder() / "gguf" / "digests" / f"{place}.json"
    known = _read_json(note)
    if known is not None and known.get("stamp") == stamp:
        return str(known["sha256"])
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_atomically(note, json.dumps({"stamp": stamp, "sha256": digest}))
    return digest


def _make_copy(gguf: Path, copy: Path, convert: Callable[[Path], None]) -> None:
    """Convert into a temporary folder and rename it to `copy`; the caller holds the lock."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{copy.name}-"
    for leftover in copy.parent.glob(f"{prefix}*"):  # of a process that died during conversion
        shutil.rmtree(leftover)
    _log.info("converting %s once: this takes a while (20 s for 100 MB)", gguf.name)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=copy.parent))
    try:
        convert(work)
        _seal(work, gguf)
        if copy.exists():
            shutil.rmtree(copy)
        work.rename(copy)
        _sync(copy.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _log.info("converted; the copy is in %s", copy)


def _seal(folder: Path, gguf: Path) -> None:
    """Sync the files to disk, then write the manifest that marks the copy as complete."""
    import transformers

    for path in folder.iterdir():
        _sync(path)
    manifest = {
        "gguf": gguf.name,
        "transformers": transformers.__version__,
        "copy": folder.name,  # random: distinguishes this copy from a later one
        "files": _facts(folder),
    }
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2))
    _sync(folder)


def _is_whole(copy: Path) -> bool:
    manifest = _read_json(copy / _MANIFEST)
    try:
        return manifest is not None and manifest.get("files") == _facts(copy)
    except OSError:  # another process is removing a damaged copy
        return False


def _facts(folder: Path) -> dict[str, list[Any]]:
    """Return size and SHA-256 of each file; only the size of weights, which take long to hash."""
    facts: dict[str, list[Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.name != _MANIFEST:
            weights = path.suffix == ".safetensors"
            digest = None if weights else hashlib.sha256(path.read_bytes()).hexdigest()
            facts[path.name] = [path.stat().st_size, digest]
    return facts


@contextmanager
def _locked(copy: Path) -> Iterator[None]:
    """Hold the lock of a copy, which excludes other processes."""
    from filelock import FileLock, Timeout

    copy.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{copy}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("waiting for another process to convert the same GGUF file")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if the file holds none or cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
