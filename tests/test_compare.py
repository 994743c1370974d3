"""Two results side by side: what is called a change, what is called noise, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passlm.bench.reports.compare import ResultsError, compare, load_results, verdict
from passlm.errors import InputError

KEPT = sorted((Path(__file__).parents[1] / "docs" / "results").glob("*/results.json"))


def run(method: str = "two-pass", speed: float = 1.5, spread: float = 0.05, **more: Any) -> Any:
    """An entry of `results.json`, its interval so wide on the log scale to either side."""
    interval = [speed * math.exp(-spread), speed * math.exp(spread)]
    return {
        "suite": "humaneval",
        "method": method,
        "lookahead_tokens": 4 if method == "two-pass" else 0,
        "temperature": 0.0,
        "judge": "coupled",
        "prompts": 10,
        "tokens": 1280,
        "tokens_per_second": 40.0 * speed,
        "tokens_per_pass": 1.7,
        "accepted_length": 1.3,
        "identical_to_ar": 0.9,
        "speedup_vs_ar": speed,
        "speedup_interval": interval,
        **more,
    }


def results(*runs: Any, provenance: Any = None, **settings: Any) -> dict[str, Any]:
    """A result of those runs and of plain decoding."""
    stamp = {
        "passlm": "0.1.0",
        "packages": {"torch": "2.13.0"},
        "machine": {"cores": 2, "threads": 2},
        "commit": "abc",
        "arguments": ["bench", "--suite", "humaneval"],
        "time": "2026-01-01",
    }
    return {
        "provenance": {**stamp, **(provenance or {})},
        "settings": {"model": "tiny", "dtype": "float32", "limit": 10, "seed": 0, **settings},
        "complete": True,
        "missing_suites": {},
        "skipped": [],
        "runs": [run("ar", 1.0, 0.0), *runs],
    }


def text(a: dict[str, Any], b: dict[str, Any]) -> str:
    return compare(a, b, ("first", "second"))


def warnings(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    lines = text(a, b).splitlines()
    return [line for line in lines if line.startswith("- **Warning:**")]


def in_folder(folder: Path, content: Any) -> Path:
    (folder / "results.json").write_text(json.dumps(content))
    return folder


# What is a change


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (run(speed=1.5), run(speed=1.8), "faster"),
        (run(speed=1.8), run(speed=1.5), "slower"),
        (run(speed=1.5), run(speed=1.52), "within noise"),
        (run(speed=1.5), run(speed=1.5), "within noise"),
        (run(spread=0.0), run(spread=0.0), "within noise"),
        # Outside each other's interval, 0.06 apart with 0.05 to either side of both.
        (run(speed=1.5), run(speed=1.5 * math.exp(0.06)), "within noise"),
        (run(speed=1.5), run(speed=1.5 * math.exp(0.08)), "faster"),  # though the intervals overlap
        (run(speed=1.5, spread=0.01), run(speed=1.8, spread=0.5), "within noise"),
        (run(), run(speed=9.0, speedup_interval=None), "unknown"),
    ],
)
def test_verdict(a: Any, b: Any, expected: str) -> None:
    """Catches a verdict turned over, and one condition taken for both."""
    assert verdict(a, b) == expected


def test_estimate_within_the_others_interval_is_noise() -> None:
    """Catches the standard errors deciding alone where an interval is not symmetric."""
    a = run(speed=1.5, speedup_interval=[1.49, 1.7])
    b = run(speed=1.69, speedup_interval=[1.68, 1.7])
    assert abs(math.log(1.69 / 1.5)) > math.hypot(math.log(1.7 / 1.49), math.log(1.7 / 1.68)) / 2
    assert verdict(a, b) == verdict(b, a) == "within noise"


def test_false_alarms_are_as_rare_as_said() -> None:
    """Catches a standard error off by a factor, either way; the draws are seeded."""
    rng = np.random.default_rng(0)
    error = 0.03
    spread = 1.96 * error

    def share(change: float) -> float:
        draws = rng.normal([0, change], error, (4000, 2))
        found = [verdict(*(run(speed=math.exp(x), spread=spread) for x in row)) for row in draws]
        return 1 - found.count("within noise") / len(found)

    assert 0.04 < share(0) < 0.06
    assert share(4 * math.sqrt(2) * error) > 0.95  # 4 standard errors: missed with odds of 0.02


# What is written


def test_runs_stand_side_by_side_with_their_verdict() -> None:
    """Catches columns of A and B exchanged, and a row without its figures."""
    a = results(run(speed=1.5))
    b = results(run(speed=1.8, tokens_per_pass=2.1, identical_to_ar=0.8))
    lines = text(a, b).splitlines()
    (row,) = [line for line in lines if line.startswith("| two-pass |")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("two-pass", "4", "1.50 (1.43 to 1.58)", "1.80 (1.71 to 1.89)", "+20.0 %", "faster"),
        *("60.0, 72.0", "1.70, 2.10", "1.30, 1.30", "90.0 %, 80.0 %"),
    ]
    assert "1 of 1 speed-ups changed beyond noise" in text(a, b)
    assert (
        "- humaneval, temperature 0 (greedy): two-pass, L 4 is faster: 1.50 to 1.80 (+20.0 %)"
        in (lines)
    )
    assert "two-pass, L 4 is slower: 1.80 to 1.50 (-16.7 %)" in text(b, a)


def test_a_table_for_each_suite_and_temperature() -> None:
    """Catches runs of two temperatures compared with each other."""
    runs = [run(suite=s, temperature=t) for s in ("humaneval", "code") for t in (0.0, 0.8)]
    made = text(results(*runs), results(*runs))
    assert made.count("| two-pass | 4 |") == 4
    assert "## humaneval, temperature 0 (greedy)" in made
    assert "## code, temperature 0.8\n" in made
    assert "0 of 4 speed-ups changed" in made


def test_plain_decoding_is_no_row() -> None:
    """Catches the measure of all speed-ups counted as one of them."""
    made = text(results(run()), results(run()))
    assert "| ar |" not in made
    assert "0 of 1 speed-ups changed" in made
    assert (
        "- ar, the baseline of speed-ups: 40.0 tokens/s, 10 prompts, 1280 new tokens in A" in made
    )


def test_runs_of_one_file_are_listed() -> None:
    """Catches methods that vanish because the other file lacks them."""
    made = text(results(run(), run("hf")), results(run(), run(lookahead_tokens=2)))
    only = made.partition("## Runs in one result only")[2]
    assert "- A, humaneval, temperature 0 (greedy): hf\n" in only
    assert "- B, humaneval, temperature 0 (greedy): two-pass, L 2\n" in only
    assert "only" not in text(results(run()), results(run()))


def test_nothing_in_common_is_said() -> None:
    """Catches '0 of 0 changed', which reads as a result."""
    made = text(results(run(suite="a")), {**results(), "runs": [run(suite="b")]})
    assert "of 0 speed-ups" not in made
    assert "have no run with the same suite" in made


# How they were made


def test_settings_and_provenance_that_differ_come_first() -> None:
    """Catches a difference that is not shown, and equal settings that hide it."""
    a = results(run(), lookahead={"name": "shipped"})
    changed = {"machine": {"cores": 2, "threads": 1}, "arguments": ["bench", "--limit", "a|b"]}
    b = results(run(judge="rejection"), provenance=changed, limit=None, dtype="bfloat16")
    table = text(a, b).partition("## Changed speed-ups")[0].splitlines()
    for row in (
        "| dtype | float32 | bfloat16 |",
        "| limit | 10 | \N{EN DASH} |",
        "| machine.threads | 2 | 1 |",
        "| lookahead.name | shipped | \N{EN DASH} |",
        "| judge | coupled | coupled, rejection |",
        "| arguments | `bench --suite humaneval` | `bench --limit 'a\\|b'` |",
    ):
        assert row in table
    assert not any("seed" in line or "cores" in line for line in table)


@pytest.mark.parametrize(("older", "differs"), [(None, False), (False, False), (True, True)])
def test_setting_that_an_older_file_lacks_was_not_used(older: Any, differs: bool) -> None:
    """Catches each new option listed as a difference from every older result, or never."""
    assert ("compiled" in text(results(run()), results(run(), compiled=older))) is differs


def test_equal_results_say_so() -> None:
    """Catches an empty table."""
    assert "No recorded differences." in text(results(run()), results(run()))
    assert warnings(results(run()), results(run())) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "other"}, "model: A and B run different models"),
        ({"quantize": "int8"}, "quantize: A and B run different models"),
        (
            {"max_new_tokens": 8, "top_k": 3},
            "top_k, max_new_tokens: A and B generate different text",
        ),
    ],
)
def test_comparison_without_sense_is_warned_of(settings: dict[str, Any], said: str) -> None:
    """Catches the speed-up of another model passed off as a change of a method."""
    (warning,) = warnings(results(run()), results(run(), **settings))
    assert said in warning


def test_other_number_of_prompts_is_warned_of() -> None:
    """Catches a suite cut by --limit compared with the whole, and one warning for each method."""
    b = results(run(), run("hf"))
    for entry in b["runs"]:
        entry["prompts"] = 164
    (warning,) = warnings(results(run(), run("hf")), b)
    assert "10 prompts in A and 164 in B" in warning


def test_plain_decoding_of_another_speed_is_warned_of() -> None:
    """Catches 'slower' for a method that runs as before beside a faster plain decoding."""
    b = results(run())
    b["runs"][0]["tokens_per_second"] = 60.0
    (warning,) = warnings(results(run()), b)
    assert "ar itself runs at 40.0 tokens/s in A and 60.0 in B (+50 %)" in warning
    b["runs"][0]["tokens_per_second"] = 42.0
    assert warnings(results(run()), b) == []


def test_unfinished_result_is_warned_of() -> None:
    """Catches suites missing from one file for no visible reason."""
    (warning,) = warnings(results(run()), {**results(run()), "complete": False})
    assert "B is not complete" in warning


# Files


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.parent.name)
def test_kept_results_are_read_and_equal_themselves(file: Path) -> None:
    """Catches a field required that older results lack, and changes found where there are none."""
    content = load_results(file.parent)
    assert content == load_results(file)
    made = text(content, copy.deepcopy(content))
    assert "No recorded differences." in made
    assert "\n0 of " in made


def test_kept_results_can_be_compared() -> None:
    """Catches a traceback for any two of the files that people have."""
    kept = [load_results(file) for file in KEPT]
    assert len(kept) > 3
    for a in kept:
        for b in kept:
            assert text(a, b).startswith("# passlm bench: A and B\n")


def test_fields_that_an_old_run_lacks_are_dashes() -> None:
    """Catches a key error where a figure was not counted yet."""
    needed = ("suite", "method", "temperature", "speedup_vs_ar")
    bare = {name: value for name, value in run().items() if name in needed}
    old = {"provenance": {}, "settings": {}, "runs": [bare]}
    assert "| unknown |" in text(old, copy.deepcopy(old))


def broken(**more: Any) -> dict[str, Any]:
    return {**results(run()), **more}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["runs"], "expected a JSON object"),
        ({"rows": []}, "'provenance' is missing or is not a dict"),
        (broken(settings=None), "'settings' is missing or is not a dict"),
        (broken(runs={}), "'runs' is missing or is not a list"),
        (broken(missing_suites=3), "'missing_suites' is not a dict"),
        (broken(runs=["x"]), "run 1: not a JSON object"),
        (broken(runs=[run(), run(suite=None)]), "run 2: 'suite' is not a string"),
        (broken(runs=[run(temperature=None)]), "run 1: 'temperature' is not a number"),
        (broken(runs=[run(tokens_per_pass="2")]), "'tokens_per_pass' is not a number"),
        (broken(runs=[run(speedup_vs_ar=None)]), "'speedup_vs_ar' is not a positive"),
        (broken(runs=[run(speedup_vs_ar=math.nan)]), "'speedup_vs_ar' is not a positive"),
        (broken(runs=[run(speedup_interval=[1])]), "'speedup_interval' is not a pair"),
        (broken(runs=[run(speedup_interval=[0, 1])]), "'speedup_interval' is not a pair"),
        (broken(runs=[run(), run()]), "run 2: duplicate of humaneval, .*two-pass, L 4"),
    ],
)
def test_other_shape_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    """Catches a traceback from deep within, and a run lost behind another of its name."""
    with pytest.raises(ResultsError, match=rf"results\.json is not a result of bench: .*{said}"):
        load_results(in_folder(tmp_path, content))


@pytest.mark.parametrize("content", [b"{broken", b"", b"\xff\xfe\xff"])
def test_broken_json_is_refused(tmp_path: Path, content: bytes) -> None:
    """Catches a traceback for a file that was cut off."""
    file = tmp_path / "other.json"
    file.write_bytes(content)
    with pytest.raises(ResultsError, match=r"other\.json is not JSON: "):
        load_results(file)


@pytest.mark.parametrize("name", ["", "gone", "gone.json"])
def test_missing_file_names_what_to_give(tmp_path: Path, name: str) -> None:
    """Catches a bare 'no such file' for a folder that bench did not write."""
    with pytest.raises(
        InputError, match=r"cannot be read .*: pass a folder written by bench --out"
    ):
        load_results(tmp_path / name)


def test_batches_and_lengths_are_runs_of_their_own() -> None:
    """Catches a sweep refused as the same run twice, or batches held against single prompts."""
    both = [{"batch_size": n, "prompt_tokens": c} for n in (1, 4) for c in (8, 9)]
    sizes = [run("two-pass", 1.5, **more) for more in both]
    plain = [run("ar", 1.0, 0.0, **more) for more in both]
    before, after = results(*sizes, *plain), results(*copy.deepcopy(sizes), *plain)
    after["runs"][3] |= {"speedup_vs_ar": 9.0, "speedup_interval": [8.5, 9.5]}
    text = compare(before, after, ("a", "b"))
    assert "1 of 4 speed-ups changed beyond noise" in text
    assert "humaneval, 8 prompt tokens, batches of 4, temperature 0 (greedy): two-pass" in text
    old, new = results(run()), results(run(batch_size=1, prompt_tokens=None))
    assert "Runs in one result only" not in compare(old, new, ("a", "b"))
