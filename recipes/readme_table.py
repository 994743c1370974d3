"""Write the README's table of results from the `passlm bench` folders in docs/results/current.

With --check, only compare: exit with 1 if the README's table is not the one the results give.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results/current"
BEGIN, END = "<!-- measured: recipes/readme_table.py -->\n", "<!-- /measured -->"
# Rows of the table in this order; any other method follows under its own name.
NAMES = {
    "ar": "plain decoding, tokens/s",
    "two-pass": "two-pass",
    "one-pass": "one-pass",
    "fixed-token": "two-pass, untrained embedding",
    "draft-head": "draft head before every pass",
    "lookup": "prompt lookup alone",
    "auto": "**auto** (the default)",
    "hf": "transformers' `generate`",
    "hf-prompt-lookup": "transformers' prompt lookup",
    "hf-assistant": "transformers' assisted decoding",
    "llama-cpp": "llama.cpp, 4-bit weights",
    "vllm": "vLLM",
}


@dataclass(frozen=True)
class Run:
    """One entry of a `results.json`, and whether another engine made it.

    Attributes:
        entry: the entry.
        peer: the method is transformers' or another engine's.
    """

    entry: dict[str, Any]
    peer: bool

    @property
    def row(self) -> tuple[str, int]:
        """Method and look-ahead tokens: the row of the table."""
        return self.entry["method"], self.entry["lookahead_tokens"]

    @property
    def place(self) -> tuple[str, float]:
        """Suite and temperature: the place in the row."""
        return self.entry["suite"], self.entry["temperature"]

    @property
    def figure(self) -> str:
        """Tokens per second of plain decoding; the speed-up over it of another method."""
        if self.entry["method"] == "ar":
            return f"{self.entry['tokens_per_second']:.0f}"
        return f"{self.entry['speedup_vs_ar']:.2f}"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of all `passlm bench` folders directly below `folder`, by their names.

    Raises:
        SystemExit: there are none, one is unfinished, or they are of different revisions.
    """
    found = {path.parent.name: json.loads(path.read_text()) for path in results_files(folder)}
    if not found:
        sys.exit(f"no results in {folder}: run recipes/current.sh")
    unfinished = [name for name, results in found.items() if not results["complete"]]
    if unfinished:
        sys.exit(f"unfinished runs in {folder}: {', '.join(unfinished)}; finish with --resume")
    commits = {results["provenance"]["commit"] for results in found.values()}
    if len(commits) > 1:
        sys.exit(f"{folder} holds results of several revisions: {', '.join(sorted(commits))}")
    return found


def results_files(folder: Path) -> list[Path]:
    """Return the `results.json` of each run below `folder`, in the order of their names."""
    return sorted(folder.glob("*/results.json"))


def runs_of(found: dict[str, dict[str, Any]]) -> list[Run]:
    """Return all entries; of plain decoding, which every folder has, the first folder's.

    Raises:
        SystemExit: two folders hold the same method, suite and temperature.
    """
    runs: dict[tuple[Any, ...], Run] = {}
    for name, results in found.items():
        for entry in results["runs"]:
            peer = entry["method"].startswith("hf") or entry["engine"] is not None
            run = Run(entry, peer)
            key = *run.row, *run.place
            if key not in runs:
                runs[key] = run
            elif entry["method"] != "ar":
                sys.exit(f"{name} repeats {entry['method']} on {entry['suite']}: remove one run")
    return list(runs.values())


def table(runs: list[Run]) -> str:
    """Return the table: a row for each method, a column for each suite."""
    suites = list(dict.fromkeys(run.entry["suite"] for run in runs))
    temperatures = sorted({run.entry["temperature"] for run in runs})
    figures: dict[tuple[str, int], dict[tuple[str, float], str]] = {}
    for run in runs:
        figures.setdefault(run.row, {})[run.place] = run.figure
    order = list(NAMES)
    rows = sorted(
        figures, key=lambda row: (order.index(row[0]) if row[0] in order else len(order), row)
    )
    title = " / ".join(f"temperature {t:g}" if t else "greedy" for t in temperatures)
    lines = [f"| {title} | {' | '.join(suites)} |", "| --- |" + " ---: |" * len(suites)]
    for method, tokens in rows:
        label = NAMES.get(method, method) + (f", L = {tokens}" if tokens else "")
        own = figures[method, tokens]
        cells = [" / ".join(own.get((s, t), "-") for t in temperatures) for s in suites]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def identical(runs: list[Run]) -> str:
    """Return a sentence on how many texts equal those of plain decoding, ours and others'."""
    others = [run for run in runs if run.row[0] != "ar"]
    peers = [run for run in others if run.peer]
    ours = share([run for run in others if not run.peer])
    if ours is None:
        sys.exit("the results do not say how many texts equal those of plain decoding")
    said = f"Texts identical to plain decoding's: {ours} of passlm's methods"
    theirs = share(peers)
    return said + (f", {theirs} of transformers'." if theirs else ".")


def share(runs: list[Run]) -> str | None:
    """Return the share of identical texts, as a percentage; None if no run was compared."""
    compared = [run.entry for run in runs if run.entry["identical_to_ar"] is not None]
    if not compared:
        return None
    prompts = sum(entry["prompts"] for entry in compared)
    equal = sum(entry["prompts"] * entry["identical_to_ar"] for entry in compared)
    return f"{100 * equal / prompts:.0f} %" if equal < prompts else "all"


def source(found: dict[str, dict[str, Any]], runs: list[Run]) -> str:
    """Return a line that says where the figures come from."""
    first = next(iter(found.values()))
    settings, facts = first["settings"], first["provenance"]
    plain = [run.entry for run in runs if run.row[0] == "ar"]
    counts = sorted({entry["prompts"] for entry in plain})
    prompts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    passes = "compiled" if settings.get("compiled") else "eager"
    machine, weights = facts["machine"], settings.get("quantize") or settings["dtype"]
    links = ", ".join(f"[{name}](docs/results/current/{name}/report.md)" for name in found)
    return (
        f"{prompts} prompts of each suite, {settings['max_new_tokens']} new tokens, {weights}, "
        f"{passes} passes, {machine['threads']} threads of {machine['processor']}, commit "
        f"`{facts['commit']}`. Intervals and settings: {links}."
    )


def measured(folder: Path = RESULTS) -> str:
    """Return all that stands between the README's two marks."""
    found = load(folder)
    runs = runs_of(found)
    return f"{table(runs)}\n\n{identical(runs)}\n{source(found, runs)}\n"


def readme(text: str, made: str) -> str:
    """Return the README's text with the part between the marks replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + made + END + after


def main() -> int:
    """Write the README's table, or check it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = README.read_text(encoding="utf-8")
    made = readme(text, measured())
    if not parser.parse_args().check:
        README.write_text(made, encoding="utf-8")
        return 0
    if made == text:
        return 0
    print("README's table is not that of docs/results/current: run recipes/readme_table.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
