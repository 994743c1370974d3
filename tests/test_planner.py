"""Plans follow from costs and counts: the formulas, the best choice, what is learnt."""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product

import pytest

from passlm.decoding.decoder import agreed_pass, closed_up
from passlm.decoding.noise import Noise
from passlm.decoding.request import Request
from passlm.decoding.strategies import Adaptive, Choice, Limits, PassSize, Strategy, autoregressive
from passlm.decoding.text import Row
from passlm.params import SamplingParams
from passlm.plan import Chain, Guessing, Plan
from passlm.planning import auto
from passlm.planning.acceptance import expected_length
from passlm.planning.auto import AutoChooser, AutoPlan
from passlm.planning.cost_curve import CostCurve

WIDE = Limits(1000)
# Costs of two machines: where rows are all but free, and where each costs as much as the first.
FLAT = CostCurve((1, 41), (1.0, 1.4), (1, 4), (0.02, 0.02), 0.001)
STEEP = CostCurve((1, 11), (1.0, 11.0), (1, 4), (0.5, 0.5), 0.5)
DRAFT = Chain((5, 6, 7, 8))
COPIED = Chain(tuple(range(12)), "lookup", 16)
PRIOR = (0.7, 0.5, 0.4, 0.3)
WRONG = 99  # a token that no chain guesses


def test_a_curve_is_linear_between_and_beyond_what_was_measured() -> None:
    """Catches a curve that ends at its last point: plans of more rows would be free."""
    curve = CostCurve((1, 3, 5), (1.0, 2.0, 6.0), (2, 4), (0.5, 1.5), 0.1)
    assert [curve.of(rows) for rows in (1, 2, 3, 4, 5, 7)] == [1.0, 1.5, 2.0, 4.0, 6.0, 10.0]
    assert curve.of(1, 2, 2) == pytest.approx(2.0 + 0.5)
    assert curve.of(1, 4, 3) == pytest.approx(6.0 + 1.0 + 0.1)  # 4 rows, of which 3 are drafted
    assert curve.of(3, 2, 1) == pytest.approx(6.0 + 0.5 + 0.1)  # the shortest group, no less


def test_the_formulas_of_the_method() -> None:
    """Catches `E` that multiplies what should be summed, and one pass counted for two."""
    assert expected_length([0.5, 0.5, 0.0]) == 0.75
    curve = CostCurve((1, 9), (2.0, 4.0), (1, 8), (0.25, 0.25), 0.0)
    assert curve.plain() == 0.5
    assert curve.two_pass(1.0, 4) == pytest.approx((2 + 1) / (3.25 + 3.0))
    assert curve.one_pass(1.0, 2) == pytest.approx((1 + 1) / 4.25)


@pytest.mark.parametrize("rows", [(2, 1), (1, 1), (1,), ()])
def test_a_curve_out_of_order_is_refused(rows: tuple[int, ...]) -> None:
    """Catches costs that would be looked up in the wrong place."""
    with pytest.raises(ValueError, match="in rising order"):
        CostCurve(rows, (1.0, 2.0))


def test_a_curve_without_groups_draws_no_plan_with_them() -> None:
    """Catches look-ahead rows that cost nothing."""
    with pytest.raises(ValueError, match="costs of groups"):
        AutoPlan(CostCurve((1, 2), (1.0, 1.1)), PRIOR)


def test_rows_that_cost_much_are_not_computed() -> None:
    """Catches plain decoding left out of the choice."""
    chooser = AutoPlan(STEEP, (0.2, 0.2)).begin()
    assert chooser.choose([], WIDE).plan == Plan(0, (0,))
    assert chooser.choose([Chain((1, 2))], WIDE) == Choice(None, Plan(0, (0,)))


def test_rows_that_cost_little_are_used() -> None:
    """Catches a chooser that never drafts, or verifies a part of a sure chain."""
    chooser = AutoPlan(FLAT, PRIOR).begin()
    assert chooser.choose([], WIDE).plan.groups[0] > 0
    chosen = chooser.choose([DRAFT, COPIED], WIDE)
    assert chosen.chain is COPIED
    assert chosen.plan.candidates == len(COPIED.tokens)
    weak = Chain(COPIED.tokens, "lookup", 1)
    assert chooser.choose([DRAFT, weak], WIDE).chain is DRAFT


