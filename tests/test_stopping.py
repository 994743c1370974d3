"""Ends of a text: ids and length inside a block, stop strings across pieces of text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from passlm.decoding.stopping import StopStrings, cut_block
from passlm.outputs import FinishReason

# Ids


def naive_cut(tokens: list[int], eos: set[int], room: int) -> tuple[int, FinishReason | None]:
    """One token after the other, as plain decoding would."""
    for written, token in enumerate(tokens, start=1):
        if token in eos:
            return written, "eos"
        if written == room:
            return written, "length"
    return len(tokens), None


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.sets(st.integers(0, 9), max_size=3),
    st.integers(1, 10),
)
@example([3, 4], {4}, 2)  # both at once: the end of sequence is the reason
@example([3, 4, 5], {5}, 2)  # an end behind the length does not exist
@example([3, 4, 5], set(), 3)
@settings(deadline=None, max_examples=300)
def test_block_is_cut_where_plain_decoding_would_end(
    tokens: list[int], eos: set[int], room: int
) -> None:
    """Catches a token kept behind the end, the end itself dropped, and a length off by one."""
    assert cut_block(tokens, eos, room) == naive_cut(tokens, eos, room)


def test_the_first_of_several_ends_counts() -> None:
    """Catches a search for one id after the other, which would keep the tokens between."""
    assert cut_block([1, 8, 2, 9], [9, 8], 10) == (2, "eos")


def test_a_full_context_is_named() -> None:
    """Catches a text that says 'length' where the model's context was the limit."""
    assert cut_block([1, 2], (), 2, full="context") == (2, "context")


# Text


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character over the whole text."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


def run(chunks: list[str], stops: list[str]) -> tuple[str, bool, list[str]]:
    """What is shown in all, whether it stopped, and what was shown after each chunk."""
    streamed = StopStrings(stops)
    shown: list[str] = []
    for chunk in chunks:
        text, stopped = streamed.push(chunk)
        shown.append(text)
        if stopped:
            return "".join(shown), True, shown
    return "".join(shown) + streamed.flush(), False, shown


def cut_at(text: str, cuts: list[int]) -> list[str]:
    """The text in pieces, some of them empty."""
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


TEXTS = st.text("ab\n", max_size=24)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3)
CUTS = st.lists(st.integers(0, 100), max_size=8)


@given(TEXTS, STOPS, CUTS)
@example("aab", ["ab"], [1, 2])  # a held beginning that goes on from a later place
@example("abab\n", ["abab\n", "ba"], [1, 2, 3, 4])  # a short one is met inside a longer one
@example("abab\n", ["abab\n", "ba"], [])
@example("xaby", ["ab"], [])
@settings(deadline=None, max_examples=500)
def test_stream_is_the_text_before_the_stop_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """Catches a stop across two pieces that is missed, part of it shown, text before it lost,
    and a result that depends on how the text is cut into tokens."""
    shown, stopped, _ = run(cut_at(text, cuts), stops)
    assert (shown, stopped) == naive_stop(text, stops)


@given(TEXTS, STOPS, CUTS)
@settings(deadline=None, max_examples=300)
def test_only_a_possible_beginning_is_held_back(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """Catches text held back for nothing: a reader would wait for it."""
    chunks = cut_at(text, cuts)
    seen = ""
    for chunk, shown_until in zip(chunks, _running(run(chunks, stops)[2]), strict=False):
        seen += chunk
        if naive_stop(seen, stops)[1]:
            break
        longest = max(
            (n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0
        )
        assert shown_until == len(seen) - longest


def _running(parts: list[str]) -> list[int]:
    return [sum(map(len, parts[: n + 1])) for n in range(len(parts))]


def test_without_stops_everything_is_shown_at_once() -> None:
    """Catches a delay that nobody asked for."""
    streamed = StopStrings([])
    assert streamed.push("abc") == ("abc", False)
    assert streamed.flush() == ""


@pytest.mark.parametrize("chunks", [["one END two"], ["one E", "ND two"], list("one END two")])
def test_nothing_of_the_stop_is_shown(chunks: list[str]) -> None:
    """Catches the first letters of a stop string on the screen."""
    assert run(chunks, ["END"])[:2] == ("one ", True)
