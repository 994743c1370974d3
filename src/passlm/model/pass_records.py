"""The inputs and outputs of a pass.

Running a pass is left to `target.py`, the use of logits to `decoding/decoder.py`.
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

_MORE_ROWS = 6  # that the output layer computes in the time of reading its weights again


@dataclass(frozen=True)
class PassRow:
    """One batch row of a pass: its real tokens, root first, and its plan."""

    tokens: Sequence[int]
    plan: Plan

    def __post_init__(self) -> None:
        if len(self.tokens) != 1 + self.plan.candidates:
            raise ValueError(
                f"{len(self.tokens)} tokens for a plan of {self.plan.candidates} candidates: "
                "expected the root and each candidate"
            )


@dataclass(frozen=True)
class LookAheadRows:
    """The trained part for decoding, in the target's type and on its device.

    Attributes:
        inputs: input embeddings `LA_1..LA_L`, `[L, d_model]`.
        lora: updates of the target's layers for look-ahead rows.
        sampler: the sampler head, which corrects the logits of look-ahead rows.
        head: the draft head, which drafts without look-ahead rows.
    """

    inputs: Tensor
    lora: AppliedLora | None = None
    sampler: SamplerHead | None = None
    head: AppliedHead | None = None

    @property
    def reads_hidden(self) -> bool:
        """Whether a head reads the inputs of the output layer."""
        return self.sampler is not None or self.head is not None


@dataclass
class PassOutput:
    """Output of a pass. Batch row `b` is valid up to its own plan's length, real rows first.

    Attributes:
        whole: logits of all rows, `[B, Q, V]`, where `Q` is the longest plan; None where they are
            computed on demand.
        hidden: inputs of the output layer for each batch row, `[Q_b, d_model]`, or `[Q, d_model]`
            where `whole` is given; None where nothing reads them.
        head: the output layer.
    """

    whole: Tensor | None
    hidden: Sequence[Tensor] | None = None
    head: Callable[[Tensor], Tensor] | None = None
    _made: list[Tensor] = field(default_factory=list, init=False, repr=False)  # of all rows

    @property
    def logits(self) -> Tensor:
        """Logits of all rows, `[B, Q, V]`; the plans must have one length."""
        if self.whole is None:
            self._make_all()
            return torch.stack(self._made)
        return self.whole

    def of(self, places: Sequence[tuple[int, slice]]) -> list[Tensor]:
        """Return the logits of some rows of some batch rows, `[rows, V]` each.

        All are computed in one call.

        Args:
            places: index of a batch row, and a slice of its rows.
        """
        if not places:
            return []
        if self.whole is not None:
            return [self.whole[text, rows] for text, rows in places]
        assert self.hidden is not None, "there are neither logits nor hidden states"
        asked = [self.hidden[text][rows] for text, rows in places]
        if not self._made and sum(map(len, self.hidden)) - sum(map(len, asked)) > _MORE_ROWS:
            return self._logits_of(asked)
        self._make_all()
        return [self._made[text][rows] for text, rows in places]

    def _make_all(self) -> None:
        if not self._made:
            assert self.hidden is not None, "there are neither logits nor hidden states"
            self._made = self._logits_of(self.hidden)

    def _logits_of(self, parts: Sequence[Tensor]) -> list[Tensor]:
        assert self.head is not None, "there are neither logits nor an output layer"
        made = self.head(torch.cat(list(parts)))
        return list(torch.split(made, [len(part) for part in parts]))


@dataclass(frozen=True)
class Hung:
    """Hidden states of look-ahead rows on known sequences, before the target's output layer.

    Attributes:
        hidden: those of the look-ahead rows, `[B, R, d_model]`, with gradients.
        text_hidden: those of the sequences' own rows, `[T, S, d_model]`, without gradients.
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
