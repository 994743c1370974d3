"""Compare plain decoding with PaSS on the packaged model; `make demo` runs this.

Speeds are those of bfloat16, the median of a few runs. The texts are compared in float32, where all
methods write the same tokens on every machine. In bfloat16 that holds only where passlm's own
operators run; elsewhere a pass of one row and one of several round differently, and may choose
differently between two tokens that tie. Exits with 1 if the float32 texts differ.
"""

import logging
import os
import sys
from statistics import median

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "3600")  # in a log, one line for a progress bar

import passlm
from passlm.outputs import Output

PROMPT = '''class Stack:
    """A last-in, first-out stack of items."""

    def __init__(self):
        self.items = []

    def push(self, item):'''
METHODS = ("ar", "two-pass", "one-pass", "auto")
ROUNDS = 3  # the methods take turns, so that a slow moment of the machine does not hit one alone
NEW_TOKENS = 80


def decode(dtype: str, rounds: int) -> dict[str, list[Output]]:
    """Continue the prompt with each method, `rounds` times, using the look-ahead files `best`."""
    lm = passlm.load("smollm2-135m", lookahead="best", dtype=dtype)
    for method in METHODS:  # warm up: the first passes of a process are slow
        lm.generate(PROMPT, method=method, max_new_tokens=4)
    made: dict[str, list[Output]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method in METHODS:
            made[method] += lm.generate(PROMPT, method=method, max_new_tokens=NEW_TOKENS)
    return made


def main() -> int:
    """Print the text once, and the figures of each method; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    exact = {method: made[0] for method, made in decode("float32", 1).items()}
    fast = decode("bfloat16", ROUNDS)
    speeds = {
        method: median(output.stats.tokens_per_second for output in made)
        for method, made in fast.items()
    }
    equal = {method: output.tokens == exact["ar"].tokens for method, output in exact.items()}
    print(PROMPT + exact["ar"].text)
    print(f"\n{'method':<10} {'tokens/s':>9} {'speed-up':>9} {'tokens/pass':>12}  float32 text")
    for method, speed in speeds.items():
        print(
            f"{method:<10} {speed:>9.1f} {speed / speeds['ar']:>9.2f} "
            f"{fast[method][0].stats.tokens_per_pass:>12.2f}  "
            f"{'equal' if equal[method] else 'DIFFERS'}"
        )
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
