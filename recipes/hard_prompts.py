"""Write prompts that are hard to draft for, as JSONL: random tokens, random Unicode, base64.

`passlm bench --prompts FILE` shows with these prompts whether `--method auto` is ever slower than
plain decoding. A temperature of 1.5 on any suite tests the same.
"""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path

from passlm.loading.models import DEFAULT_MODEL, load_model

EACH = 4
TOKENS, BYTES, LETTERS = 64, 120, 80


def main() -> int:
    """Write the file named on the command line and return the exit code."""
    if len(sys.argv) != 2:
        print("usage: hard_prompts.py FILE", file=sys.stderr)
        return 2
    rng = random.Random(0)
    tokenizer = load_model(DEFAULT_MODEL).tokenizer
    lines = []
    for number in range(EACH):
        ids = [rng.randrange(100, len(tokenizer)) for _ in range(TOKENS)]
        letters = (chr(rng.choice((rng.randrange(0x400, 0x2FFF), 32))) for _ in range(LETTERS))
        prompts = {
            "tokens": tokenizer.decode(ids),
            "unicode": "".join(letters),
            "base64": base64.b64encode(rng.randbytes(BYTES)).decode(),
        }
        lines += [{"name": f"{kind}-{number}", "prompt": text} for kind, text in prompts.items()]
    Path(sys.argv[1]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
