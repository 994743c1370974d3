"""The README's table of results: what it shows, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import readme_table


def entry(method: str, suite: str, temperature: float = 0.0, **changed: Any) -> dict[str, Any]:
    own = {
        "method": method,
        "suite": suite,
        "temperature": temperature,
        "lookahead_tokens": 2 if method == "two-pass" else 0,
        "engine": "llama.cpp" if method == "llama-cpp" else None,
        "prompts": 4,
        "tokens_per_second": 40.0,
        "speedup_vs_ar": 1.0 if method == "ar" else 1.25,
        "identical_to_ar": None if method == "llama-cpp" else 1.0,
    }
    return own | changed


def write(folder: Path, name: str, runs: list[dict[str, Any]], **changed: Any) -> None:
    results = {
        "complete": True,
        "settings": {"compiled": True, "dtype": "bfloat16", "max_new_tokens": 64},
        "provenance": {"commit": "abc123", "machine": {"threads": 2, "processor": "CPU"}},
        "runs": runs,
    }
    (folder / name).mkdir(parents=True)
    (folder / name / "results.json").write_text(json.dumps(results | changed))


def test_one_table_of_methods_and_suites(tmp_path: Path) -> None:
    """Catches figures in the wrong row or column, and methods in the order of the run."""
    drawn = [entry("ar", "code", 0.8), entry("auto", "code", 0.8, speedup_vs_ar=1.1)]
    greedy = [
        entry("hf", "code", identical_to_ar=0.5, speedup_vs_ar=0.3),
        entry("auto", "code", speedup_vs_ar=1.5),
        entry("two-pass", "code"),
        entry("ar", "code"),
        entry("ar", "text", tokens_per_second=50.0),
    ]
    write(tmp_path, "cpu", greedy + drawn)
    made = readme_table.measured(tmp_path).splitlines()
    assert made[0] == "| greedy / temperature 0.8 | code | text |"
    assert made[2] == "| plain decoding, tokens/s | 40 / 40 | 50 / - |"
    assert made[3] == "| two-pass, L = 2 | 1.25 / - | - / - |"
    assert made[4] == "| **auto** (the default) | 1.50 / 1.10 | - / - |"
    assert made[5] == "| transformers' `generate` | 0.30 / - | - / - |"
    said = "Texts identical to plain decoding's: all of passlm's methods, 50 % of transformers'."
    assert made[7] == said
    assert "commit `abc123`" in made[8]


def test_other_engines_come_from_a_folder_of_their_own(tmp_path: Path) -> None:
    """Catches a second folder's plain decoding taking the place of the first one's."""
    write(tmp_path, "a", [entry("ar", "code"), entry("auto", "code")])
    engine = [entry("ar", "code", tokens_per_second=30.0), entry("llama-cpp", "code")]
    write(tmp_path, "b", engine)
    made = readme_table.measured(tmp_path)
    assert "| plain decoding, tokens/s | 40 |" in made
    assert "| llama.cpp, 4-bit weights | 1.25 |" in made


def test_not_all_texts_equal(tmp_path: Path) -> None:
    """Catches a claim that texts are equal where some are not."""
    runs = [entry("ar", "code"), entry("auto", "code", identical_to_ar=0.75)]
    write(tmp_path, "cpu", runs)
    assert "decoding's: 75 % of passlm's methods." in readme_table.measured(tmp_path)


@pytest.mark.parametrize(
    ("runs", "changed", "message"),
    [
        ([entry("ar", "code"), entry("auto", "text")], {"complete": False}, "unfinished"),
        (
            [entry("ar", "code"), entry("auto", "text")],
            {"provenance": {"commit": "def456"}},
            "several revisions",
        ),
        ([entry("ar", "code"), entry("auto", "code")], {}, "repeats auto"),
    ],
    ids=["unfinished", "revisions", "repeated"],
)
def test_what_is_no_single_run_is_refused(
    runs: list[dict[str, Any]], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Catches a table put together from runs that do not belong together."""
    write(tmp_path, "a", [entry("ar", "code"), entry("auto", "code")])
    write(tmp_path, "b", runs, **changed)
    with pytest.raises(SystemExit, match=message):
        readme_table.measured(tmp_path)


def test_no_results(tmp_path: Path) -> None:
    """Catches an empty table where the run was never made."""
    with pytest.raises(SystemExit, match=r"run recipes/current\.sh"):
        readme_table.measured(tmp_path)


def test_rest_of_the_readme_stays() -> None:
    """Catches text around the table that is lost when the table is written anew."""
    text = f"before\n{readme_table.BEGIN}old\n{readme_table.END}\nafter\n"
    made = readme_table.readme(text, "new\n")
    assert made == f"before\n{readme_table.BEGIN}new\n{readme_table.END}\nafter\n"
