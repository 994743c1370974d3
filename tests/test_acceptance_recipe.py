"""The recipe that counts accepted candidates, on a tiny model of bytes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from byte_model import CONTEXT, ROWS, save_folders

from passlm.bench.suites.tasks import Task
from passlm.generate import Generator, load
from passlm.lookahead.trained import load as load_rows
from passlm.outputs import Stats

SCRIPT = Path(__file__).parents[1] / "recipes" / "acceptance.py"
NEW_TOKENS = 24
LONGEST = CONTEXT - NEW_TOKENS
TEXTS = ["def f(x):", "a", "x" * LONGEST, "the quick brown fox", "y" * (LONGEST + 1), "[1, 2, "]
SUITES = {
    "code": [Task("code", str(number), prompt=text) for number, text in enumerate(TEXTS)],
    "chat": [Task("chat", "81", messages=({"role": "user", "content": "Hello"},))],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("acceptance")
    save_folders(place)
    return place


@pytest.fixture(scope="module")
def lm(place: Path) -> Generator:
    return load(str(place / "model"), lookahead=place / "rows", dtype="float32")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with suites of a few prompts."""
    spec = importlib.util.spec_from_file_location("acceptance_recipe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "load_suite", lambda name, *_: SUITES[name])
    return module


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    """A command line; a flag given again in `more` wins."""
    return [
        *("--model", str(place / "model"), "--lookahead", str(place / "rows")),
        *("--dtype", "float32", "--suite", "code,chat", "--lookahead-tokens", "3"),
        *("--max-new-tokens", str(NEW_TOKENS), "--batch", "2", "--out", str(out)),
        *more,
    ]


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def prompts(suite: str) -> list[Any]:
    """What of a suite fits into the context, as `generate` takes it."""
    every = [task.prompt or list(task.messages or ()) for task in SUITES[suite]]
    return [prompt for prompt in every if len(prompt) <= LONGEST]


def test_counts_are_those_of_each_prompt_alone(
    recipe: ModuleType, place: Path, lm: Generator, tmp_path: Path
) -> None:
    """Catches passes counted for the wrong prompt, lost, or changed by the batch; a judge, draft
    or temperature that is not passed on; prompts that are cut or not counted as skipped."""
    out = tmp_path / "a.json"
    assert recipe.main(arguments(place, out, "--seed", "5", "--judge", "rejection", "coupled")) == 0
    rows = read(out)["rows"]
    assert len(rows) == 2 * (1 + 4)
    assert [row["temperature"] for row in rows[:5]] == [0, 0.8, 0.8, 0.8, 0.8]
    assert len({row["accepted_length"] for row in rows[:5]}) > 2
    for row in rows:
        drawn = {name: row[name] for name in ("temperature", "judge", "draft")}
        options = {"max_new_tokens": NEW_TOKENS, "top_k": 10, "lookahead_tokens": 3, **drawn}
        total = Stats.total(
            [
                lm.generate(prompt, method="two-pass", seed=5 + number, **options)[0].stats
                for number, prompt in enumerate(prompts(row["suite"]))
            ]
        )
        assert row["prompts"] == len(prompts(row["suite"]))
        assert row["skipped"] == (row["suite"] == "code")
        assert (row["tokens"], row["judging_passes"]) == (total.tokens, total.judging_passes)
        counts = [round(share * total.judging_passes) for share in row["accepted_by_position"]]
        assert counts == total.accepted_by_position
        assert row["accepted_length"] == pytest.approx(sum(row["accepted_by_position"]))
        shares = zip(row["accepted_of_reached"], total.judged_by_position, strict=True)
        assert [round((share or 0) * reached) for share, reached in shares] == counts


def test_batch_stays_full(recipe: ModuleType, lm: Generator) -> None:
    """Catches a batch that is let run out, or that grows past its size."""
    widths = []

    class Watched(recipe.Decoder):  # type: ignore[name-defined,misc]
        def step(self) -> Any:
            widths.append(len(self.rows))
            return super().step()

    assert lm.look_ahead is not None
    decoder = Watched(lm.target, recipe.decoder_for(lm).look_ahead)
    plan = recipe.strategy("two-pass", 3)
    greedy = recipe.SamplingParams()
    requests = [recipe.Request.of(b"abc", greedy, new, plan) for new in (1, 20, 4, 9, 12)]
    counts = recipe.decode(decoder, requests, 2)
    assert [count.tokens for count in counts] == [1, 20, 4, 9, 12]
    assert set(widths) == {1, 2}
    assert widths == sorted(widths, reverse=True)  # 1 only when none is waiting


def test_resume_keeps_what_is_there(
    recipe: ModuleType, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows measured twice, lost at an interruption, or doubled."""
    whole, out = tmp_path / "whole.json", tmp_path / "part.json"
    assert recipe.main(arguments(place, whole)) == 0
    measured: list[Any] = []
    measure = recipe.measure

    def interrupted(*given: Any) -> Any:
        measured.append(given)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(recipe, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(arguments(place, out))
    assert len(read(out)["rows"]) == 2
    assert recipe.main(arguments(place, out, "--resume", "--batch", "3")) == 0
    assert len(measured) == 2 + 1 + 8

    def without_time(file: Path) -> list[Any]:
        return [{**row, "seconds": 0} for row in read(file)["rows"]]

    assert without_time(out) == without_time(whole)
    assert len(read(out)["provenance"]) == 2
    assert out.with_suffix(".md").read_text() == whole.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((), "exists: choose another"),
        (("--resume", "--max-new-tokens", "8"), "its max_new_tokens is 24, not 8"),
        (("--resume", "--lookahead-tokens", "2"), "its lookahead_tokens is 3, not 2"),
        (("--resume", "--limit", "1"), "its limit is None, not 1"),
        (("--resume", "--top-k", "5"), "its top_k is 10, not 5"),
        (("--resume", "--lookahead", "fixed-token"), "its lookahead is 'rows', not 'fixed-token'"),
    ],
)
def test_other_settings_are_refused(
    recipe: ModuleType,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    reason: str,
) -> None:
    """Catches rows of several settings in one file, and results that are overwritten."""
    out = tmp_path / "a.json"
    line = arguments(place, out, "--suite", "chat", "--temperature", "0")
    assert recipe.main(line) == 0
    before = out.read_bytes()
    assert recipe.main([*line, *more]) == 2
    assert reason in capsys.readouterr().err
    assert out.read_bytes() == before


def test_other_rows_under_the_same_name_are_refused(
    recipe: ModuleType, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file that mixes figures from before and after a training, and a wrong card."""
    out = tmp_path / "a.json"
    line = arguments(place, out, "--suite", "chat", "--temperature", "0")
    assert recipe.main(line) == 0
    other = load_rows(place / "rows")
    other.embeddings.data.add_(1)
    other.save(tmp_path / "rows")
    changed = ("--lookahead", str(tmp_path / "rows"))
    assert recipe.main([*line, *changed, "--resume"]) == 2
    assert "its lookahead_sha256 is" in capsys.readouterr().err
    assert recipe.main([*line, "--resume", "--card", str(tmp_path / "rows")]) == 2
    assert "holds other look-ahead files" in capsys.readouterr().err


def test_compiled_and_eager_rows_are_not_mixed(
    recipe: ModuleType,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a flag that is ignored, and a file whose rows ran by passes that round otherwise."""
    asked: list[bool] = []

    def loaded(*names: Any, compile: bool, **options: Any) -> Generator:
        asked.append(compile)
        return load(*names, **options)

    monkeypatch.setattr(recipe, "load", loaded)
    out = tmp_path / "a.json"
    line = arguments(place, out, "--suite", "chat", "--temperature", "0")
    assert recipe.main([*line, "--compile"]) == 0
    assert recipe.main([*line, "--resume"]) == 2
    assert "its compile is True, not None" in capsys.readouterr().err
    assert recipe.main([*line, "--compile", "--resume"]) == 0
    assert asked == [True, False, True]


@pytest.mark.parametrize("content", ["{broken", "[]", '{"provenance": {}, "rows": [{}]}'])
def test_files_of_others_are_refused(
    recipe: ModuleType,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    """Catches a traceback, or a file of another kind that is written over."""
    out = tmp_path / "a.json"
    out.write_text(content)
    assert recipe.main(arguments(place, out, "--resume")) == 2
    assert "does not hold results of this recipe" in capsys.readouterr().err
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--suite", "codes"), "no suite 'codes'"),
        (("--batch", "0"), "batch is 0"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "0.8", "--card", "x"), "give temperature 0"),
        (("--lookahead", "none"), "nothing to measure"),
        (("--lookahead-tokens", str(ROWS + 1)), f"rows for 1 to {ROWS}"),
        (("--max-new-tokens", str(CONTEXT)), "no prompt of suite 'code' leaves room"),
        (("--judges", "coupled"), "did you mean --judge?"),
    ],
)
def test_wrong_usage_is_one_line(
    recipe: ModuleType,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    reason: str,
) -> None:
    """Catches a traceback, and mistakes that are noticed after an hour."""
    assert recipe.main(arguments(place, tmp_path / "a.json", *more)) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_fixed_token_is_measured(recipe: ModuleType, place: Path, tmp_path: Path) -> None:
    """Catches the baseline lost, which needs no look-ahead files."""
    out = tmp_path / "a.json"
    more = ("--lookahead", "fixed-token", "--temperature", "0")
    assert recipe.main(arguments(place, out, *more)) == 0
    content = read(out)
    assert content["settings"]["lookahead"] == "fixed-token"
    assert all(row["judging_passes"] for row in content["rows"])


def test_table_has_a_line_for_each_suite(recipe: ModuleType, place: Path, tmp_path: Path) -> None:
    """Catches figures in the wrong column."""
    out = tmp_path / "a.json"
    assert recipe.main(arguments(place, out, "--judge", "coupled")) == 0
    head, _, code, chat = out.with_suffix(".md").read_text().splitlines()[2:]
    assert head == (
        "| suite | prompts | greedy | T = 0.8, coupled, sampled drafts "
        "| T = 0.8, coupled, greedy drafts |"
    )
    rows = read(out)["rows"]
    assert [row["draft"] for row in rows[:3]] == ["greedy", "sampled", "greedy"]
    for name, count, told, found in (("code", 5, code, rows[:3]), ("chat", 1, chat, rows[3:])):
        cells = [f"{row['accepted_length']:.3f}" for row in found]
        assert told == f"| {name} | {count} | {' | '.join(cells)} |"


def test_greedy_figures_go_into_the_card(recipe: ModuleType, place: Path, tmp_path: Path) -> None:
    """Catches lost figures of the card, changed embeddings, and a README that lacks the new."""
    folder, out = tmp_path / "rows", tmp_path / "a.json"
    rows = load_rows(place / "rows")
    rows.card = type(rows.card)(
        **{**vars(rows.card), "accepted_length": {"held-out text": 0.5}},
    )
    rows.save(folder)
    tensors = (folder / "lookahead.safetensors").read_bytes()
    line = arguments(place, out, "--lookahead", str(folder), "--card", str(folder))
    assert recipe.main(line) == 0
    found = load_rows(folder).card
    names = [f"{suite}, greedy, {NEW_TOKENS} tokens, L=3" for suite in ("code", "chat")]
    assert list(found.accepted_length) == ["held-out text", *names]
    first = read(out)["rows"][0]
    noted = found.accepted_length[names[0]]
    assert noted["accepted_length"] == round(first["accepted_length"], 3)
    assert noted["by_position"] == [round(share, 3) for share in first["accepted_by_position"]]
    assert noted["prompts"] == 5
    assert (folder / "lookahead.safetensors").read_bytes() == tensors
    readme = (folder / "README.md").read_text()
    assert f"| {names[0]}: accepted length | {noted['accepted_length']:.3f} |" in readme
