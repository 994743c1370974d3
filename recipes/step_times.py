"""Measure the time that each part of a decoding step takes, in milliseconds, for one prompt."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from typing import Any

from passlm.cli import Parser
from passlm.cli.common import add_decoding_arguments, add_model_arguments, loaded
from passlm.decoding.decoder import Decoder
from passlm.decoding.text import Row
from passlm.errors import InputError
from passlm.model.pass_records import PassOutput
from passlm.model.target import Target
from passlm.params import METHODS

# Each part: class, method, and the parts measured within it.
PARTS: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "step": (
        Decoder,
        "step",
        ("pass", "judge", "propose", "remember", "choose plan", "output layer"),
    ),
    "propose": (Decoder, "_propose", ()),
    "choose plan": (Row, "choose_plan", ()),
    "pass": (Target, "run", ("model",)),
    "output layer": (PassOutput, "of", ()),
    "judge": (Row, "judge", ()),
    "remember": (Decoder, "_remember", ()),
}
PROMPT = "def quicksort(items: list[int]) -> list[int]:\n"


def main() -> int:
    """Run the measurement, print the table, and return the exit code."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--method", nargs="+", choices=METHODS, default=["ar", "two-pass", "auto"])
    made.add_argument("--max-new-tokens", type=int, default=128)
    add_model_arguments(made)
    add_decoding_arguments(made)
    try:
        run(made.parse(sys.argv[1:]))
    except InputError as error:
        print(f"step_times.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Print a table with one column per method."""
    lm = loaded(arguments)
    seconds: defaultdict[str, float] = defaultdict(float)
    watched = {**PARTS, "model": (Target, "_call", ())}
    for name, (kind, method, _) in watched.items():
        setattr(kind, method, timed(getattr(kind, method), name, seconds))
    extend = Target.extend

    def left_out(*given: Any) -> Any:
        """Prefill the prompt and leave its passes out of the times."""
        extend(*given)
        seconds.clear()

    Target.extend = left_out  # type: ignore[method-assign]
    columns = []
    for method in arguments.method:
        lm.generate(
            PROMPT, max_new_tokens=16, method=method
        )  # compiles the passes and measures costs
        stats = lm.generate(PROMPT, max_new_tokens=arguments.max_new_tokens, method=method)[0].stats
        own = {part: seconds[part] - sum(seconds[p] for p in held(part)) for part in watched}
        columns.append({part: 1e3 * took / stats.passes for part, took in own.items()})
        columns[-1]["tokens per pass"] = stats.tokens_per_pass
    print(f"| ms per step ({lm.target.engine}) | {' | '.join(arguments.method)} |")
    print("| --- |" + " ---: |" * len(columns))
    labels = {
        "propose": "propose candidates",
        "step": "rest of the step",
        "pass": "rest of the pass: rows, masks, cache",
    }
    for part in ("model", *PARTS, "tokens per pass"):
        cells = (f"{column[part]:.2f}" for column in columns)
        print(f"| {labels.get(part, part)} | {' | '.join(cells)} |")


def held(part: str) -> tuple[str, ...]:
    """Return the parts measured within a part."""
    return PARTS[part][2] if part in PARTS else ()


def timed(function: Any, name: str, seconds: defaultdict[str, float]) -> Any:
    """Return the function wrapped so that its time is added to `seconds[name]`."""

    @functools.wraps(function)
    def watched(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds[name] += time.perf_counter() - begun

    return watched


if __name__ == "__main__":
    sys.exit(main())
