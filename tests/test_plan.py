"""Plans and layouts: explicit small examples, and a naive loop written from the method's text."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passlm.decoding.strategies import OnePass, TwoPass, autoregressive, strategy
from passlm.params import METHODS
from passlm.plan import Plan


@dataclass(frozen=True)
class NaiveRow:
    """One row of a pass as the method states it; `depth` 0 is a real row."""

    real: int
    depth: int

    @property
    def position(self) -> int:
        """Relative to the root."""
        return self.real + self.depth

    def sees(self, other: NaiveRow) -> bool:
        """Real rows up to its own; of look-ahead rows, its own group's up to itself."""
        if other.depth == 0:
            return other.real <= self.real
        return self.depth > 0 and other.real == self.real and other.depth <= self.depth


def naive_rows(plan: Plan) -> list[NaiveRow]:
    """The rows of a pass in order: the real ones, then group after group."""
    rows = [NaiveRow(real, 0) for real in range(1 + plan.candidates)]
    for real, length in enumerate(plan.groups):
        rows += [NaiveRow(real, depth) for depth in range(1, length + 1)]
    return rows


def visible(plan: Plan) -> list[str]:
    """Visibility as a picture: a line for each row, `x` where it sees, `.` where it does not."""
    return ["".join(".x"[int(seen)] for seen in row) for row in plan.layout().visible]


plans = st.lists(st.integers(0, 5), min_size=1, max_size=7).map(
    lambda groups: Plan(len(groups) - 1, tuple(groups))
)


def test_autoregressive_layout() -> None:
    """Catches a root that does not see itself, or an offset that is not the root's."""
    layout = Plan(0, (0,)).layout()
    assert layout.offset.tolist() == [0]
    assert layout.look_ahead.tolist() == [0]
    assert visible(Plan(0, (0,))) == ["x"]
    assert layout.real == 1


def test_drafting_layout() -> None:
    """Catches a group that starts at the root's own position, or does not see the root."""
    layout = Plan(0, (3,)).layout()
    assert layout.offset.tolist() == [0, 1, 2, 3]
    assert layout.look_ahead.tolist() == [0, 1, 2, 3]
    assert visible(Plan(0, (3,))) == ["x...", "xx..", "xxx.", "xxxx"]


def test_validating_layout() -> None:
    """Catches candidates that are not causal among themselves."""
    layout = Plan(2, (0, 0, 0)).layout()
    assert layout.offset.tolist() == [0, 1, 2]
    assert layout.look_ahead.tolist() == [0, 0, 0]
    assert visible(Plan(2, (0, 0, 0))) == ["x..", "xx.", "xxx"]


def test_one_pass_layout() -> None:
    """Catches groups that see candidates behind their own row, each other, or too little."""
    layout = Plan(1, (2, 2)).layout()
    assert layout.offset.tolist() == [0, 1, 1, 2, 2, 3]
    assert layout.look_ahead.tolist() == [0, 0, 1, 2, 1, 2]
    assert visible(Plan(1, (2, 2))) == [
        "x.....",  # root
        "xx....",  # candidate
        "x.x...",  # LA_1 on the root: not the candidate
        "x.xx..",
        "xx..x.",  # LA_1 on the candidate: not the root's group
        "xx..xx",
    ]


def test_uneven_layout() -> None:
    """Catches group starts counted with one common length."""
    plan = Plan(2, (1, 0, 2))
    layout = plan.layout()
    assert layout.offset.tolist() == [0, 1, 2, 1, 3, 4]
    assert layout.look_ahead.tolist() == [0, 0, 0, 1, 1, 2]
    assert visible(plan) == ["x.....", "xx....", "xxx...", "x..x..", "xxx.x.", "xxx.xx"]
    assert [plan.group(row) for row in range(3)] == [slice(3, 4), slice(4, 4), slice(4, 6)]


@given(plans)
def test_layout_is_the_naive_loop(plan: Plan) -> None:
    """Catches any layout in which vectorised indexing strays from the method's sentences."""
    rows, layout = naive_rows(plan), plan.layout()
    assert plan.rows == len(rows) == len(layout.offset) == len(layout.look_ahead)
    assert layout.real == 1 + plan.candidates
    assert layout.offset.tolist() == [row.position for row in rows]
    assert layout.look_ahead.tolist() == [row.depth for row in rows]
    assert layout.visible.dtype == torch.bool
    assert layout.visible.tolist() == [[row.sees(other) for other in rows] for row in rows]


@given(plans)
def test_group_is_where_the_layout_puts_it(plan: Plan) -> None:
    """Catches drafts read from another row's group: a shift that no error shows."""
    rows = naive_rows(plan)
    for real in range(1 + plan.candidates):
        expected = [NaiveRow(real, depth) for depth in range(1, plan.groups[real] + 1)]
        assert rows[plan.group(real)] == expected


@given(plans)
def test_equal_plans_share_one_layout(plan: Plan) -> None:
    """Catches a layout built anew in every pass: plans must be equal by value."""
    assert Plan(plan.candidates, tuple(plan.groups)) == plan
    assert Plan(plan.candidates, tuple(plan.groups)).layout() is plan.layout()


@pytest.mark.parametrize(
    ("candidates", "groups"),
    [(0, ()), (0, (1, 1)), (2, (0, 0)), (1, (0, -1)), (-1, ()), (-1, (0,))],
)
def test_bad_groups_are_refused(candidates: int, groups: tuple[int, ...]) -> None:
    """Catches a plan whose groups do not fit its real rows: it would draft from the wrong row."""
    with pytest.raises(ValueError, match="group"):
        Plan(candidates, groups)


def test_strategies_are_the_table_of_the_method() -> None:
    """Catches a strategy that takes other passes than the method's table, or a group longer than
    what is of use."""
    assert autoregressive(0, 9) == Plan(0, (0,))
    assert TwoPass(4)(0, 9) == Plan(0, (4,))
    assert TwoPass(4)(0, 2) == Plan(0, (2,))
    assert TwoPass(4)(4, 9) == Plan(4, (0,) * 5)
    assert OnePass(3)(0, 9) == Plan(0, (3,))
    assert OnePass(3)(3, 9) == Plan(3, (3,) * 4)
    assert OnePass(3)(2, 1) == Plan(2, (1,) * 3)
    assert OnePass(3)(2, 0) == Plan(2, (0,) * 3)


def test_strategy_by_name() -> None:
    """Catches a method's name that stands for another one, or an unknown one that is accepted."""
    assert METHODS == ("auto", "ar", "two-pass", "one-pass")
    assert strategy("ar", 0) is autoregressive
    assert strategy("two-pass", 4) == TwoPass(4)
    assert strategy("one-pass", 4) == OnePass(4)
    with pytest.raises(ValueError, match=r"'three-pass'.*one-pass"):
        strategy("three-pass", 4)
    with pytest.raises(ValueError, match=r"'auto'.*one-pass"):  # its plans need costs
        strategy("auto", 4)
    with pytest.raises(ValueError, match=r"two-pass.*0"):
        strategy("two-pass", 0)
