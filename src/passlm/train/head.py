"""Train a draft head on the hidden states of real rows, without passes of look-ahead rows.

A sequence passes through the target once. From the hidden state of a row (an anchor) the head
predicts the tokens that follow the next one. Anchors of one sequence are too similar to make a
good step, so they are drawn from the latest sequences together. The target's probabilities of the
listed tokens are kept with these sequences, so that an anchor costs only the head's computation.
The rest of training is left to `loop.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passlm.drafts.draft_head import DraftHead
from passlm.lookahead.trained import LookAhead
from passlm.model.pass_records import Hung
from passlm.model.training import hidden_states
from passlm.plan import Layout
from passlm.train.loop import Trainer, group_lengths
from passlm.train.loss import PART_NUMBERS, Guess, KnownRows, Part, row_losses, spans


@dataclass(frozen=True)
class ReadText:
    """Sequence that has passed through the target.

    Attributes:
        tokens: Token ids, `[S]`.
        hidden: Input of the target's output layer, `[S, d_model]`.
        chances: The target's probabilities of the listed tokens, `[S, K]` float16.
    """

    tokens: Tensor
    hidden: Tensor
    chances: Tensor


@dataclass(frozen=True)
class HungGuesses(Hung):
    """Predictions of a draft head, in place of look-ahead rows.

    Attributes:
        chances: The target's probabilities of the listed tokens at the position of each prediction,
            `[B, R, K]` float16.
    """

    chances: Tensor


@dataclass(frozen=True)
class ListedRows(KnownRows):
    """Predictions among the listed tokens, with the target's probabilities of these tokens.

    Attributes:
        chances: The target's probabilities of the listed tokens, `[R, K]`.
    """

    chances: Tensor

    def taught(self, guess: Guess) -> Tensor:
        """Return the target's probabilities of the listed tokens, `[R, K]`."""
        return self.chances.float()


