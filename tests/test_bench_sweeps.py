"""Batches, cut prompts, kinds of questions, first runs: what is run, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_llama import small_llama
from test_bench import NEW_TOKENS, arguments, folder, in_folder, lm, samples_of, stub

from passlm.bench.engines.decoding import PlanDecoding, Record, TimedTarget
from passlm.bench.engines.methods import Method
from passlm.bench.measuring.measure import Prompt, Sample, interleave, summarize, warm_up
from passlm.bench.reports import notes
from passlm.bench.reports.markdown import markdown
from passlm.bench.reports.sweeps import BATCHES, LENGTHS, STEPS, SWEEPS, TEMPERATURES, Conditions
from passlm.bench.suites.prompts import Collector, _without_trailing_space
from passlm.bench.suites.tasks import Task
from passlm.cli import main
from passlm.decoding.strategies import Strategy, autoregressive
from passlm.generate import Generator
from passlm.outputs import Stats
from passlm.params import SamplingParams

__all__ = ["folder", "lm"]


def given(count: int, cut: int | None = None, category: str | None = None) -> list[Prompt]:
    return [Prompt("own", f"p{n}", (5 + n, 6), None, category, cut) for n in range(count)]


def of_size(size: int, name: str = "ar") -> Method:
    return replace(stub(name), batch_size=size)


def sampled(prompt: int, method: Method, tokens: int, seconds: float, repeat: int = 0) -> Sample:
    return Sample(prompt, method, Record((1,) * tokens, seconds, Stats(tokens=tokens)), repeat)


# What is run


def test_batches_take_their_turn_at_their_last_prompt() -> None:
    """Catches a batch run before or long after its prompts alone, one that mixes lengths, and a
    last one that is not whole."""
    prompts = [p for n in range(5) for p in (given(5, 2)[n], given(5, 4)[n])]
    turns = list(interleave(prompts, [of_size(1), of_size(2), of_size(4)], seed=0, repeats=2))
    for turn in turns:
        assert len(turn.numbers) == turn.method.batch_size
        assert len({prompts[number].cut for number in turn.numbers}) == 1
        assert turn.seeds == tuple(number + 10 * turn.repeat for number in turn.numbers)
    last = [turn.numbers[-1] for turn in turns]
    assert last == sorted(last)
    for cut in (2, 4):
        for size, whole in ((1, 5), (2, 4), (4, 4)):
            ran = [
                prompts[number].name
                for turn in turns
                for number in turn.numbers
                if (turn.method.batch_size, turn.repeat, prompts[number].cut) == (size, 1, cut)
            ]
            assert ran == [f"p{n}" for n in range(whole)]


def test_a_batch_is_one_run(lm: Generator) -> None:
    """Catches texts of a batch taken for independent runs, a speed that counts its time for each of
    them, and one held against plain decoding of single prompts."""
    alone, ar, fast = of_size(1), of_size(2), of_size(2, "two-pass")
    samples = [sampled(n, alone, 4, 1.0) for n in range(5)]
    samples += [sampled(n, ar, 4, 1.0) for n in range(4)]
    samples += [sampled(n, fast, 4 if n % 2 else 6, 0.5 if n < 2 else 0.25) for n in range(4)]
    runs = summarize(given(5), samples, [alone, ar, fast], lm.target, 0)
    assert [(r["method"], r["batch_size"], r["prompts"]) for r in runs] == [
        ("ar", 1, 5),
        ("ar", 2, 4),
        ("two-pass", 2, 4),
    ]
    assert [r["prompts_left_out"] for r in runs] == [0, 1, 1]
    assert runs[2]["tokens_per_second"] == pytest.approx(20 / 1.5)
    assert runs[2]["speedup_vs_ar"] == pytest.approx(20 / 1.5 / 4)
    low, high = runs[2]["speedup_interval"]
    assert [low, high] == pytest.approx([10 / 4, 10 / 2])  # of two batches, not four texts
    rates = (10.0, 20.0)
    spread = ((rates[1] - rates[0]) / 2**0.5) / 15
    assert runs[2]["speed_spread"]["prompts"] == pytest.approx(spread)


def test_a_method_without_a_whole_batch_has_no_entry(lm: Generator) -> None:
    """Catches a division by no runs."""
    methods = [of_size(1), of_size(4)]
    runs = summarize(given(2), samples_of(given(2), methods, 4, 0), methods, lm.target, 0)
    assert [run["batch_size"] for run in runs] == [1]


def test_slow_runs_are_counted_and_kept(lm: Generator) -> None:
    """Catches an outlier that is dropped, and one that is counted against the mean."""
    ar = stub("ar")
    seconds = (1.0, 1.0, 1.0, 1.0, 1.9, 2.1, 30.0)
    samples = [sampled(n, ar, 4, took) for n, took in enumerate(seconds)]
    run = summarize(given(7), samples, [ar], lm.target, 0)[0]
    assert run["slow_runs"] == 2
    assert run["tokens_per_second"] == pytest.approx(28 / sum(seconds))


def test_categories_are_parts_of_the_whole(lm: Generator) -> None:
    """Catches prompts of one kind counted with another, repeats taken for prompts, and the base of
    another kind."""
    prompts = [replace(p, category="ab"[n % 2]) for n, p in enumerate(given(3))]
    ar, fast = stub("ar"), stub("two-pass")
    samples = [sampled(n, ar, 4, 1.0 + n % 2, r) for n in range(3) for r in range(2)]
    samples += [sampled(n, fast, 4, 0.5, r) for n in range(3) for r in range(2)]
    run = summarize(prompts, samples, [ar, fast], lm.target, 0)[1]
    first, second = run["categories"]
    assert (first["category"], first["prompts"], first["speedup_vs_ar"]) == ("a", 2, 2.0)
    assert (second["category"], second["prompts"], second["speedup_vs_ar"]) == ("b", 1, 4.0)
    assert first["tokens_per_second"] == 8.0
    assert first["accepted_length"] == 0.0
    assert summarize(given(3), samples, [ar, fast], lm.target, 0)[1]["categories"] == []


def test_first_runs_hold_what_comes_before_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches compiling and measuring, which happen before a run is timed, left out of it."""
    now = [0.0]
    monkeypatch.setattr("passlm.bench.measuring.measure.time.perf_counter", lambda: now[0])
    longest = []

    def decode(prompt: Sequence[int], sampling: SamplingParams, most: int) -> Record:
        longest.append(most)
        now[0] += 7.0 + 2.0  # seven to get ready
        return Record((1, 2), 2.0, first_token_seconds=0.5)

    silent = replace(stub("hf"), decode=lambda *_: Record((1,), 0.0))
    first, other = warm_up(given(1), [replace(stub("ar"), decode=decode), silent], 100)
    assert (first.seconds, first.first_token_seconds) == (9.0, 7.5)
    assert other.first_token_seconds is None
    assert longest == [8]