def test_a_source_that_fails_is_left_until_it_would_have_been_right() -> None:
    """Catches acceptance that is not counted by source, and a source given up for ever because
    what is not verified is not counted."""
    chooser = AutoPlan(FLAT, PRIOR).begin()

    def used(passes: int, right: str) -> list[str | None]:
        """Which chains were verified while those of one source go on as the text does."""
        sources: list[str | None] = []
        for _ in range(passes):
            choice = chooser.choose([Chain((5,) * 4), Chain((1,) * 12, "lookup", 3)], WIDE)
            sources.append(None if choice.chain is None else choice.chain.source)
            token = 5 if right == "look-ahead" else 1
            chooser.learn(choice, [token, 9] if sources[-1] == right else [token])
        return sources

    first = used(400, "look-ahead")
    assert first[0] == "lookup"
    assert first[40:].count("look-ahead") > 300
    assert used(200, "lookup")[60:].count("lookup") > 120


def test_passes_without_gain_come_to_plain_decoding() -> None:
    """Catches a text that no draft fits being slowed for as long as it is: nearly all passes are
    plain at last, and drafting is still tried now and then."""
    curve = CostCurve((1, 11), (1.0, 2.0), (1, 4), (0.1, 0.1), 0.02)
    chooser = AutoPlan(curve, PRIOR).begin()
    rows, chain = [], None
    for _ in range(1500):
        choice = chooser.choose([] if chain is None else [chain], WIDE)
        chooser.learn(choice, [WRONG])
        length = choice.plan.groups[0]
        chain = Chain((1,) * length) if length else None
        rows.append(choice.plan.rows)
    assert rows[0] > 1
    assert sum(rows[500:]) / 1000 < 1.1
    assert max(rows[500:]) > 1


def test_the_choice_is_the_best_of_all_plans() -> None:
    """Catches a search that overlooks plans: all mixtures of groups of one length."""
    curve = CostCurve((1, 21), (1.0, 2.2), (1, 3), (0.1, 0.2), 0.03)
    chooser = AutoPlan(curve, (0.7, 0.5, 0.3), lookup=False).begin()
    chances = [0.7, 0.5, 0.3]
    value, plan = chooser._search(chances)
    others = []
    for candidates, rows in product(range(4), (1, 2, 3)):
        for hung in product((0, rows), repeat=1 + candidates):
            others.append(_value(chooser, curve, chances[:candidates], hung))
    assert value == pytest.approx(max(others))
    assert value == pytest.approx(_value(chooser, curve, chances[: plan.candidates], plan.groups))


def _value(
    chooser: AutoChooser, curve: CostCurve, chances: list[float], groups: tuple[int, ...]
) -> float:
    reached = [1.0]
    for chance in chances:
        reached.append(reached[-1] * chance)
    ends = [now - later for now, later in zip(reached, [*reached[1:], 0.0], strict=True)]
    worth = sum(end * chooser._group_values[rows] for end, rows in zip(ends, groups, strict=True))
    cost = curve.of(len(groups), sum(groups), max(groups))
    if len(groups) + sum(groups) > 1:
        cost *= auto._CAUTION
    return sum(reached) + worth - chooser.rate * cost


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_rows_that_a_pass_has_anyway_are_used(rows: int) -> None:
    """Catches a text that computes more than was agreed, and one that pays for rows that its batch
    has paid for."""
    chooser = AutoPlan(STEEP, PRIOR).begin()
    assert chooser.choose([COPIED], WIDE).plan.rows < 9
    plan = chooser.choose([COPIED], Limits(1000, shared=PassSize(rows))).plan
    assert plan.rows <= rows
    assert plan.candidates == rows - 1


