"""Token ids to text, a token at a time, without a character torn in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Decode = Callable[[Sequence[int]], str]

_CONTEXT = 6  # tokens before the new ones: how a token reads may depend on its neighbours
_UNFINISHED = "\ufffd"


class Detokenizer:
    """Text of a growing text's new tokens.

    Args:
        decode: ids to text.
        prompt: ids the new ones follow; their text is not given again.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self.decode = decode
        self.ids = list(prompt[-_CONTEXT:])
        self.shown = len(self.ids)  # ids whose text has been given

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        self.ids.append(token)
        text = self._unseen()
        if text.endswith(_UNFINISHED):
            return ""
        self._forget()
        return text

    def flush(self) -> str:
        """What is left of an unfinished character, once no more tokens will come."""
        text = self._unseen()
        self.shown = len(self.ids)
        return text

    def _unseen(self) -> str:
        before = self.decode(self.ids[: self.shown])
        return self.decode(self.ids)[len(before) :]

    def _forget(self) -> None:
        self.ids = self.ids[-_CONTEXT:]
        self.shown = len(self.ids)


def text_behind(decode: Decode, prompt: Sequence[int], tokens: Iterable[int]) -> str:
    """Text of some tokens as it reads behind a prompt: some tokenizers drop a text's first space.

    Args:
        decode: ids to text.
        prompt: ids before them; their text is not given.
        tokens: the ids.
    """
    detokenizer = Detokenizer(decode, prompt)
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
