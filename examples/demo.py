"""What `make demo` shows: plain decoding and PaSS side by side on the packaged model.

In float32, where both must write the same text token for token; exits with 1 if they do not.
"""

import logging
import sys

import passlm

PROMPT = '''def count_words(text: str) -> dict[str, int]:
    """Count how often each word occurs in a text.

    >>> count_words("the cat and the dog")
    {'the': 2, 'cat': 1, 'and': 1, 'dog': 1}
    """
'''
METHODS = ("ar", "two-pass", "one-pass")


def main() -> int:
    """Generate with each method, print the text once and the figures of each."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lm = passlm.load("smollm2-135m", dtype="float32")
    for method in METHODS:  # warm up: the first passes of a process are slow
        lm.generate(PROMPT, method=method, max_new_tokens=4)
    outputs = {
        method: lm.generate(PROMPT, method=method, max_new_tokens=128)[0] for method in METHODS
    }
    plain = outputs["ar"]
    print(PROMPT + plain.text)
    print(f"\n{'method':<10} {'tokens/s':>9} {'speed-up':>9} {'tokens/pass':>12}  text")
    for method, output in outputs.items():
        ratio = output.stats.tokens_per_second / plain.stats.tokens_per_second
        same = "equal" if output.tokens == plain.tokens else "DIFFERS"
        print(
            f"{method:<10} {output.stats.tokens_per_second:>9.1f} {ratio:>9.2f} "
            f"{output.stats.tokens_per_pass:>12.2f}  {same}"
        )
    return 0 if all(output.tokens == plain.tokens for output in outputs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
