"""The results of `bench` as Markdown; every number comes from the results' own entries."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_HEAD = (
    "method",
    "L",
    "tokens/s",
    "speed-up (95 %)",
    "tokens/pass",
    "accepted length",
    "accepted by position",
    "identical to ar",
)
_NONE = "\N{EN DASH}"


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each suite and temperature, then where the numbers come from.

    Args:
        results: the content of `results.json`.
    """
    parts = ["# passlm bench"]
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["suite"], run["temperature"]), []).append(run)
    for (suite, temperature), runs in groups.items():
        parts += [f"## {suite}, {_temperature(temperature)}", _table(runs), *_notes(runs)]
    parts += ["## Where this comes from", _source(results)]
    return "\n\n".join(parts) + "\n"


def _temperature(temperature: float) -> str:
    return f"temperature {temperature:g}" + (" (greedy)" if temperature == 0 else "")


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1)), *map(_row, runs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(run: Mapping[str, Any]) -> tuple[str, ...]:
    shares = run["accepted_by_position"]
    same = run["identical_to_ar"]
    return (
        run["method"],
        str(run["lookahead_tokens"] or _NONE),
        _number(run["tokens_per_second"], 1),
        _speedup(run),
        _number(run["tokens_per_pass"], 2),
        _number(run["accepted_length"] if shares else None, 2),
        ", ".join(_number(share, 2) for share in shares) if shares else _NONE,
        _NONE if same is None else f"{100 * same:.1f} %",
    )


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _speedup(run: Mapping[str, Any]) -> str:
    interval = run["speedup_interval"]
    shown = interval and run["method"] != "ar"
    spread = f" ({interval[0]:.2f} to {interval[1]:.2f})" if shown else ""
    return f"{run['speedup_vs_ar']:.2f}{spread}"


def _notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many prompts were run, and how near to a tie differing texts part."""
    first = runs[0]
    lines = [f"{first['prompts']} prompts, {first['tokens']} new tokens by {first['method']}"]
    if first["temperature"] > 0:
        judges = {f"judge {r['judge']}, draft {r['draft']}" for r in runs if r["judge"]}
        lines += sorted(judges)
    lines += [_quality(run) for run in runs if run.get("quality")]
    for run in runs:
        margins = [difference["margin"] for difference in run["differences"] or ()]
        if margins and run["temperature"] == 0:  # sampled, noise decides beside the logits
            steps = f", L {run['lookahead_tokens']}" if run["lookahead_tokens"] else ""
            lines.append(
                f"{run['method']}{steps}: texts that differ from ar: {len(margins)}; where they "
                f"first do, the two best logits lie {median(margins):.3g} apart (median) and "
                f"{max(margins):.3g} at most"
            )
    return ["\n".join(f"- {line}" for line in lines)]


def _quality(run: Mapping[str, Any]) -> str:
    """pass@k, with how many problems it comes from."""
    quality = run["quality"]
    steps = f", L {run['lookahead_tokens']}" if run["lookahead_tokens"] else ""
    figures = []
    for k, found in quality["pass_at_k"].items():
        interval = found["interval"]
        spread = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        figures.append(f"pass@{k} {found['value']:.3f}{spread}")
    return (
        f"{run['method']}{steps}: {', '.join(figures)}; {quality['samples']} programs for "
        f"{quality['problems']} problems"
    )


def _engine(settings: Mapping[str, Any]) -> str:
    ours = []
    if settings.get("compiled"):
        ours.append("run compiled passes")
    elif settings["packed_weights"]:
        ours.append("compute with packed weights")
    if settings.get("quantize"):
        ours.append(f"compute with weights rounded to {settings['quantize']}, so another model")
    if ours:
        return f"our methods {' and '.join(ours)}; those of hf are transformers as it is"
    return "all methods compute with the model's plain weights"


def _source(results: Mapping[str, Any]) -> str:
    stamp, settings = results["provenance"], results["settings"]
    machine, packages = stamp["machine"], stamp["packages"]
    commit = stamp["commit"] or "unknown"
    lines = [
        f"passlm {stamp['passlm']}, commit {commit}; {stamp['time']}",
        f"model {settings['model']}, {settings['dtype']} on {settings['device']}; "
        f"look-ahead files: {_lookahead(settings['lookahead'])}",
        _engine(settings),
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; {machine['system']}",
        f"Python {stamp['python']}, torch {packages['torch']}, "
        f"transformers {packages['transformers']}",
        f"`passlm {shlex.join(stamp['arguments'])}`",
    ]
    if results["peak_memory_bytes"] is not None:
        lines.append(f"peak memory of the process: {results['peak_memory_bytes'] / 2**20:.0f} MiB")
    if results["skipped"]:
        lines.append(f"{len(results['skipped'])} prompts skipped: too long for the context")
    lines += [f"suite {name} left out: {why}" for name, why in results["missing_suites"].items()]
    if not results["complete"]:
        lines.append("not complete: suites were still to come")
    return "\n".join(f"- {line}" for line in lines)


def _lookahead(files: Mapping[str, Any] | None) -> str:
    if files is None:
        return "none"
    return f"{files['name']} (for {files['base_model']}, {files['look_ahead_tokens']} rows)"
