"""Writes the results of `bench` as Markdown; all numbers come from the entries of the results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from passlm.bench.reports.notes import (
    FIRST_RUNS,
    Kinds,
    by_category,
    first_run_label,
    first_runs,
    left_out,
    loading,
    rules,
    slow_runs,
)
from passlm.bench.reports.sweeps import BASELINE, SWEEPS, Sweep, best_choices, fastest, grouped

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
# Kinds of tokens, see `bench/measuring/predictability.py`, with their names in the report.
_KINDS = {"accepted": "accepted", "refused": "rejected", "drawn": "drawn"}


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report: a table for each suite and temperature, sweeps, and the provenance.

    Args:
        results: the content of `results.json`.
    """
    parts = ["# passlm bench"]
    kinds = by_category(results["runs"])
    for conditions, runs in grouped(results["runs"]).items():
        parts += [f"## {conditions.place}, {_temperature(runs[0]['temperature'])}"]
        parts += [_table(runs), *_notes(runs)]
        if conditions in kinds:
            parts += _categories(kinds[conditions])
        parts += _predictability(runs)
    for sweep in SWEEPS:
        parts += _sweep(sweep, results["runs"])
    parts += _start(results)
    parts += ["## How the figures are made", _listed([*rules(results), *left_out(results)])]
    parts += ["## Command, machine and settings", _source(results)]
    return "\n\n".join(parts) + "\n"


def _temperature(temperature: float) -> str:
    return f"temperature {temperature:g}" + (" (greedy)" if temperature == 0 else "")


def _table(runs: Sequence[Mapping[str, Any]]) -> str:
    return _lined(_HEAD, [_row(run) for run in runs])


