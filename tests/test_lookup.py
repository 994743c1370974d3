"""Prompt lookup finds what followed the last tokens before."""

from __future__ import annotations

import random

import pytest

from passlm.drafts.prompt_lookup import LONGEST_MATCH, PromptLookup


@pytest.mark.parametrize(
    ("text", "found", "evidence"),
    [
        ([1, 2, 3, 9, 1, 2], [3, 9, 1, 2], 2),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2, 4], 2),  # the last occurrence, not the first
        ([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], [5, 8, 1, 2], 3),  # the longest match before the last
        ([1, 2, 3], [], 0),  # the last token is new
        ([4], [], 0),
        ([5, 5], [5, 5, 5, 5], 1),  # a text that repeats goes on repeating
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2], 4),
    ],
)
def test_what_followed_is_found(text: list[int], found: list[int], evidence: int) -> None:
    """Catches an occurrence that is the text's own end, the wrong one of two, a place off by one,
    and evidence that counts tokens which differ."""
    assert PromptLookup().find(text, 4) == (found, evidence)


def test_a_text_that_grows_is_found_as_one_given_whole() -> None:
    """Catches sequences that are not indexed where the text grows by several tokens."""
    rng = random.Random(3)
    text = [rng.randrange(4) for _ in range(200)]
    growing, place = PromptLookup(), 0
    while place < len(text):
        place += rng.randint(1, 5)
        assert growing.find(text[:place], 6) == PromptLookup().find(text[:place], 6)


def test_evidence_has_an_end() -> None:
    """Catches a backward comparison that runs on: a text of one token is all agreement."""
    assert PromptLookup().find([3] * 300, 2) == ([3, 3], LONGEST_MATCH)
