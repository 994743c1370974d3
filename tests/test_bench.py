"""Methods side by side: what is run, in which order, and the figures made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_llama import small_llama
from tiny import ARCHITECTURES, CONTEXT, VOCABULARY, random_look_ahead
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from passlm.bench.engines import methods as bench_methods
from passlm.bench.engines.decoding import PlanDecoding, Record, TimedTarget
from passlm.bench.engines.methods import Asked, Method, MethodError, build
from passlm.bench.measuring.agreement import margin
from passlm.bench.measuring.intervals import student_quantile
from passlm.bench.measuring.measure import (
    Prompt,
    Sample,
    converse,
    interleave,
    speedup_interval,
    summarize,
)
from passlm.bench.reports.markdown import markdown
from passlm.bench.suites.tasks import TaskError
from passlm.cli import main
from passlm.generate import Generator
from passlm.lookahead.trained import LookAhead
from passlm.model.pass_records import PassRow
from passlm.model.target import Target
from passlm.outputs import Stats, Step
from passlm.params import SamplingParams, StopParams
from passlm.plan import Plan

UNKNOWN, END = 0, 1
NEW_TOKENS = 10
LOOK_AHEAD = 3
PROMPTS = (("one", "w5 w6 w7"), ("two", "w9 w9 w10 w11 w12"), ("three", "w40 w3"))
# 2 methods once, 3 for each of 2 numbers of look-ahead tokens, at 2 temperatures.
ONCE = ("ar", "auto", "lookup", "hf", "hf-prompt-lookup")  # for each temperature
THEIRS = ("hf", "hf-prompt-lookup")
RUNS = (len(ONCE) + 3 * 2) * 2


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One word a token; `<unk>` is 0 and `<end>` is 1."""
    words = ["<unk>", "<end>", *(f"w{n}" for n in range(2, VOCABULARY))]
    level = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=level, **special)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with its tokenizer and look-ahead rows, and a file of prompts."""
    place = tmp_path_factory.mktemp("bench")
    model = ARCHITECTURES["llama"].build()
    model.save_pretrained(place / "model")
    tokenizer(unk_token="<unk>").save_pretrained(place / "model")
    LookAhead.mean(Target(model), LOOK_AHEAD, "tiny").save(place / "rows")
    lines = [json.dumps({"name": name, "prompt": text}) for name, text in PROMPTS]
    (place / "own.jsonl").write_text("\n".join(lines) + "\n")
    return place


def arguments(folder: Path, *more: str) -> list[str]:
    """A command line; a flag given again in `more` wins."""
    return [
        "bench",
        *("--model", str(folder / "model")),
        *("--lookahead", str(folder / "rows")),
        *("--prompts", str(folder / "own.jsonl")),
        *("--dtype", "float32"),
        *("--max-new-tokens", str(NEW_TOKENS)),
        *more,
    ]


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """The folder of one whole run."""
    place = folder / "out"
    lists = ("--temperature", "0,0.8", "--lookahead-tokens", "1,3", "--top-k", "20")
    assert main(arguments(folder, *lists, "--out", str(place))) == 0
    return place


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


@pytest.fixture
def lm() -> Generator:
    """A fresh model, for tests that change its settings."""
    target = Target(ARCHITECTURES["llama"].build())
    return Generator(
        target, tokenizer(unk_token="<unk>"), random_look_ahead(target, 3, head_width=8)
    )


def asked(*names: str, ignore_eos: bool = False, **sampling: Any) -> Asked:
    temperature = sampling.pop("temperature", 0.0)
    stopping = StopParams(NEW_TOKENS, ignore_eos=ignore_eos)
    return Asked(names, (temperature,), (2,), SamplingParams(**sampling), stopping)


def stub(
    name: str, tokens: int = 4, seconds: float = 1.0, calls: list[Any] | None = None
) -> Method:
    """A method that only notes how it was called."""

    def decode(prompt: Sequence[int], sampling: SamplingParams, longest: int) -> Record:
        if calls is not None:
            calls.append((name, tuple(prompt), sampling.seed))
        stats = Stats()
        stats.count(Step(tuple(range(tokens)), 0, 0))
        return Record(tuple(range(tokens)), 1.0, stats)

    return Method(name, "plan", SamplingParams(), 0, decode)


def samples_of(
    given: Sequence[Prompt],
    methods: Sequence[Method],
    longest: int,
    seed: int,
    repeats: int = 1,
) -> list[Sample]:
    """What all turns give."""
    turns = interleave(given, methods, seed, repeats)
    return [sample for turn in turns for sample in turn.run(given, longest)]


def prompts(count: int) -> list[Prompt]:
    return [Prompt("own", f"p{n}", (5 + n, 6, 7)) for n in range(count)]


def in_folder(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "prompts.jsonl").read_text().splitlines()]


# The results


def test_one_entry_for_each_method_temperature_and_length(results: dict[str, Any]) -> None:
    """Would catch a combination left out, run twice, or ar run for each number of tokens."""
    keys = [(r["method"], r["temperature"], r["lookahead_tokens"]) for r in results["runs"]]
    assert len(keys) == len(set(keys)) == RUNS
    assert {key for key in keys if key[0] in ONCE} == {
        (name, temperature, 0) for name in ONCE for temperature in (0, 0.8)
    }
    assert results["complete"] is True
    assert results["peak_memory_bytes"] > 2**20
    assert results["provenance"]["passlm"]


def test_shape_and_sums(results: dict[str, Any]) -> None:
    """Would catch a renamed field, and figures that do not follow from the counts."""
    for run in results["runs"]:
        assert (run["suite"], run["prompts"]) == ("own", len(PROMPTS))
        assert run["tokens"] == len(PROMPTS) * NEW_TOKENS
        assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])
        low, high = run["speedup_interval"]
        assert low <= run["speedup_vs_ar"] <= high
        if run["method"] in THEIRS:
            nothing = ("plan", "passes", "tokens_per_pass", "accepted_length", "judge")
            assert all(run[name] is None for name in (*nothing, "accepted_by_position"))
            continue
        assert run["tokens_per_pass"] == pytest.approx(run["tokens"] / run["passes"])
        assert run["accepted_length"] == pytest.approx(sum(run["accepted_by_position"]))
        if run["method"] not in ONCE[1:]:
            assert len(run["judged_by_position"]) == run["lookahead_tokens"]
        assert run["prefill_seconds"] + run["decode_seconds"] == pytest.approx(run["seconds"])
        assert 0 < run["seconds_outside_forward_share"] < 1


def test_ar_is_one_pass_a_token_and_the_measure_of_all(results: dict[str, Any]) -> None:
    """Would catch ratios taken to another method or to another temperature's plain decoding."""
    for run in results["runs"]:
        if run["method"] == "ar":
            assert run["passes"] == run["tokens"]
            assert run["speedup_vs_ar"] == 1
            assert run["speedup_interval"] == [1, 1]


