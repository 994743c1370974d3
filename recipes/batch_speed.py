"""Throughput by batch size: plain decoding and `auto` on the same groups of prompts, in turn."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from passlm.bench.tasks import SUITES, load_suite
from passlm.cli import Parser
from passlm.cli.common import add_decoding_arguments, add_model_arguments, loaded
from passlm.errors import InputError
from passlm.generate import Generator
from passlm.provenance import provenance, write_atomically

METHODS = ("ar", "auto")


def main() -> int:
    """Measure, print and write; gives the exit code."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--suite", choices=SUITES, default="humaneval")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    made.add_argument("--prompts", type=int, default=16, help="in all, for each batch size")
    made.add_argument("--max-new-tokens", type=int, default=64)
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    add_model_arguments(made)
    add_decoding_arguments(made)
    try:
        run(made.parse(sys.argv[1:]))
    except InputError as error:
        print(f"batch_speed.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """A row for each batch size, printed as it comes."""
    lm = loaded(arguments)
    encode = lm.encode
    tasks = load_suite(arguments.suite, encode, lm.tokenizer.decode, arguments.prompts)
    prompts = [task.prompt or list(task.messages or ()) for task in tasks]
    rows: list[dict[str, Any]] = []
    print("| texts at a time | plain, tokens/s | auto, tokens/s | auto over plain |")
    print("| ---: | ---: | ---: | ---: |")
    for size in arguments.batch:
        groups = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        rates = measured(lm, [g for g in groups if len(g) == size], arguments.max_new_tokens)
        rows.append({"batch": size, **rates})
        print(
            f"| {size} | {rates['ar']:.1f} | {rates['auto']:.1f} | "
            f"{rates['auto'] / rates['ar']:.2f} |",
            flush=True,
        )
        if arguments.out is not None:
            content = {"engine": lm.target.engine, "suite": arguments.suite, "rows": rows}
            stamp = provenance(sys.argv[1:])
            write_atomically(
                arguments.out, json.dumps({"provenance": stamp, **content}, indent=1) + "\n"
            )


def measured(lm: Generator, groups: list[Any], new_tokens: int) -> dict[str, float]:
    """New tokens a second of all texts together, prefill included, by method."""
    order = random.Random(0)
    tokens, seconds = dict.fromkeys(METHODS, 0), dict.fromkeys(METHODS, 0.0)
    for method in METHODS:
        lm.generate(groups[0], max_new_tokens=4, method=method)  # compiles
    for group in groups:  # so that nothing is measured while the clock runs
        longest = max(len(lm.encode(prompt)) for prompt in group)
        lm.costs.curve(len(group), longest + new_tokens // 2)
    for group in groups:
        for method in order.sample(METHODS, len(METHODS)):
            begun = time.perf_counter()
            outputs = lm.generate(group, max_new_tokens=new_tokens, method=method)
            seconds[method] += time.perf_counter() - begun
            tokens[method] += sum(output.stats.tokens for output in outputs)
    return {method: tokens[method] / seconds[method] for method in METHODS}


if __name__ == "__main__":
    sys.exit(main())
