"""Texts of both reports: how the figures are made, and which prompts they do not include."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from passlm.bench.measuring.measure import SLOW, WARM_UP_TOKENS
from passlm.bench.reports.sweeps import Conditions, Run, grouped, run_label

RULES = (
    "No run is dropped, however slow. Tokens per second are all new tokens of a method divided by "
    "all its seconds, prefill included. Speed-ups are ratios of tokens per second on the same "
    "prompts; their intervals come from resampling prompts. The time to first token is a median."
)
_SLOW = f"Runs at less than 1/{SLOW} of their method's median tokens per second"
BATCHED = (
    "In batches, tokens per second are the new tokens of all sequences divided by the time of the "
    "whole batch, and speed-ups are over plain decoding in batches of the same size. Transformers' "
    "methods and other engines decode one prompt at a time."
)
FIRST_RUNS = (
    f"First runs generate at most {WARM_UP_TOKENS} tokens and are not in the figures. They run in "
    "this order, and later ones use what earlier ones have compiled, loaded or measured."
)


def rules(results: Mapping[str, Any]) -> list[str]:
    """Return sentences on how the figures are made."""
    runs: Sequence[Run] = results.get("runs") or ()
    lines = [RULES]
    counts = [run["slow_runs"] for run in runs if run.get("slow_runs") is not None]
    if counts:
        lines.append(f"{_SLOW}: {sum(counts)} of {sum(map(_timed, runs))}.")
    if any((run.get("batch_size") or 1) > 1 for run in runs):
        lines.append(BATCHED)
    return lines


def slow_runs(runs: Sequence[Run]) -> str:
    """Return the number of slow runs of each method, under the same conditions."""
    found = [f"{run_label(run)} {run['slow_runs']}" for run in runs if run.get("slow_runs")]
    return f"{_SLOW}: {', '.join(found)}, of {_timed(runs[0])} each"


def _timed(run: Run) -> int:
    """Return how often a method was timed; a batch is timed as a whole."""
    return int(run["prompts"] * (run.get("repeats") or 1) // (run.get("batch_size") or 1))


def left_out(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on prompts that the figures do not include."""
    if results.get("skipped"):
        yield f"prompts skipped because they exceed the context: {len(results['skipped'])}"
    for short in results.get("too_short") or ():
        place = f"{short['suite']}, {short['prompt_tokens']} prompt tokens"
        yield f"{place}: prompts left out because they are shorter: {short['prompts']}"
    for few in results.get("no_batch") or ():
        conditions = Conditions(few["suite"], None, few["batch_size"], few["prompt_tokens"])
        yield f"{conditions.place}: not run, because there are only {few['prompts']} prompts"
    for conditions, runs in grouped(results.get("runs") or ()).items():
        left_over = runs[0].get("prompts_left_out")
        if left_over and conditions.temperature == results["runs"][0]["temperature"]:
            yield f"{conditions.place}: prompts left out after the last full batch: {left_over}"
    for suite in results.get("first_turn_only") or ():
        yield (
            f"{suite}: only the first turn of each chat was run, because later turns cannot be "
            "batched or cut"
        )


def loading(results: Mapping[str, Any]) -> str | None:
    """Return a sentence on the loading time of the model and of other engines."""
    took, since = results.get("load_seconds"), results.get("start_seconds")
    if took is None or since is None:
        return None
    sentence = f"The model was loaded in {took:.1f} s, {since:.1f} s after the process started"
    others = [
        f"{name} {facts['load_seconds']:.1f} s"
        for name, facts in (results.get("engines") or {}).items()
        if facts.get("load_seconds") is not None
    ]
    return (
        f"{sentence}; other engines started in {', '.join(others)}." if others else f"{sentence}."
    )


def first_runs(runs: Sequence[Run]) -> list[Run]:
    """Return, for each method and batch size, the first entry that has a first run."""
    found: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        if run.get("first_run_seconds") is not None:
            found.setdefault((run_label(run), run.get("batch_size")), run)
    return list(found.values())


def first_run_label(run: Run) -> str:
    """Return the method of a run, with its batch size if that is above 1."""
    size = run.get("batch_size") or 1
    return run_label(run) + (f", batches of {size}" if size > 1 else "")


Kinds = dict[str, dict[str, Mapping[str, Any]]]
"""Figures by category, then by the label of a run."""


def by_category(runs: Sequence[Run]) -> dict[Conditions, Kinds]:
    """Return the figures by category, for suites with prompts of more than one category."""
    found: dict[Conditions, Kinds] = {}
    for run in runs:
        entries = run.get("categories") or ()
        if len(entries) > 1:
            kinds = found.setdefault(Conditions.of(run), {})
            for entry in entries:
                kinds.setdefault(entry["category"] or "none", {})[run_label(run)] = entry
    return found
