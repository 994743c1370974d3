"""Two-sample tests of drawn texts: right statistics, honest p-values, and wrong judges noticed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from byte_model import save_folders
from small_llama import BLANKS, counting_llama, counting_look_ahead

from passlm.bench.measuring.distribution import (
    CHANCE,
    END,
    LEVEL,
    Energy,
    LengthSteps,
    OfWhole,
    Sampler,
    Texts,
    TokenCells,
    holm,
    noticed,
    p_values,
    questions,
    text_lengths,
)
from passlm.bench.measuring.judged import JudgedTokens
from passlm.decoding import judge
from passlm.decoding.strategies import Adaptive, ByHead, OnePass, Strategy, TwoPass, autoregressive
from passlm.drafts.draft_head import DraftHead
from passlm.generate import Generator
from passlm.outputs import Output
from passlm.params import Draft, Judge, SamplingParams
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve

SCRIPT = Path(__file__).parents[1] / "recipes" / "same_distribution.py"
PROMPTS = ([1, 2, 3], [5, 8, 11])
ENDS = frozenset({7})  # a number that a text may come by
TOKENS = 6
TEXTS = 300
SHUFFLES = 2000
WARM = 1.3  # a temperature at which about one draft in two is accepted
PLANS: dict[str, Strategy | Adaptive] = {
    "two-pass": TwoPass(3),
    "one-pass": OnePass(2),
    # Rows are cheap and copies are taken for good, so that both sources are used.
    "auto": AutoPlan(CostCurve((1, 21), (1.0, 1.1), (1, 4), (0.01, 0.01)), (0.5,) * BLANKS),
}


def texts(rows: Sequence[Sequence[int]]) -> Texts:
    return np.array(rows, dtype=np.int64)


def sides(left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """The first texts on the left, the others on the right."""
    label = np.repeat([1.0, 0.0], [left, right])
    return label[None], 1 - label[None]


def draw(plans: Strategy | Adaptive, judge: Judge, first_seed: int, texts: int = TEXTS) -> list:
    """Texts of both prompts with consecutive seeds."""
    target = counting_llama()
    sampler = Sampler(
        target,
        counting_look_ahead().rows(target),
        SamplingParams(temperature=WARM, judge=judge),
        plans,
        ENDS,
        TOKENS,
        at_once=100,
    )
    return [
        sampler.draw(prompt, range(first_seed + at * texts, first_seed + (at + 1) * texts))
        for at, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def plain() -> list[Texts]:
    return draw(autoregressive, "coupled", 10**6)


def chances(plain: list[Texts], other: list[Texts]) -> list[float]:
    return p_values(list(zip(plain, other, strict=True)), questions(4), SHUFFLES, 0)


# Statistics


def test_chi_squared_of_a_known_table() -> None:
    """Catches expected counts of another table: 30 and 10 against 20 and 20 give 16/3."""
    drawn = texts([[1]] * 30 + [[2]] * 10 + [[1]] * 20 + [[2]] * 20)
    assert TokenCells.at(drawn, 0)(*sides(40, 40)) == pytest.approx([16 / 3])


def test_rare_tokens_are_one_cell() -> None:
    """Catches many cells of one text each, which drown what the common ones show."""
    drawn = texts([[1]] * 20 + [[token] for token in range(100, 109)])
    cells = TokenCells.at(drawn, 0).cells
    assert cells.sum(0).tolist() == [20, 9]
    assert (cells.sum(1) == 1).all()


def test_a_cell_that_no_side_has_counts_nothing() -> None:
    """Catches 0 divided by 0 where texts are drawn with replacement."""
    drawn = texts([[1]] * 20 + [[2]] * 20)
    none_of_two = np.repeat([1.0, 0.0], 20)[None]
    assert TokenCells.at(drawn, 0)(none_of_two, none_of_two).tolist() == [0]


def test_lengths_count_the_end_and_what_goes_on_is_longer() -> None:
    """Catches texts that go on taken for those that end with the last place."""
    drawn = texts([[1, END, END], [1, 7, END], [1, 2, 3]])
    assert text_lengths(drawn).tolist() == [1, 2, 4]
    # F is 1/2, 1 on the left and 0, 0 on the right.
    four = texts([[1, END, END], [1, 7, END], [1, 2, 3], [4, 5, 6]])
    assert LengthSteps.of(four)(*sides(2, 2)) == pytest.approx([1.0])


def test_energy_is_its_definition() -> None:
    """Catches a sign, a factor 2 or a distance of other places: all expectations written out."""
    rng = np.random.default_rng(0)
    left, right = rng.integers(3, size=(7, 4)), rng.integers(3, size=(5, 4))

    def mean(one: Texts, other: Texts) -> float:
        return float(np.mean([(a != b).mean() for a, b in product(one, other)]))

    expected = 2 * mean(left, right) - mean(left, left) - mean(right, right)
    energy = Energy.of(np.vstack([left, right]))(*sides(7, 5))
    assert energy == pytest.approx([expected])
    assert expected > 0


# Tests


def test_p_values_of_equal_distributions_are_even() -> None:
    """Catches p-values that are too small, or so large that nothing is ever refused.

    400 pairs of samples of one distribution: those up to 0.05 are 20 on average; a right test
    gives less than 4 or more than 38 once in 10,000 runs, for each question. Seeds are fixed.
    """
    rng = np.random.default_rng(1)
    asked = questions(1)
    met = np.zeros(len(asked))
    for seed in range(400):
        both = rng.geometric(0.4, size=(2, 30, 3)).clip(max=6)
        both[both == 6] = END
        met += [chance <= 0.05 for chance in p_values([(both[0], both[1])], asked, 99, seed)]
    assert ((met > 3) & (met < 39)).all(), met


def test_the_least_p_value_is_one_of_the_shuffles() -> None:
    """Catches a p-value of 0, and sides that are shuffled across prompts."""
    apart = [(texts([[1]] * 20), texts([[2]] * 20))]
    assert p_values(apart, [OfWhole()], 499, 0) == [1 / 500]
    # Each prompt has a text of its own on both sides: nothing differs.
    same = [(texts([[at]] * 20), texts([[at]] * 20)) for at in range(3)]
    assert p_values(same, [OfWhole()], 499, 0) == [1.0]


def test_small_shifts_add_up_over_prompts() -> None:
    """Catches the largest prompt taken for all of them."""
    rng = np.random.default_rng(0)
    prompts = [
        (rng.binomial(1, 0.5, size=(60, 1)), rng.binomial(1, 0.68, size=(60, 1))) for _ in range(8)
    ]
    alone = [p_values([pair], [OfWhole()], 999, 0)[0] for pair in prompts]
    assert p_values(prompts, [OfWhole()], 999, 0)[0] < min(alone) / 4


def test_holm() -> None:
    """Catches corrected values out of order or above 1: the textbook's steps."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


