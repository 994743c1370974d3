"""Write the output tokens of every tested architecture, to compare releases of the libraries.

    python recipes/release_texts.py OUT.json              # in one environment
    python recipes/release_texts.py OUT.json --compare OTHER.json   # in the other

Each tiny random model of `tests/tiny.py` continues four prompts in float32 by plain, two-pass and
one-pass decoding and by transformers' own `generate`. The packaged model continues eight prompts
of code and text. With `--compare`, the exit code is 1 if any output differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import passlm
from passlm.decoding.strategies import OnePass, TwoPass, autoregressive
from passlm.model.target import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import (
    ARCHITECTURES,
    MORE_ARCHITECTURES,
    PROMPT_LENGTHS,
    generate,
    look_ahead_rows,
    prompt,
    requests_for,
    run,
)

METHODS = {"ar": autoregressive, "two-pass": TwoPass(4), "one-pass": OnePass(3)}
LOOK_AHEAD = {"ar": 0, "two-pass": 4, "one-pass": 3}
NEW_TOKENS = 64
REAL_PROMPTS = (
    "def fib(n):",
    "class Stack:\n    def __init__(self):\n",
    "import json\n\n\ndef load(path):\n",
    "for i in range(10):\n    print(",
    "The history of the steam engine begins",
    "A list of the largest rivers of Europe:",
    "Q: What is 12 times 7?\nA:",
    "Once upon a time",
)


def tiny_texts() -> dict[str, list[list[int]]]:
    """Return the output token ids of every tiny model, by architecture and method."""
    prompts = [prompt(length) for length in PROMPT_LENGTHS]
    texts = {}
    for name, architecture in {**ARCHITECTURES, **MORE_ARCHITECTURES}.items():
        target = Target(architecture.build())
        for method, plans in METHODS.items():
            length = LOOK_AHEAD[method]
            rows = look_ahead_rows(target, length) if length else None
            written = run(target, requests_for(prompts, plans, new=NEW_TOKENS), rows)
            texts[f"{name} {method}"] = written.texts
        texts[f"{name} generate"] = [generate(target.model, p, NEW_TOKENS)[0] for p in prompts]
    return texts


def real_texts() -> dict[str, list[list[int]]]:
    """Return the output token ids of the packaged model, by method."""
    lm = passlm.load("smollm2-135m", dtype="float32")
    texts = {}
    for method in ("ar", "two-pass", "one-pass"):
        outputs = lm.generate(list(REAL_PROMPTS), method=method, max_new_tokens=NEW_TOKENS)
        texts[f"smollm2-135m {method}"] = [list(output.tokens) for output in outputs]
    return texts


def main() -> int:
    """Write the outputs, compare them if requested, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compare", type=Path, metavar="OTHER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("transformers", "torch", "tokenizers", "numpy")}
    result = {"versions": versions, "texts": tiny_texts() | real_texts()}
    arguments.out.write_text(json.dumps(result) + "\n")
    if arguments.compare is None:
        return 0
    other = json.loads(arguments.compare.read_text())
    texts, others = result["texts"], other["texts"]
    unlike = [name for name in texts.keys() | others.keys() if texts.get(name) != others.get(name)]
    print(f"{len(texts)} sets of outputs, {other['versions']} and {versions}: {len(unlike)} differ")
    print("\n".join(sorted(unlike)))
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
