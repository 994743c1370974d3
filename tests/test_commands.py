"""Every command once, on the real model: what has to work under each set of pinned versions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from user_commands import COMMANDS, SNIPPETS, ask_server, run_command, run_snippet

PYTHON = Path(sys.executable)

pytestmark = [pytest.mark.model, pytest.mark.command]


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, tmp_path: Path) -> None:
    """Catches a command that does not work with the installed versions, or warns of them."""
    assert run_command(PYTHON, name, tmp_path).strip()


def test_server(tmp_path: Path) -> None:
    """Catches a server that does not start or does not answer with the installed versions."""
    assert ask_server(PYTHON, tmp_path)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["python", "transformers"])
def test_snippet(snippet: str, tmp_path: Path) -> None:
    """Catches the library or the hook failing with the installed versions."""
    assert "return" in run_snippet(PYTHON, snippet, tmp_path)
