"""The report as a page: what batches, lengths, temperatures and kinds of questions changed."""

from __future__ import annotations

from typing import Any

import pytest
from test_bench_html import (
    cells,
    charts,
    column,
    made_results,
    made_run,
    parsed,
    places,
    plain_run,
    section,
    text,
)


def swept_results() -> dict[str, Any]:
    """Two methods in batches of two sizes, at two lengths and three temperatures."""
    runs = [
        one(
            batch_size=size,
            prompt_tokens=cut,
            temperature=temperature,
            tokens_per_second=speed * size + cut - temperature,
            slow_runs=size - 1,
            prompts_left_out=size % 2,
        )
        for size in (1, 4)
        for cut in (64, 256)
        for temperature in (0.0, 0.5, 1.0)
        for one, speed in ((plain_run, 30.0), (auto_run, 50.0))
    ]
    return made_results(*runs)


def auto_run(**more: Any) -> dict[str, Any]:
    return made_run("auto", **more)


@pytest.mark.parametrize(
    ("name", "charts_of_it", "best"),
    [
        ("batches", 2 * 3, "auto at 4 (text, 64 prompt tokens, greedy)"),
        ("lengths", 2 * 3, "auto at 256 (text, greedy)"),
        ("temperatures", 2 * 2, "auto at 0 (text, 64 prompt tokens)"),
    ],
)
def test_sweeps_are_drawn_with_their_numbers(name: str, charts_of_it: int, best: str) -> None:
    """Catches a curve that joins runs of different conditions, or numbers of another value."""
    results = swept_results()
    part = section(parsed(results), name)
    assert len(charts(part)) == charts_of_it
    assert best in text(part.find("h2"))
    assert text(part.find("h2")).count("(") <= 4
    for chart in charts(part):
        found = [path for path in chart.iter("path") if path.get("class") == "line"]
        assert len(found) == 2  # both methods
        assert all(len(places(line)) == (3 if name == "temperatures" else 2) for line in found)
    field = {"batches": "batch_size", "lengths": "prompt_tokens", "temperatures": "temperature"}[
        name
    ]
    told = sorted((row[3], row[4]) for row in cells(part))
    assert told == sorted((run[field], run["tokens_per_second"]) for run in results["runs"])


def test_values_are_marked_where_they_are() -> None:
    """Catches marks that are on no value, and ones written over each other."""
    lengths = (16, 32, 64, 256, 1024)
    runs = [plain_run(prompt_tokens=n) for n in lengths]
    runs += [plain_run(temperature=t) for t in (0.0, 0.5, 0.8)]
    root = parsed(made_results(*runs))
    for name, expected in (
        ("lengths", ["64", "256", "1024"]),
        ("temperatures", ["0", "0.5", "0.8"]),
    ):
        (chart,) = charts(section(root, name))
        marks = {
            text(t): float(t.attrib["x"]) for t in chart.iter("text") if t.get("class") == "middle"
        }
        assert sorted(marks, key=float) == expected
        (line,) = (path for path in chart.iter("path") if path.get("class") == "line")
        assert {x for x, _ in places(line)} >= set(marks.values())


def test_what_was_not_varied_is_not_drawn() -> None:
    """Catches charts of one point, and a column that says nothing."""
    root = parsed(made_results())
    sections = {part.get("id") for part in root.iter("section")}
    assert not {"batches", "lengths", "temperatures"} & sections
    heads = [text(head) for head in section(root, "runs").findall(".//thead/tr/th")]
    assert not {"batch", "prompt tokens"} & set(heads)
    swept = section(parsed(swept_results()), "runs")
    assert column(swept, "batch")[::6] == [1, 1, 4, 4]
    assert column(swept, "slow runs")[-1] == 3


def test_conditions_are_told_apart() -> None:
    """Catches batches held against single prompts in one chart."""
    root = parsed(swept_results())
    names = [text(caption) for caption in section(root, "speed-up").iter("figcaption")]
    assert len(names) == len(set(names)) == 12
    assert "text, 64 prompt tokens, batches of 4, temperature 0.5" in names
    told = [row[1] for row in cells(section(root, "speed-up"))]
    assert told[:2] == ["text, 64 prompt tokens"] * 2
    costs = [row[0] for row in cells(section(root, "costs"))]
    assert "mean pass of auto, text, 64 prompt tokens, greedy" in costs
    assert not [name for name in costs if "batches" in name]


def test_many_conditions_make_no_endless_title() -> None:
    """Catches a headline that nobody reads to its end."""
    runs = [made_run("auto", suite=f"s{n}", speedup_vs_ar=1.0 + n / 10) for n in range(1, 9)]
    told = text(parsed(made_results(*runs)).find(".//p[@class='headline']"))
    assert "auto 1.80 on s8" in told
    assert told.endswith("; and 4 more below.")


def test_categories_are_a_table_of_their_own() -> None:
    """Catches kinds in the wrong row, and a table for a suite that has one kind."""
    part = section(parsed(made_results(plain_run(), made_run("auto"))), "categories")
    assert text(part.find("h3")) == "text, greedy"
    assert cells(part) == [["coding", 2, 32.0, [1.25, 0.5]], ["writing", 1, 31.0, [1.125, 0.25]]]
    assert "auto 1.12 (writing) to 1.25 (coding) on text, greedy" in text(part.find("h2"))
    one = made_run("auto")
    one["categories"] = one["categories"][:1]
    assert (
        parsed(made_results(plain_run(categories=[]), one)).find(".//section[@id='categories']")
        is None
    )


def test_first_runs_are_told_once() -> None:
    """Catches the first run of a method told again for every suite."""
    runs = [plain_run(), made_run("auto"), made_run("auto", suite="code", first_run_seconds=9.0)]
    runs.append(made_run("auto", batch_size=4, first_run_seconds=3.0))
    part = section(parsed(made_results(*runs)), "start")
    assert cells(part) == [["ar", 0.5, 0.75], ["auto", 0.5, 0.75], ["auto, batches of 4", 0.5, 3]]
    assert "loaded 1.5 s after the process started" in text(part.find("h2"))
    assert "loaded in 1.2 s" in text(part)
    engines = {"vllm": {"engine": "vLLM 1", "load_seconds": 31.25, "idle_cores": None}}
    told = text(section(parsed(made_results(*runs, engines=engines)), "start"))
    assert "other engines started in vllm 31.2 s" in told


def test_rules_and_what_they_leave_out_are_told() -> None:
    """Catches figures that do not say how outliers, batches and short prompts are dealt with."""
    told = text(section(parsed(swept_results()), "runs"))
    for words in (
        "No run is dropped, however slow",
        "Runs at less than 1/2 of their method's median tokens per second: 36 of 36",
        "divided by the time of the whole batch",
        "text, 64 prompt tokens: prompts left out because they are shorter: 5",
        "text, batches of 8: not run, because there are only 3 prompts",
        "text, 64 prompt tokens: prompts left out after the last full batch: 1",
        "chat: only the first turn of each chat was run",
    ):
        assert words in told, words
    assert "2026-01-02" in text(section(parsed(swept_results()), "source"))
