"""Name the files that `bench --out` writes, and check that no earlier run is overwritten."""

from __future__ import annotations

from pathlib import Path

from passlm.errors import InputError

RUN, PROMPTS = "run.json", "prompts.jsonl"  # written during the run; see `journal.py`
RESULTS, REPORT, PAGE = "results.json", "report.md", "report.html"  # written after each suite
ALL = (RUN, RESULTS, PROMPTS, REPORT, PAGE)


def check_unused(out: Path | None, resume: bool, overwrite: bool) -> None:
    """Check that writing to the folder loses no earlier run.

    Args:
        out: the folder; None if nothing is to be written.
        resume: whether to continue the run in the folder.
        overwrite: whether to replace the run in the folder.

    Raises:
        InputError: the folder contains a run and neither `resume` nor `overwrite` is set; both are
            set; one is set without a folder; or `out` is a file.
    """
    if resume and overwrite:
        raise InputError("--resume continues a run and --overwrite replaces it: give one of them")
    if out is None:
        if overwrite:
            raise InputError("--overwrite replaces the run in a folder: give the folder with --out")
        if resume:
            raise InputError("--resume continues the run in a folder: give the folder with --out")
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    held = [name for name in (RUN, RESULTS, PROMPTS) if (out / name).exists()]
    if held and not (resume or overwrite):
        raise InputError(
            f"--out {out} contains {held[0]} of an earlier run: continue it with --resume, give "
            "another folder, or use --overwrite"
        )