def _lined(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


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
    """Return notes below a table: number of prompts, quality, slow runs, outputs unlike ar."""
    first = runs[0]
    lines = [f"{first['prompts']} prompts, {first['tokens']} new tokens by {first['method']}"]
    if first["temperature"] > 0:
        judges = {f"judge {r['judge']}, draft {r['draft']}" for r in runs if r["judge"]}
        lines += sorted(judges)
    lines += [_quality(run) for run in runs if run.get("quality")]
    lines += [slow_runs(runs)] if any(run.get("slow_runs") for run in runs) else []
    for run in runs:
        margins = [difference["margin"] for difference in run["differences"] or ()]
        if margins and run["temperature"] == 0:  # in sampling, noise matters as well as the logits
            steps = f", L {run['lookahead_tokens']}" if run["lookahead_tokens"] else ""
            lines.append(
                f"{run['method']}{steps}: outputs that differ from ar: {len(margins)}; where they "
                f"first differ, the two best logits are {median(margins):.3g} apart (median), "
                f"at most {max(margins):.3g}"
            )
    return ["\n".join(f"- {line}" for line in lines)]


def _predictability(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the log-probability and entropy of tokens by kind; nothing if not measured."""
    rows: list[tuple[str, ...]] = []
    measured = [run for run in runs if run.get("predictability")]
    for run in measured:
        figures = run["predictability"]
        steps = str(run["lookahead_tokens"] or _NONE)
        rows.append((run["method"], steps, *_by_kind(figures)))
        if len(figures["by_source"]) > 1:
            parts = figures["by_source"].items()
            rows += [(f"{run['method']}: {source}", steps, *_by_kind(own)) for source, own in parts]
    if not rows:
        return []
    head = ("method", "L", *(f"{kind}: log p, entropy, count" for kind in _KINDS.values()))
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    prompts = ", ".join(map(str, sorted({run["predictability"]["prompts"] for run in measured})))
    return [
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"Predictability of the tokens on {prompts} prompts: mean log-probability and entropy in "
        "nats, under the distribution that judged the tokens; at temperature 0 under the model's "
        "own distribution. Only the first rejected candidate of a pass is counted. Tokens to which "
        "top-k and other filters give probability 0 are counted after the plus sign and are not in "
        "the mean log-probability.",
    ]


def _by_kind(figures: Mapping[str, Any]) -> list[str]:
    cells = []
    for kind in _KINDS:
        own = figures.get(kind)
        if not own or not own["count"]:
            cells.append(_NONE)
            continue
        count = f"{own['count'] - own['excluded']}"
        count += f" + {own['excluded']}" if own["excluded"] else ""
        cells.append(f"{_number(own['logprob'], 2)}, {_number(own['entropy'], 2)}, {count}")
    return cells


def _categories(kinds: Kinds) -> list[str]:
    """Return a table of speed-ups by category of prompt."""
    labels = list(dict.fromkeys(label for entries in kinds.values() for label in entries))
    others = [label for label in labels if label != BASELINE]
    rows = []
    for category, entries in kinds.items():
        plain = entries.get(BASELINE, {})
        cells = [_kind(entries.get(label)) for label in others]
        count = str(max(entry["prompts"] for entry in entries.values()))
        rows.append((category, count, _number(plain.get("tokens_per_second"), 1), *cells))
    return [
        _lined(("category", "prompts", f"{BASELINE}, tokens/s", *others), rows),
        "By category: speed-up over plain decoding on the same prompts, with the accepted length "
        "in parentheses.",
    ]


def _kind(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return _NONE
    length = entry["accepted_length"]
    return _number(entry["speedup_vs_ar"], 2) + ("" if length is None else f" ({length:.2f})")


def _sweep(sweep: Sweep, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of throughput by one setting, with all other conditions the same."""
    swept = sweep.curves(runs)
    if not swept:
        return []
    values = sorted(
        {value for curves in swept.values() for points in curves.values() for value, _ in points}
    )
    rows, best = [], []
    for conditions, curves in swept.items():
        for label, points in curves.items():
            top = fastest(points)[1] if sweep.choice else None
            cells = {value: _throughput(run, bold=run is top) for value, run in points}
            place = (conditions.name, label)
            rows.append((*place, *(cells.get(value, _NONE) for value in values)))
        if sweep.choice:
            best.append(f"{conditions.name}: {best_choices(sweep, curves)}")
    note = "Tokens per second; in parentheses the speed-up over plain decoding, all else equal"
    chosen = "; the fastest, selected after measuring, is bold" if sweep.choice else ""
    head = ("suite", "method", *(f"{value:g}" for value in values))
    parts = [f"## Tokens per second by {sweep.values}"]
    parts += ["Fastest, in tokens per second:", _listed(best)] if best else []
    return [*parts, _lined(head, rows), f"{note}{chosen}."]


def _throughput(run: Mapping[str, Any], bold: bool) -> str:
    """Return the tokens per second and the speed-up."""
    ratio = f" ({run['speedup_vs_ar']:.2f})" if run["method"] != BASELINE else ""
    text = f"{run['tokens_per_second']:.1f}{ratio}"
    return f"**{text}**" if bold else text


def _start(results: Mapping[str, Any]) -> list[str]:
    """Return the loading time and the time to first token of first runs."""
    loaded = loading(results)
    if loaded is None:
        return []
    rows = [
        (
            first_run_label(run),
            _number(run["first_run_first_token_seconds"], 2),
            _number(run["first_run_seconds"], 2),
        )
        for run in first_runs(results["runs"])
    ]
    if not rows:
        return ["## Loading and first runs", loaded]
    head = ("first run", "seconds to first token", "seconds to last token")
    return ["## Loading and first runs", loaded, _lined(head, rows), FIRST_RUNS]


def _quality(run: Mapping[str, Any]) -> str:
    """Return a method's pass@k, with the number of programs and problems."""
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
        ours.append("use packed weights")
    if settings.get("quantize"):
        ours.append(f"use weights rounded to {settings['quantize']}, which is a different model")
    if ours:
        return f"methods of passlm {' and '.join(ours)}; hf methods are unmodified transformers"
    return "all methods use the model's original weights"


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
    lines += [f"suite {name} left out: {why}" for name, why in results["missing_suites"].items()]
    lines += (results.get("missing_methods") or {}).values()
    lines += [_other_engine(name, own) for name, own in (results.get("engines") or {}).items()]
    if results.get("resumed"):
        times = ", ".join(one["time"] for one in results["resumed"])
        lines.append(f"interrupted and resumed at {times}")
    if not results["complete"]:
        lines.append("not complete: not all suites were run")
    return "\n".join(f"- {line}" for line in lines)


def _other_engine(name: str, facts: Mapping[str, Any]) -> str:
    idle = facts["idle_cores"]
    busy = "" if idle is None else f", using {idle:.3f} cores while other methods ran"
    return (
        f"{name} is {facts['engine']}: another engine in a separate process{busy}; its own clock "
        "measures it, and its outputs are not compared with those of ar"
    )


def _lookahead(files: Mapping[str, Any] | None) -> str:
    if files is None:
        return "none"
    return f"{files['name']} (for {files['base_model']}, {files['look_ahead_tokens']} rows)"
