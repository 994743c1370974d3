"""Measure throughput by batch size for plain decoding and `auto`, each with a full batch.

As in a server, the next prompt replaces a sequence that finishes. The two methods alternate every
few passes, so that changes in the machine's speed affect both. Prefill is not counted.
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
BLOCK = 8  # passes before the other method takes its turn


def main() -> int:
    """Run the measurement, print and write the results, and return the exit code."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--suite", choices=SUITES, default="humaneval")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    made.add_argument("--prompts", type=int, default=16, help="sequences per method and size")
    made.add_argument("--max-new-tokens", type=int, default=128)
    made.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    add_model_arguments(made)
    add_decoding_arguments(made)
    try:
        run(made.parse(sys.argv[1:]))
    except InputError as error:
        print(f"batch_speed.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Measure each batch size; print its row and write the file as soon as it is known."""
    lm = loaded(arguments)
    encode = lm.encode
    tasks = load_suite(arguments.suite, encode, lm.tokenizer.decode, arguments.prompts)
    prompts = [lm.encode(task.prompt or list(task.messages or ())) for task in tasks]
    rows: list[dict[str, Any]] = []
    print("| batch size | plain, tokens/s | auto, tokens/s | auto over plain |")
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


class FullBatch:
    """Batch of one method that is kept full.

    Args:
        lm: The model.
        method: `ar` or `auto`.
        prompts: Token ids of each prompt; used in order, then again from the first.
        size: Batch size.
        new_tokens: Maximum number of new tokens of each sequence.

    Attributes:
        finished: Number of finished sequences.
        tokens: Number of new tokens.
        seconds: Time spent in decoding steps; prefill is left out.
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

    def run_block(self) -> None:
        """Run `BLOCK` decoding steps, filling the batch before each."""
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
    """Return the throughput of the whole batch in new tokens per second, by method."""
    batches = {method: FullBatch(lm, method, prompts, size, new_tokens) for method in METHODS}
    for batch in batches.values():
        batch.run_block()  # compiles
        batch.tokens, batch.seconds = 0, 0.0
    while any(batch.finished < len(prompts) for batch in batches.values()):
        for batch in batches.values():
            if batch.finished < len(prompts):
                batch.run_block()
    return {method: batch.tokens / batch.seconds for method, batch in batches.items()}


if __name__ == "__main__":
    sys.exit(main())
