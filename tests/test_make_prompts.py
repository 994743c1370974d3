"""The recipe that makes prompts, on a small folder of text."""

import ast
import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "make_prompts.py"

MODULE = '''
import math


def area_of_ring_{0}(outer, inner):
    """Return the area of a ring between two circles around the same point, given both radii."""
    if inner > outer:
        outer, inner = inner, outer
    if inner < 0:
        raise ValueError("a radius cannot be negative, but the smaller one is")
    large = math.pi * outer * outer
    small = math.pi * inner * inner
    difference = large - small
    return difference


class Ring{0}:
    """A ring that knows its radii and can be asked for its area and the lengths of its edges."""

    def __init__(self, outer, inner):
        self.outer = outer
        self.inner = inner

    def area(self):
        return area_of_ring_{0}(self.outer, self.inner)

    def edges(self):
        return [2 * math.pi * self.outer, 2 * math.pi * self.inner]

    def width(self):
        return self.outer - self.inner
'''
LEAD = (
    "Mount Example {0} (also Peak {0}) is a mountain in the north of an invented country. "
    "It was first climbed long ago, and many people have visited it since, mostly in summer. "
    "Its slopes are covered with forests of pine, and a railway leads to a hut below its summit, "
    "where travellers rest before the last part of the way, which is steep and often windy."
)


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_prompts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_prompts"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


make_prompts = _load()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for folder in ("code/stdlib", "code/codeio", "text/wikipedia", "text/factbook"):
        (root / folder).mkdir(parents=True)
    for number in range(30):
        (root / f"code/stdlib/m{number}.py").write_text(MODULE.format(number))
    solved = [{"text": MODULE.format(f"solved_{number}")} for number in range(30)]
    (root / "code/codeio/codeio.jsonl").write_text("\n".join(map(json.dumps, solved)) + "\n")
    leads = [{"text": LEAD.format(number)} for number in range(40)]
    (root / "text/wikipedia/leads.jsonl").write_text("\n".join(map(json.dumps, leads)) + "\n")
    (root / "text/factbook/xx.txt").write_text("Background\n" + "Long history. " * 40)
    return root


def content(record: dict[str, Any]) -> str:
    return str(record["prompt"] if "prompt" in record else record["messages"][0]["content"])


def test_shares_lengths_and_forms(text: Path) -> None:
    """Catches a missing kind, a duplicate, an overlong prompt, or a chat without messages."""
    made = make_prompts.records(text, 100, 0)
    shares = {kind.name: kind.share for kind in make_prompts.KINDS}
    assert Counter(record["kind"] for record in made) == shares
    assert len({record["id"] for record in made}) == len({content(r) for r in made}) == 100
    assert all(16 <= len(content(record)) <= 1600 for record in made)
    chats = {record["kind"] for record in made if "messages" in record}
    assert chats == {"question", "task", "problem", "writing"}


def test_the_seed_decides(text: Path) -> None:
    """Catches an order that depends on sets, the file system or the run."""
    first = make_prompts.records(text, 60, 1)
    assert make_prompts.records(text, 60, 1) == first
    assert make_prompts.records(text, 60, 2) != first


def test_the_kinds_are_mixed(text: Path) -> None:
    """Catches a file sorted by kind, whose first part would be of one kind."""
    made = make_prompts.records(text, 100, 0)
    assert len({record["kind"] for record in made[:40]}) >= 5


def test_functions_lack_only_a_body(text: Path) -> None:
    """Catches a prompt that is cut inside its docstring or that goes on into the body."""
    made = make_prompts.functions(text, random.Random(0))
    for prompt in (next(made) for _ in range(80)):
        assert prompt.endswith("\n")
        function = ast.parse(prompt).body[-1]
        assert isinstance(function, ast.FunctionDef)
        assert len(function.body) == 1
        assert ast.get_docstring(function)


@pytest.mark.parametrize("task", make_prompts.TASKS, ids=lambda task: task.names.split()[0])
def test_every_task_can_be_worded_and_computed(task: Any) -> None:
    """Catches a description with a wrong place, or an answer that fails on random arguments."""
    rng = random.Random(0)
    for _ in range(20):
        wording = make_prompts.word_task(task, rng)
        assert len(set(wording.arguments)) == len(wording.kinds)
        assert all(name in wording.text for name in wording.arguments)
        call, value = wording.example(rng)
        ast.literal_eval(value)
        ast.parse(call)
        for name in task.names.split():
            assert not make_prompts.WELL_KNOWN.search(name)


def test_templates_name_words_that_there_are() -> None:
    """Catches a key without a pool, and one that is left in the text."""
    rng = random.Random(0)
    for template in make_prompts.PROBLEMS + make_prompts.WRITING:
        filled = make_prompts.fill(template, rng, {"sequence": "1, 2", "lead": "A text."})
        assert "{" not in filled


@pytest.mark.parametrize(
    ("lead", "name", "person"),
    [
        ("Basalt (bass-alt) is a rock. Most basalt is dark.", "basalt", False),
        ("A kettle, or pot, is a vessel.", "a kettle", False),
        ("The Elbe is a river in Europe.", "the Elbe", False),
        ("Ada Example (1815) was an English mathematician. She wrote.", "Ada Example", True),
    ],
)
def test_subjects(lead: str, name: str, person: bool) -> None:
    """Catches a subject in the wrong case, or a person taken for a thing."""
    found = make_prompts.subject_of(lead, frozenset(["basalt"]))
    assert found is not None
    assert (found.name, found.person) == (name, person)


def test_leads_without_a_plain_subject_are_left_out() -> None:
    """Catches questions about half a sentence."""
    lead = "In the theory of everything, the rule of all that there may be is a law."
    assert make_prompts.subject_of(lead, frozenset()) is None


def test_code_is_cut_at_a_line_end() -> None:
    """Catches a cut inside a line, or one that leaves nothing to write."""
    cut = make_prompts.cut_at_line("x = 1234567\n" * 80)
    assert cut is not None
    assert cut.endswith("\n")
    assert 350 <= len(cut) <= 600
    assert make_prompts.cut_at_line("x = 1234567\n" * 20) is None


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    """Catches a traceback, or an empty file, where the text was not fetched."""
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "fetch_text.py" in done.stderr
    assert not out.exists()