def test_all_that_plans_are_chosen_by_is_measured_beforehand() -> None:
    """Catches a prompt of another length, in the middle of a run, that has costs measured."""
    asked: list[tuple[int, int]] = []

    def plans(texts: int, tokens: int) -> Strategy:
        asked.append((texts, tokens))
        return autoregressive

    own = PlanDecoding(TimedTarget(small_llama(), pack=False), plans, None, frozenset(), False)
    method = replace(stub("auto"), decode=own, batch_size=2)
    few = [replace(prompt, ids=(1,) * n) for prompt, n in zip(given(2), (3, 5), strict=True)]
    warm_up(few, [method], 6, [*few, replace(few[0], ids=(1,) * 40)])
    assert set(asked) >= {(2, 6), (2, 8), (2, 43)}


# Prompts


def test_prompts_are_cut_from_their_end(lm: Generator) -> None:
    """Catches the beginning kept, short prompts taken as they are, and shortness left untold."""
    tasks = [Task("own", f"n{n}", " ".join(f"w{k}" for k in range(2, 2 + n))) for n in (3, 8, 5)]
    found = Collector(lm, NEW_TOKENS, (4, 8)).collect([], tasks, None)
    (prompts,) = found.suites
    assert [(p.name, p.cut, p.ids) for p in prompts] == [
        ("n8", 4, (6, 7, 8, 9)),
        ("n8", 8, (2, 3, 4, 5, 6, 7, 8, 9)),
        ("n5", 4, (3, 4, 5, 6)),
    ]
    assert found.too_short == [
        {"suite": "own", "prompt_tokens": 4, "prompts": 1},
        {"suite": "own", "prompt_tokens": 8, "prompts": 2},
    ]


