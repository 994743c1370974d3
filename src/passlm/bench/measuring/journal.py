"""Store the results of a `bench` run as it progresses, so that a later process can resume it.

`run.json` describes the run and is written before anything is measured. `prompts.jsonl` gets a line
for each prompt that a method has decoded, with everything from which statistics are computed. The
order of the turns depends only on the seed, so the stored lines are always the first ones of the
run.
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


_log = logging.getLogger(__name__)


class JournalError(InputError):
    """A folder cannot be written to, or its run cannot be resumed; the message is one line."""


# The description of a run


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of `run.json`.

    Raises:
        JournalError: the file is missing or damaged.
    """
    path = folder / RUN
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about["about"], dict) or not isinstance(about["resumed"], list):
            raise TypeError
        return dict(about)
    except FileNotFoundError:
        raise JournalError(
            f"--out {folder} contains no run to resume ({RUN} is missing): leave out --resume to "
            "start a new one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise JournalError(
            f"cannot resume --out {folder}: {RUN} is not a valid file of bench; give another "
            "folder, or use --overwrite"
        ) from None


def check_same(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run is resumed with the settings that it was started with.

    Args:
        folder: the folder of the run.
        there: the description of the run in `run.json`.
        now: the description of the run in this process, or a part of it.

    Raises:
        JournalError: the descriptions differ; the message lists all differences.
    """
    now = json.loads(json.dumps(now))
    other = [text for part in now for text in _differences(part, there.get(part), now[part])]
    if other:
        raise JournalError(
            f"--out {folder} was started with other settings: {'; '.join(other)}. "
            "Give the same settings, another folder, or --overwrite"
        )


def _differences(part: str, there: Any, now: Any) -> Iterator[str]:
    if not isinstance(now, dict) or not isinstance(there, dict):
        if there != now:
            yield f"{part} was {_shown(there)}, now {_shown(now)}"
        return
    for name in dict.fromkeys([*there, *now]):
        before, after = there.get(name), now.get(name)
        if before == after:
            continue
        if part == "arguments":
            yield _flag(name, before, after)
        elif part == "prompts":
            yield f"the prompts of suite {name} have changed"
        else:
            yield from _differences(f"{part} {name.replace('_', ' ')}", before, after)


def _flag(name: str, there: Any, now: Any) -> str:
    """Return the description of a changed argument, with the name of its command-line flag."""
    flag = "--" + name.replace("_", "-")
    if isinstance(there, bool) and isinstance(now, bool):
        if name == "pack":
            flag, there = "--no-pack", not there
        return f"{flag} was {'given, now not given' if there else 'not given, now given'}"
    return f"{flag} was {_shown(there)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list):
        return ",".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# The results of a run


def prompt_line(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    """Return a line of `prompts.jsonl`: a readable summary, and the complete record."""
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
    """Return the record that is stored in a line of `prompts.jsonl`."""
    values = {part.name: _as_tuples(line["record"][part.name]) for part in fields(Record)}
    stats = line["record"]["stats"]
    return Record(**values | {"stats": None if stats is None else Stats(**stats)})


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


class Journal:
    """The lines of `prompts.jsonl`: reads those of an earlier process and appends new ones.

    Args:
        folder: the folder of the run; None to store nothing.
        kept: the stored lines, in the order of the turns.
        ends: the offset in bytes of the end of each stored line.

    Attributes:
        recalled: number of stored lines that `recall` has returned.
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
        """Start or resume a run, and lock its folder against other processes meanwhile.

        Args:
            folder: the folder of the run, created if missing; None to store nothing.
            about: the description of the run.
            resume: whether to resume the run in the folder; if False, the files of an earlier run
                are deleted.

        Raises:
            JournalError: another process uses the folder, the run was started with other settings
                or is damaged, or the folder cannot be written to.
        """
        if folder is None:
            yield cls(None)
            return
        with _locked(folder):
            journal = cls._resumed(folder, about) if resume else cls._started(folder, about)
            try:
                journal._file = (folder / PROMPTS).open("ab", buffering=0)
            except OSError as error:
                raise _unwritable(folder, error) from error
            with journal._file:
                yield journal

    @classmethod
    def _started(cls, folder: Path, about: Mapping[str, Any]) -> Self:
        try:
            for name in ALL:
                (folder / name).unlink(missing_ok=True)
            run = {"about": about, "provenance": provenance(), "resumed": []}
            write_atomically(folder / RUN, json.dumps(run, indent=1) + "\n")
        except OSError as error:
            raise _unwritable(folder, error) from error
        return cls(folder)

    @classmethod
    def _resumed(cls, folder: Path, about: Mapping[str, Any]) -> Self:
        run = read_run(folder)
        check_same(folder, run["about"], about)
        now = provenance()
        run["resumed"].append({name: now[name] for name in ("time", "commit")})
        if now["commit"] != run["provenance"]["commit"]:
            _log.warning(
                "the run was started by commit %s, this is commit %s",
                *(run["provenance"]["commit"], now["commit"]),
            )
        try:
            content = (folder / PROMPTS).read_bytes() if (folder / PROMPTS).exists() else b""
            write_atomically(folder / RUN, json.dumps(run, indent=1) + "\n")
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                _log.info("dropped the incomplete last line of %s", folder / PROMPTS)
                os.truncate(folder / PROMPTS, whole)
        except OSError as error:
            raise _unwritable(folder, error) from error
        lines, ends, end = [], [], 0
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            end += len(line) + 1
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise _wrong_line(folder, number) from None
            ends.append(end)
        return cls(folder, lines, ends)

    @property
    def kept(self) -> int:
        """Number of stored lines that were read from the file."""
        return len(self._kept)

    @property
    def origin(self) -> dict[str, Any]:
        """The run's `provenance`, and the times and commits at which it was `resumed`."""
        if self.folder is None:
            return {"provenance": provenance(), "resumed": []}
        run = read_run(self.folder)
        return {name: run[name] for name in ("provenance", "resumed")}

    def recall(self, prompts: Sequence[Prompt], turn: Turn) -> list[Sample]:
        """Return the stored samples of the next turn, or an empty list if the turn must be run.

        The stored lines of an incomplete batch are deleted.

        Args:
            prompts: all prompts of the suite.
            turn: the next turn.

        Raises:
            JournalError: the stored lines do not belong to this turn.
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
                raise _wrong_line(self.folder, at + 1) from None
        self.recalled += count
        return samples

    def write(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> None:
        """Append the samples of a turn.

        Args:
            prompts: all prompts of the suite.
            samples: the samples.

        Raises:
            JournalError: they cannot be written, for example because the disk is full.
        """
        if self._file is None or self.folder is None:
            return
        lines = [json.dumps(prompt_line(prompts[one.prompt], one)) + "\n" for one in samples]
        left = "".join(lines).encode()
        try:
            while left:  # an unbuffered file may write only a part
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _drop(self, count: int) -> None:
        """Delete all stored lines after the first `count`."""
        assert self.folder is not None, "nothing is stored without a folder"
        os.truncate(self.folder / PROMPTS, self._ends[count - 1] if count else 0)
        del self._kept[count:], self._ends[count:]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise JournalError(
            f"--out {folder} is being written by another process: wait until it ends, or give "
            "another folder"
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file
            (folder / _LOCK).unlink()
        lock.release()


def _unwritable(folder: Path, error: OSError) -> JournalError:
    return JournalError(
        f"cannot write to --out {folder}: {error.strerror}; fix that, then continue with --resume "
        f"if the folder contains {RUN}"
    )


def _wrong_line(folder: Path | None, number: int) -> JournalError:
    path = folder and folder / PROMPTS
    return JournalError(
        f"{path}, line {number}: does not belong to this run; delete it and all lines after it, or "
        "use --overwrite"
    )
