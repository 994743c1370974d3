"""Costs are measured once, kept, and measured anew when anything they depend on changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_llama import small_llama
from tiny import random_look_ahead

from passlm.decoding.text import Row
from passlm.drafts.draft_head import DraftHeadDrafter
from passlm.lookahead.card import HELD_OUT
from passlm.lookahead.trained import LookAhead
from passlm.model import compiled
from passlm.model.target import Target
from passlm.plan import Chain
from passlm.planning import kept_costs
from passlm.planning.cost_curve import CostCurve
from passlm.planning.kept_costs import Costs
from passlm.planning.measure import GROUPS, REAL_ROWS, measure, rising

CURVE = CostCurve((1, 2), (1.0, 1.5), (1, 2), (0.25, 0.5), 0.125)
Calls = list[tuple[int, int]]


@pytest.fixture
def target() -> Target:
    return Target(small_llama())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setattr(kept_costs, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Batch and context of every curve that is measured; each is `CURVE`."""
    calls: Calls = []

    def instead(_: Target, __: object, batch: int, context: int) -> CostCurve:
        calls.append((batch, context))
        return CURVE

    monkeypatch.setattr(kept_costs, "measure", instead)
    return calls


def files(folder: Path) -> list[Path]:
    return sorted((folder / "costs").glob("*.json"))


@pytest.mark.parametrize("batch", [1, 3])
def test_real_passes_are_measured(
    target: Target, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches plans that are not run as asked, groups without a cost, and a draft head that is
    timed where it has nothing to do."""
    rows = LookAhead.mean(target, 4, "small")
    curve = measure(target, rows.rows(target), batch, context=20, rounds=2)
    assert curve.rows == REAL_ROWS
    assert curve.groups == tuple(length for length in GROUPS if length <= 4)
    assert all(seconds > 0 for seconds in curve.seconds)
    assert curve.head_seconds == ()
    bare = measure(target, None, batch, context=20, rounds=1)
    assert bare.groups == ()
    head = random_look_ahead(target, 3, head_width=8).rows(target)
    asked: list[int] = []
    draw, now = Row.draw, [0.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    def slowly(self: Row, *given: Any) -> None:
        now[0] += 0.005
        draw(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Row, "draw", slowly)
        patch.setattr("passlm.planning.measure.time.perf_counter", clock)
        drawn = measure(
            target,
            random_look_ahead(target, 3, sampler_width=8).rows(target),
            batch,
            context=20,
            rounds=2,
        )
    assert drawn.draw_seconds > 0.004 * batch > drawn.know_seconds
    assert max(drawn.group_seconds) < 0.01
    propose = DraftHeadDrafter.propose

    def counted(self: DraftHeadDrafter, rows: Sequence[Row]) -> list[Chain | None]:
        chains = propose(self, rows)
        asked.append(sum(len(chain.tokens) for chain in chains if chain is not None))
        return chains

    monkeypatch.setattr(DraftHeadDrafter, "propose", counted)
    guesses = measure(target, head, batch, context=20, rounds=2).head_seconds
    assert len(guesses) == 3
    assert [asked.count(batch * count) for count in (1, 2, 3)] == [asked.count(batch)] * 3
    assert asked.count(batch) > 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], (1.0, 2.0, 3.0)),
        ([1.0, 3.0, 2.0, 4.0], (1.0, 2.5, 2.5, 4.0)),
        ([3.0, 2.0, 1.0], (2.0, 2.0, 2.0)),
        ([], ()),
    ],
)
def test_costs_rise_with_the_rows(values: list[float], expected: tuple[float, ...]) -> None:
    """Catches one bad measurement that makes a longer group look cheaper than a shorter one."""
    assert rising(values) == pytest.approx(expected)


def test_a_short_context_is_measured_as_far_as_it_goes() -> None:
    """Catches positions that the model does not have."""
    model = small_llama()
    model.config.max_position_embeddings = 24
    target = Target(model)
    assert measure(target, None, context=100, rounds=2).rows[0] == 1


def test_a_curve_is_kept(folder: Path, target: Target, measured: Calls) -> None:
    """Catches a curve that is measured in every process, or read back as another one."""
    first = Costs(target).curve(1, 100)
    assert Costs(target).curve(1, 120) == first == CURVE  # a near context
    assert measured == [(1, 128)]
    content = json.loads(files(folder)[0].read_text())
    assert content["provenance"]["machine"]["cores"] >= 1
    assert Costs(target).curve(1, 100, anew=True) == CURVE
    assert len(measured) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda t: Costs(t).curve(8, 100),
        lambda t: Costs(t).curve(1, 2000),
        lambda t: Costs(Target(small_llama(seed=9))).curve(1, 100),
        lambda t: Costs(Target(t.model.bfloat16())).curve(1, 100),
        lambda t: Costs(t, LookAhead.mean(t, 2, "x")).curve(1, 100),
    ],
    ids=["batch", "context", "weights", "type", "look-ahead files"],
)
def test_what_has_changed_is_measured_anew(
    folder: Path, target: Target, measured: Calls, other: Callable[[Target], CostCurve]
) -> None:
    """Catches costs of one setting taken for another's."""
    Costs(target).curve(1, 100)
    other(target)
    assert len(measured) == 2
    assert len(files(folder)) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"key": 1}', "{"])