def test_texts_agree_on_what_is_best_for_all() -> None:
    """Catches a batch slowed by the only text that has something to verify, and one that never
    drafts because no text alone is worth it."""
    settings = AutoPlan(CostCurve((1, 5, 9), (1.0, 2.0, 3.0)))
    sure, none = [COPIED], list[Chain]()

    def agreed(
        chains: list[list[Chain]], strategy: Adaptive | Strategy = settings
    ) -> PassSize | None:
        request = Request.of([1], SamplingParams(), 100, strategy)
        return agreed_pass(
            [Row(request, 100, "length", Noise(0), [1], proposed=own) for own in chains]
        )

    assert agreed([sure] * 4) == PassSize(9)
    assert agreed([sure] * 3 + [none]) == PassSize(9)
    assert agreed([sure] + [none] * 15) == PassSize(1)
    assert agreed([none] * 4) == PassSize(1)
    assert agreed([sure]) is None
    assert agreed([sure, sure], autoregressive) is None


def test_look_ahead_rows_of_one_text_are_paid_for_by_all() -> None:
    """Catches look-ahead rows hung because each text takes their price for its own alone, and
    texts that believe a pass with them as cheap as one without."""
    curve = CostCurve((1, 5), (1.0, 1.1), (1, 4), (0.5, 0.5), 0.0)
    chooser = AutoPlan(curve, (0.9, 0.9, 0.9, 0.9)).begin()
    chooser.resize(4)
    assert {shared.look_ahead for shared in chooser.passes} == {False, True}
    plain, dear = PassSize(5), PassSize(5, look_ahead=True)
    assert max(chooser.choose([], Limits(1000, shared=plain)).plan.groups) == 0
    assert max(chooser.choose([], Limits(1000, shared=dear)).plan.groups) == 4
    cost = chooser._settings.cost
    assert cost(5, 0, 0, dear) == pytest.approx(cost(5, 0, 0, plain) + 0.5 * auto._CAUTION)
    unsure = AutoPlan(curve, (0.0,) * 4).begin()
    assert unsure.value_of([], plain) > unsure.value_of([], dear)


def test_a_batch_that_changes_changes_the_costs_and_not_what_was_learnt() -> None:
    """Catches plans for a batch that is no more, counts that are lost with it, and costs that are
    measured while texts wait."""
    curves = {1: CostCurve((1, 5), (1.0, 1.1)), 4: CostCurve((1, 5), (2.0, 8.0))}
    asked: list[int] = []

    def known(texts: int) -> CostCurve | None:
        asked.append(texts)
        return curves.get(texts)

    chooser = AutoPlan(curves[1], curves=known).begin()
    chain = Chain((1,) * 4, "lookup", 8)
    for _ in range(20):
        chooser.learn(chooser.choose([chain], WIDE), [1, 1, WRONG])
    rows, rate = chooser.choose([chain], WIDE).plan.rows, chooser.rate
    chooser.resize(4)
    assert chooser.rate == pytest.approx(rate / 2)
    assert chooser.choose([chain], WIDE).plan.rows < rows
    chooser.resize(2)  # not known: goes on as it was
    assert chooser.choose([chain], WIDE).plan.rows < rows
    chooser.resize(1)
    assert chooser.choose([chain], WIDE).plan.rows == rows
    assert asked == [4, 2, 1]
    assert AutoPlan(curves[1]).begin().resize(4) is None


def test_a_text_hears_of_the_batch_when_its_size_has_changed() -> None:
    """Catches plans.values anew for a text that left and another that took its place, and a size
    that is never told."""
    heard: list[int] = []

    class Hearing(AutoChooser):
        def resize(self, texts: int) -> None:
            heard.append(texts)

    class Plans(AutoPlan):
        def begin(self, guessing: Guessing = "likeliest") -> AutoChooser:
            return Hearing(self)

    request = Request.of([1, 2], SamplingParams(), 9, Plans(STEEP), frozenset())
    row = Row(request, 9, "length", Noise(0), [1, 2])
    for texts in (1, 1, 8, 8, 7, 8):
        row.begin_step(texts)
    assert heard == [1, 8, 7, 8]


@pytest.mark.parametrize(
    ("staying", "places"),
    [([0, 1, 2], [0, 1, 2]), ([0, 2, 3], [0, 3, 2]), ([3, 4], [4, 3]), ([1], [1]), ([], [])],
)
def test_gaps_are_filled_from_the_end(staying: list[int], places: list[int]) -> None:
    """Catches texts that all move up for one that leaves, one lost, and one in two places."""
    assert closed_up(staying) == places


