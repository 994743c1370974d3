"""Plot accepted length against training anchors, LoRA rank, LoRA layers and look-ahead rows.

Read docs/results/acceptance-by-training/growth.json and write growth.png, which docs/training.md
shows, beside it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "acceptance-by-training"
LAYERS = {
    "all": (),
    "attention": ("self_attn.*",),
    "MLP": ("mlp.*",),
    "upper half": ("layers.1[5-9].*", "layers.2?.*"),
}


def main() -> int:
    """Write the figure and return the exit code."""
    content = json.loads((FOLDER / "growth.json").read_text())
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    anchors, rank, layers, rows = figure.subplots(1, 4)
    seen = content["anchors"]["rows"]
    anchors.plot(
        [r["anchors"] / 1000 for r in seen], [r["accepted_length"] for r in seen], "o-", color="C0"
    )
    anchors.set(title="anchors seen", xlabel="thousands")
    settings = content["settings"]
    bars(rank, settings, "lora_rank", [(str(value), value) for value in (4, 12, 32)])
    bars(layers, settings, "lora_layers", [(name, list(of)) for name, of in LAYERS.items()])
    bars(rows, settings, "lookahead_tokens", [(str(value), value) for value in (4, 6, 8)])
    rank.set(title="rank of the LoRA")
    layers.set(title="layers with LoRA")
    layers.tick_params(axis="x", labelrotation=20)
    rows.set(title="look-ahead rows trained")
    anchors.set(ylabel="held-out accepted length")
    for axes in (anchors, rank, layers, rows):
        axes.set(ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(FOLDER / "growth.png")
    return 0


def bars(
    axes: Axes, settings: dict[str, Any], name: str, values: Sequence[tuple[str, object]]
) -> None:
    """Draw one bar per setting, with the standard error of its mean over the held-out groups."""
    base = {**settings["base"], "lora_layers": []}
    heights, errors = [], []
    for _, value in values:
        wanted = {name: value} if base[name] != value else {}
        row = next(r for r in settings["rows"] if changes(r, base) == wanted)
        heights.append(row["accepted_length"])
        errors.append(standard_error(row["accepted_by_position"], settings["held_out_groups"]))
    axes.bar([label for label, _ in values], heights, yerr=errors, color="C0", ecolor="0.4")


def changes(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in which a run differs from the base run."""
    return {name: value for name, value in row["changed"].items() if base.get(name) != value}


def standard_error(reached: Sequence[float], groups: int) -> float:
    """Return the standard error of a mean accepted length.

    Args:
        reached: Share of groups whose candidates are accepted up to each position.
        groups: Number of groups.
    """
    mean = sum(reached)
    # E[n^2] = sum over j of (2j - 1) P(n >= j)
    squares = sum((2 * j - 1) * share for j, share in enumerate(reached, start=1))
    return math.sqrt(max(0.0, squares - mean**2) / groups)


if __name__ == "__main__":
    sys.exit(main())
