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
LONGEST_MATCH = 16  # longer matches are accepted at hardly higher rates


class PromptLookup:
    """N-gram index of one sequence, extended as tokens are appended."""

    def __init__(self) -> None:
        self._indexed = 0  # number of tokens already in the index
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> place after its last occurrence

    def find(self, tokens: Sequence[int], count: int) -> tuple[list[int], int]:
        """Return the tokens that followed the last tokens at their previous occurrence.

        Args:
            tokens: all token ids so far: those of the previous call, and any after them.
            count: number of tokens to return. Where fewer tokens follow the previous occurrence,
                they are repeated, since the sequence may be periodic.

        Returns:
            The tokens, and the number of tokens that match before them, up to `LONGEST_MATCH`. No
            tokens and 0 if the last token has not occurred before.
        """
        self._extend(tokens)
        end = len(tokens)
        for length in _INDEXED:
            place = self._after.get(tuple(tokens[end - length :])) if length <= end else None
            if place is not None:
                period = end - place
                found = [tokens[place + step % period] for step in range(count)]
                return found, _match_length(tokens, place)
        return [], 0

    def _extend(self, tokens: Sequence[int]) -> None:
        """Index the n-grams that are followed by a token."""
        for place in range(max(1, self._indexed), len(tokens)):
            for length in _INDEXED:
                if length <= place:
                    self._after[tuple(tokens[place - length : place])] = place
        self._indexed = len(tokens)


class LookupDrafter:
    """Proposes what followed the last tokens at their previous occurrence in the sequence."""

    source: Source = "lookup"

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[DraftSequence, PromptLookup] = WeakKeyDictionary()

    def propose(self, sequences: Sequence[DraftSequence]) -> list[Chain | None]:
        """Return a copied continuation for each sequence whose strategy asks for one."""
        return [self._found(sequence) for sequence in sequences]

    def _found(self, sequence: DraftSequence) -> Chain | None:
        length = sequence.draft_length(self.source)
        if not length:
            return None
        index = self._indices.setdefault(sequence, PromptLookup())
        tokens, evidence = index.find(sequence.tokens, length)
        return Chain(tuple(tokens), self.source, evidence) if tokens else None

    def remember(self, verified: Sequence[Verified], output: PassResult) -> None:
        """Do nothing: the index is built from the sequence's own tokens."""


def _match_length(tokens: Sequence[int], place: int) -> int:
    """Return the number of tokens before `place` that equal those at the end of the sequence."""
    longest = min(LONGEST_MATCH, place)
    for length in range(longest):
        if tokens[place - 1 - length] != tokens[-1 - length]:
            return length
    return longest
