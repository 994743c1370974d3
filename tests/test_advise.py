"""`passlm advise`: the verdict on measured figures, and the command that measures them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_model import CONTEXT, byte_generator, save_folders

from passlm.bench.advise import (
    LEAST_PROMPTS,
    WORTH,
    Advice,
    Measured,
    Pilot,
    advise,
    batched,
    break_even_chance,
    break_even_length,
    fixed_plans,
    missing_prompts,
    pays_up_to,
    plan_cost,
    relative_cost,
    widened,
)
from passlm.bench.engines.decoding import PlanDecoding
from passlm.bench.engines.methods import Asked, build
from passlm.bench.measuring.measure import Turn, speedup_interval
from passlm.bench.suites.tasks import Task
from passlm.cli import DONE, INTERRUPTED, USAGE, main
from passlm.cli import advise as command
from passlm.cli.advise import Advised, screen
from passlm.decoding.strategies import TwoPass
from passlm.errors import InputError
from passlm.params import SamplingParams, StopParams
from passlm.planning.cost_curve import CostCurve

# Rows of little cost, as on a GPU, and of as much as a pass of their own.
CHEAP = CostCurve((1, 2, 5, 9, 21), (1.0, 1.02, 1.05, 1.1, 1.3), (1, 4), (0.05, 0.05))
DEAR = CostCurve((1, 2, 5, 9, 21), (1.0, 1.9, 4.0, 7.0, 16.0), (1, 4), (0.2, 0.3))


def plan(
    method: str = "two-pass",
    tokens: int = 4,
    speedup: float = 1.3,
    spread: float = 0.1,
    accepted: float = 1.2,
    pass_cost: float = 1.1,
    **more: Any,
) -> Measured:
    """A plan whose interval reaches so far to either side, as a ratio."""
    whole = Measured(
        method,
        tokens,
        tokens_per_second=30 * speedup,
        speedup=speedup,
        interval=(speedup / (1 + spread), speedup * (1 + spread)),
        tokens_per_pass=speedup * pass_cost,
        pass_cost=pass_cost,
        rows_per_pass=1.0 + tokens,
        accepted_length=accepted,
        chances=(0.6, 0.4, 0.3, 0.2)[:tokens],
    )
    return replace(whole, **more)


def pilot(*plans: Measured, prompts: int = 12, curve: CostCurve = CHEAP, **more: Any) -> Pilot:
    return replace(Pilot(plans, prompts, 100 * prompts, 0.1, curve), **more)


def causes(advice: Advice) -> list[str]:
    return [reason.cause for reason in advice.reasons]


# The verdict


def test_it_pays() -> None:
    """Catches a slower plan recommended, and reasons against what pays."""
    advice = advise(pilot(plan(speedup=1.2), plan("lookup", 0, speedup=1.5), plan("one-pass", 1)))
    assert advice.verdict == "yes"
    assert advice.best.method == "lookup"
    assert (advice.more_prompts, advice.reasons) == (0, ())
    assert advice.best.flags(None) == "--method auto --lookahead none"


def test_it_does_not_pay_because_too_little_is_accepted() -> None:
    """Catches the costs blamed: rows cost next to nothing, and drafts are refused."""
    advice = advise(pilot(plan(speedup=0.9, accepted=0.05, pass_cost=1.1)))
    assert advice.verdict == "no"
    assert causes(advice) == ["acceptance"]
    said = advice.reasons[0].text
    needed = break_even_length(plan(), CHEAP)
    assert "accepts 0.05 per pass" in said
    assert f"needs {needed:.2f}" in said
    assert f"(a rate of {break_even_chance(needed, 4):.2f})" in said


def test_it_does_not_pay_because_rows_are_dear() -> None:
    """Catches acceptance blamed where nothing that is accepted could pay."""
    dear = plan(speedup=0.5, accepted=1.2, pass_cost=4.0)
    advice = advise(pilot(dear, curve=DEAR))
    assert advice.verdict == "no"
    assert causes(advice) == ["costs"]
    assert "a pass of 5 rows takes 4.00 times as long as a pass of 1" in advice.reasons[0].text


def test_too_close_to_call() -> None:
    """Catches a verdict that the interval does not carry, and a number of prompts that is not
    what the rule of square roots gives."""
    advice = advise(pilot(plan(speedup=1.06, spread=0.12)))
    assert advice.verdict == "undecided"
    # log(1.12) is what the interval reaches to a side, log(1.06) what it may.
    assert advice.more_prompts == 34
    assert causes(advice) == []


@pytest.mark.parametrize("prompts", [1, LEAST_PROMPTS - 1])
def test_too_few_prompts(prompts: int) -> None:
    """Catches a verdict on a few prompts that happen to agree, and one without an interval."""
    interval = None if prompts == 1 else (1.4, 1.6)
    advice = advise(pilot(plan(speedup=1.5, interval=interval), prompts=prompts))
    assert advice.verdict == "undecided"
    assert causes(advice)[0] == "few prompts"
    assert advice.more_prompts == LEAST_PROMPTS - prompts


def test_no_needs_every_plan_to_fall_short() -> None:
    """Catches a refusal while a plan with a wide interval may still pay."""
    short, open_ended = plan(speedup=0.97, spread=0.02), plan("auto", 0, 0.96, spread=0.2)
    assert advise(pilot(short)).verdict == "no"
    assert advise(pilot(short, open_ended)).verdict == "undecided"


def test_a_sure_gain_of_little_is_a_gain() -> None:
    """Catches a gain below `WORTH` that is sure and yet refused."""
    assert advise(pilot(plan(speedup=1.03, spread=0.01))).verdict == "yes"


def test_the_best_of_many_needs_a_wider_interval() -> None:
    """Catches the luckiest of several plans taken for sure: alone it is, among four it is not."""
    lucky = plan(speedup=1.12, spread=0.11)
    assert advise(pilot(lucky)).verdict == "yes"
    others = [plan("auto", 0, 1.0), plan("lookup", 0, 1.0), plan("one-pass", 1, 1.0)]
    assert advise(pilot(lucky, *others)).verdict == "undecided"


def test_how_much_wider() -> None:
    """Catches a factor upside down: Bonferroni's for four is 2.498 over 1.960."""
    assert widened(plan(speedup=2.0, spread=0.1), 1) == pytest.approx((2 / 1.1, 2.2))
    low, high = widened(plan(speedup=2.0, spread=0.1), 4) or (0, 0)
    assert high == pytest.approx(2 * 1.1 ** (2.4977 / 1.95996), rel=1e-4)
    assert low * high == pytest.approx(4)