def test_float32_texts_are_identical_greedy_and_sampled(results: dict[str, Any]) -> None:
    """Would catch a method with other settings, ends or seeds; sampled hf draws otherwise."""
    for run in results["runs"]:
        if run["method"] in THEIRS and run["temperature"] > 0:
            assert run["identical_to_ar"] is None
        else:
            assert (run["identical_to_ar"], run["differences"]) == (1, [])


def test_prompts_file_holds_every_run(out: Path, results: dict[str, Any]) -> None:
    """Would catch records lost or written for the warm-up."""
    lines = in_folder(out)
    assert len(lines) == RUNS * len(PROMPTS)
    assert sum(line["tokens"] for line in lines) == sum(r["tokens"] for r in results["runs"])
    keys = {"name", "method", "plan", "tokens", "passes", "seconds", "accepted", "suite"}
    assert all(keys <= set(line) for line in lines)


def test_methods_are_interleaved_in_the_file(out: Path) -> None:
    """Would catch one method being run on all prompts before the next."""
    names = [line["name"] for line in in_folder(out)]
    assert names == [name for name, _ in PROMPTS for _ in range(RUNS)]


def test_report_is_made_of_the_results(out: Path, results: dict[str, Any]) -> None:
    """Would catch a table that misses a run, and a report that needs more than the results."""
    text = markdown(results)
    assert (out / "report.md").read_text() == text
    assert text.count("## own, temperature") == 2
    assert text.count("| two-pass | 3 |") == 2
    assert "passlm " in text
    run = {**results["runs"][1], "speedup_vs_ar": 7.77, "speedup_interval": [7.11, 8.22]}
    assert "7.77 (7.11 to 8.22)" in markdown({**results, "runs": [run]})


