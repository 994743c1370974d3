"""Compare plain decoding with PaSS on the packaged model; `make demo` runs this.

Speeds are those of bfloat16. The texts are compared in float32, where all methods write the same
tokens on every machine. In bfloat16 that holds only where passlm's own operators run; elsewhere a
pass of one row and one of several round differently, and may choose differently between two
tokens that tie. Exits with 1 if the float32 texts differ.
"""

import logging
import os
import sys

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


def decode(dtype: str) -> dict[str, Output]:
    """Continue the prompt with each method, using the look-ahead files `best`."""
    lm = passlm.load("smollm2-135m", lookahead="best", dtype=dtype)
    for method in METHODS:  # warm up: the first passes of a process are slow
        lm.generate(PROMPT, method=method, max_new_tokens=4)
    return {method: lm.generate(PROMPT, method=method, max_new_tokens=128)[0] for method in METHODS}


def main() -> int:
    """Print the text once, and the figures of each method."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    exact, fast = decode("float32"), decode("bfloat16")
    print(PROMPT + exact["ar"].text)
    print(f"\n{'method':<10} {'tokens/s':>9} {'speed-up':>9} {'tokens/pass':>12}  float32 text")
    plain = fast["ar"].stats.tokens_per_second
    for method, output in fast.items():
        same = "equal" if exact[method].tokens == exact["ar"].tokens else "DIFFERS"
        print(
            f"{method:<10} {output.stats.tokens_per_second:>9.1f} "
            f"{output.stats.tokens_per_second / plain:>9.2f} "
            f"{output.stats.tokens_per_pass:>12.2f}  {same}"
        )
    return 0 if all(output.tokens == exact["ar"].tokens for output in exact.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
