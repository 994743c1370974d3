"""The interface between the decoder and the sources of draft tokens.

A drafter proposes candidates before each pass and may keep what it needs from the pass afterwards.
To add a source, write a module with a class that follows `Drafter` and list it in
`decoding/drafters.py`. Which proposal is verified is left to the strategy
(`decoding/strategies.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from passlm.drafts.sampler_head import Shortlist
from passlm.plan import Chain, Guessing, Source


class DraftSequence(Protocol):
    """The part of a sequence under generation that drafters see.

    Attributes:
        tokens: settled token ids, prompt included; the last one is the root of the next pass.
        proposed: candidates that other drafters have proposed for the next pass.
    """

    tokens: list[int]
    proposed: list[Chain]

    @property
    def guessing(self) -> Guessing:
        """How candidates are made from logits; see `plan.Guessing`."""
        ...

    def draft_length(self, source: Source) -> int:
        """Return the number of tokens this source should propose for the next pass (0: none)."""
        ...

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 0 for greedy decoding."""
        ...

    @property
    def noise_weight(self) -> float:
        """Exponent of the noise in a guess, from 0 to 1; see `judge.guess`."""
        ...

    def noise_ahead(
        self, count: int, vocabulary: int, listed: Tensor | None = None, sureness: bool = False
    ) -> Tensor:
        """Return the predetermined sampling noise of the next positions, `[count, K]` float32.

        Args:
            count: number of positions.
            vocabulary: number of tokens that noise is made for.
            listed: ids of the `K` tokens to return, on the CPU; None for all.
            sureness: the drafter's sureness will depend on the noise.
        """
        ...

    def draw(self, draft: DraftBuilder, logits: Tensor, among: Shortlist | None = None) -> None:
        """Draw the next candidates of a draft by the sequence's sampling parameters.

        Args:
            draft: the candidates so far; the new ones are appended.
            logits: `[R, V]` for `R` candidates; or `[1, K]` of the tokens of a shortlist.
            among: the shortlist.
        """
        ...


@dataclass(eq=False)
class DraftBuilder:
    """Candidates of one sequence while they are being drawn.

    Attributes:
        source: name of the drafter.
        sure: the drafter gives a probability for each of its tokens.
        tokens: ids drawn so far.
        sureness: those probabilities.
        q: the distributions the tokens were drawn from, `[M, V]`; None where they are one-hot.
    """

    source: Source
    sure: bool = False
    tokens: list[int] = field(default_factory=list)
    sureness: list[float] = field(default_factory=list)
    q: Tensor | None = None

    @property
    def chain(self) -> Chain:
        """The candidates drawn so far, at least one."""
        return Chain(tuple(self.tokens), self.source, sureness=tuple(self.sureness), q=self.q)


class PassResult(Protocol):
    """The part of a pass's output that drafters see; `model.pass_records.PassOutput` is one.

    Attributes:
        hidden: inputs of the output layer by batch row, `[Q_b, d_model]` each; None if not kept.
    """

    hidden: Sequence[Tensor] | None

    def of(self, places: Sequence[tuple[int, slice]]) -> list[Tensor]:
        """Return the logits of some rows of some batch rows, `[rows, V]` each."""
        ...


@dataclass(frozen=True)
class Verified:
    """A sequence that goes on after a pass.

    Attributes:
        sequence: the sequence; its tokens include what the pass settled.
        batch_row: its row of the batch in the pass.
        accepted: number of accepted candidates, so the index of the last accepted real row.
        group: the rows of the look-ahead group on that real row; may be empty.
    """

    sequence: DraftSequence
    batch_row: int
    accepted: int
    group: slice


class Drafter(Protocol):
    """A source of candidates.

    Attributes:
        source: its name, unique among the drafters of a decoder. Acceptance is counted under it.
    """

    source: Source

    def propose(self, sequences: Sequence[DraftSequence]) -> list[Chain | None]:
        """Return the candidates for the next pass of each sequence, None for no proposal.

        Called once before each pass, after the drafters listed earlier. The candidates follow
        the sequence's last token. Under the rejection judge, candidates that are not drawn from
        a distribution `Chain.q` must depend on the settled tokens alone.
        """
        ...

    def remember(self, verified: Sequence[Verified], output: PassResult) -> None:
        """Keep what the next proposals need from a pass.

        Args:
            verified: the sequences that go on. Those that ended are not mentioned again.
            output: what the pass computed.
        """
        ...
