"""The runs of a result by what they have in common, and by what was varied beside it.

Tables and charts of both are left to `markdown.py` and `figures.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from passlm.bench.reports.markup import finite

Run = Mapping[str, Any]  # an entry of "runs" in results.json

BASELINE = "ar"


@dataclass(frozen=True)
class Conditions:
    """What runs have in common that are held against each other.

    Attributes:
        suite: whose prompts they ran.
        temperature: of the draws.
        batch_size: prompts that were decoded as one batch.
        prompt_tokens: the length that prompts were cut to; None where they were whole.
    """

    suite: str
    temperature: float | None
    batch_size: int | None = 1
    prompt_tokens: int | None = None

    @classmethod
    def of(cls, run: Run) -> Conditions:
        """Those of a run; older results have whole prompts, one at a time."""
        batch_size, cut = run.get("batch_size") or 1, run.get("prompt_tokens")
        return cls(run["suite"], run["temperature"], batch_size, cut)

    @property
    def place(self) -> str:
        """Suite, length and batch in words."""
        parts = [self.suite]
        if self.prompt_tokens is not None:
            parts.append(f"{self.prompt_tokens} prompt tokens")
        if self.batch_size is not None and self.batch_size > 1:
            parts.append(f"batches of {self.batch_size}")
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """All of it in words."""
        if self.temperature is None:
            return self.place
        drawn = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{self.place}, {drawn}"


def grouped(runs: Sequence[Run]) -> dict[Conditions, list[Run]]:
    """The runs by their conditions."""
    found: dict[Conditions, list[Run]] = {}
    for run in runs:
        found.setdefault(Conditions.of(run), []).append(run)
    return found


def steps(run: Run) -> int:
    """Look-ahead steps of a run; 0 without."""
    return run["lookahead_tokens"] or 0


def run_label(run: Run) -> str:
    """Its method, and its number of look-ahead steps where it has one."""
    return f"{run['method']}, L {steps(run)}" if steps(run) else str(run["method"])


@dataclass(frozen=True)
class Sweep:
    """A setting that runs were made with several values of.

    Attributes:
        name: of the sweep.
        field: of a run's entry.
        values: what the setting is, for a table's head or an axis.
        least: how many values are worth a chart.
        choice: what to call a value where it is a user's to choose, so that the best one is named.
    """

    name: str
    field: str
    values: str
    least: int = 2
    choice: str | None = None

    def of(self, run: Run) -> float | None:
        """The run's value; None where it has none."""
        value = run.get(self.field)
        if self.field == "batch_size":
            return value or 1
        return finite(value) if value or self.field == "temperature" else None

    def conditions(self, run: Run) -> Conditions:
        """What the run has in common with those of other values."""
        common = Conditions.of(run)
        if self.field == "temperature":
            return replace(common, temperature=None)
        if self.field == "batch_size":
            return replace(common, batch_size=None)
        if self.field == "prompt_tokens":
            return replace(common, prompt_tokens=None)
        return common

    def label(self, run: Run) -> str:
        """What tells a curve from others under the same conditions."""
        return str(run["method"]) if self.field == "lookahead_tokens" else run_label(run)

    def curves(self, runs: Sequence[Run]) -> dict[Conditions, dict[str, list[tuple[float, Run]]]]:
        """Values and runs, in order, by conditions and label; those of too few values left out."""
        found: dict[Conditions, dict[str, list[tuple[float, Run]]]] = {}
        for run in runs:
            value = self.of(run)
            if value is not None and finite(run.get("tokens_per_second")) is not None:
                of_it = found.setdefault(self.conditions(run), {})
                of_it.setdefault(self.label(run), []).append((value, run))
        kept = {}
        for conditions, curves in found.items():
            several = {
                label: sorted(points, key=lambda point: point[0])
                for label, points in curves.items()
                if len({value for value, _ in points}) >= self.least
            }
            if several:
                kept[conditions] = several
        return kept


STEPS = Sweep("steps", "lookahead_tokens", "look-ahead steps L", choice="L")
BATCHES = Sweep("batches", "batch_size", "prompts decoded at once", choice="batches of")
LENGTHS = Sweep("lengths", "prompt_tokens", "tokens of the prompt")
TEMPERATURES = Sweep("temperatures", "temperature", "temperature", least=3)
SWEEPS = (STEPS, BATCHES, LENGTHS, TEMPERATURES)


def fastest(points: Sequence[tuple[float, Run]]) -> tuple[float, Run]:
    """The value with the most tokens a second."""
    return max(points, key=lambda point: float(point[1]["tokens_per_second"]))


def best_choices(sweep: Sweep, curves: Mapping[str, Sequence[tuple[float, Run]]]) -> str:
    """Of each curve the value with the most tokens a second."""
    best = {label: fastest(points) for label, points in curves.items()}
    return ", ".join(
        f"{label} with {sweep.choice} {value:g} ({run['tokens_per_second']:.1f})"
        for label, (value, run) in best.items()
    )
