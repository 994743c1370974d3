"""Every command of passlm as a user runs it, on the real model and with little work.

Shared by the tests that run them in this environment and in one made from the built wheel.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/usage.md")]
SNIPPETS = [s for page in PAGES for s in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]

COMMANDS = {
    "generate": "generate PROMPT --max-new-tokens 8 --stats",
    "info": "info smollm2-135m",
    "profile": "profile --json",
    "bench": "bench --prompts PROMPTS --methods ar,two-pass,hf --limit 1 --max-new-tokens 8 --json",
    "advise": "advise --prompts PROMPTS --limit 2 --time-limit 100 --max-new-tokens 8 --json",
    "distill-data": "distill-data --prompts PROMPTS --out ANSWERS --max-new-tokens 8 --json",
    "train": "train --data TEXT --out ROWS --kind embeddings --lookahead-tokens 2 --steps 2 "
    "--sequences 1 --sequence-tokens 64 --anchors 4 --evaluate-texts 1 --json",
}


def environment() -> dict[str, str]:
    """Return the environment without what would show other sources than the installed ones."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def run(arguments: list[str], folder: Path, timeout: float = 300) -> str:
    """Run a program in `folder`; return its standard output, or fail with what it wrote."""
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    warned = [line for line in done.stderr.splitlines() if "deprecated" in line]
    assert not warned, done.stderr
    return done.stdout


def run_command(python: Path, name: str, folder: Path) -> str:
    """Run the command `name` of the passlm that is installed beside `python`."""
    prompts = folder / "prompts.jsonl"
    lines = [{"id": "a", "prompt": "def add(a, b):"}, {"id": "b", "prompt": "The sky is"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = folder / "text.py"
    text.write_text((ROOT / "tests" / "tiny.py").read_text(encoding="utf-8"))
    given = {
        "PROMPT": "def fib(n):",
        "PROMPTS": str(prompts),
        "ANSWERS": str(folder / "answers.jsonl"),
        "TEXT": str(text),
        "ROWS": str(folder / "rows"),
    }
    arguments = [given.get(word, word) for word in COMMANDS[name].split()]
    return run([str(python.with_name("passlm")), *arguments], folder)


def run_snippet(python: Path, snippet: str, folder: Path) -> str:
    """Run some lines of Python."""
    return run([str(python), "-W", "error::FutureWarning", "-c", snippet], folder)


def ask_server(python: Path, folder: Path) -> str:
    """Start the server, let it complete a prompt, stop it; return the completion."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    quickly = ["--no-compile", "--max-batch", "1"]  # compiling and measuring take minutes
    server = subprocess.Popen(
        [str(python.with_name("passlm")), "serve", "--port", port, *quickly],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().endswith(f":{port}\n")  # it says so when it is ready
        asked = {"model": "smollm2-135m", "prompt": "def fib(n):", "max_tokens": 8}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait(60)
    return text