@pytest.mark.slow
def test_how_often_nothing_is_called_a_gain() -> None:
    """Catches intervals too narrow for their number of plans: docs/quality.md says 2 in 100 with 12
    prompts. Seeds are fixed; a right rule gives more than 20 of 300 once in 20,000 tests."""
    rng = np.random.default_rng(0)
    called = 0
    for seed in range(300):
        tokens = np.tile(rng.integers(40, 128, size=12).astype(float), (2, 1))
        plain = tokens[0] * np.exp(0.05 * rng.normal(size=12))
        plans = []
        for number in range(4):
            seconds = np.stack([tokens[0] * np.exp(0.15 * rng.normal(size=12)), plain])
            low, high = speedup_interval(tokens, seconds, seed) or (0, 0)
            speedup = float(plain.sum() / seconds[0].sum())
            plans.append(plan(tokens=number, speedup=speedup, interval=(low, high)))
        called += advise(pilot(*plans)).verdict == "yes"
    assert called <= 20


def test_prompts_out_of_reach_are_said_to_be() -> None:
    """Catches a number without meaning, and one of 0 where it is not settled."""
    assert missing_prompts(1.025, (0.5, 2.1), 12) is None
    assert missing_prompts(1.5, (0.99, 2.2), 12) == 1
    assert missing_prompts(WORTH**0.5, (0.99, 1.07), 12) is not None


# Why


def test_prompts_that_take_the_time() -> None:
    """Catches drafting blamed for time that goes into reading."""
    quick = plan(speedup=1.0, spread=0.02, tokens_per_pass=1.6, pass_cost=1.1)
    advice = advise(pilot(quick, reading=0.8))
    assert advice.verdict == "no"
    assert causes(advice) == ["reading"]
    assert "80%" in advice.reasons[0].text
    assert "cannot exceed 1.2," in advice.reasons[0].text


