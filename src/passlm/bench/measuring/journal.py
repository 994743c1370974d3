"""What a run of `bench` keeps of itself as it goes, so that another process can go on with it.

`run.json` says what the run is, and is there before anything is measured. `prompts.jsonl` gets a
line for each prompt that a method has decoded, with all that figures are made of. Turns come in an
order that the seed alone decides, so what is kept is always the beginning of what is to be done.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from io import FileIO
from pathlib import Path
from typing import Any, Self

from passlm.bench.engines.decoding import Record
from passlm.bench.measuring.folder import ALL, PROMPTS, RUN
from passlm.bench.measuring.measure import Prompt, Sample, Turn, identity
from passlm.errors import InputError
from passlm.outputs import Stats
from passlm.provenance import provenance, write_atomically

_LOCK = ".lock"
_OTHERWISE = "give the same, name another folder, or use --overwrite"

_log = logging.getLogger(__name__)


class JournalError(InputError):
    """A folder cannot be written to, or a run in it not gone on with; one line."""


# What a run is


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        JournalError: the folder has none, or one that is damaged.
    """
    path = folder / RUN
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about["about"], dict) or not isinstance(about["resumed"], list):
            raise TypeError
        return dict(about)
    except FileNotFoundError:
        raise JournalError(
            f"--out {folder} holds no run to go on with ({RUN} is missing): leave --resume out to "
            "start one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise JournalError(
            f"cannot resume --out {folder}: {RUN} cannot be read as one of bench; name another "
            "folder, or use --overwrite"
        ) from None


def check_same(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Make sure that what is asked for now is what a run was begun with.

    Args:
        folder: of the run.
        there: what `run.json` says it is.
        now: the same of this process, or a part of it.

    Raises:
        JournalError: something differs; all of it is named.
    """
    now = json.loads(json.dumps(now))
    other = [text for part in now for text in _differences(part, there.get(part), now[part])]
    if other:
        raise JournalError(f"--out {folder} was begun otherwise: {'; '.join(other)}: {_OTHERWISE}")


def _differences(part: str, there: Any, now: Any) -> Iterator[str]:
    if not isinstance(now, dict) or not isinstance(there, dict):
        if there != now:
            yield f"{part} {_shown(there)} there, {_shown(now)} now"
        return
    for name in dict.fromkeys([*there, *now]):
        before, after = there.get(name), now.get(name)
        if before == after:
            continue
        if part == "arguments":
            yield _flag(name, before, after)
        elif part == "prompts":
            yield f"suite {name} had other prompts"
        else:
            yield from _differences(f"{part} {name.replace('_', ' ')}", before, after)


def _flag(name: str, there: Any, now: Any) -> str:
    """One difference of arguments, in the words of the command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(there, bool) and isinstance(now, bool):
        if name == "pack":
            flag, there = "--no-pack", not there
        return f"{flag} {'there, not now' if there else 'now, not there'}"
    return f"{flag} {_shown(there)} there, {_shown(now)} now"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list):
        return ",".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# What it has done