class HeadTrainer(Trainer):
    """Trainer of the draft head of look-ahead files; the files' other parts stay unchanged."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._known: dict[int, ReadText] = {}

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, HungGuesses]:
        """Return anchors drawn from this process's latest sequences, `windows` included.

        The draw depends only on the numbers of the windows, so that a resumed run draws the same.
        """
        config, lengths = self.config, torch.tensor(group_lengths(self.config))
        numbers = self._last(windows)
        for number in [known for known in self._known if known not in numbers]:
            del self._known[number]
        last = config.sequence_tokens - config.reach - 1
        shape = len(windows), len(lengths)
        draw = self.drawing(windows[0])
        texts = torch.randint(len(numbers), shape, generator=draw)
        anchors = torch.randint(last, shape, generator=draw)
        drawn, at = torch.unique(texts, return_inverse=True)
        read = [
            self._read(number) for number in numbers
        ]  # read all, so that every process runs the same number of passes
        chosen = [read[number] for number in drawn.tolist()]
        text = torch.stack([each.tokens for each in chosen])
        hidden = torch.stack([each.hidden for each in chosen])
        at, anchor = (each.repeat_interleave(lengths, 1) for each in (at, anchors))
        rows = torch.cat([torch.arange(1, 1 + length) for length in lengths.tolist()])
        depth = rows.expand_as(at)
        places = zip(at.flatten().tolist(), (anchor + depth).flatten().tolist(), strict=True)
        chances = torch.stack([chosen[one].chances[place] for one, place in places])
        at, anchor, depth = (each.to(text.device) for each in (at, anchor, depth))
        return text, HungGuesses(
            hidden[at, anchor], hidden, depth, anchor + depth, at, chances.view(*at.shape, -1)
        )

    def _last(self, windows: Sequence[int]) -> list[int]:
        """Return the window numbers of this process's latest batches, up to `windows`."""
        size = len(windows)
        apart = size * (1 if self.processes is None else self.processes.place[1])
        steps = max(1, self.config.head_texts // size)
        firsts = range(windows[0] % apart, windows[0] + 1, apart)[-steps:]
        return [first + at for first in firsts for at in range(size)]

    @torch.no_grad()
    def _read(self, window: int) -> ReadText:
        """Run a window through the target; the latest windows are cached."""
        if window not in self._known:
            tokens = self.windows.window(window).to(self.target.device)
            hidden = hidden_states(self.target, tokens[None])[0]
            rows = torch.split(hidden, max(1, PART_NUMBERS // self.target.vocabulary))
            chances = torch.cat([self._chances(part) for part in rows])
            self._known[window] = ReadText(tokens, hidden, chances)
        return self._known[window]

    def _chances(self, hidden: Tensor) -> Tensor:
        """Return the target's probabilities of the listed tokens, `[R, K]`, not renormalised."""
        logits = self.target.logits(hidden).float() / self.config.teacher_temperature
        return logits.softmax(-1)[:, self._head.listed].half()

    def _settings(self) -> dict[str, Any]:
        listed = self._head.listed.tolist()
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()
        return {**super()._settings(), "listed tokens": digest[:12]}

    def trained(self, look_ahead: LookAhead) -> dict[str, nn.Parameter]:
        """Return the head's parameters, by name."""
        every = look_ahead.named_parameters()
        return {name: parameter for name, parameter in every if name.startswith("head.")}

    def rated(self, look_ahead: LookAhead) -> list[dict[str, Any]]:
        """Return Adam's parameter group, with its peak learning rate."""
        parameters = list(self.trained(look_ahead).values())
        return [{"params": parameters, "highest": self.config.head_learning_rate}]

    def hang(self, text: Tensor, layouts: Sequence[Layout]) -> Hung:
        """Return predictions with their anchors' hidden states, placed like look-ahead rows."""
        hidden = hidden_states(self.target, text)
        rows = text.shape[1]
        depth = torch.stack([layout.look_ahead[rows:] for layout in layouts]).to(text.device)
        position = torch.stack([layout.offset[rows:] for layout in layouts]).to(text.device)
        texts = torch.arange(len(text), device=text.device)[:, None].expand_as(depth)
        return Hung(hidden[texts, position - depth], hidden, depth, position, texts)

    def _backward(self, hung: Hung, text: Tensor) -> float:
        assert isinstance(hung, HungGuesses), "made by batch()"
        hidden, chances = hung.hidden.flatten(0, 1), hung.chances.flatten(0, 1)
        depth, position, texts = hung.depth.flatten(), hung.position.flatten(), hung.text.flatten()
        weight = self.config.position_weight ** (depth - 1)
        scale = weight / weight.sum()
        starts = (depth == 1).nonzero().squeeze(1).tolist()
        trained = list(self.parameters.values())
        total = 0.0
        for start, end in spans([*starts, len(depth)], max(1, PART_NUMBERS // chances.shape[1])):
            part = slice(start, end)
            at = texts[part], position[part]
            rows = ListedRows(hidden[part], depth[part], text, at, chances[part])
            losses = row_losses(self.config.loss, self._guess(rows), rows)
            loss = (losses * scale[part]).sum()
            torch.autograd.backward(loss / self.config.accumulate, inputs=trained)
            total += float(loss.detach())
        return total

    @property
    def _head(self) -> DraftHead:
        head = self.look_ahead.head
        assert head is not None, "there is a head to train"
        return head

    def _guess(self, rows: KnownRows) -> Guess:
        head, tables = self._head, self.target.embeddings
        before = tables.inputs.detach()[rows.before(head.tokens)]
        outputs = tables.outputs.detach()[head.listed]
        logits = head.logits(rows.hidden, before, rows.depth, outputs)
        return Guess(logits.float(), head.listed.expand(len(logits), -1))

    def _guesses(self, part: Part) -> tuple[Guess, Guess]:
        guess = self._guess(part)
        return guess, guess
