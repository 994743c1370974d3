"""The inputs and outputs of a pass.

Running a pass is left to `target.py`, using its logits to `decoding/decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from passlm.drafts.draft_head import AppliedHead
from passlm.drafts.sampler_head import SamplerHead
from passlm.layers.lora import AppliedLora
from passlm.plan import Plan

# Rows that the output layer computes in the time that reading its weights a second time would take.
_MORE_ROWS = 6


@dataclass(frozen=True)
class PassRow:
    """One batch row of a pass.

    Attributes:
        tokens: ids of the root and of each candidate, `1 + M`.
        plan: plan of the batch row.

    Raises:
        ValueError: the number of tokens is not that of the plan's real rows.
    """

    tokens: Sequence[int]
    plan: Plan

    def __post_init__(self) -> None:
        if len(self.tokens) != 1 + self.plan.candidates:
            raise ValueError(
                f"{len(self.tokens)} tokens for a plan of {self.plan.candidates} candidates: "
                "expected one for the root and one for each candidate"
            )


@dataclass(frozen=True)
class LookAheadRows:
    """The trained part for decoding, in the target's type and on its device.

    Attributes:
        inputs: input embeddings `LA_1..LA_L`, `[L, d_model]`.
        lora: LoRA updates of the target's layers for look-ahead rows; None without.
        sampler: the sampler head, which corrects the logits of look-ahead rows; None without.
        head: the draft head, which drafts without look-ahead rows; None without.
    """

    inputs: Tensor
    lora: AppliedLora | None = None
    sampler: SamplerHead | None = None
    head: AppliedHead | None = None

    @property
    def reads_hidden(self) -> bool:
        """True if a head reads the inputs of the output layer."""
        return self.sampler is not None or self.head is not None


@dataclass
class PassOutput:
    """Output of a pass.

    The rows of batch row `b` are the `Q_b` rows of its plan, real rows first. Where tensors have
    more rows, the rest is padding.

    Attributes:
        whole: logits of all rows, `[B, Q, V]`, where `Q` is the longest plan's number of rows; None
            where they are computed on demand.
        hidden: inputs of the output layer for each batch row, `[Q_b, d_model]`, or `[Q, d_model]`
            where `whole` is given; None where nothing reads them.
        head: the output layer; None where `whole` is given.
    """

    whole: Tensor | None
    hidden: Sequence[Tensor] | None = None
    head: Callable[[Tensor], Tensor] | None = None
    _computed: list[Tensor] = field(default_factory=list, init=False, repr=False)  # of all rows

    @property
    def logits(self) -> Tensor:
        """Logits of all rows, `[B, Q, V]`; all plans must have the same number of rows."""
        if self.whole is None:
            self._compute_all()
            return torch.stack(self._computed)
        return self.whole

    def of(self, places: Sequence[tuple[int, slice]]) -> list[Tensor]:
        """Return the logits of some rows of some batch rows, `[rows, V]` each.

        Logits that are computed on demand are computed in one call of the output layer: for these
        rows alone or, if the others are few, for all rows of the pass.

        Args:
            places: pairs of the index of a batch row and a slice of its rows.
        """
        if not places:
            return []
        if self.whole is not None:
            return [self.whole[batch_row, rows] for batch_row, rows in places]
        assert self.hidden is not None, "there are neither logits nor hidden states"
        hidden = [self.hidden[batch_row][rows] for batch_row, rows in places]
        if not self._computed and sum(map(len, self.hidden)) - sum(map(len, hidden)) > _MORE_ROWS:
            return self._logits_of(hidden)
        self._compute_all()
        return [self._computed[batch_row][rows] for batch_row, rows in places]

    def _compute_all(self) -> None:
        if not self._computed:
            assert self.hidden is not None, "there are neither logits nor hidden states"
            self._computed = self._logits_of(self.hidden)

    def _logits_of(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        assert self.head is not None, "there are neither logits nor an output layer"
        logits = self.head(torch.cat(list(hidden)))
        return list(torch.split(logits, [len(part) for part in hidden]))


@dataclass(frozen=True)
class Hung:
    """Output of a training pass: hidden states of look-ahead rows on known sequences.

    Hidden states are inputs of the target's output layer.

    Attributes:
        hidden: hidden states of the look-ahead rows, `[B, R, d_model]`, with gradients.
        text_hidden: hidden states of the sequences' own rows, `[T, S, d_model]`, without gradients.
        depth: `j` of each look-ahead row, `[B, R]`.
        position: position of each look-ahead row, `[B, R]`; it predicts the token at
            `position + 1`.
        text: index of the sequence that each look-ahead row belongs to, `[B, R]`.
    """

    hidden: Tensor
    text_hidden: Tensor
    depth: Tensor
    position: Tensor
    text: Tensor
