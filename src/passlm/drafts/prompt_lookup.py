"""Prompt lookup: draft tokens copied from an earlier occurrence of the last few tokens.

Needs no pass and no weights. Saxena, "Prompt Lookup Decoding" (2023); Yang et al., "Inference with
reference" (arXiv 2304.04487). Whether a match is worth verifying is left to `planning/auto.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from passlm.drafts.protocol import DraftSequence, PassResult, Verified
from passlm.plan import Chain, Source

_INDEXED = (4, 3, 2, 1)  # lengths of the n-grams to look up, longest first
LONGEST_MATCH = 16  # a longer match is hardly better evidence


class PromptLookup:
    """An n-gram index of one sequence that grows at its end."""

    def __init__(self) -> None:
        self._known = 0
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> place after its last occurrence

    def find(self, text: Sequence[int], count: int) -> tuple[list[int], int]:
        """Return the tokens that followed the last tokens at their previous occurrence.

        Args:
            text: all token ids so far: those of the previous call, and any after them.
            count: number of tokens. Where the sequence ends before, the part between the two
                occurrences is repeated.

        Returns:
            The tokens, and the number of matching tokens, up to `LONGEST_MATCH`; no tokens and 0
            if the last token has not occurred before.
        """
        self._extend(text)
        end = len(text)
        for length in _INDEXED:
            place = self._after.get(tuple(text[end - length :])) if length <= end else None
            if place is not None:
                period = end - place
                found = [text[place + step % period] for step in range(count)]
                return found, _agreeing(text, place)
        return [], 0

    def _extend(self, text: Sequence[int]) -> None:
        """Index the n-grams that are followed by a token."""
        for place in range(max(1, self._known), len(text)):
            for length in _INDEXED:
                if length <= place:
                    self._after[tuple(text[place - length : place])] = place
        self._known = len(text)


class LookupDrafter:
    """Proposes what followed the last tokens at their previous occurrence in the sequence."""

    source: Source = "lookup"

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[DraftSequence, PromptLookup] = WeakKeyDictionary()

    def propose(self, sequences: Sequence[DraftSequence]) -> list[Chain | None]:
        """Return a copied continuation for each sequence whose plan asks for one."""
        return [self._found(sequence) for sequence in sequences]

    def _found(self, sequence: DraftSequence) -> Chain | None:
        length = sequence.draft_length(self.source)
        if not length:
            return None
        index = self._indices.setdefault(sequence, PromptLookup())
        tokens, evidence = index.find(sequence.tokens, length)
        return Chain(tuple(tokens), self.source, evidence) if tokens else None

    def remember(self, verified: Sequence[Verified], output: PassResult) -> None:
        """Do nothing: the sequence's own tokens are all that is needed."""


def _agreeing(text: Sequence[int], place: int) -> int:
    """Return the number of equal tokens before `place` and at the end of the sequence."""
    longest = min(LONGEST_MATCH, place)
    for length in range(longest):
        if text[place - 1 - length] != text[-1 - length]:
            return length
    return longest
