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
from passlm.lookahead import LookAhead
from passlm.outputs import Stats
from passlm.provenance import provenance, write_atomically

PAIRS = tuple(product(("coupled", "rejection"), ("greedy", "sampled")))
BATCH = 16


def main() -> None:
    """Measure every pair at every temperature and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="humaneval")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--lookahead", default="embeddings", help="or fixed-token")
    parser.add_argument("--lookahead-tokens", type=int, default=4)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0, 0.5, 0.8, 1.0, 1.2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/acceptance.json"))
    arguments = parser.parse_args()
    lm = loaded(arguments)
    rows = []
    prompts = texts(lm, arguments)
    for temperature in arguments.temperatures:
        for judge, draft in PAIRS[:1] if temperature == 0 else PAIRS:  # greedy, the four are one
            asked = {"temperature": temperature, "judge": judge, "draft": draft}
            rows.append({**asked, **measure(lm, prompts, arguments, asked)})
            print(rows[-1], file=sys.stderr, flush=True)
    content = {"provenance": provenance(), "prompts": len(prompts), "rows": rows}
    write_atomically(arguments.out, json.dumps(content, indent=1) + "\n")
    write_atomically(arguments.out.with_suffix(".md"), table(rows))


def loaded(arguments: argparse.Namespace) -> Generator:
    """The packaged model with the rows asked for."""
    if arguments.lookahead != "fixed-token":
        return load(lookahead=arguments.lookahead)
    lm = load(lookahead="none")
    token = lm.tokenizer.unk_token_id
    assert token is not None, "the packaged model has an unknown token"
    rows = LookAhead.fixed_token(lm.target, token, arguments.lookahead_tokens, "smollm2-135m")
    return Generator(lm.target, lm.tokenizer, rows)


def texts(lm: Generator, arguments: argparse.Namespace) -> list[str]:
    """The suite's prompts."""

    def encode(text: str) -> list[int]:
        return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    tasks = load_suite(arguments.suite, encode, lm.decode, arguments.limit)
    return [task.prompt for task in tasks if task.prompt is not None]


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
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        lengths = [r["accepted_length"] for r in rows if r["temperature"] == temperature]
        if temperature == 0:
            lengths *= len(PAIRS)
        lines.append(f"| {temperature} | " + " | ".join(f"{v:.3f}" for v in lengths) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
