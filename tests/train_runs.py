"""What tests of `passlm train` share: a text folder and the flags of a run that takes a moment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from passlm.train.loop import CHECKPOINT

SMALL = (
    *("--lookahead-tokens", "3", "--lora-rank", "4", "--sampler-width", "16"),
    *("--sequence-tokens", "40", "--anchors", "8", "--warmup", "1", "--held-out", "0.3"),
    *("--evaluate-every", "2", "--evaluate-texts", "2", "--checkpoint-every", "2"),
)


def texts(folder: Path) -> Path:
    """A folder of six short texts."""
    folder.mkdir()
    for number in range(6):
        lines = [f"line {n} of text {number}: the quick brown fox" for n in range(12)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def train(model: Path, data: Path, out: Path, steps: int = 2) -> list[str]:
    """The arguments of a short run."""
    paths = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return ["train", *paths, "--steps", str(steps), *SMALL]


def command(arguments: list[str]) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "passlm.cli", *arguments]


def environment() -> dict[str, str]:
    """For a process of its own: the sources here, one thread."""
    source = str(Path(__file__).parents[1] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def steps_kept(out: Path) -> int:
    """Steps that the checkpoint stands for; it can be read only if it is whole."""
    from safetensors import safe_open

    with safe_open(out / CHECKPOINT, framework="pt") as file:
        return int(file.metadata()["steps_done"])