@pytest.mark.parametrize("curve", [FLAT, STEEP])
@pytest.mark.parametrize("worth", [(0.0, 0.3, 0.5, 0.6, 0.6), (0.0, 2.0, 0.1, 0.0, 3.0)])
def test_the_best_plan_is_the_best_of_all(curve: CostCurve, worth: tuple[float, ...]) -> None:
    """Catches groups that are passed over though they pay."""
    chooser = AutoPlan(curve, PRIOR).begin()
    chooser._group_values = list(worth)
    for first, later in product((0.05, 0.4, 0.9), (0.1, 0.8)):
        chances = [first, *[later] * 5]
        values = []
        for candidates in range(1 + len(chances)):
            reached = [1.0]
            for chance in chances[:candidates]:
                reached.append(reached[-1] * chance)
            ends = [a - b for a, b in pairwise([*reached, 0.0])]
            for rows, hung in product(range(5), range(1 << (1 + candidates))):
                at = [place for place in range(1 + candidates) if hung >> place & 1]
                if bool(at) != bool(rows):
                    continue
                gained = sum(reached) + sum(ends[place] for place in at) * worth[rows]
                price = chooser._settings.cost(1 + candidates, len(at) * rows, rows, None)
                values.append(gained - chooser.rate * price)
        assert chooser._search(chances)[0] == pytest.approx(max(values))


def test_what_a_pass_took_counts_for_every_text_of_it() -> None:
    """Catches a text that believes its passes to be short because it used none of their rows."""
    curve = CostCurve((1, 5), (1.0, 2.0))
    alone, together = AutoPlan(curve).begin(), AutoPlan(curve).begin()
    for _ in range(100):
        alone.learn(alone.choose([], WIDE), [WRONG])
        together.learn(together.choose([], Limits(1000, shared=PassSize(5))), [WRONG])
    assert alone.rate == pytest.approx(1.0, rel=0.05)
    assert together.rate == pytest.approx(0.5, rel=0.05)


def test_the_same_text_gives_the_same_plans() -> None:
    """Catches plans that follow a clock: with a seed, rejection would not repeat its text."""

    def plans() -> list[Choice]:
        chooser = AutoPlan(FLAT, PRIOR).begin()
        made = []
        for step in range(60):
            chains = [DRAFT] if step % 3 else [DRAFT, Chain((1, 2), "lookup", 1 + step % 5)]
            made.append(chooser.choose(chains, WIDE))
            chooser.learn(made[-1], [*made[-1].candidates[: step % 4], WRONG])
        return made

    assert plans() == plans()


@pytest.mark.parametrize(
    ("limits", "plan"),
    [
        (Limits(1), Plan(0, (0,))),
        (Limits(2), Plan(1, (0, 0))),
        (Limits(3), Plan(2, (1, 1, 1))),
        (Limits(50, 3), Plan(3, (0, 0, 0, 0))),
        (Limits(50, 5), Plan(4, (1,) * 5)),
        (Limits(50, 0), Plan(0, (0,))),
    ],
)
def test_nothing_is_computed_beyond_the_end(limits: Limits, plan: Plan) -> None:
    """Catches rows of no use near the text's end, and positions that the model does not have."""
    assert Choice(DRAFT, Plan(4, (3,) * 5)).within(limits).plan == plan


def test_what_a_text_begins_with_is_weighed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches every text, and every batch that shrinks or grows, weighing all plans anew: with
    many texts that takes longer than what it saves."""
    curves = {1: FLAT, 4: STEEP}
    plan = AutoPlan(FLAT, PRIOR, curves=curves.get)
    weighings: list[AutoChooser] = []
    weigh = AutoChooser._update_values

    def counted(self: AutoChooser) -> None:
        weighings.append(self)
        weigh(self)

    monkeypatch.setattr(AutoChooser, "_update_values", counted)
    first = plan.begin()
    once = len(weighings)
    assert once > 0
    assert plan.begin().values == first.values
    assert len(weighings) == once
    for _ in range(3):
        for texts in (4, 1):
            first.resize(texts)
    assert len(weighings) == 2 * once
    first.resize(4)
    assert plan.resized(4).begin().values == first.values
    assert plan.resized(4).resized(1) is plan


def test_what_groups_are_worth_is_remembered_by_the_size_of_the_batch() -> None:
    """Catches a text that takes its neighbours' coming and going for a new beginning."""
    plan = AutoPlan(FLAT, PRIOR, curves={1: FLAT, 4: STEEP}.get)
    chooser = plan.begin()
    for _ in range(64):
        chooser.learn(chooser.choose([DRAFT], WIDE), [WRONG])
    learnt = chooser.values[1]
    assert learnt != plan.begin().values[1]
    chooser.resize(4)
    assert max(chooser.values[1]) == 0, "it has seen how seldom groups are right"
    chooser.resize(1)
    assert chooser.values[1] == learnt


