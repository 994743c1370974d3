"""What a pass is given and what it gives.

Running it is left to `target.py`, what is done with logits to `decoding/decoder.py`.
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

_MORE_ROWS = 6  # that the output layer computes in the time of reading its weights once more


@dataclass(frozen=True)
class PassRow:
    """What one batch row computes in a pass: its real tokens, root first, and its plan."""

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
    """What look-ahead rows are made of, in the target's type and place.

    Attributes:
        inputs: input embeddings `LA_1..LA_L`, `[L, d_model]`.
        lora: updates of the target's layers for these rows.
        sampler: the head that weighs their guesses again.
        head: what guesses behind a real row, without any of them.
    """

    inputs: Tensor
    lora: AppliedLora | None = None
    sampler: SamplerHead | None = None
    head: AppliedHead | None = None

    @property
    def reads_hidden(self) -> bool:
        """Whether something takes what the output layer is given."""
        return self.sampler is not None or self.head is not None


@dataclass
class PassOutput:
    """What a pass gave. Row `b` has meaning up to its own plan's length, real rows first.

    Attributes:
        whole: logits of all rows, `[B, Q, V]`, where `Q` is the longest plan; None where they are
            made when asked for.
        hidden: what the target's output layer is given for each text, `[Q_b, d_model]`, or `[Q,
            d_model]` where there are logits of all rows; None where nothing asks for it.
        head: the output layer.
    """

    whole: Tensor | None
    hidden: Sequence[Tensor] | None = None
    head: Callable[[Tensor], Tensor] | None = None
    _made: list[Tensor] = field(default_factory=list, init=False, repr=False)  # of all rows

    @property
    def logits(self) -> Tensor:
        """Logits of all rows, `[B, Q, V]`, of texts with plans of one length."""
        if self.whole is None:
            self._make_all()
            return torch.stack(self._made)
        return self.whole

    def of(self, places: Sequence[tuple[int, slice]]) -> list[Tensor]:
        """Logits of some rows of some texts, `[rows, V]` each, made all at once.

        Args:
            places: number of the text in the batch, and its rows.
        """
        if not places:
            return []
        if self.whole is not None:
            return [self.whole[text, rows] for text, rows in places]
        assert self.hidden is not None, "neither logits nor what they are made of"
        asked = [self.hidden[text][rows] for text, rows in places]
        if not self._made and sum(map(len, self.hidden)) - sum(map(len, asked)) > _MORE_ROWS:
            return self._logits_of(asked)
        self._make_all()
        return [self._made[text][rows] for text, rows in places]

    def _make_all(self) -> None:
        if not self._made:
            assert self.hidden is not None, "neither logits nor what they are made of"
            self._made = self._logits_of(self.hidden)

    def _logits_of(self, parts: Sequence[Tensor]) -> list[Tensor]:
        assert self.head is not None, "neither logits nor what makes them"
        made = self.head(torch.cat(list(parts)))
        return list(torch.split(made, [len(part) for part in parts]))


@dataclass(frozen=True)
class Hung:
    """What look-ahead rows of known texts gave, before the target's output layer.

    Attributes:
        hidden: of the look-ahead rows, `[B, R, d_model]`, with gradients.
        text_hidden: of the texts' own rows, `[T, S, d_model]`, without.
        depth: `j` of each look-ahead row, `[B, R]`.
        position: of each look-ahead row, `[B, R]`; it predicts the token at `position + 1`.
        text: which of the texts each look-ahead row hangs on, `[B, R]`.
    """

    hidden: Tensor
    text_hidden: Tensor
    depth: Tensor
    position: Tensor
    text: Tensor