def test_report_names_differences(results: dict[str, Any]) -> None:
    """Would catch texts that differ being hidden behind a rounded share."""
    part = [{"prompt": "one", "index": 2, "token": 4, "ar_token": 5, "margin": 0.0625}]
    run = {**results["runs"][1], "identical_to_ar": 0.9, "differences": part}
    text = markdown({**results, "runs": [run]})
    assert "differ from ar: 1" in text
    assert "0.0625 apart" in text


# Order and seeds


def test_interleave_shuffles_within_each_prompt() -> None:
    """Would catch a fixed order, in which one method always runs on a warm or a cold cache."""
    calls: list[Any] = []
    stubs = [stub(name, calls=calls) for name in "abcd"]
    samples = samples_of(prompts(12), stubs, 4, 3)
    assert [sample.prompt for sample in samples] == [n for n in range(12) for _ in range(4)]
    orders = ["".join(c[0] for c in calls[n : n + 4]) for n in range(0, 48, 4)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 3  # 12 orders of 24: all among 3 has a chance below 1e-8
    again = [turn.method.name for turn in interleave(prompts(12), stubs, seed=3)]
    assert again == [sample.method.name for sample in samples]


def test_methods_share_a_prompts_seed_and_prompts_do_not() -> None:
    """Would catch sampled texts compared under different noise, and one noise for all prompts."""
    calls: list[Any] = []
    samples_of(prompts(3), [stub("a", calls=calls), stub("b", calls=calls)], 4, 2**64 - 2)
    seeds = {ids: {c[2] for c in calls if c[1] == ids} for _, ids, _ in calls}
    assert sorted(map(len, seeds.values())) == [1, 1, 1]
    assert set.union(*seeds.values()) == {2**64 - 2, 2**64 - 1, 0}


# Figures


def test_twice_as_fast_is_about_two() -> None:
    """Would catch a ratio turned over, and means of ratios in place of ratios of sums."""
    rng = np.random.default_rng(0)
    tokens = np.full((2, 60), 100)
    baseline = rng.uniform(1.8, 2.2, 60)
    seconds = np.stack([baseline / 2 * rng.uniform(0.9, 1.1, 60), baseline])
    interval = speedup_interval(tokens, seconds, seed=0)
    assert interval is not None
    low, high = interval
    assert 1.9 < low < 2 < high < 2.1
    assert interval == speedup_interval(tokens, seconds, seed=0)


def test_bootstrap_is_paired() -> None:
    """Would catch prompts drawn apart for the two methods: slow prompts would widen it."""
    seconds = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    interval = speedup_interval(np.full((2, 3), 50), seconds, seed=1)
    assert interval == pytest.approx([2, 2])


@pytest.mark.parametrize(("freedom", "known"), [(2, 4.303), (3, 3.182), (9, 2.262), (99, 1.984)])
def test_students_quantiles(freedom: int, known: float) -> None:
    """Catches a wrong term; the values are those of the tables."""
    assert student_quantile(0.975, freedom) == pytest.approx(known, rel=0.01)


def test_few_prompts_have_wide_intervals() -> None:
    """Catches the plain percentile interval, which holds the truth in 86 of 100 cases of 6 prompts,
    and one so wide that it holds it always. Seeds are fixed."""
    rng = np.random.default_rng(0)
    held, runs = 0, 300
    for seed in range(runs):
        plain = rng.uniform(1.0, 2.0, 6)
        seconds = np.stack([plain * np.exp(0.2 * rng.normal(size=6)), plain])
        low, high = speedup_interval(np.full((2, 6), 64), seconds, seed) or [0, 0]
        held += low <= np.exp(-0.02) <= high  # the mean of such times is exp(0.2**2 / 2)
    assert 0.89 * runs < held < 0.99 * runs


def test_one_prompt_has_no_interval() -> None:
    """Would catch an interval of no width where nothing is known of the spread."""
    assert speedup_interval(np.array([[5], [5]]), np.array([[1.0], [2.0]]), 0) is None


def test_acceptance_by_position_is_of_all_judging_passes(lm: Generator) -> None:
    """Would catch conditional shares passed off as unconditional ones."""
    stats = Stats()
    for tokens, accepted in ((1, 0), (2, 1), (3, 2), (3, 2)):
        stats.count(Step(tuple(range(tokens)), accepted, 2))
    stats.count(Step((1,), 0, 0))  # a drafting pass
    stats.decode_seconds = 4.0
    record = Record(tuple(range(10)), 5.0, stats, 3.0)
    method = replace(stub("ar"), decode=lambda *_: record)
    run = summarize(prompts(1), [Sample(0, method, record)], [method], lm.target, 0)[0]
    assert run["accepted_by_position"] == [0.75, 0.5]
    assert run["judged_by_position"] == [4, 3]
    assert run["accepted_of_judged_by_position"] == pytest.approx([0.75, 2 / 3])
    assert run["accepted_length"] == 1.25
    assert run["seconds_outside_forward_share"] == 0.25


def test_a_rigged_difference_is_counted_and_its_margin_measured(lm: Generator) -> None:
    """Would catch differing texts counted as equal, and a margin read one place off."""
    plain = build(lm, asked("ar"), "tiny")[0]

    def rigged(prompt: Sequence[int], sampling: SamplingParams, longest: int) -> Record:
        record = plain.decode(prompt, sampling, longest)
        wrong = (*record.tokens[:3], (record.tokens[3] + 1) % VOCABULARY, *record.tokens[4:])
        return replace(record, tokens=wrong) if prompt[0] == 5 else record

    both = [plain, replace(plain, name="two-pass", decode=rigged)]
    given = prompts(4)
    samples = samples_of(given, both, NEW_TOKENS, 0)
    runs = summarize(given, samples, both, lm.target, 0)
    assert [run["identical_to_ar"] for run in runs] == [1, 0.75]
    (difference,) = runs[1]["differences"]
    expected = plain(given[0].ids, 0, NEW_TOKENS).tokens
    assert (difference["prompt"], difference["index"]) == ("p0", 3)
    assert difference["ar_token"] == expected[3] != difference["token"]
    text = torch.tensor([[*given[0].ids, *expected[:3]]])
    best = lm.target.model(text).logits[0, -1].detach().topk(2)
    assert best.indices[0] == expected[3]
    assert difference["margin"] == pytest.approx(float(best.values.diff().abs()), abs=1e-4)


def test_a_text_that_is_only_shorter_differs(lm: Generator) -> None:
    """Would catch a comparison of the common part alone, or a look behind the end."""
    plain = stub("ar", tokens=4)
    both = [plain, stub("two-pass", tokens=2)]
    runs = summarize(prompts(1), samples_of(prompts(1), both, 4, 0), both, lm.target, 0)
    (difference,) = runs[1]["differences"]
    assert (difference["index"], difference["token"], difference["ar_token"]) == (2, None, 2)


def test_margin_of_a_single_token(lm: Generator) -> None:
    """Would catch a prefill of nothing being refused."""
    assert margin(lm.target, [5]) > 0


# Methods


def test_hf_takes_nothing_from_the_models_own_settings(lm: Generator) -> None:
    """Would catch generation settings of the model changing what hf writes and ar does not."""
    settings: Any = lm.target.model.generation_config
    settings.repetition_penalty, settings.do_sample, settings.top_k = 3.0, True, 2
    ar, hf = build(lm, asked("ar", "hf"), "tiny")
    ids = [5, 6, 7]
    assert hf(ids, 0, NEW_TOKENS).tokens == ar(ids, 0, NEW_TOKENS).tokens


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_all_methods_end_alike(lm: Generator, ignore_eos: bool) -> None:
    """Would catch an end that one method heeds and another does not, in either setting."""
    ids = [5, 6, 7]
    text = build(lm, asked("ar"), "tiny")[0](ids, 0, NEW_TOKENS).tokens
    lm.eos = frozenset({text[4]})
    settings: Any = lm.target.model.generation_config
    settings.eos_token_id = text[4]
    expected = NEW_TOKENS if ignore_eos else text.index(text[4]) + 1
    names = (*bench_methods.OURS, *bench_methods.THEIRS)
    others = bench_methods.Others(lm.target.model)
    for method in build(lm, asked(*names, ignore_eos=ignore_eos), "tiny", others=others):
        assert method(ids, 0, NEW_TOKENS).tokens == text[:expected], method.name


def test_sampled_hf_draws_from_the_same_few_tokens(lm: Generator) -> None:
    """Would catch top-k or temperature not reaching hf: with top-k 1 all sampling is greedy."""
    few = build(lm, asked("ar", "hf", temperature=0.8, top_k=1), "tiny")
    greedy = build(lm, asked("ar"), "tiny")[0]([5, 6], 0, NEW_TOKENS).tokens
    assert [method([5, 6], 3, NEW_TOKENS).tokens for method in few] == [greedy, greedy]


@pytest.mark.parametrize(
    ("special", "token"),
    [({"unk_token": "<unk>", "eos_token": "<end>"}, UNKNOWN), ({"eos_token": "<end>"}, END)],
)
def test_fixed_token_fills_every_row(lm: Generator, special: dict[str, str], token: int) -> None:
    """Would catch the trained rows, or another token than the unknown or end one, being used."""
    fixed = build(Generator(lm.target, tokenizer(**special)), asked("fixed-token"), "tiny")[0]
    assert isinstance(fixed.decode, PlanDecoding)
    assert fixed.plan == "two-pass(2)"
    rows = fixed.decode.look_ahead
    assert rows is not None
    assert torch.equal(rows.inputs, lm.target.embed(torch.tensor([token, token])))
    assert (rows.lora, rows.sampler) == (None, None)


def test_draft_head_needs_one(lm: Generator) -> None:
    """Would catch plain decoding under the name of drafting, and a head asked for too much."""
    (method,) = build(lm, asked("draft-head"), "tiny")
    assert method.plan == "draft-head(2)"
    stats = method([5, 6, 7], 0, NEW_TOKENS).stats
    assert stats is not None
    assert stats.judging_passes >= stats.passes - 2  # all but the first and, at the end, one
    rows = LookAhead.mean(lm.target, 3, "tiny")
    with pytest.raises(MethodError, match="none is loaded"):
        build(Generator(lm.target, lm.tokenizer, rows), asked("draft-head"), "tiny")
    four = replace(asked("draft-head"), lookahead_tokens=(4,))
    with pytest.raises(MethodError, match="proposes 1 to 3"):
        build(lm, four, "tiny")


def test_fixed_token_needs_a_token(lm: Generator) -> None:
    """Would catch a silent choice of some other token."""
    with pytest.raises(MethodError, match="neither"):
        build(Generator(lm.target, tokenizer()), asked("fixed-token"), "tiny")


def test_rejection_sampling_is_not_expected_to_repeat(lm: Generator) -> None:
    """Would catch texts of the rejection judge, which differ by right, reported as faults."""
    made = build(lm, asked("ar", "one-pass", temperature=0.8, judge="rejection"), "tiny")
    assert [method.repeats_plain for method in made] == [True, False]
    greedy = build(lm, asked("one-pass", "hf", judge="rejection"), "tiny")
    assert all(method.repeats_plain for method in greedy)


def test_time_in_forward_is_within_the_decoding_time(lm: Generator) -> None:
    """Would catch prefill or another method's passes being counted as this run's forward."""
    for method in build(lm, asked("ar", "one-pass"), "tiny"):
        record = method([5, 6, 7] * 20, 0, NEW_TOKENS)
        assert record.stats is not None
        assert record.forward_seconds is not None
        assert 0 < record.forward_seconds < record.stats.decode_seconds < record.seconds


def test_timed_target_gives_the_same_logits(lm: Generator) -> None:
    """Would catch the stopwatch changing what is measured."""
    timed = TimedTarget(lm.target.model, pack=False)
    assert margin(timed, [5, 6]) == margin(lm.target, [5, 6])
    assert timed.seconds > 0


# Batches


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_is_its_texts(lm: Generator, temperature: float) -> None:
    """Catches texts of a batch mixed up, drawn with each other's noise, or counted together."""
    names = ("ar", "two-pass", "one-pass", "auto", "lookup", "fixed-token")
    given = [[5, 6, 7], [9, 9, 10, 11, 12], [40, 3], [8]]
    both = replace(asked(*names, temperature=temperature), batch_sizes=(1, 4))
    made = build(lm, both, "tiny")
    for alone, together in zip(made[: len(names)], made[len(names) :], strict=True):
        assert (alone.name, together.batch_size) == (together.name, 4)
        found = together.batch(given, range(4), NEW_TOKENS)
        expected = [alone(ids, seed, NEW_TOKENS) for seed, ids in enumerate(given)]
        assert [record.tokens for record in found] == [record.tokens for record in expected]
        assert {record.seconds for record in found} == {found[0].seconds}
        for record, ids in zip(found, given, strict=True):
            assert record.stats is not None
            assert record.first_token_seconds is not None
            assert (record.stats.prompt_tokens, record.stats.tokens) == (len(ids), NEW_TOKENS)
            assert len(record.positions) == NEW_TOKENS
            assert record.first_token_seconds < 4 * record.seconds
            parts = record.stats.prefill_seconds + record.stats.decode_seconds
            assert parts == pytest.approx(record.seconds)
        if alone.name == "ar":
            assert [record.rows for record in found] == [NEW_TOKENS] * 4


def test_what_decodes_one_prompt_at_a_time_needs_batches_of_one() -> None:
    """Catches other engines timed alone and called a batch, and sizes that are none."""
    names = ("ar", "hf")
    with pytest.raises(
        MethodError, match=r"^hf can only decode one prompt at a time: add 1 to --batch"
    ):
        bench_methods.check_names(names, (2, 4))
    with pytest.raises(MethodError, match="batch size is 0"):
        bench_methods.check_names(("ar",), (0, 1))
    bench_methods.check_names(names, (1, 4))


# The command


def test_json_is_the_last_line_and_ar_is_added(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Would catch ratios without a base, progress on standard output, and a JSON of many lines."""
    assert main(arguments(folder, "--methods", "hf", "--limit", "2", "--json")) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = json.loads(lines[-1])["runs"]
    assert [(run["method"], run["prompts"]) for run in runs] == [("ar", 2), ("hf", 2)]
    assert lines[0] == "# passlm bench"
    assert "ar is added" in caplog.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--methods", "two-pas"), "did you mean 'two-pass'?"),
        (("--suite", "humanevl"), "did you mean 'humaneval'?"),
        (("--temperature", "hot"), "separated by commas"),
        (("--temperature", "0,-1"), "temperature is -1"),
        (("--lookahead-tokens", "4"), "rows for 1 to 3"),
        (("--lookahead-tokens", "0"), "0"),
        (("--lookahead", "none"), "look-ahead files"),
        (("--limit", "0"), "limit is 0"),
        (("--repeats", "0"), "repeats is 0"),
        (("--run-generated-code",), "suite humaneval: add it"),
        (("--compare", "a", "b"), "leave --prompts out"),
        (("--suite", "code", "--prompts", "code.jsonl"), "rename"),
        (("--overwrite",), "--out"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    """Would catch a traceback, or a wrong setting that is quietly mended."""
    assert main(arguments(folder, *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "passlm: " in line]
    assert said in errors[-1]


def test_results_to_compare_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a traceback."""
    assert main(["bench", "--compare", "nowhere", "either"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_no_prompts_at_all_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a run of nothing."""
    assert main(["bench"]) == 2
    assert "--suite" in capsys.readouterr().err


def test_a_broken_line_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch broken prompts being passed over."""
    broken = folder / "broken.jsonl"
    broken.write_text('{"prompt": "w5"}\n{"prompt": \n')
    assert main(arguments(folder, "--prompts", str(broken))) == 2
    assert "line 2" in capsys.readouterr().err


def test_results_are_not_overwritten_unasked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a run lost to a second one, and records of two runs in one file."""
    line = arguments(folder, "--methods", "ar", "--limit", "1", "--out", str(tmp_path))
    assert main(line) == 0
    before = (tmp_path / "results.json").read_bytes()
    assert main(line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before
    assert main([*line, "--overwrite"]) == 0
    assert len(in_folder(tmp_path)) == 1


def test_a_missing_suite_is_named_and_the_rest_runs(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Would catch one missing package costing the whole run, or being left unsaid."""

    def missing(name: str, *_: Any) -> list[Any]:
        raise TaskError(f"suite {name!r} needs some package: pip install it")

    monkeypatch.setattr("passlm.bench.suites.prompts.load_suite", missing)
    line = arguments(folder, "--suite", "text", "--methods", "ar", "--limit", "1", "--json")
    assert main(line) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results["missing_suites"]) == ["text"]
    assert [run["suite"] for run in results["runs"]] == ["own"]
    assert "pip install it" in caplog.text
    alone = [part for part in line if "own.jsonl" not in part and part != "--prompts"]
    assert main(alone) == 2
    assert "no prompts are left" in capsys.readouterr().err


def test_prompts_too_long_for_the_context_are_skipped_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Would catch texts cut by the context, which end early and differ between methods."""
    fits, exceeds = CONTEXT - NEW_TOKENS, CONTEXT - NEW_TOKENS + 1
    lines = [json.dumps({"name": f"n{n}", "prompt": "w5 " * n}) for n in (fits, exceeds)]
    file = folder / "long.jsonl"
    file.write_text("\n".join(lines))
    assert main(arguments(folder, "--prompts", str(file), "--methods", "ar", "--json")) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["skipped"] == [{"suite": "long", "prompt": f"n{exceeds}", "tokens": exceeds}]
    assert (results["runs"][0]["prompts"], results["runs"][0]["tokens"]) == (1, NEW_TOKENS)
    assert f"skipped n{exceeds}" in caplog.text


# Chats of several turns


def test_a_chat_goes_on_with_the_methods_own_answers(lm: Generator) -> None:
    """Catches a second turn that is not asked, or asked behind another method's answer; and a
    margin taken from a text that none of them wrote."""

    def further(answers: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        return (
            (5, 6, *(token for answer in answers for token in answer), 7)[:40]
            if (len(answers) < 3)
            else None
        )

    asked_for: list[Any] = []
    prompt = Prompt("own", "chat", (5, 6), further)
    sample = samples_of([prompt], [stub("ar", calls=asked_for)], 4, 3)[0]
    assert [(name, ids) for name, ids, _ in asked_for] == [
        ("ar", (5, 6)),
        ("ar", (5, 6, 0, 1, 2, 3, 7)),
        ("ar", (5, 6, 0, 1, 2, 3, 0, 1, 2, 3, 7)),
    ]
    record = sample.record
    assert record.answers == [(0, 1, 2, 3)] * 3
    assert (record.seconds, record.stats and record.stats.tokens) == (3.0, 12)
    made = build(lm, asked("ar", "hf"), "tiny")
    real = [converse(prompt, method, 0, NEW_TOKENS) for method in made]
    assert real[0].answers == real[1].answers
    assert [len(answer) for answer in real[0].answers] == [NEW_TOKENS] * 3
    first = real[0].turns[1][1]
    tokens = list(real[0].tokens)
    tokens[first] = (tokens[first] + 1) % VOCABULARY
    wrong = replace(real[0], tokens=tuple(tokens))
    samples = [Sample(0, made[0], real[0]), Sample(0, made[1], wrong)]
    runs = summarize([prompt], samples, made, lm.target, 0)
    assert runs[1]["identical_to_ar"] == 0.0
    difference = runs[1]["differences"][0]
    assert (difference["turn"], difference["index"]) == (2, 0)
    assert difference["margin"] == margin(lm.target, real[0].turns[1][0])


def test_what_a_text_was_paid_with(lm: Generator) -> None:
    """Catches rows that are not counted, and a first token timed with the whole text."""
    for method in build(lm, asked("ar", "two-pass", "hf"), "tiny"):
        record = method([5, 6, 7], 0, NEW_TOKENS)
        assert record.first_token_seconds is not None
        assert 0 < record.first_token_seconds < record.seconds
        if method.name == "hf":
            assert record.rows is None
        elif record.stats is not None and record.rows is not None:
            assert record.rows == record.stats.passes if method.name == "ar" else record.rows > 12


# Repeats, and programs that are run


def test_repeats_are_runs_of_their_own_and_no_prompts(lm: Generator) -> None:
    """Catches repeats with one seed, speeds that count them as prompts, and a spread that mixes
    the two."""
    calls: list[Any] = []
    methods = [stub("ar", 4, 1.0, calls), stub("two-pass", 8)]
    samples = samples_of(prompts(2), methods, 4, 10, repeats=3)
    assert len(samples) == 12
    assert sorted(seed for _, _, seed in calls) == [10, 11, 12, 13, 14, 15]
    fast, slow = (
        [replace(s, record=replace(s.record, seconds=1.0 + s.repeat)) for s in samples],
        [replace(s, record=replace(s.record, seconds=1.0 + s.prompt)) for s in samples],
    )
    within = summarize(prompts(2), fast, methods, lm.target, 0)[0]
    between = summarize(prompts(2), slow, methods, lm.target, 0)[0]
    assert (within["prompts"], within["repeats"], within["tokens"]) == (2, 3, 24)
    assert within["speed_spread"]["prompts"] == pytest.approx(0)
    assert within["speed_spread"]["repeats"] > 0.5
    assert between["speed_spread"]["repeats"] == pytest.approx(0)
    assert between["speed_spread"]["prompts"] > 0.4


def test_generated_code_is_scored_by_method(
    lm: Generator, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Catches programs of one method scored as another's, cut at the wrong place, read without what
    stands before them, or run without being asked for."""
    from passlm.bench.session import scored
    from passlm.bench.suites import humaneval

    ran: list[tuple[str, str]] = []

    def score(problems: Any, completions: dict[str, list[str]], **_: Any) -> dict[str, Any]:
        ran.extend((name, text) for name, texts in completions.items() for text in texts)
        return {"pass_at_k": {}, "samples": 1, "problems": len(problems)}

    problem = humaneval.Problem("p0", "def f():\n", "f", "")
    monkeypatch.setattr(humaneval, "load_problems", lambda: [problem])
    monkeypatch.setattr(humaneval, "score", score)

    def decode(lm: Generator, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))  # a text's first space is dropped, as by Llama 2's

    monkeypatch.setattr(Generator, "decode", decode)
    methods = [stub("ar", 2), stub("two-pass", 3)]
    samples = samples_of(prompts(1), methods, 4, 0, repeats=2)
    found = [
        scored(lm, prompts(1), [one for one in samples if one.method is method], 0)
        for method in methods
    ]
    texts = ["".join(f" {token}" for token in range(count)) for count in (2, 2, 3, 3)]
    assert ran == [("p0", text) for text in texts]
    assert [quality["problems"] for quality in found] == [1, 1]


def test_a_compiled_target_counts_from_nothing(tmp_path: Path) -> None:
    """Catches a stopwatch that is not there yet when a target looks at its model's sizes."""
    target = TimedTarget(small_llama(), pack=True, compiled=tmp_path)
    assert target.engine == "compiled"
    assert target.seconds == 0.0


def test_rows_that_fill_up_a_batch_count_where_they_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a price of drafting in batches that is too low, or that of the longest text for all
    where each costs its own rows."""
    target = TimedTarget(small_llama(), pack=False)
    rows = [PassRow([1, 2, 3], Plan(2, (0, 0, 0))), PassRow([4], Plan(0, (0,)))]
    target.run(target.new_cache(batch=2), rows, None)
    assert target.rows == [3, 3]
    monkeypatch.setattr(TimedTarget, "in_line", True)
    target.run(target.new_cache(batch=2), rows, None)
    assert target.rows == [3, 1]
