"""Find the end of a sequence, possibly in the middle of an accepted block.

Ends by token ids (end of sequence, length) and by text (stop strings) are separate, since modules
below `generate.py` see ids only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from passlm.outputs import FinishReason


def cut_block(
    tokens: Sequence[int], eos: Collection[int], room: int, full: FinishReason = "length"
) -> tuple[int, FinishReason | None]:
    """Return the number of tokens of a settled block to keep, and the finish reason, if any.

    Args:
        tokens: newly settled token ids.
        eos: ids that end the sequence; the first one found is kept as its last token.
        room: number of tokens that may still be generated, 1 or more.
        full: the finish reason when `room` is used up.
    """
    for kept, token in enumerate(tokens[:room], start=1):
        if token in eos:
            return kept, "eos"
    if len(tokens) >= room:
        return room, full
    return len(tokens), None


class StopStrings:
    """Streams text up to the first stop string; holds back text that may be the start of one.

    Args:
        stops: the stop strings, none of them empty.

    Attributes:
        held: text held back so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add new text; return the text to show now, and whether a stop string was found.

        The first stop string to be complete ends the text; of several that end at the same place,
        the longest. All text before the stop string is returned; the stop string and the text after
        it are not. The result does not depend on how the text is cut into pieces.
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
        """Return the text held back; call this when no more text follows."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
