"""What `make demo` shows: plain decoding and PaSS side by side on the packaged model.

The speeds are those of bfloat16. That both write the same is shown in float32, where it holds
token for token; in bfloat16 a pass of one row and one of five round differently, and a tie between
two tokens may fall either way. Exits with 1 if the float32 texts differ.
"""

import logging
import sys

import passlm
from passlm.outputs import Output

PROMPT = '''def count_words(text: str) -> dict[str, int]:
    """Count how often each word occurs in a text.

    >>> count_words("the cat and the dog")
    {'the': 2, 'cat': 1, 'and': 1, 'dog': 1}
    """
'''
METHODS = ("ar", "two-pass", "one-pass")


def decode(dtype: str) -> dict[str, Output]:
    """The prompt continued by each method."""
    lm = passlm.load("smollm2-135m", dtype=dtype)
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