def test_prompts_end_with_something_to_see_where_that_is_asked(lm: Generator) -> None:
    """Catches white space left at the end, a prompt of nothing else that is lost, chats that are
    no text to continue, and prompts stripped without being asked."""
    chat = Task("own", "chat", messages=({"role": "user", "content": "w2 "},))
    assert _without_trailing_space(Task("own", "a", " w2  w3 \n\t\n")).prompt == " w2  w3"
    for kept in (Task("own", "b", "\n"), Task("own", "c", "w4"), chat):
        assert _without_trailing_space(kept) == kept
    tasks, seen = ([Task("own", "a", text)] for text in ("w2 w3\n", "w2 w3"))
    digests = [
        Collector(lm, NEW_TOKENS, stripped=stripped).collect([], own, None).digests["own"]
        for own, stripped in ((tasks, False), (tasks, True), (seen, False))
    ]
    assert digests[0] != digests[1] == digests[2]


def test_a_cut_prompt_may_fit_where_a_whole_one_does_not(lm: Generator) -> None:
    """Catches the context held against the length before the cut."""
    task = Task("own", "long", "w5 " * 500)
    assert Collector(lm, NEW_TOKENS).collect([], [task], None).suites == []
    found = Collector(lm, NEW_TOKENS, (16, 400)).collect([], [task], None)
    assert [p.cut for p in found.suites[0]] == [16]
    assert found.skipped == [{"suite": "own", "prompt": "long", "tokens": 400}]


def test_digests_are_of_all_that_is_asked(lm: Generator) -> None:
    """Catches prompts that may change between two processes of one run."""
    tasks = [Task("own", "a", "w5 w6"), Task("own", "b", "w7")]
    digest = Collector(lm, NEW_TOKENS).collect([], tasks, None).digests["own"]
    for other in (tasks[:1], [tasks[0], replace(tasks[1], prompt="w8")], tasks[::-1]):
        assert Collector(lm, NEW_TOKENS).collect([], other, None).digests["own"] != digest
    turns = [tasks[0], replace(tasks[1], turns=("w9",))]
    assert Collector(lm, NEW_TOKENS).collect([], turns, None).digests["own"] != digest
    assert Collector(lm, NEW_TOKENS).collect([], list(tasks), None).digests["own"] == digest


def test_chats_take_no_further_turn_in_a_sweep(lm: Generator) -> None:
    """Catches turns that are asked behind a cut text, or in a batch, and that being left untold."""
    task = Task("own", "chat", "w5 w6 w7", turns=("w8",))
    whole = Collector(lm, NEW_TOKENS).collect([], [task], None)
    assert whole.suites[0][0].further is not None
    assert whole.first_turn_only == []
    alone = Collector(lm, NEW_TOKENS, whole_chats=False).collect([], [task], None)
    assert alone.suites[0][0].further is None
    assert alone.first_turn_only == ["own"]


