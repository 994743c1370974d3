"""Throughput by batch size: plain decoding and `auto`, each with a batch that is kept full.

A text that ends is replaced by the next prompt, as a server does it, and the two take turns every
few passes, so that whatever slows the machine slows both. Reading prompts is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from passlm.bench.suites.tasks import SUITES, load_suite
from passlm.cli import Parser
from passlm.cli.common import add_decoding_arguments, add_model_arguments, loaded
from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import autoregressive
from passlm.errors import InputError
from passlm.generate import Generator
from passlm.params import SamplingParams
from passlm.provenance import provenance, write_atomically

METHODS = ("ar", "auto")
BLOCK = 8  # passes of a turn


def main() -> int:
    """Measure, print and write; gives the exit code."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--suite", choices=SUITES, default="humaneval")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    made.add_argument("--prompts", type=int, default=16, help="texts finished by each method")
    made.add_argument("--max-new-tokens", type=int, default=128)
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
    prompts = [lm.encode(task.prompt or list(task.messages or ())) for task in tasks]
    rows: list[dict[str, Any]] = []
    print("| texts at a time | plain, tokens/s | auto, tokens/s | auto over plain |")
    print("| ---: | ---: | ---: | ---: |")
    for size in arguments.batch:
        rates = measured(lm, prompts, size, arguments.max_new_tokens)
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


class Crowd:
    """A batch of one method that is kept full.

    Args:
        lm: the model.
        method: `ar` or `auto`.
        prompts: token ids, taken in turn and again from the first.
        size: texts at a time.
        new_tokens: of each text, at most.
    """

    def __init__(
        self, lm: Generator, method: str, prompts: Sequence[list[int]], size: int, new_tokens: int
    ) -> None:
        self.finished, self.tokens, self.seconds = 0, 0, 0.0
        self._lm, self._size, self._new_tokens = lm, size, new_tokens
        self._prompts = cycle(prompts)
        context = sum(map(len, prompts)) // len(prompts) + new_tokens // 2
        self._plans = autoregressive if method == "ar" else lm.costs.auto(size, context)
        self._decoder = Decoder(lm.target, lm.rows)

    def turn(self) -> None:
        """A few passes of a full batch."""
        for _ in range(BLOCK):
            while len(self._decoder.rows) < self._size:
                self._decoder.join(self._next())
            begun = time.perf_counter()
            settled = self._decoder.step()
            self.seconds += time.perf_counter() - begun
            self.tokens += sum(len(step.tokens) for _, step in settled)
            self.finished += sum(step.finish_reason is not None for _, step in settled)

    def _next(self) -> Request:
        prompt = next(self._prompts)
        return Request.of(prompt, SamplingParams(), self._new_tokens, self._plans, self._lm.eos)


def measured(
    lm: Generator, prompts: Sequence[list[int]], size: int, new_tokens: int
) -> dict[str, float]:
    """New tokens a second of all texts together, by method."""
    crowds = {method: Crowd(lm, method, prompts, size, new_tokens) for method in METHODS}
    for crowd in crowds.values():
        crowd.turn()  # compiles
        crowd.tokens, crowd.seconds = 0, 0.0
    while any(crowd.finished < len(prompts) for crowd in crowds.values()):
        for crowd in crowds.values():
            if crowd.finished < len(prompts):
                crowd.turn()
    return {method: crowd.tokens / crowd.seconds for method, crowd in crowds.items()}


if __name__ == "__main__":
    sys.exit(main())
