"""The commands and snippets of README and docs/usage.md, run as written with the real model."""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/usage.md")]
README = PAGES[0]
SNIPPETS = [s for page in PAGES for s in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
SHELL = [s for page in PAGES for s in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
COMMANDS = [
    line
    for block in SHELL
    for line in block.splitlines()
    if line.startswith("passlm ")
    and not line.startswith("passlm serve ")  # it runs until it is stopped
    and not re.search(r"\b[A-Z]{3,}\b", line.split('"')[-1])
]
((SERVER, REQUEST),) = [
    found
    for s in SHELL
    for found in re.findall(r"^(passlm serve .*?)\n(curl .*?)\n$", s, re.DOTALL)
]

pytestmark = [pytest.mark.model, pytest.mark.readme]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_no_placeholder_is_left() -> None:
    """Catches a document that was to be filled in."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.md")]
    assert [page.name for page in pages if "@@" in page.read_text(encoding="utf-8")] == []


def test_the_readme_has_what_is_run_here() -> None:
    """Catches a change of the pages' form that leaves nothing to test."""
    assert len(SNIPPETS) == 2
    assert len(COMMANDS) == 5


def test_the_readme_is_one_page() -> None:
    """Catches a README that grows again: further text belongs in docs/usage.md."""
    assert len(README.splitlines()) <= 100


def test_the_links_lead_somewhere() -> None:
    """Catches links of the front pages to files that were moved."""
    for page in ("README.md", "CONTRIBUTING.md", "docs/usage.md", "docs/design.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        local = [target for target in targets if "://" not in target]
        missing = [t for t in local if not (ROOT / page).parent.joinpath(t).exists()]
        assert not missing, f"{page} links to {missing}"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["python", "transformers"])
def test_snippet(snippet: str) -> None:
    """Catches an example that no longer fits the code."""
    done = run([sys.executable, "-c", snippet])
    assert done.returncode == 0, done.stderr
    assert "return" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    """Catches a command that does not run as written."""
    installed = Path(sys.executable).with_name("passlm")
    done = run([str(installed), *shlex.split(command)[1:]])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_server_answers() -> None:
    """Catches a request that the server, started as written, does not answer."""
    installed = Path(sys.executable).with_name("passlm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    quickly = ["--no-compile", "--max-batch", "1"]  # compiling and measuring take minutes
    started = [*shlex.split(SERVER.replace("8000", port))[1:], *quickly]
    server = subprocess.Popen([str(installed), *started], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().endswith(f":{port}\n")  # it says so when it is ready
        done = run(["sh", "-c", REQUEST.replace("8000", port)])
    finally:
        server.terminate()
        server.wait(60)
    assert "return" in json.loads(done.stdout)["choices"][0]["text"], done.stderr


def test_demo_writes_equal_texts() -> None:
    """Catches `make demo` failing, and decoding with the real model that is not lossless."""
    done = run([sys.executable, "examples/demo.py"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 4