# The command


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """The folder of a run that varies all there is to vary."""
    kinds = [
        {"name": f"n{n}", "category": "ab"[n % 2], "prompt": "w5 w6 " * n + "w7"}
        for n in range(1, 6)
    ]
    file = folder / "kinds.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in kinds))
    lists = ("--batch-size", "1,2,8", "--prompt-tokens", "3,7", "--lookahead-tokens", "1,3")
    methods = ("--methods", "ar,two-pass,hf", "--temperature", "0,0.5,0.8")
    line = arguments(folder, "--prompts", str(file), *lists, *methods)
    assert main([*line, "--out", str(folder / "swept")]) == 0
    return folder / "swept"


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def test_one_entry_for_each_value(results: dict[str, Any]) -> None:
    """Catches a combination left out, and what is not ours run as if it took batches."""
    found = [
        (r["prompt_tokens"], r["batch_size"], r["temperature"], r["method"], r["lookahead_tokens"])
        for r in results["runs"]
    ]
    ours = [("ar", 0), ("two-pass", 1), ("two-pass", 3)]
    expected = {
        (cut, size, temperature, *method)
        for cut in (3, 7)
        for size in (1, 2)
        for temperature in (0, 0.5, 0.8)
        for method in (*ours, *([("hf", 0)] if size == 1 else []))
    }
    assert set(found) == expected
    assert len(found) == len(expected)
    for run in results["runs"]:
        prompts = 5 if run["prompt_tokens"] == 3 else 3
        size = run["batch_size"]
        assert run["prompts"] == prompts // size * size
        assert run["prompts_left_out"] == prompts % size
        assert run["tokens"] == run["prompts"] * NEW_TOKENS
        assert run["first_run_seconds"] > 0
        greedy = run["method"] == "hf" and run["temperature"] > 0
        assert run["identical_to_ar"] == (None if greedy else 1)
        assert run["categories"] is None if size > 1 else len(run["categories"]) == 2


def test_what_is_left_out_is_counted(results: dict[str, Any]) -> None:
    """Catches fewer prompts than the suite has, and nobody told."""
    assert results["too_short"] == [{"suite": "kinds", "prompt_tokens": 7, "prompts": 2}]
    assert results["no_batch"] == [
        {"suite": "kinds", "prompt_tokens": 3, "prompts": 5, "batch_size": 8},
        {"suite": "kinds", "prompt_tokens": 7, "prompts": 3, "batch_size": 8},
    ]
    assert list(notes.left_out(results)) == [
        "kinds, 7 prompt tokens: prompts left out because they are shorter: 2",
        "kinds, 3 prompt tokens, batches of 8: not run, because there are only 5 prompts",
        "kinds, 7 prompt tokens, batches of 8: not run, because there are only 3 prompts",
        "kinds, 3 prompt tokens, batches of 2: prompts left out after the last full batch: 1",
        "kinds, 7 prompt tokens, batches of 2: prompts left out after the last full batch: 1",
    ]


def test_lines_know_their_category_and_length(out: Path) -> None:
    """Catches lines of two lengths that cannot be told apart."""
    lines = in_folder(out)
    assert {line["prompt_tokens"] for line in lines} == {3, 7}
    assert {(line["name"], line["category"]) for line in lines} == {
        (f"n{n}", "ab"[n % 2]) for n in range(1, 6)
    }
    assert {line["batch_size"] for line in lines} == {1, 2}


def test_the_report_names_the_best_and_shows_all(out: Path, results: dict[str, Any]) -> None:
    """Catches a sweep without its table, a best that is not, and a value in the wrong column."""
    text = (out / "report.md").read_text()
    assert markdown(results) == text
    for sweep in SWEEPS:
        assert f"## Tokens per second by {sweep.values}" in text
    alike = [
        r
        for r in results["runs"]
        if (r["prompt_tokens"], r["batch_size"], r["temperature"]) == (3, 2, 0)
    ]
    best = max((r for r in alike if r["method"] == "two-pass"), key=_speed)
    told = f"two-pass with L {best['lookahead_tokens']} ({_speed(best):.1f})"
    assert f"- kinds, 3 prompt tokens, batches of 2, greedy: {told}\n" in text
    cell = f"{_speed(best):.1f} ({best['speedup_vs_ar']:.2f})"
    (row,) = (
        line
        for line in text.split("look-ahead steps L")[1].splitlines()
        if line.startswith("| kinds, 3 prompt tokens, batches of 2, greedy | two-pass |")
    )
    assert row.split(" | ")[2:][(1, 3).index(best["lookahead_tokens"])].startswith(f"**{cell}**")
    assert "| category | prompts | ar, tokens/s | two-pass, L 1 |" in text
    assert "No run is dropped" in text
    assert "| ar, batches of 2 | " in text
    assert "decode one prompt at a time" in text


