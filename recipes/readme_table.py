"""Writes README's table of measured results from the benchmark's own files in docs/results.

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
RESULTS = ("int8-compiled", "auto-compiled", "auto-eager", "humaneval")
NAMES = {
    "ar": "plain decoding",
    "lookup": "prompt lookup alone",
    "hf": "transformers' `generate`",
    "hf-prompt-lookup": "transformers' prompt lookup",
}
BEGIN, END = "<!-- measured: recipes/readme_table.py -->\n", "<!-- /measured -->"
COLUMNS = "| prompts | method | L | tokens/s | against plain | tokens/pass | same text |"


def table(name: str) -> str:
    """One result file as a table with a line on where it comes from."""
    results = json.loads((ROOT / "docs/results" / name / "results.json").read_text())
    runs, machine = results["runs"], results["provenance"]["machine"]
    lines = [COLUMNS, "| --- | --- |" + " ---: |" * 5, *map(row, runs)]
    settings, plain = results["settings"], [run for run in runs if run["method"] == "ar"]
    passes = "compiled passes" if settings.get("compiled") else "eager passes"
    weights = settings["dtype"]
    if settings.get("quantize"):
        weights = f"ours {settings['quantize']}, transformers' {weights}"
    source = (
        f"{plain[0]['prompts']} prompts of each suite, "
        f"{sum(run['tokens'] for run in plain):,} new tokens, greedy, {passes}, "
        f"{weights}, {machine['threads']} threads of {machine['processor']}; "
        f"[report](docs/results/{name}/report.md)"
    )
    return "\n".join([*lines, "", source, ""])


def row(run: dict[str, Any]) -> str:
    """One run of a method."""
    interval = run["speedup_interval"]
    against = f"{run['speedup_vs_ar']:.2f}"
    if interval is not None and run["method"] != "ar":
        against += f" ({interval[0]:.2f} to {interval[1]:.2f})"
    cells = [
        run["suite"],
        NAMES.get(run["method"], run["method"]),
        str(run["lookahead_tokens"] or ""),
        f"{run['tokens_per_second']:.1f}",
        against,
        "" if run["tokens_per_pass"] is None else f"{run['tokens_per_pass']:.2f}",
        "" if run["identical_to_ar"] is None else f"{100 * run['identical_to_ar']:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def readme() -> str:
    """README with its tables made anew."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n".join(map(table, RESULTS)) + END + after


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