def test_text_without_likely_tokens_is_not_drafted_for() -> None:
    """Catches plans that wait for refusals to see that no guess can be right: a hot text would be
    over before."""
    curve = CostCurve((1, 11), (1.0, 3.0), (1, 4), (0.2, 0.4), 0.1, head_seconds=(0.05, 0.06))

    def passes(confidences: list[float]) -> tuple[list[int], list[int]]:
        chooser = AutoPlan(curve, PRIOR, head=(0.6, 0.5)).begin()
        guessed, rows = [], []
        for _ in range(20):
            guessed.append(chooser.draft_length("head", [], 9))
            count = guessed[-1]
            chain = Chain((1,) * count, "head", sureness=(0.5,) * count) if count else DRAFT
            rows.append(chooser.choose([chain], WIDE).plan.rows)
            chooser.learn(Choice(None, Plan(0, (0,))), [WRONG], confidences)
        return guessed, rows

    (guesses, rows), (greedy_guesses, greedy_rows) = passes([0.02]), passes([])
    assert (guesses[0], rows[0]) == (greedy_guesses[0], greedy_rows[0])
    assert guesses[0] > 0
    assert rows[0] > 1
    assert set(rows[5:]) == {1}
    assert sum(guesses) < sum(greedy_guesses)
    assert max(greedy_rows[5:10]) > 1


def test_first_guesses_tell_more_of_a_head_than_later_ones() -> None:
    """Catches a first estimate that outlives the text, and a head given up after one miss."""
    curve = CostCurve((1, 11), (1.0, 3.0), head_seconds=(0.1,))
    chooser = AutoPlan(curve, lookup=False, head=(0.9,)).begin()
    unsure = Chain((1,), "head", sureness=(0.05,))
    worth = [chooser.values[0][0]]
    for _ in range(12):
        chooser.choose([unsure], WIDE)
        worth.append(chooser.values[0][0])
    falls = [after / before for before, after in pairwise(worth)]
    assert falls[0] == pytest.approx(2 / 3)
    assert falls == sorted(falls)
    assert falls[-1] == pytest.approx(0.9)


def test_candidates_that_are_drawn_cost_more() -> None:
    """Catches sampled text that is planned with the costs of greedy text, guesses of a draft head
    that are dearer where groups are, and a batch that shrinks to the costs of greedy text."""
    curve = CostCurve((1, 41), (1.0, 1.01), (1, 4), (0.02, 0.08), 0.001, (0.01, 0.02), 0.5, 0.001)
    drawn, knowing = curve.for_guessing("drawn"), curve.for_guessing("knowing")
    assert curve.for_guessing("likeliest") == curve
    assert drawn.group_seconds == pytest.approx((0.52, 2.08))
    assert drawn.head_seconds == pytest.approx((0.51, 1.02))
    assert knowing.group_seconds == pytest.approx((0.021, 0.084))
    assert knowing.head_seconds == pytest.approx((0.011, 0.022))
    plan = AutoPlan(curve, PRIOR, lookup=False, curves=lambda _: curve)
    row_of = partial(Row, room=90, full="length", noise=Noise(0), tokens=[1, 2])
    hung = []
    for asked in (
        SamplingParams(),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, draft="greedy"),
        SamplingParams(temperature=0.8, judge="rejection"),
        SamplingParams(temperature=0.8, repetition_penalty=1.2),
    ):
        row = row_of(Request.of([1, 2], asked, 90, plan, frozenset()))
        row.begin_step(3)
        hung.append(max(row.choose_plan().plan.groups))
    assert hung[0] == hung[1] == hung[2] > 1
    assert hung[3] == hung[4] < hung[0]
