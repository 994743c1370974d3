"""docs/design.md and CONTRIBUTING.md name the packages, modules and tests that there are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
SECTION = DESIGN.split("## Packages\n")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| `(\w+)/` \| (.*) \|$", SECTION, re.MULTILINE))
BY_MODULE = tuple(name for name in ROWS if name not in ("cli", "bench", "train", "serve"))


def test_the_drawing_has_the_order_of_the_import_contract() -> None:
    """Catches a package that moved in the contract and not in the drawing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    wanted = [name.strip().removeprefix("passlm.") for layer in layers for name in layer.split("|")]
    drawing = SECTION.split("```text\n")[1].split("```")[0]
    cells = [cell for line in drawing.splitlines() for cell in re.split(r"\s{2,}", line.strip())]
    assert [cell for cell in cells if re.fullmatch(r"\w+", cell)] == wanted


@pytest.mark.parametrize("package", BY_MODULE)
def test_each_module_is_named(package: str) -> None:
    """Catches a module that was added, renamed or removed without the table's knowing."""
    folder = ROOT / "src/passlm" / package
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    named = set(re.findall(r"`(\w+)`", ROWS[package]))
    assert modules - named == set(), f"list them in the table of docs/design.md, {package}/"
    gone = named - modules - {"generate", "cpp"}  # transformers' own, and a folder
    assert gone == set(), f"remove them from the table of docs/design.md, {package}/"


def test_the_tests_named_for_contributors_exist() -> None:
    """Catches a test file that was renamed and not in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\btest_[\w*]+\.py", text))
    assert named
    assert [name for name in sorted(named) if not list((ROOT / "tests").glob(name))] == []