def test_short_texts_are_named() -> None:
    """Catches answers of a few tokens that leave nothing to draft."""
    advice = advise(pilot(plan(speedup=0.9), tokens=12 * 5))
    assert "short texts" in causes(advice)


def test_passes_that_cost_more_than_the_curve_says() -> None:
    """Catches acceptance called too low with a number above what is needed."""
    slow = plan(speedup=0.8, accepted=2.0, pass_cost=2.2)
    assert causes(advise(pilot(slow))) == ["curve"]


def test_without_files_the_copied_drafts_are_judged() -> None:
    """Catches a reason that needs look-ahead rows where there are none."""
    copied = plan("lookup", 0, 0.9, pass_cost=1.0, tokens_per_pass=1.01, rows_per_pass=3.0)
    advice = advise(pilot(copied, curve=CostCurve((1, 5), (1.0, 1.2))))
    assert causes(advice) == ["acceptance"]
    assert "accepts 0.01 per pass" in advice.reasons[0].text


def test_break_even_solves_the_formulas() -> None:
    """Catches a formula with another number of tokens: at that length all plans are even."""
    two, one = plan("two-pass", 4), plan("one-pass", 1)
    for curve in (CHEAP, DEAR):
        plain = curve.plain()
        assert curve.two_pass(break_even_length(two, curve), 4) == pytest.approx(plain)
        assert curve.one_pass(break_even_length(one, curve), 1) == pytest.approx(plain)
    assert break_even_chance(0.5 + 0.25, 2) == pytest.approx(0.5)
    assert break_even_chance(0.0, 3) == pytest.approx(0, abs=1e-6)
    assert break_even_chance(2.1, 2) is None


def test_costs_between_whole_rows() -> None:
    """Catches half a row rounded away."""
    assert relative_cost(DEAR, 1.5) == pytest.approx(1.45)
    assert plan_cost(plan("lookup", 0, rows_per_pass=1.5), DEAR) == pytest.approx(1.45)


# Batches


def test_batches_follow_the_curves() -> None:
    """Catches a prediction from absolute seconds: a batch in which everything takes twice as long
    changes nothing, and one in which rows are dear ends it."""
    twice = CostCurve(CHEAP.rows, tuple(2 * s for s in CHEAP.seconds), CHEAP.groups, (0.1, 0.1))
    speedups = batched(plan(speedup=1.4), {1: CHEAP, 2: twice, 4: DEAR, 8: CHEAP})
    assert speedups[1] == speedups[8] == pytest.approx(1.4)
    assert speedups[2] == pytest.approx(1.4)
    assert speedups[4] < 0.5
    assert pays_up_to(speedups) == 2
    assert pays_up_to({1: 0.9, 2: 1.1}) is None


# The screen


CASES = [
    pilot(plan(), plan("auto", 0, 1.4), plan("lookup", 0, 1.5), plan("one-pass", 1, 0.9)),
    pilot(plan(speedup=0.9, accepted=0.05)),
    pilot(plan(speedup=0.5, pass_cost=4.0), curve=DEAR, reading=0.9, tokens=30),
    pilot(plan(speedup=1.06, spread=0.12)),
    pilot(plan(speedup=0.8, accepted=2.0, pass_cost=2.2), prompts=2, tokens=3),
    pilot(plan(speedup=1.025, spread=3.0)),
    pilot(plan(speedup=1.5, interval=None), prompts=1),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4, 8, 16)])
def test_the_screen_is_one(case: Pilot, sizes: Sequence[int]) -> None:
    """Catches an answer that runs off the screen, or lacks the verdict or the flags."""
    advice = advise(case)
    batches = dict.fromkeys(sizes, 0.987)
    said = screen(Advised(advice, case, "--method ar", batches, 20_000, "time limit", 0.8, []))
    lines = said.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert "--method ar" in said
    assert {"yes": "yes", "no": "no:", "undecided": "too close"}[advice.verdict] in lines[2]
    assert all(reason.text.split()[0] in said for reason in advice.reasons[:2])