def prompt_line(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    """One line of `prompts.jsonl`: what is read by people, and the whole record."""
    record, stats = sample.record, sample.record.stats
    return {
        **_place(prompt, sample.prompt, sample.repeat),
        **identity(sample.method),
        "category": prompt.category,
        "prompt_tokens": len(prompt.ids),
        "tokens": len(record.tokens),
        "passes": stats and stats.passes,
        "seconds": record.seconds,
        "prefill_seconds": stats and stats.prefill_seconds,
        "decode_seconds": stats and stats.decode_seconds,
        "first_token_seconds": record.first_token_seconds,
        "rows": record.rows,
        "accepted": stats and stats.accepted,
        "record": asdict(record),
    }


def _place(prompt: Prompt, number: int, repeat: int) -> dict[str, Any]:
    return {"suite": prompt.suite, "name": prompt.name, "number": number, "repeat": repeat}


def read_record(line: Mapping[str, Any]) -> Record:
    """The record that a line was made of."""
    values = {part.name: _as_tuples(line["record"][part.name]) for part in fields(Record)}
    stats = line["record"]["stats"]
    return Record(**values | {"stats": None if stats is None else Stats(**stats)})


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


class Journal:
    """The lines of a run: those of an earlier process are read, and the next ones written on.

    Args:
        folder: where they are; None keeps nothing.
        kept: lines that are there, in the order of the turns.
        ends: for each of them, how many bytes the file has up to its end.

    Attributes:
        recalled: how many of them were asked for.
    """

    def __init__(
        self,
        folder: Path | None,
        kept: Sequence[Mapping[str, Any]] = (),
        ends: Sequence[int] = (),
    ) -> None:
        self.folder = folder
        self.recalled = 0
        self._kept, self._ends = list(kept), list(ends)
        self._file: FileIO | None = None

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path | None, about: Mapping[str, Any], resume: bool = False
    ) -> Iterator[Self]:
        """Begin a run, or go on with one; nobody else can, in the meantime.

        Args:
            folder: made if missing; None keeps nothing.
            about: what the run is.
            resume: go on; else what another run left in the folder is dropped.

        Raises:
            JournalError: another process is at it, the run is of another kind or damaged, or the
                folder cannot be written to.
        """
        if folder is None:
            yield cls(None)
            return
        with _locked(folder):
            journal = cls._taken_up(folder, about) if resume else cls._begun(folder, about)
            try:
                journal._file = (folder / PROMPTS).open("ab", buffering=0)
            except OSError as error:
                raise _unwritable(folder, error) from error
            with journal._file:
                yield journal

    @classmethod
    def _begun(cls, folder: Path, about: Mapping[str, Any]) -> Self:
        try:
            for name in ALL:
                (folder / name).unlink(missing_ok=True)
            run = {"about": about, "provenance": provenance(), "resumed": []}
            write_atomically(folder / RUN, json.dumps(run, indent=1) + "\n")
        except OSError as error:
            raise _unwritable(folder, error) from error
        return cls(folder)

    @classmethod
    def _taken_up(cls, folder: Path, about: Mapping[str, Any]) -> Self:
        run = read_run(folder)
        check_same(folder, run["about"], about)
        now = provenance()
        run["resumed"].append({name: now[name] for name in ("time", "commit")})
        if now["commit"] != run["provenance"]["commit"]:
            _log.warning(
                "the run was begun by commit %s, this is %s",
                *(run["provenance"]["commit"], now["commit"]),
            )
        try:
            content = (folder / PROMPTS).read_bytes() if (folder / PROMPTS).exists() else b""
            write_atomically(folder / RUN, json.dumps(run, indent=1) + "\n")
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                _log.info("dropped the torn last line of %s", folder / PROMPTS)
                os.truncate(folder / PROMPTS, whole)
        except OSError as error:
            raise _unwritable(folder, error) from error
        lines, ends, end = [], [], 0
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            end += len(line) + 1
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise _other_line(folder, number) from None
            ends.append(end)
        return cls(folder, lines, ends)

    @property
    def kept(self) -> int:
        """How many lines there are that were read."""
        return len(self._kept)

    @property
    def origin(self) -> dict[str, Any]:
        """Where the run comes from: its `provenance`, and when it was `resumed`."""
        if self.folder is None:
            return {"provenance": provenance(), "resumed": []}
        run = read_run(self.folder)
        return {name: run[name] for name in ("provenance", "resumed")}

    def recall(self, prompts: Sequence[Prompt], turn: Turn) -> list[Sample]:
        """What the next turn gave, where it is kept; nothing where it is still to be taken.

        A batch that is not kept whole is dropped.

        Raises:
            JournalError: another turn is kept there.
        """
        begun, count = self.recalled, len(turn.numbers)
        lines = self._kept[begun : begun + count]
        if len(lines) < count:
            if lines:
                self._drop(begun)
            return []
        samples = []
        for at, (number, line) in enumerate(zip(turn.numbers, lines, strict=True), start=begun):
            expected = _place(prompts[number], number, turn.repeat) | identity(turn.method)
            try:
                if any(line[name] != value for name, value in expected.items()):
                    raise ValueError
                samples.append(Sample(number, turn.method, read_record(line), turn.repeat))
            except (ValueError, KeyError, TypeError):
                raise _other_line(self.folder, at + 1) from None
        self.recalled += count
        return samples

    def write(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> None:
        """Keep what a turn gave.

        Raises:
            JournalError: it cannot be written, as on a full disk.
        """
        if self._file is None or self.folder is None:
            return
        lines = [json.dumps(prompt_line(prompts[one.prompt], one)) + "\n" for one in samples]
        left = "".join(lines).encode()
        try:
            while left:  # an unbuffered file may take a part
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _drop(self, count: int) -> None:
        """All behind so many lines."""
        assert self.folder is not None, "without a folder nothing is kept"
        os.truncate(self.folder / PROMPTS, self._ends[count - 1] if count else 0)
        del self._kept[count:], self._ends[count:]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from the folder."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise JournalError(
            f"--out {folder} is being written by another process: let it end, or name another "
            "folder"
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open
            (folder / _LOCK).unlink()
        lock.release()


def _unwritable(folder: Path, error: OSError) -> JournalError:
    return JournalError(
        f"cannot write to --out {folder}: {error.strerror}; mend that, then go on with --resume if "
        f"{RUN} is there"
    )


def _other_line(folder: Path | None, number: int) -> JournalError:
    path = folder and folder / PROMPTS
    return JournalError(
        f"{path}, line {number}: not what this run has there; remove it and what is behind it, or "
        "use --overwrite"
    )
