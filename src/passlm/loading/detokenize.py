"""Convert token ids to text, one token at a time, without splitting a character."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 6  # tokens decoded before the new ones: a token's text may depend on its neighbours
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes


class Detokenizer:
    """Incremental decoder of a growing token sequence.

    Args:
        decode: Function from ids to text.
        prompt: Ids that precede the new tokens. Their text is not returned, except for a character
            that they leave unfinished.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self.decode = decode
        start, end = _whole(decode, prompt)
        self.ids = list(prompt[start:])
        self.shown = len(self.ids)  # ids whose text has been returned
        self._finished = end - start  # those before any unfinished character
        self._ends: list[int] = []  # indices in `ids` at which a character begins

    def push(self, token: int) -> str:
        """Return the text that this token completes; empty while a character is unfinished."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if text.endswith(_UNFINISHED):
            return ""
        new = self._unseen(text)
        self._forget()
        return new

    def flush(self) -> str:
        """Return the rest of an unfinished character after the last token."""
        text = self._unseen(self.decode(self.ids))
        self.shown = len(self.ids)
        return text

    def _unseen(self, text: str) -> str:
        before = self.decode(self.ids[: self.shown])
        if not text.startswith(before):  # the prompt's last character is now complete
            before = self.decode(self.ids[: self._finished])
        return text[len(before) :]

    def _forget(self) -> None:
        """Drop old ids, but keep a few as context, from the start of a character."""
        self.shown = len(self.ids)
        self._ends.append(self.shown)
        start = max((at for at in self._ends if at <= self.shown - _CONTEXT), default=0)
        self.ids, self.shown = self.ids[start:], self.shown - start
        self._finished = self.shown
        self._ends = [at - start for at in self._ends if at > start]


def _whole(decode: Decode, prompt: Sequence[int]) -> tuple[int, int]:
    """Return start and end of a span of a prompt's last ids that decodes to whole characters.

    Tokenizers with byte fallback decode neighbouring byte tokens together, all or none.
    """
    last, length = max(0, len(prompt) - _CONTEXT), len(prompt)
    ends = range(length, max(length - _LONGEST_CHARACTER, -1), -1)
    for end, back in product(ends, range(min(_LONGEST_CHARACTER, last + 1))):
        text = decode(prompt[last - back : end])
        if not (text.startswith(_UNFINISHED) or text.endswith(_UNFINISHED)):
            return last - back, end
    return last, length  # bytes that form no character


def text_behind(decode: Decode, prompt: Sequence[int], tokens: Iterable[int]) -> str:
    """Return the text of tokens that follow a prompt.

    Decoding the tokens alone may differ: some tokenizers drop the first space of a text.

    Args:
        decode: Function from ids to text.
        prompt: Ids that precede the tokens; their text is not returned.
        tokens: Ids to decode.
    """
    detokenizer = Detokenizer(decode, prompt)
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
