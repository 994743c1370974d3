"""Writes README's tables of measured results from the benchmark's own files in docs/results.

With --check it only says whether README shows what the files hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ("whole", "whole-sampled", "all-compiled", "int8-compiled", "humaneval")
NAMES = {
    "ar": "plain decoding, tokens/s",
    "lookup": "prompt lookup alone",
    "draft-head": "draft head before every pass",
    "hf": "transformers' `generate`",
    "hf-prompt-lookup": "transformers' prompt lookup",
    "llama-cpp": "llama.cpp",
}
BEGIN, END = "<!-- measured: recipes/readme_table.py -->\n", "<!-- /measured -->"


def tables(name: str) -> str:
    """One result file: a table for each temperature, and a line on where it comes from."""
    results = json.loads((ROOT / "docs/results" / name / "results.json").read_text())
    runs = results["runs"]
    temperatures = sorted({run["temperature"] for run in runs})
    made = [table([r for r in runs if r["temperature"] == t], t) for t in temperatures]
    return "\n\n".join([*made, source(name, results)]) + "\n"


def table(runs: list[dict[str, Any]], temperature: float) -> str:
    """A row for each method, a column for each suite: speed over plain decoding."""
    suites = list(dict.fromkeys(run["suite"] for run in runs))
    drawn = f"temperature {temperature:g}" if temperature else "greedy"
    lines = [f"| {drawn} | {' | '.join(suites)} |", "| --- |" + " --- |" * len(suites)]
    found: dict[tuple[str, int], dict[str, str]] = {}
    for run in runs:
        key = run["method"], run["lookahead_tokens"]
        found.setdefault(key, {})[run["suite"]] = cell(run)
    for (method, tokens), cells in found.items():
        label = NAMES.get(method, method) + (f", L = {tokens}" if tokens else "")
        lines.append(f"| {label} | {' | '.join(cells[suite] for suite in suites)} |")
    return "\n".join(lines)


def cell(run: dict[str, Any]) -> str:
    """Tokens a second of plain decoding; of another method its speed over that."""
    if run["method"] == "ar":
        return f"{run['tokens_per_second']:.1f}"
    low, high = run["speedup_interval"]
    return f"{run['speedup_vs_ar']:.2f} ({low:.2f} to {high:.2f})"


def source(name: str, results: dict[str, Any]) -> str:
    """Where figures come from."""
    settings, machine = results["settings"], results["provenance"]["machine"]
    plain = [run for run in results["runs"] if run["method"] == "ar"]
    passes = "compiled passes" if settings.get("compiled") else "eager passes"
    counts = sorted({run["prompts"] for run in plain})
    prompts = f"{counts[0]} prompts of each suite"
    if len(counts) > 1:
        prompts = f"{counts[0]} to {counts[-1]} prompts of each suite"
    weights = settings["dtype"]
    if settings.get("quantize"):
        weights = f"ours {settings['quantize']}, transformers' {weights}"
    return (
        f"{prompts}, "
        f"{sum(run['tokens'] for run in plain):,} new tokens a method, {passes}, "
        f"{weights}, {machine['threads']} threads of {machine['processor']}; "
        f"[report](docs/results/{name}/report.md)"
    )


def readme() -> str:
    """README with its tables made anew."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n".join(map(tables, RESULTS)) + END + after


def main() -> int:
    """Write README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    made = readme()
    if not parser.parse_args().check:
        README.write_text(made, encoding="utf-8")
        return 0
    if made == README.read_text(encoding="utf-8"):
        return 0
    print("README's figures are not those of docs/results: run recipes/readme_table.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
