"""Groups the runs of a result by their conditions, and by the setting that was varied.

`markdown.py` and `figures.py` make tables and charts of the groups.
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
    """Conditions that runs must share to be compared with each other.

    Attributes:
        suite: name of the suite of prompts.
        temperature: sampling temperature; None where it is the varied setting.
        batch_size: number of prompts decoded as one batch; None where it is the varied setting.
        prompt_tokens: length in tokens that prompts were cut to; None if they were not cut, or
            where it is the varied setting.
    """

    suite: str
    temperature: float | None
    batch_size: int | None = 1
    prompt_tokens: int | None = None

    @classmethod
    def of(cls, run: Run) -> Conditions:
        """Return the conditions of a run; in older results, uncut prompts at batch size 1."""
        batch_size, cut = run.get("batch_size") or 1, run.get("prompt_tokens")
        return cls(run["suite"], run["temperature"], batch_size, cut)

    @property
    def place(self) -> str:
        """Suite, prompt length and batch size in words."""
        parts = [self.suite]
        if self.prompt_tokens is not None:
            parts.append(f"{self.prompt_tokens} prompt tokens")
        if self.batch_size is not None and self.batch_size > 1:
            parts.append(f"batches of {self.batch_size}")
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """All conditions in words."""
        if self.temperature is None:
            return self.place
        drawn = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{self.place}, {drawn}"


def grouped(runs: Sequence[Run]) -> dict[Conditions, list[Run]]:
    """Group the runs by their conditions."""
    found: dict[Conditions, list[Run]] = {}
    for run in runs:
        found.setdefault(Conditions.of(run), []).append(run)
    return found


def steps(run: Run) -> int:
    """Return the number of look-ahead steps of a run; 0 if it has none."""
    return run["lookahead_tokens"] or 0


def run_label(run: Run) -> str:
    """Return the method of a run, with the number of look-ahead steps if it has one."""
    return f"{run['method']}, L {steps(run)}" if steps(run) else str(run["method"])


@dataclass(frozen=True)
class Sweep:
    """A setting that was varied between runs.

    Attributes:
        name: name of the sweep.
        field: field of a run's entry that holds the setting.
        values: description of the setting, for table headings and axes.
        least: minimum number of values to draw a chart.
        choice: word before a value in the list of best values; None if there is no such list,
            because the setting is not chosen for speed.
    """

    name: str
    field: str
    values: str
    least: int = 2
    choice: str | None = None

    def of(self, run: Run) -> float | None:
        """Return the run's value of the setting; None if it has none."""
        value = run.get(self.field)
        if self.field == "batch_size":
            return value or 1
        return finite(value) if value or self.field == "temperature" else None

    def conditions(self, run: Run) -> Conditions:
        """Return the conditions that the run shares with runs of other values."""
        common = Conditions.of(run)
        if self.field == "temperature":
            return replace(common, temperature=None)
        if self.field == "batch_size":
            return replace(common, batch_size=None)
        if self.field == "prompt_tokens":
            return replace(common, prompt_tokens=None)
        return common

    def label(self, run: Run) -> str:
        """Return the label that distinguishes a run's curve from others of the same conditions."""
        return str(run["method"]) if self.field == "lookahead_tokens" else run_label(run)

    def curves(self, runs: Sequence[Run]) -> dict[Conditions, dict[str, list[tuple[float, Run]]]]:
        """Return curves by conditions and label: values and runs, sorted by value.

        Curves with fewer than `least` different values are left out.
        """
        found: dict[Conditions, dict[str, list[tuple[float, Run]]]] = {}
        for run in runs:
            value = self.of(run)
            if value is not None and finite(run.get("tokens_per_second")) is not None:
                curves_of = found.setdefault(self.conditions(run), {})
                curves_of.setdefault(self.label(run), []).append((value, run))
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
BATCHES = Sweep("batches", "batch_size", "batch size", choice="batches of")
LENGTHS = Sweep("lengths", "prompt_tokens", "prompt length in tokens")
TEMPERATURES = Sweep("temperatures", "temperature", "temperature", least=3)
SWEEPS = (STEPS, BATCHES, LENGTHS, TEMPERATURES)


def fastest(points: Sequence[tuple[float, Run]]) -> tuple[float, Run]:
    """Return the value, and its run, with the highest throughput."""
    return max(points, key=lambda point: float(point[1]["tokens_per_second"]))


def best_choices(sweep: Sweep, curves: Mapping[str, Sequence[tuple[float, Run]]]) -> str:
    """Return the value with the highest throughput of each curve, as text."""
    best = {label: fastest(points) for label, points in curves.items()}
    return ", ".join(
        f"{label} with {sweep.choice} {value:g} ({run['tokens_per_second']:.1f})"
        for label, (value, run) in best.items()
    )
