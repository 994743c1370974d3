"""Keys and values of finished sequences, for prompts with the same beginning.

A chat that continues sends all earlier messages again. Their keys and values are reused unless they
were evicted to make room. The least recently used sequence is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from passlm.model.cache import RowCache

MIN_PREFIX_TOKENS = 16  # below this length, copying costs as much as it saves


class PrefixCache:
    """Cached sequences, least recently used first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], RowCache] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Total number of cached tokens."""
        return sum(map(len, self._kept))

    def add(self, tokens: Sequence[int], cache: RowCache) -> None:
        """Cache a sequence, and drop cached sequences that are a prefix of it.

        A sequence is not added if it is too short or already contained in the cache.

        Args:
            tokens: token ids.
            cache: the keys and values of exactly these tokens.
        """
        if len(tokens) < MIN_PREFIX_TOKENS or self.find(tokens)[0] == len(tokens):
            return
        new = tuple(tokens)
        for prefix in [kept for kept in self._kept if new[: len(kept)] == kept]:
            del self._kept[prefix]
        self._kept[new] = cache

    def find(self, prompt: Sequence[int]) -> tuple[int, RowCache | None]:
        """Return the cached sequence with the longest prefix in common with a prompt.

        Returns:
            The length of the common prefix and the sequence's keys and values; 0 and None if no
            sequence starts like the prompt.
        """
        best, found = 0, None
        for kept in self._kept:
            count = shared_prefix_length(kept, prompt)
            if count > best:
                best, found = count, kept
        if found is None:
            return 0, None
        self._kept.move_to_end(found)
        return best, self._kept[found]

    def evict_to(self, limit: int) -> None:
        """Evict sequences until at most `limit` tokens are cached."""
        while self._kept and self.tokens > limit:
            self._kept.popitem(last=False)


def shared_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    count = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        count += 1
    return count
