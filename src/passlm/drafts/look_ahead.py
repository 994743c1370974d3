"""Candidates from look-ahead rows: the paper's drafts, with a sampler head where one is trained.

A pass computes a group of look-ahead rows on its real rows. The group on the last accepted row
gives the candidates for the next pass. The sampler head itself is in `sampler_head.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from passlm.drafts.drawing import by_guessing, draw_together, known_noise
from passlm.drafts.protocol import DraftBuilder, DraftSequence, PassResult, Verified
from passlm.drafts.sampler_head import Embeddings, GroupSampler, SamplerHead
from passlm.plan import Chain, Source


class LookAheadDrafter:
    """Drafts from the look-ahead group on the last accepted row.

    Args:
        sampler: the sampler head; None to draw from the rows' own logits.
        tables: the target's embeddings, which a sampler head needs.
    """

    source: Source = "look-ahead"

    def __init__(self, sampler: SamplerHead | None, tables: Embeddings | None) -> None:
        self._sampler = sampler
        self._tables = tables
        self._drafted: WeakKeyDictionary[DraftSequence, Chain] = WeakKeyDictionary()

    def propose(self, sequences: Sequence[DraftSequence]) -> list[Chain | None]:
        """Return the candidates that `remember` drafted from the last pass."""
        return [self._drafted.get(sequence) for sequence in sequences]

    def remember(self, verified: Sequence[Verified], output: PassResult) -> None:
        """Draft from the groups on the last accepted rows."""
        for one in verified:
            self._drafted.pop(one.sequence, None)
        drafting = [one for one in verified if one.group.start < one.group.stop]
        if not drafting:
            return
        groups = output.of([(one.batch_row, one.group) for one in drafting])
        sequences = [one.sequence for one in drafting]
        if self._sampler is None or self._tables is None:
            self._draw(sequences, groups)
            return
        assert output.hidden is not None, "a pass with a sampler head keeps its hidden states"
        hidden = [output.hidden[one.batch_row][one.group] for one in drafting]
        self._sample(self._sampler, self._tables, sequences, groups, hidden)

    def _draw(self, sequences: Sequence[DraftSequence], groups: Sequence[Tensor]) -> None:
        for sequence, logits in zip(sequences, groups, strict=True):
            draft = DraftBuilder(self.source)
            sequence.draw(draft, logits)
            self._drafted[sequence] = draft.chain

    def _sample(
        self,
        head: SamplerHead,
        tables: Embeddings,
        sequences: Sequence[DraftSequence],
        groups: Sequence[Tensor],
        hidden: Sequence[Tensor],
    ) -> None:
        """Draft with the sampler head, from logits and hidden states of each group's rows."""
        vocabulary = groups[0].shape[1]
        for guessing, using in by_guessing(sequences):
            some = [sequences[at] for at in using]
            sampler = GroupSampler(
                head, tables, [groups[at] for at in using], [hidden[at] for at in using]
            )
            if guessing == "drawn":
                chains = [draft.chain for draft in draw_together(some, sampler, self.source)]
            else:
                knowing = guessing == "knowing"
                noise = known_noise(some, sampler.lengths, vocabulary) if knowing else None
                drafted = sampler.likeliest([sequence.tokens for sequence in some], noise)
                chains = [Chain(tuple(tokens), self.source) for tokens in drafted]
            self._drafted.update(zip(some, chains, strict=True))
