"""Counts how many candidates each judge accepts, for greedy and sampled drafts.

Makes docs/results/acceptance.json and .md. Texts are decoded in batches: acceptance depends on
neither the batch nor the speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from passlm.bench.tasks import load_suite
from passlm.generate import Generator, load
from passlm.outputs import Stats
from passlm.provenance import provenance, write_atomically

TEMPERATURES = (0.5, 0.8, 1.0, 1.2)
PAIRS = tuple(product(("coupled", "rejection"), ("greedy", "sampled")))
BATCH = 16


def main() -> None:
    """Measure every pair at every temperature and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="humaneval")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--lookahead", default="embeddings")
    parser.add_argument("--lookahead-tokens", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs/results/acceptance.json"))
    arguments = parser.parse_args()
    lm = load(lookahead=arguments.lookahead)

    def encode(text: str) -> list[int]:
        return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    tasks = load_suite(arguments.suite, encode, lm.decode, arguments.limit)
    prompts = [task.prompt for task in tasks if task.prompt is not None]
    rows = []
    for temperature in (0.0, *TEMPERATURES):
        for judge, draft in PAIRS[:1] if temperature == 0 else PAIRS:
            asked = {"temperature": temperature, "judge": judge, "draft": draft}
            rows.append({**asked, **measure(lm, prompts, arguments, asked)})
            print(rows[-1], file=sys.stderr, flush=True)
    content = {"provenance": provenance(), "prompts": len(prompts), "rows": rows}
    write_atomically(arguments.out, json.dumps(content, indent=1) + "\n")
    write_atomically(arguments.out.with_suffix(".md"), table(rows))


def measure(
    lm: Generator, prompts: Sequence[str], arguments: argparse.Namespace, asked: dict[str, Any]
) -> dict[str, Any]:
    """The accepted length of all prompts, and the accepted share of the candidates reached."""
    parts: list[Stats] = []
    for start in range(0, len(prompts), BATCH):
        outputs = lm.generate(
            list(prompts[start : start + BATCH]),
            method="two-pass",
            lookahead_tokens=arguments.lookahead_tokens,
            max_new_tokens=arguments.max_new_tokens,
            top_k=10,
            seed=start,
            **asked,
        )
        parts += [output.stats for output in outputs]
    total = Stats.total(parts)
    shares = zip(total.accepted_by_position, total.judged_by_position, strict=True)
    return {
        "tokens": total.tokens,
        "accepted_length": total.accepted_length,
        "accepted_of_reached": [a / max(1, j) for a, j in shares],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The accepted lengths, a line a temperature."""
    head = " | ".join(f"{judge}, {draft} drafts" for judge, draft in PAIRS)
    lines = [f"| temperature | {head} |", "| --- |" + " --- |" * len(PAIRS)]
    for temperature in TEMPERATURES:
        lengths = [r["accepted_length"] for r in rows if r["temperature"] == temperature]
        lines.append(f"| {temperature} | " + " | ".join(f"{v:.3f}" for v in lengths) + " |")
    greedy = rows[0]["accepted_length"]
    return "\n".join([*lines, "", f"Greedy decoding, where the four are one: {greedy:.3f}.", ""])


if __name__ == "__main__":
    main()