# The plans


def test_fixed_plans_are_the_best_by_the_curve() -> None:
    """Catches lengths that files have no rows for, and a plan that decodes as another."""
    lm = byte_generator()
    assert lm.look_ahead is not None
    asked = Asked(("ar", "auto"), (0.0,), (), SamplingParams(), StopParams(8))
    auto = build(lm, asked, "bytes")[-1]
    two, one = fixed_plans(auto, CHEAP, (0.9, 0.9, 0.9, 0.9))
    assert (two.name, two.lookahead_tokens) == ("two-pass", 4)
    assert one.plan == f"one-pass({one.lookahead_tokens})"
    assert isinstance(two.decode, PlanDecoding)
    assert two.decode.plans(1, 10) == TwoPass(4)
    record = two([1, 2, 3], 0, 8)
    assert len(record.tokens) <= 8
    assert record.stats is not None
    assert record.stats.judging_passes > 0
    assert fixed_plans(auto, CHEAP, (0.9, 0.01))[0].lookahead_tokens == 1
    assert fixed_plans(auto, CHEAP, ()) == []


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("advise")
    save_folders(place)
    lines = [{"prompt": f"def f{n}(x):\n"} for n in range(9)]
    lines += [{"messages": [{"role": "user", "content": "Hello"}]}, {"prompt": "x" * CONTEXT}]
    (place / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def arguments(place: Path, *more: str) -> list[str]:
    """A command line; a flag given again in `more` wins."""
    return [
        "advise",
        *("--model", str(place / "model"), "--lookahead", str(place / "rows")),
        *("--prompts", str(place / "own.jsonl"), "--dtype", "float32", "--limit", "3"),
        *("--max-new-tokens", "12", "--json"),
        *more,
    ]


def answer(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """The screen, and the object on the last line."""
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


def test_the_command_measures_and_answers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan left out, figures that are not of the same run, and a screen too large."""
    assert main(arguments(place, "--batch-size", "3", "--ignore-eos")) == DONE
    said, found = answer(capsys)
    assert len(said.splitlines()) <= 24
    text = [line for line in said.splitlines() if not line.startswith("flags")]  # has a folder
    assert max(map(len, text)) <= 100
    kinds = [run["method"] for run in found["runs"]]
    assert kinds == ["ar", "lookup", "auto", "two-pass", "one-pass"]
    assert found["verdict"] == "undecided"  # of three prompts
    assert found["reasons"][0]["cause"] == "few prompts"
    assert (found["prompts"], found["tokens"], found["of_prompts"]) == (3, 36, 11)
    assert all(run["tokens"] == 36 for run in found["runs"])
    assert all(run["identical_to_ar"] == 1 for run in found["runs"])
    best = max(found["runs"][1:], key=lambda run: run["speedup_vs_ar"])
    assert (found["method"], found["speedup"]) == (best["method"], best["speedup_vs_ar"])
    assert found["flags"].startswith("--method ")
    assert found["flags"] in said
    assert [entry["batch_size"] for entry in found["batches"]] == [1, 2, 3]
    assert found["stopped"] is None


def test_without_files_only_copies_are_drafted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches plans that need look-ahead rows, and flags that ask for them."""
    assert main(arguments(place, "--lookahead", "none", "--temperature", "0.8")) == DONE
    _, found = answer(capsys)
    assert [run["method"] for run in found["runs"]] == ["ar", "lookup"]
    assert "two-pass" not in found["flags"]
    assert found["runs"][0]["temperature"] == 0.8


def test_prompts_are_drawn_by_the_seed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the first lines taken, or other ones each time."""
    drawn: list[list[str]] = []

    def noted(lm: Any, tasks: Sequence[Any], *given: Any) -> Any:
        drawn.append([task.name for task in tasks])
        raise InputError("enough")

    monkeypatch.setattr(command, "prompts_of", noted)
    for seed in ("1", "1", "2"):
        assert main(arguments(place, "--seed", seed)) == USAGE
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0], key=int) == [str(1 + n) for n in range(11)] != drawn[0]


def test_the_time_limit_ends_it_between_runs(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a limit that is not looked at, a prompt counted that some plans have not done, and
    a limit that leaves nothing."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(command, "_now", lambda: next(clock))
    # Two plans: the clock is read once before, and after each of the runs.
    flags = ("--lookahead", "none", "--time-limit", "25")
    assert main(arguments(place, *flags)) == DONE
    said, found = answer(capsys)
    assert (found["stopped"], found["prompts"]) == ("time limit", 1)
    assert "(time limit)" in said
    assert main(arguments(place, *flags[:3], "5")) == USAGE
    assert "before one prompt was done" in capsys.readouterr().err


def test_an_interruption_gives_what_was_measured(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches measured prompts lost to Ctrl-C, and an exit code that hides it."""
    runs = []
    whole = Turn.run

    def interrupted(self: Turn, *given: Any) -> Any:
        runs.append(self)
        if len(runs) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, *given)

    monkeypatch.setattr(Turn, "run", interrupted)
    assert main(arguments(place, "--lookahead", "none")) == INTERRUPTED
    said, found = answer(capsys)
    assert (found["stopped"], found["prompts"], len(runs)) == ("interrupted", 1, 3)
    assert "(interrupted)" in said
    runs[:] = runs[:2]  # the next one is the first run of a command
    assert main(arguments(place, "--lookahead", "none")) == INTERRUPTED
    assert capsys.readouterr().out == ""


def test_prompts_that_fit_are_looked_for() -> None:
    """Catches fewer prompts than asked for where the first ones drawn are too long, and more."""
    lm = byte_generator()
    tasks = [Task("own", str(n), "x" * (CONTEXT if n % 2 else 5)) for n in range(12)]
    assert [one.name for one in command.prompts_of(lm, tasks, 3, 8)] == ["0", "2", "4"]
    assert len(command.prompts_of(lm, tasks, 9, 8)) == 6


def test_prompts_beyond_the_context_are_left_out(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches a run that ends at the first prompt too long, or goes on with none."""
    long = tmp_path / "long.jsonl"
    lines = [{"prompt": "y" * CONTEXT}, {"prompt": "short"}]
    long.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(arguments(place, "--prompts", str(long), "--lookahead", "none")) == DONE
    _, found = answer(capsys)
    assert found["prompts"] == 1
    long.write_text(json.dumps(lines[0]) + "\n")
    assert main(arguments(place, "--prompts", str(long))) == USAGE
    assert f"exceed the context of {CONTEXT}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("", "has no prompts"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2"),
    ],
)
def test_a_bad_file(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, a broken line without its number, and a model loaded before."""
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["advise", "--prompts", str(file), "--model", "none such"]) == USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--limit", "0"), "--limit is 0"),
        (("--batch-size", "-2"), "--batch-size is -2"),
        (("--batch-size", "200"), "up to 64"),
        (("--time-limit", "0"), "--time-limit is 0"),
        (("--time-limit", "nan"), "--time-limit is nan"),
        (("--seed", "-1"), "--seed is -1"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--lookahead-tokens", "3"), "unrecognized argument"),
    ],
)
def test_bad_settings(
    place: Path, flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback."""
    assert main(arguments(place, *flags)) == USAGE
    assert said in capsys.readouterr().err


def test_prompts_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback where nothing is named."""
    assert main(["advise"]) == USAGE
    assert "--prompts" in capsys.readouterr().err


@pytest.mark.model
def test_two_prompts_of_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches what only a whole model shows: files that ship, packed weights, a chat template."""
    file = tmp_path / "own.jsonl"
    lines = [
        {"prompt": "def add(a, b):\n"},
        {"messages": [{"role": "user", "content": "Say hello."}]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--threads", "1", "--max-new-tokens", "6", "--json")
    assert main(["advise", "--prompts", str(file), *flags]) == DONE
    said, found = answer(capsys)
    assert found["verdict"] == "undecided"
    assert found["prompts"] == 2
    assert {run["method"] for run in found["runs"]} == {
        *("ar", "lookup", "auto", "two-pass", "one-pass")
    }
    assert "too close to call" in said
