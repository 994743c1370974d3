"""Append answers to a JSONL file, from which an interrupted run resumes.

The content of an answer and its generation are left to `answers.py`.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from passlm.provenance import provenance, write_atomically
from passlm.train.answers import AnswerError, Record, Settings

_log = logging.getLogger(__name__)


def about_file(out: Path) -> Path:
    """Return the path of the file that holds an answer file's settings."""
    return out.with_name(f"{out.name}.about.json")


def about_settings(settings: Settings, model: str, dtype: str, prompts: str) -> Record:
    """Return everything that determines the answers, in a form that JSON can hold.

    Args:
        settings: Settings of all answers.
        model: Name of the model.
        dtype: Type of the model's weights.
        prompts: Hash that `read_questions` returned.
    """
    shared = {**asdict(settings), "temperature": list(settings.temperature)}
    return {"model": model, "dtype": dtype, **shared, "prompts": prompts}


class AnswerFile:
    """JSONL file to which answers are appended, each completely or not at all.

    Args:
        out: Path of the file; its settings are stored next to it.
        settings: Settings from `about_settings`.
        resume: Keep the answers that the file holds, if it exists.
        overwrite: Drop the answers that the file holds.

    Attributes:
        answered: Ids of the answers found in the file.

    Raises:
        AnswerError: The file exists and neither `resume` nor `overwrite` is set; or it was made
            with other settings, is damaged, or cannot be written.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], resume: bool = False, overwrite: bool = False
    ) -> None:
        self.out = out
        self.answered: frozenset[str] = frozenset()
        check_unused(out, resume, overwrite)
        try:
            if resume and out.exists():
                self.answered = self._resumed(settings)
            else:
                self._begin(settings)
            self._file: io.FileIO = out.open("ab", buffering=0)
            self._size = self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Append one answer.

        Raises:
            AnswerError: The answer cannot be written, e.g. on a full disk; the file is unchanged.
        """
        left = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        whole = len(left)
        try:
            while left:  # an unbuffered write may be partial
                left = left[self._file.write(left) :]
        except BaseException as error:
            with suppress(OSError):
                self._file.truncate(self._size)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        self._size += whole

    def _begin(self, settings: Mapping[str, Any]) -> None:
        self.out.unlink(missing_ok=True)  # before its settings are replaced
        about = {"settings": settings, "provenance": provenance(), "resumed": []}
        write_atomically(about_file(self.out), json.dumps(about, indent=1) + "\n")

    def _resumed(self, settings: Mapping[str, Any]) -> frozenset[str]:
        about = self._about()
        before = about["settings"]
        other = [
            f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        if other:
            raise AnswerError(
                f"--out {self.out} was started with other settings ({'; '.join(other)}): "
                "give the same ones, or use --overwrite"
            )
        answered = self._drop_incomplete_line()
        about["resumed"] = [*about.get("resumed", []), provenance()]
        write_atomically(about_file(self.out), json.dumps(about, indent=1) + "\n")
        return answered

    def _about(self) -> Record:
        path = about_file(self.out)
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(about["settings"], dict):
                return dict(about)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise AnswerError(
            f"cannot resume --out {self.out}: its settings in {path} are missing or damaged; "
            "name another file, or use --overwrite"
        )

    def _drop_incomplete_line(self) -> frozenset[str]:
        """Return the ids of all answers, and truncate an incomplete last line."""
        content = self.out.read_bytes()
        whole = content.rfind(b"\n") + 1
        ids = []
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                ids.append(str(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError):
                raise AnswerError(
                    f"{self.out}, line {number}: not an answer; remove the line to have it "
                    "answered again, or use --overwrite"
                ) from None
        if whole < len(content):
            _log.info("dropped the incomplete last line of %s", self.out)
            os.truncate(self.out, whole)
        return frozenset(ids)

    def _unwritable(self, error: OSError) -> AnswerError:
        return AnswerError(
            f"cannot write to --out {self.out}: {error.strerror}; the answers in it are complete: "
            "solve the problem, then continue with --resume"
        )


def check_unused(out: Path, resume: bool, overwrite: bool) -> None:
    """Check that no answers would be lost.

    Raises:
        AnswerError: The file exists and neither `resume` nor `overwrite` is set, both are set, or
            the path is not a file.
    """
    if resume and overwrite:
        raise AnswerError("--resume continues and --overwrite starts again: give one of them")
    if out.exists() and not out.is_file():
        raise AnswerError(f"--out {out} is not a file: name a JSONL file")
    if out.exists() and not (resume or overwrite):
        raise AnswerError(f"--out {out} exists: continue with --resume, or use --overwrite")
