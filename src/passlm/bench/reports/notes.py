"""What both reports say beside the figures: how these are made, and what is not in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from passlm.bench.measuring.measure import SLOW, WARM_UP_TOKENS
from passlm.bench.reports.sweeps import Conditions, Run, grouped, run_label

RULES = (
    "No run is dropped, however slow. Tokens a second are all new tokens of a method over all its "
    "seconds, prefill included; speed-ups are ratios of them on the same prompts, and their "
    "intervals resample prompts. The time to the first token is a median."
)
_SLOW = f"Runs at less than 1/{SLOW} of their method's median tokens a second"
BATCHED = (
    "In batches, tokens a second are the new tokens of all texts over the time of the whole batch, "
    "and speed-ups are over plain decoding in batches of the same size. Transformers' methods and "
    "other engines decode one prompt at a time."
)
FIRST_RUNS = (
    f"First runs write {WARM_UP_TOKENS} tokens at most and are not in the figures. They are made "
    "in this order, and what one has compiled, loaded or measured those behind it find done."
)


def rules(results: Mapping[str, Any]) -> list[str]:
    """How the figures are made."""
    runs: Sequence[Run] = results.get("runs") or ()
    lines = [RULES]
    counts = [run["slow_runs"] for run in runs if run.get("slow_runs") is not None]
    if counts:
        lines.append(f"{_SLOW}: {sum(counts)} of {sum(map(_goes, runs))}.")
    if any((run.get("batch_size") or 1) > 1 for run in runs):
        lines.append(BATCHED)
    return lines


def slow_runs(runs: Sequence[Run]) -> str:
    """Which methods had some far below their median speed, under the same conditions."""
    found = [f"{run_label(run)} {run['slow_runs']}" for run in runs if run.get("slow_runs")]
    return f"{_SLOW}: {', '.join(found)}, of {_goes(runs[0])} each"


def _goes(run: Run) -> int:
    """How often a method was timed: a batch is timed as a whole."""
    return int(run["prompts"] * (run.get("repeats") or 1) // (run.get("batch_size") or 1))


def left_out(results: Mapping[str, Any]) -> Iterator[str]:
    """Which prompts the figures do not hold."""
    if results.get("skipped"):
        yield f"prompts skipped as too long for the context: {len(results['skipped'])}"
    for short in results.get("too_short") or ():
        place = f"{short['suite']}, {short['prompt_tokens']} prompt tokens"
        yield f"{place}: prompts left out as shorter than that: {short['prompts']}"
    for few in results.get("no_batch") or ():
        conditions = Conditions(few["suite"], None, few["batch_size"], few["prompt_tokens"])
        yield f"{conditions.place}: not run, since there are {few['prompts']} prompts"
    for conditions, runs in grouped(results.get("runs") or ()).items():
        behind = runs[0].get("prompts_left_out")
        if behind and conditions.temperature == results["runs"][0]["temperature"]:
            yield f"{conditions.place}: prompts left out behind the last whole batch: {behind}"
    for suite in results.get("first_turn_only") or ():
        yield (
            f"{suite}: chats were asked their first turn alone, since further ones cannot be "
            "batched or cut"
        )


def loading(results: Mapping[str, Any]) -> str | None:
    """How long it took until the model was loaded, and other engines had theirs."""
    took, since = results.get("load_seconds"), results.get("start_seconds")
    if took is None or since is None:
        return None
    told = f"{since:.1f} s after the process began the model was loaded, which took {took:.1f} s"
    others = [
        f"{name} {facts['load_seconds']:.1f} s"
        for name, facts in (results.get("engines") or {}).items()
        if facts.get("load_seconds") is not None
    ]
    return f"{told}; to start other engines took {', '.join(others)}." if others else f"{told}."


def first_runs(runs: Sequence[Run]) -> list[Run]:
    """Of each method and batch size the run whose first run came first."""
    found: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        if run.get("first_run_seconds") is not None:
            found.setdefault((run_label(run), run.get("batch_size")), run)
    return list(found.values())


def first_run_label(run: Run) -> str:
    """Its method, with the size of its batches."""
    size = run.get("batch_size") or 1
    return run_label(run) + (f", batches of {size}" if size > 1 else "")


Kinds = dict[str, dict[str, Mapping[str, Any]]]
"""Figures by category, then by run."""


def by_category(runs: Sequence[Run]) -> dict[Conditions, Kinds]:
    """The figures of suites that have prompts of more than one category."""
    found: dict[Conditions, Kinds] = {}
    for run in runs:
        entries = run.get("categories") or ()
        if len(entries) > 1:
            kinds = found.setdefault(Conditions.of(run), {})
            for entry in entries:
                kinds.setdefault(entry["category"] or "none", {})[run_label(run)] = entry
    return found
