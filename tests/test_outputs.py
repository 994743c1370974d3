"""The counts every report is made from."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llama import BLANKS, counting, counting_llama, counting_look_ahead, decode

from passlm.decoding.request import Request
from passlm.decoding.strategies import OnePass
from passlm.outputs import Stats, Step
from passlm.params import SamplingParams


@st.composite
def whole_steps(draw: st.DrawFn) -> Step:
    """A pass that nothing cut: its accepted candidates and one token more."""
    judged = draw(st.integers(0, 5))
    accepted = draw(st.integers(0, judged))
    return Step(tuple(range(accepted + 1)), accepted, judged)


def counted(steps: list[Step]) -> Stats:
    """The counts of these passes."""
    stats = Stats()
    for step in steps:
        stats.count(step)
    return stats


@given(st.lists(whole_steps(), max_size=12))
@settings(deadline=None, max_examples=200)
def test_counts_are_those_of_a_list_of_verdicts(steps: list[Step]) -> None:
    """Catches a candidate behind a refusal counted as refused, and one counted twice."""
    verdicts: list[tuple[int, bool]] = []  # (position, accepted) of each candidate looked at
    for step in steps:
        verdicts += [(position, True) for position in range(step.accepted)]
        verdicts += [(step.accepted, False)] if step.accepted < step.judged else []
    stats = counted(steps)
    longest = max((step.judged for step in steps), default=0)
    assert stats.judged_by_position == [
        sum(p == position for p, _ in verdicts) for position in range(longest)
    ]
    assert stats.accepted_by_position == [
        sum(p == position and good for p, good in verdicts) for position in range(longest)
    ]
    assert stats.tokens == sum(len(step.tokens) for step in steps)
    assert stats.passes == len(steps)
    assert stats.accepted == sum(step.accepted for step in steps)
    # What is accepted at a place and what settles behind it make up the tokens.
    assert stats.tokens == stats.accepted + stats.passes


@given(st.lists(whole_steps(), max_size=12))
@settings(deadline=None, max_examples=100)
def test_counts_fall_from_position_to_position(steps: list[Step]) -> None:
    """Catches counts by position that are shifted: a place is reached from the one before."""
    stats = counted(steps)
    judged, accepted = stats.judged_by_position, stats.accepted_by_position
    assert all(a <= j for a, j in zip(accepted, judged, strict=True))
    assert all(j <= a for j, a in zip(judged[1:], accepted, strict=False))


def test_means_have_the_passes_with_candidates_below_them() -> None:
    """Catches an accepted length over all passes, which would call two-pass half as good."""
    stats = counted([Step((1,), 0, 0), Step((1, 2, 3), 2, 4), Step((1,), 0, 0), Step((1,), 0, 4)])
    assert stats.judging_passes == 2
    assert stats.accepted_length == 1.0
    assert stats.tokens_per_pass == 1.5
    assert stats.judged_by_position == [2, 1, 1, 0]
    assert stats.accepted_by_position == [1, 1, 0, 0]


def test_nothing_done_is_nothing_a_pass() -> None:
    """Catches a division by zero before the first pass."""
    stats = Stats()
    assert stats.accepted_length == stats.tokens_per_pass == stats.tokens_per_second == 0.0
    assert Stats.total([]) == stats


def test_tokens_per_second_leaves_prefill_out() -> None:
    """Catches a long prompt that makes decoding look slow."""
    stats = Stats(tokens=30, prefill_seconds=100.0, decode_seconds=1.5)
    assert stats.tokens_per_second == 20.0


@given(st.lists(st.lists(whole_steps(), max_size=6), max_size=4))
@settings(deadline=None, max_examples=100)
def test_total_is_the_count_of_all_steps(parts: list[list[Step]]) -> None:
    """Catches a field left out of the sum, and parts of unequal depth added out of line."""
    stats = [counted(part) for part in parts]
    for number, part in enumerate(stats):
        part.prompt_tokens, part.prefill_seconds, part.decode_seconds = number, 2.0, 0.5
    whole = counted([step for part in parts for step in part])
    whole.prompt_tokens = sum(range(len(parts)))
    whole.prefill_seconds, whole.decode_seconds = 2.0 * len(parts), 0.5 * len(parts)
    assert Stats.total(stats) == whole
    for field in dataclasses.fields(Stats):
        if field.name.endswith("seconds") and parts:
            assert getattr(whole, field.name) > 0


@pytest.mark.parametrize(
    ("kept", "accepted", "judged", "by_position"),
    [
        (1, 1, 1, ([1], [1])),
        (2, 2, 2, ([1, 1], [1, 1])),  # ends at the last accepted one: the third was not judged
        (3, 2, 3, ([1, 1, 1], [1, 1, 0])),  # ends at the drawn token: the third was refused
    ],
)
def test_what_lies_behind_a_cut_was_never_judged(
    kept: int, accepted: int, judged: int, by_position: tuple[list[int], list[int]]
) -> None:
    """Catches tokens behind the stop in the counts: two of four were accepted, one drawn."""
    step = Step((5, 6, 7), accepted=2, judged=4).cut(kept, "eos")
    assert step == Step((5, 6, 7)[:kept], accepted, judged, "eos")
    stats = counted([step])
    assert (stats.judged_by_position, stats.accepted_by_position) == by_position


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_counts_of_decoding_that_ends_inside_an_accepted_block(place: int) -> None:
    """Catches an end-of-sequence among accepted candidates behind which counting goes on."""
    target, rows = counting_llama(), counting_look_ahead().rows(counting_llama())
    prompt, plan = counting(1, 12, seed=3)[0].tolist(), OnePass(BLANKS)
    (_, free), *_ = decode(target, [Request.of(prompt, SamplingParams(), 40, plan)], rows)
    block = next(i for i, step in enumerate(free) if step.accepted == 3 < step.judged)
    end = free[block].tokens[place]
    written = [token for step in free[:block] for token in step.tokens]
    assert end not in written, "choose another prompt: the end comes too early"
    request = Request.of(prompt, SamplingParams(), 40, plan, eos=[end])
    (tokens, steps), *_ = decode(target, [request], rows)
    assert tokens == [*written, *free[block].tokens[: place + 1]]
    assert steps[:-1] == free[:block]
    assert steps[-1].finish_reason == "eos"
    expected, stats = counted(free[:block]), counted(steps)
    expected.passes += 1
    expected.judging_passes += 1
    expected.tokens += place + 1
    for position in range(place + 1):  # the fourth was refused, and its place drawn
        expected.judged_by_position[position] += 1
        expected.accepted_by_position[position] += position < 3
    assert stats == expected
