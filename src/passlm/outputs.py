"""Results of a pass and of a whole generation, as plain records.

`Stats` holds the counts that every report is computed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class Step:
    """Tokens settled by one pass for one batch row."""

    tokens: tuple[int, ...]
    """Settled token ids, the accepted candidates first."""
    accepted: int
    """Number of `tokens` that are accepted candidates; a remaining one was drawn."""
    judged: int
    """Number of candidates that the pass verified."""
    finish_reason: FinishReason | None = None

    def cut(self, kept: int, reason: FinishReason) -> Step:
        """Return a copy that ends after `kept` tokens and does not count what follows as judged."""
        return Step(self.tokens[:kept], min(self.accepted, kept), min(self.judged, kept), reason)


@dataclass
class Stats:
    """Counts of one generation, in tokens, passes and seconds."""

    prompt_tokens: int = 0
    tokens: int = 0
    passes: int = 0
    judging_passes: int = 0
    """Passes that had candidates to verify."""
    judged_by_position: list[int] = field(default_factory=list)
    """Number of candidates reached (all before them accepted) at position 1, 2, ..."""
    accepted_by_position: list[int] = field(default_factory=list)
    """Number of the reached candidates that were accepted, by position."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def count(self, step: Step) -> None:
        """Add the counts of one pass."""
        self.passes += 1
        self.tokens += len(step.tokens)
        self.judging_passes += step.judged > 0
        while len(self.judged_by_position) < step.judged:
            self.judged_by_position.append(0)
            self.accepted_by_position.append(0)
        for position in range(min(step.accepted + 1, step.judged)):
            self.judged_by_position[position] += 1
            self.accepted_by_position[position] += position < step.accepted

    @property
    def accepted(self) -> int:
        """Total number of accepted candidates."""
        return sum(self.accepted_by_position)

    @property
    def accepted_length(self) -> float:
        """Mean number of accepted candidates per pass that had any; 0.0 without such a pass."""
        return self.accepted / self.judging_passes if self.judging_passes else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per forward pass; 0.0 before the first pass."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, without prefill; 0.0 before the first pass."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @classmethod
    def total(cls, parts: Sequence[Stats]) -> Stats:
        """Return the sum of the counts of several generations."""
        longest = max((len(part.judged_by_position) for part in parts), default=0)

        def summed(columns: list[list[int]]) -> list[int]:
            return [sum(c[i] for c in columns if i < len(c)) for i in range(longest)]

        return cls(
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            tokens=sum(part.tokens for part in parts),
            passes=sum(part.passes for part in parts),
            judging_passes=sum(part.judging_passes for part in parts),
            judged_by_position=summed([part.judged_by_position for part in parts]),
            accepted_by_position=summed([part.accepted_by_position for part in parts]),
            prefill_seconds=sum(part.prefill_seconds for part in parts),
            decode_seconds=sum(part.decode_seconds for part in parts),
        )


@dataclass(frozen=True)
class Chunk:
    """A piece of streamed text, produced by one step."""

    texts: tuple[str, ...]
    """Text shown for each token, one string per token. A string is empty while a character or a
    possible stop string is incomplete."""
    tokens: tuple[int, ...]
    """Token ids settled by the step, cut at a stop."""
    accepted: int
    """Number of `tokens` that are accepted candidates; they come first."""
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """Text to print now."""
        return "".join(self.texts)


@dataclass(frozen=True)
class Output:
    """Result of a complete generation."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