def _speed(run: dict[str, Any]) -> float:
    return float(run["tokens_per_second"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--batch-size", "2"), "hf, hf-prompt-lookup can only decode one prompt at a time"),
        (("--batch-size", "0,1"), "batch size is 0"),
        (("--batch-size", "two"), "separated by commas, each int"),
        (("--prompt-tokens", "0"), "--prompt-tokens contains 0"),
        (("--prompt-tokens", "99", "--methods", "ar"), "no prompts are left"),
        (("--batch-size", "64", "--methods", "ar"), "no prompts are left"),
        (
            ("--suite", "humaneval", "--run-generated-code", "--prompt-tokens", "4"),
            "needs whole prompts",
        ),
    ],
)
def test_wrong_sweeps_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    """Catches a traceback, or a sweep that is quietly another one."""
    assert main(arguments(folder, *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "passlm: " in line]
    assert said in errors[-1]


# Sweeps of results


def entry(method: str, speed: float, steps: int = 0, **more: Any) -> dict[str, Any]:
    own = {"suite": "own", "temperature": 0.0, "lookahead_tokens": steps, "method": method}
    return {**own, "tokens_per_second": speed, "speedup_vs_ar": speed / 10, **more}


def test_curves_join_what_differs_in_one_thing() -> None:
    """Catches a curve through runs that differ in two, and a single value drawn as one."""
    runs = [
        entry("one-pass", 10.0 + steps + size, steps, batch_size=size, prompt_tokens=cut)
        for steps in (4, 2)
        for size in (1, 8)
        for cut in (64, 16)
    ]
    by_steps = STEPS.curves([*runs, entry("ar", 9.0)])
    assert len(by_steps) == 4
    assert all(list(curves) == ["one-pass"] for curves in by_steps.values())
    at = Conditions("own", 0.0, 8, 64)
    assert [(n, run["tokens_per_second"]) for n, run in by_steps[at]["one-pass"]] == [
        (2, 20.0),
        (4, 22.0),
    ]
    assert list(BATCHES.curves(runs)) == [Conditions("own", 0.0, None, c) for c in (64, 16)]
    lengths = LENGTHS.curves(runs)
    assert {run["prompt_tokens"] for _, run in lengths[at_any(lengths, 8)]["one-pass, L 4"]} == {
        16,
        64,
    }
    assert TEMPERATURES.curves(runs) == {}
    two = [entry("ar", 1.0, temperature=t) for t in (0.0, 1.0)]
    assert TEMPERATURES.curves(two) == {}
    three = [*two, entry("ar", 2.0, temperature=0.5)]
    ((conditions, curves),) = TEMPERATURES.curves(three).items()
    assert (conditions.name, [t for t, _ in curves["ar"]]) == ("own", [0.0, 0.5, 1.0])
    assert STEPS.curves([entry("ar", 1.0), {**entry("x", 1.0, 2), "tokens_per_second": None}]) == {}


def at_any(found: dict[Conditions, Any], size: int) -> Conditions:
    return next(conditions for conditions in found if conditions.batch_size == size)


def test_older_results_are_whole_prompts_one_at_a_time() -> None:
    """Catches older results that make a group of their own."""
    old, new = entry("ar", 1.0), entry("ar", 1.0, batch_size=1, prompt_tokens=None)
    assert Conditions.of(old) == Conditions.of(new)
    assert Conditions.of(old).name == "own, greedy"
    named = Conditions("own", 0.8, 4, 64).name
    assert named == "own, 64 prompt tokens, batches of 4, temperature 0.8"