def test_a_damaged_file_is_measured_anew(
    folder: Path, target: Target, measured: Calls, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a crash, and a damaged file that stays for ever."""
    Costs(target).curve(1, 100)
    files(folder)[0].write_text(content)
    assert Costs(target).curve(1, 100) == CURVE
    assert len(measured) == 2
    assert Costs(target).curve(1, 100) == CURVE
    assert len(measured) == 2


def test_costs_that_cannot_be_kept_are_used(
    folder: Path, target: Target, measured: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a full disk or a read-only home that stops decoding."""
    (folder / "costs").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert Costs(target).curve(1, 100) == CURVE
    assert "cannot keep" in caplog.text


def test_the_card_gives_the_prior(folder: Path, target: Target, measured: Calls) -> None:
    """Catches shares of groups taken for chances given the rows before, and figures of suites that
    plans would then be tested on."""
    rows = LookAhead.mean(target, 3, "small")
    suite = {"a": {"accepted_length": 1.4, "by_position": [0.9, 0.5]}}
    held_out = {"accepted_length": 0.7, "by_position": [0.5, 0.2]}
    rows.card = replace(rows.card, accepted_length={**suite, HELD_OUT: held_out})
    plan = Costs(target, rows).auto(1, 100)
    assert plan.prior == pytest.approx((0.5, 0.4, 0.4))
    length_alone = replace(rows.card, accepted_length={**suite, HELD_OUT: 1.0})
    assert length_alone.prior == pytest.approx((0.5, 0.5, 0.5))
    nothing = replace(rows.card, accepted_length=suite)
    assert nothing.prior == replace(rows.card, accepted_length={}).prior
    measured = replace(rows.card, chances={"look_ahead": [0.6, 1.0, 0.3, 0.2], "texts": "x"})
    assert measured.prior == (0.6, 0.99, 0.3)
    assert Costs(target, rows).auto(1, 100, longest=1).prior == (0.5,)
    assert Costs(target, rows).auto(1, 100, longest=0).prior == ()
    assert Costs(target).auto(1, 100).prior == ()
    costs = Costs(target, rows)
    assert costs.auto(1, 100) is costs.auto(1, 110), "each text would weigh its plans anew"
    with_head = random_look_ahead(target, 3, head_width=8)
    assert replace(with_head.card, chances={"head": [0.4]}).head_prior == (0.4,) * 3
    assert Costs(target, with_head).auto(1, 100).head == with_head.card.head_prior
    assert Costs(target, with_head).auto(1, 100, longest=0).head == ()


def test_a_batch_of_another_size_takes_what_is_known(
    folder: Path, target: Target, measured: Calls
) -> None:
    """Catches costs measured while texts are being written, and kept ones that are not found."""
    Costs(target).curve(4, 100)
    costs = Costs(target)
    plan = costs.auto(1, 100)
    before = len(measured)
    assert plan.curves is not None
    assert plan.curves(4) == CURVE
    assert plan.curves(8) is None
    assert len(measured) == before
    costs.curve(8, 100)
    assert plan.curves(8) == CURVE


def test_costs_of_passes_that_do_not_compile_are_those_of_eager_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches eager costs kept as those of compiled passes, for every later start that compiles."""
    target = Target(small_llama(), compiled=folder / "compiled")

    def refuse(_: object, path: Path) -> None:
        raise compiled.CompileError("no compiler")

    monkeypatch.setattr(compiled, "compile_to", refuse)
    Costs(target).curve(1, 20)
    assert target.engine == "eager"
    assert [json.loads(file.read_text())["key"]["engine"] for file in files(folder)] == ["eager"]
