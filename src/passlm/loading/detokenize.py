"""Token ids to text, a token at a time, without a character torn in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 6  # tokens before the new ones: how a token reads may depend on its neighbours
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes


class Detokenizer:
    """Text of a growing text's new tokens.

    Args:
        decode: ids to text.
        prompt: ids the new ones follow; their text is not given again, but for a character that
            they leave unfinished.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self.decode = decode
        start, end = _whole(decode, prompt)
        self.ids = list(prompt[start:])
        self.shown = len(self.ids)  # ids whose text has been given
        self._finished = end - start  # those of them without a character begun
        self._ends: list[int] = []  # places behind which a character begins

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if text.endswith(_UNFINISHED):
            return ""
        new = self._unseen(text)
        self._forget()
        return new

    def flush(self) -> str:
        """What is left of an unfinished character, once no more tokens will come."""
        text = self._unseen(self.decode(self.ids))
        self.shown = len(self.ids)
        return text

    def _unseen(self, text: str) -> str:
        before = self.decode(self.ids[: self.shown])
        if not text.startswith(before):  # the prompt's last character is whole by now
            before = self.decode(self.ids[: self._finished])
        return text[len(before) :]

    def _forget(self) -> None:
        """Keep some ids before the new ones, from where a character begins."""
        self.shown = len(self.ids)
        self._ends.append(self.shown)
        start = max((at for at in self._ends if at <= self.shown - _CONTEXT), default=0)
        self.ids, self.shown = self.ids[start:], self.shown - start
        self._finished = self.shown
        self._ends = [at - start for at in self._ends if at > start]


def _whole(decode: Decode, prompt: Sequence[int]) -> tuple[int, int]:
    """Where some of a prompt's last ids begin that are whole characters, and where these end.

    Tokenizers that fall back on bytes read neighbouring ones together, all or none.
    """
    last, length = max(0, len(prompt) - _CONTEXT), len(prompt)
    ends = range(length, max(length - _LONGEST_CHARACTER, -1), -1)
    for end, back in product(ends, range(min(_LONGEST_CHARACTER, last + 1))):
        text = decode(prompt[last - back : end])
        if not (text.startswith(_UNFINISHED) or text.endswith(_UNFINISHED)):
            return last - back, end
    return last, length  # bytes that were never characters


def text_behind(decode: Decode, prompt: Sequence[int], tokens: Iterable[int]) -> str:
    """Text of some tokens as it reads behind a prompt: some tokenizers drop a text's first space.

    Args:
        decode: ids to text.
        prompt: ids before them; their text is not given.
        tokens: the ids.
    """
    detokenizer = Detokenizer(decode, prompt)
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