# Drawing


def test_texts_are_those_of_generate() -> None:
    """Catches a prompt's cache shared wrongly, seeds mixed up, or texts cut at another place."""
    target = counting_llama()
    drawn = draw(TwoPass(3), "coupled", 40, texts=5)
    lm = Generator(target, _NoText(), counting_look_ahead())  # type: ignore[arg-type]
    for prompt, rows, first in zip(PROMPTS, drawn, (40, 45), strict=True):
        for at, row in enumerate(rows):
            output: Output = lm.generate(
                [prompt], temperature=WARM, seed=first + at, max_new_tokens=TOKENS, method="ar"
            )[0]
            cut = list(output.tokens)
            if 7 in cut:
                cut = cut[: cut.index(7) + 1]
            assert row.tolist() == cut + [END] * (TOKENS - len(cut))


class _NoText:
    """A tokenizer for those who look at ids alone."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""


def test_equal_seeds_prove_nothing(plain: list[Texts]) -> None:
    """Shows why seeds must differ: with the coupled judge equal ones give equal texts."""
    same = draw(TwoPass(3), "coupled", 10**6)
    assert all((a == b).all() for a, b in zip(plain, same, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["coupled", "rejection"])
@pytest.mark.parametrize("name", PLANS)
def test_pass_draws_as_plain_decoding_does(name: str, judge: Judge, plain: list[Texts]) -> None:
    """Catches a judge or plan that shifts texts. Seeds are fixed, so it never fails by chance;
    with others it would once in 1,000 for each of the six (Holm over six tests at 0.001)."""
    start = 10**5 * (1 + 2 * list(PLANS).index(name) + (judge == "coupled"))
    other = draw(PLANS[name], judge, start)
    assert not any((a == b).all() for a, b in zip(plain, other, strict=True))
    assert min(holm(chances(plain, other))) > 0.001


# Wrong judges, and what would be noticed


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script."""
    spec = importlib.util.spec_from_file_location("same_distribution_recipe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("at", [1, 2, 3])
def test_wrong_judges_are_refused(at: int, recipe: ModuleType, plain: list[Texts]) -> None:
    """Catches tests that notice nothing. The mildest of the wrong judges is too mild for so few
    texts, and the place of the right one must be given back."""
    right = judge.rejection
    wrong = recipe.wrong_judges()[at]
    with recipe.in_place(wrong):
        other = draw(TwoPass(3), "rejection", 5 * 10**5)
    assert judge.rejection is right
    assert np.mean(wrong.off) > 0.05
    assert min(holm(chances(plain, other))) <= LEVEL


def test_a_wrong_judge_with_nothing_wrong_is_the_right_one(recipe: ModuleType) -> None:
    """Catches a control that differs from the judge in more than it says; `off` must be 0 then."""
    wrong = recipe.WrongJudge("nothing")
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        p, q = (torch.rand(3, 5, generator=rng).softmax(-1) for _ in range(2))
        candidates = torch.randint(5, (2,), generator=rng).tolist()
        uniform = torch.rand(2, generator=rng, dtype=torch.float64)
        noise = torch.empty(3, 5).exponential_(generator=rng)
        given = (p, q[:2], candidates, uniform, noise)
        assert wrong(*given) == judge.rejection(*given)
    assert max(wrong.off) < 1e-6


def test_how_far_a_wrong_judge_is_off(recipe: ModuleType) -> None:
    """Catches a distance of something else: with every draft accepted it is that of `p` and `q`;
    with the residual drawn from `p`, one half of `sum |min(p, q) - p sum min(p, q)|`."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]] * 2), torch.tensor([[0.2, 0.2, 0.6]])
    given = (p, q, [0], torch.tensor([0.0]), torch.ones(2, 3))
    _, from_p, _, always = recipe.wrong_judges()
    always(*given)
    assert always.off == pytest.approx([0.4])
    from_p(*given)
    both = torch.minimum(p[0], q[0])
    expected = (both - p[0] * both.sum()).abs().sum() / 2
    assert from_p.off == pytest.approx([float(expected)])


def watched(
    plans: Strategy | Adaptive, judge: Judge, first_seed: int, **drawn: Any
) -> JudgedTokens:
    """The judged tokens of many texts."""
    found = JudgedTokens()
    target = counting_llama()
    sampling = SamplingParams(temperature=WARM, judge=judge, **drawn)
    files = counting_look_ahead()
    files.head = DraftHead.start(target.d_model, 8, 2, 2, torch.arange(target.vocabulary - 1))
    files.head.out.data.normal_(0, 1.0, generator=torch.Generator().manual_seed(5))
    rows = files.rows(target)
    sampler = Sampler(target, rows, sampling, plans, frozenset(), 20, 100, found)
    sampler.draw(PROMPTS[0], range(first_seed, first_seed + TEXTS))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["coupled", "rejection"])
@pytest.mark.parametrize("name", PLANS)
def test_judged_tokens_have_the_probability_of_the_model(name: str, judge: Judge) -> None:
    """Catches a set that depends on the noise of its place, tokens held to another row's `p`, and
    a variance that is none. Seeds are fixed; with others each of the six fails once in 1,000."""
    found = watched(PLANS[name], judge, 7 * 10**5)
    assert found.count > TEXTS
    assert 0.01 < found.variance / found.count < 0.26
    assert found.p_value > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("draft", get_args(Draft))
@pytest.mark.parametrize("judge", get_args(Judge))
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_draft_heads_tokens_are_judged_as_they_are_drawn(
    penalty: float, judge: Judge, draft: Draft
) -> None:
    """Catches drawn tokens of a head taken for copied ones: they would be found far too often.
    Seeds are fixed; with others each of the eight fails once in 1,000."""
    drawn: dict[str, Any] = {"draft": draft, "repetition_penalty": penalty}
    found = watched(ByHead(2), judge, 9 * 10**5, **drawn)
    assert found.count > TEXTS
    assert found.p_value > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_places_chosen_by_their_noise_are_not_judged(penalty: float) -> None:
    """Catches tokens found too often where those places are verified whose noise is of help."""
    cheap = CostCurve((1, 21), (1.0, 1.1), head_seconds=(0.01, 0.02))
    plans = AutoPlan(cheap, lookup=False, head=(0.5, 0.5))
    assert watched(plans, "coupled", 0, repetition_penalty=penalty).count == 0
    others = watched(plans, "coupled", 0, repetition_penalty=penalty, draft="greedy")
    assert others.count > TEXTS
    assert others.p_value > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("at", range(4))
def test_judged_tokens_show_wrong_judges(at: int, recipe: ModuleType) -> None:
    """Catches a test that notices little: here even the mildest judge is found, and for judges that
    accept too often the excess is the shift itself, up to three standard errors."""
    wrong = recipe.wrong_judges()[at]
    with recipe.in_place(wrong):
        found = watched(TwoPass(3), "rejection", 8 * 10**5)
    assert found.p_value < 1e-4
    assert found.excess > 0
    error = found.variance**0.5 / found.count
    off = float(np.mean(wrong.off))
    if not wrong.residual_from_p:
        assert found.excess / found.count == pytest.approx(off, abs=3 * error)
    assert found.least_shift(1e-4, CHANCE) == pytest.approx((3.89 + 0.84) * error, rel=0.01)


def test_nothing_judged_says_nothing() -> None:
    """Catches a division by zero where nothing was drafted, and sums that forget a part."""
    none = JudgedTokens()
    assert none.p_value == 1.0
    assert none.least_shift(0.05, CHANCE) is None
    none.add(JudgedTokens(100, 19.6, 100.0))
    assert none.p_value == pytest.approx(0.05, abs=1e-3)


def test_what_is_said_to_be_noticed_is() -> None:
    """Catches a power that is only claimed: texts shifted by that much are refused in about the
    share of runs that is stated (80 %; under 140 or over 180 of 200 once in 2,000 tests)."""
    rng = np.random.default_rng(0)
    asked = questions(1)
    right = rng.geometric(0.5, size=(2000, 3)).clip(max=6)
    greedy = texts([[1, 1, 1]])
    pool = right[:200]
    found = noticed([pool], [greedy], asked, 0.05, seed=0)
    for question, shift in zip(asked[::2], found[::2], strict=True):
        assert shift.share is not None
        same = (question.seen(pool) == question.seen(greedy)).all(1).mean()
        assert shift.total_variation == pytest.approx(shift.share * (1 - same))
        refused = 0
        for seed in range(200):
            left, other = (pool[rng.integers(len(pool), size=len(pool))] for _ in range(2))
            other[rng.random(len(other)) < shift.share] = greedy
            refused += p_values([(left, other)], [question], 199, seed)[0] <= 0.05
        assert abs(refused / 200 - CHANCE) <= 0.1


def test_what_cannot_be_noticed_is_said() -> None:
    """Catches a share of 1 for a test that nothing reaches: here all lengths are equal."""
    pool = np.random.default_rng(0).integers(2, size=(50, 3))
    length = next(question for question in questions(0) if question.name == "length")
    (found,) = noticed([pool], [pool[:1]], [length], 0.01, seed=0)
    assert found.share is None
    assert found.total_variation is None


# The recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("distribution")
    save_folders(place)
    return place


def command(place: Path, *more: str) -> list[str]:
    return [
        "same_distribution.py",
        *("--model", str(place / "model"), "--lookahead", str(place / "rows")),
        *("--limit", "2", "--temperature", "0.7", "--control-temperature", "0.7"),
        *("--samples", "40", "--max-new-tokens", "4", "--positions", "2", "--at-once", "20"),
        *more,
    ]


def test_a_whole_run(
    place: Path,
    tmp_path: Path,
    recipe: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a run that does not end, shared seeds, and a report of other figures."""
    monkeypatch.setattr(sys, "argv", command(place, "--out", str(tmp_path / "out"), "--json"))
    assert recipe.main() == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert json.loads(said.splitlines()[-1]) == results
    assert said.startswith((tmp_path / "out" / "report.md").read_text())
    assert results["refused"] == 0
    # Judges, methods, questions with judged tokens; then those of each judge in all.
    assert len(results["tests"]) == 2 * 3 * (4 + 1) + 2
    for name in ("coupled", "rejection"):
        own = [t for t in results["tests"] if t["judge"] == name and "judged" in t]
        assert own[-1]["judged"] == sum(test["judged"] for test in own[:-1]) > 100
        assert 0 < own[-1]["notices"] < 0.2
    assert all(test["p"] <= test["holm"] <= 1 for test in results["tests"])
    assert [control["judge"] for control in results["controls"]] == [
        wrong.name for wrong in recipe.wrong_judges()
    ]
    assert len(results["noticed"]) == 4
    assert str(place) not in json.dumps(results["provenance"]["machine"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--samples", "0"), "--samples is 0"),
        (("--positions", "9"), "--positions is 9"),
        (("--temperature", "0"), "draws nothing"),
        (("--control-temperature", "2"), "--control-temperature 2.0"),
        (("--lookahead", "none"), "no look-ahead files"),
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_bad_input(
    place: Path,
    flags: tuple[str, ...],
    said: str,
    recipe: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback."""
    monkeypatch.setattr(sys, "argv", command(place, *flags))
    assert recipe.main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1 or "temperature" in error
