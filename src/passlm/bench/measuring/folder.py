"""What `bench --out` writes, by name, and whether a folder may be written to."""

from __future__ import annotations

from pathlib import Path

from passlm.errors import InputError

RUN, PROMPTS = "run.json", "prompts.jsonl"  # as the run goes; see `journal.py`
RESULTS, REPORT, PAGE = "results.json", "report.md", "report.html"  # after each suite
ALL = (RUN, RESULTS, PROMPTS, REPORT, PAGE)


def check_unused(out: Path | None, resume: bool, overwrite: bool) -> None:
    """Make sure that no run would be lost.

    Raises:
        InputError: the folder holds one and neither `resume` nor `overwrite` is set, both are, or
            there is no folder.
    """
    if resume and overwrite:
        raise InputError("--resume goes on and --overwrite starts anew: give one of them")
    if out is None:
        if overwrite:
            raise InputError("--overwrite replaces the run in a folder: name it with --out")
        if resume:
            raise InputError("--resume goes on with the run in a folder: name it with --out")
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    held = [name for name in (RUN, RESULTS, PROMPTS) if (out / name).exists()]
    if held and not (resume or overwrite):
        raise InputError(
            f"--out {out} holds {held[0]} of another run: go on with it with --resume, name "
            "another folder, or use --overwrite"
        )
