"""The recipes that measure the server, with a tiny model of bytes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_model import save_folders

from passlm.bench.suites.tasks import Task

pytest.importorskip("uvicorn", reason="the recipes need the server: the extra 'serve'")

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model, rows = save_folders(tmp_path_factory.mktemp("served"))
    engine = ["--model", str(model), "--lookahead", str(rows), "--dtype", "float32"]
    return [*engine, "--no-compile"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A recipe, imported as it is when it is run: beside what it imports."""
    monkeypatch.syspath_prepend(str(RECIPES))
    module = __import__(name)
    monkeypatch.delitem(sys.modules, name)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load_test"])
def test_load(recipe: Any, flags: list[str], tmp_path: Path) -> None:
    """Catches clients that lose requests, and a report that hides what failed."""
    out = tmp_path / "load"
    limits = ["--longest", "100", "--max-new-tokens", "40"]
    briefly = ["--clients", "6", "--warm-up", "0", "--minutes", "0.04", *limits, "--out", str(out)]
    assert recipe.main([*briefly, "--", *flags, "--max-batch", "2", "--max-waiting", "3"]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["finished"] > 0
    assert report["hung_up"] > 0
    assert report["equal_alone"] == report["compared_alone"] == report["finished"]
    told = sum(report[kind] for kind in ("finished", "hung_up", "refused", "failed"))
    assert told == report["sent"]
    assert report["failed"] == report["rows_left"] == 0
    assert "| rows left | 0 |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["load_test"])
def test_memory_is_compared_behind_the_warm_up(recipe: Any) -> None:
    """Catches a cache that fills while the server warms up counted as a leak, and a leak that is
    not: memory grows for 2 minutes to 200, or all the time."""
    stays: list[Any] = [(at, 100 + min(at, 120) * 100 // 120, {}) for at in range(420)]
    leaks: list[Any] = [(at, 1000 + at, {}) for at in range(420)]
    assert recipe.memory_growth(stays, 120, 420) == 0
    assert recipe.memory_growth(stays, 0, 420) > 0.3
    assert recipe.memory_growth(leaks, 120, 420) > 0.1
    assert recipe.memory_growth(stays, 120, 299) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["serve_speed"])
def test_speed(
    recipe: Any, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stream that is not counted, and ways that do not get the same texts."""
    user = {"role": "user", "content": "Hello"}
    tasks = [Task("text", "a", prompt="abc"), Task("text", "b", messages=(user,))]
    monkeypatch.setattr(recipe, "load_suite", lambda *_: tasks)
    out = tmp_path / "speed"
    briefly = ["--suite", "text", "--streams", "1", "2", "--rounds", "1", "--max-new-tokens", "24"]
    assert recipe.main([*briefly, "--out", str(out), "--", *flags]) == 0
    one, two = json.loads(out.with_suffix(".json").read_text())["rows"]
    for method in ("ar", "auto"):
        assert one[method]["tokens"] == one[f"inside {method}"]["tokens"] == 48
        assert 24 <= two[method]["tokens"] <= 48  # until the first of them has no more to ask
        assert one["server_over_inside"][method] > 0
    assert one["ar"]["passes"] == 48
    assert "One stream of the server" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["serve_speed"])
def test_what_comes_once_a_stream_has_nothing_to_ask_does_not_count(
    recipe: Any, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the slowest text of a round taken for many streams, and streams that are idle."""
    answer = recipe.Answer(tokens=40, passes=20, events=[1.0, 2.0, 3.0, 4.0])
    assert [answer.share(until) for until in (0.5, 2.0, 9.0)] == [0.0, 0.5, 1.0]
    assert recipe.main(["--prompts", "6", "--streams", "1", "8", "--", *flags]) == 2
    assert "--prompts is 6: 8 streams need at least 8" in capsys.readouterr().err
