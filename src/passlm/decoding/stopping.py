"""Where a text ends, also in the middle of an accepted block.

Token ids (end of sequence, length) and text (stop strings) are looked at apart: what is below
`generate.py` sees ids only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from passlm.outputs import FinishReason


def cut_block(
    tokens: Sequence[int], eos: Collection[int], room: int, full: FinishReason = "length"
) -> tuple[int, FinishReason | None]:
    """How many tokens of a settled block are kept, and why the text ends there, if it does.

    Args:
        tokens: newly settled token ids.
        eos: ids that end the text; the one found is kept as its last token.
        room: how many tokens may still be written, 1 or more.
        full: the reason to give where `room` runs out.
    """
    for kept, token in enumerate(tokens[:room], start=1):
        if token in eos:
            return kept, "eos"
    if len(tokens) >= room:
        return room, full
    return len(tokens), None


class StopStrings:
    """Streams text up to the first stop string and holds back what may be the start of one.

    Args:
        stops: the stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take new text; give what can be shown now, and whether a stop string was met.

        The stop string that is complete first ends the text, the longest if there are several:
        how the text is cut into pieces changes nothing. The text before it is whole; nothing of
        it or behind it is given.
        """
        self.held += text
        starts = {stop: self.held.find(stop) for stop in self.stops}
        ends = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
        if ends:
            _, start = min(ends)
            shown, self.held = self.held[:start], ""
            return shown, True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, False

    def flush(self) -> str:
        """The text held back, once no more will come."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
