"""Keys and values of texts that are over, for prompts that begin as they did.

A chat that goes on sends all that was said before: its keys and values are at hand if nobody
needed their room. The least recently used are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from passlm.model.cache import RowCache

MIN_PREFIX_TOKENS = 16  # tokens below which a copy saves nothing worth its trouble


class PrefixCache:
    """Remembered texts, least recently used first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], RowCache] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens held in all."""
        return sum(map(len, self._kept))

    def add(self, tokens: Sequence[int], cache: RowCache) -> None:
        """Keep a text, in place of those that it continues.

        Args:
            tokens: ids.
            cache: their keys and values, of nothing else.
        """
        if len(tokens) < MIN_PREFIX_TOKENS or self.find(tokens)[0] == len(tokens):
            return
        new = tuple(tokens)
        for prefix in [kept for kept in self._kept if new[: len(kept)] == kept]:
            del self._kept[prefix]
        self._kept[new] = cache

    def find(self, prompt: Sequence[int]) -> tuple[int, RowCache | None]:
        """How many tokens the best remembered text shares with a prompt, and its cache."""
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
        """Forget texts until no more than so many tokens are held."""
        while self._kept and self.tokens > limit:
            self._kept.popitem(last=False)


def shared_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two texts have in common."""
    count = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        count += 1
    return count
