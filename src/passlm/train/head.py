"""Training of a draft head: on rows that need no pass of their own, since they are the text's.

A text goes through the target once; from the hidden states of its rows (the anchors) the head
guesses the tokens behind the one after each. Those of one text are too much alike for a step:
anchors are drawn from the last texts together. Everything else is the loop's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passlm.lookahead import LookAhead
from passlm.passes import Hung
from passlm.plan import Layout
from passlm.train.loop import Trainer, group_lengths
from passlm.train.loss import Guess, Part, parts, row_losses


class HeadTrainer(Trainer):
    """Trains the draft head of look-ahead files, and leaves what else they hold as it is."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, Hung]:
        """Anchors of the last texts that this process had, these the last of them.

        They depend on the numbers of the texts alone: a resumed run draws the same.
        """
        config, lengths = self.config, torch.tensor(group_lengths(self.config))
        numbers = self._last(windows)
        for number in [known for known in self._known if known not in numbers]:
            del self._known[number]
        places = config.sequence_tokens - config.reach - 1
        shape = len(windows), len(lengths)
        draw = self.drawing(windows[0])
        texts = torch.randint(len(numbers), shape, generator=draw)
        anchors = torch.randint(places, shape, generator=draw)
        drawn, at = torch.unique(texts, return_inverse=True)
        read = [self._read(number) for number in numbers]  # all: as many in every process
        text, hidden = (torch.stack([read[n][part] for n in drawn.tolist()]) for part in (0, 1))
        at, anchor = (each.repeat_interleave(lengths, 1).to(text.device) for each in (at, anchors))
        rows = torch.cat([torch.arange(1, 1 + length) for length in lengths.tolist()])
        depth = rows.to(text.device).expand_as(at)
        return text, Hung(hidden[at, anchor], hidden, depth, anchor + depth, at)

    def _last(self, windows: Sequence[int]) -> list[int]:
        """Numbers of the texts of this process's last steps, up to these."""
        size = len(windows)
        apart = size * (1 if self.processes is None else self.processes.place[1])
        steps = max(1, self.config.head_texts // size)
        firsts = range(windows[0] % apart, windows[0] + 1, apart)[-steps:]
        return [first + at for first in firsts for at in range(size)]

    def _read(self, window: int) -> tuple[Tensor, Tensor]:
        """A text, `[S]`, and its hidden states, `[S, d_model]`; the last ones are remembered."""
        if window not in self._known:
            text = self.windows.window(window).to(self.target.device)
            self._known[window] = text, self.target.hidden(text[None])[0]
        return self._known[window]

    def _settings(self) -> dict[str, Any]:
        listed = [] if self.look_ahead.head is None else self.look_ahead.head.listed.tolist()
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()
        return {**super()._settings(), "listed tokens": digest[:12]}

    def trained(self, look_ahead: LookAhead) -> dict[str, nn.Parameter]:
        """The head's parameters, by name."""
        every = look_ahead.named_parameters()
        return {name: parameter for name, parameter in every if name.startswith("head.")}

    def rated(self, look_ahead: LookAhead) -> list[dict[str, Any]]:
        """One group of them."""
        parameters = list(self.trained(look_ahead).values())
        return [{"params": parameters, "highest": self.config.head_learning_rate}]

    def hang(self, text: Tensor, layouts: Sequence[Layout]) -> Hung:
        """Rows with the hidden states of their anchors; a guess stands where its row would."""
        hidden = self.target.hidden(text)
        rows = text.shape[1]
        depth = torch.stack([layout.look_ahead[rows:] for layout in layouts]).to(text.device)
        position = torch.stack([layout.offset[rows:] for layout in layouts]).to(text.device)
        texts = torch.arange(len(text), device=text.device)[:, None].expand_as(depth)
        return Hung(hidden[texts, position - depth], hidden, depth, position, texts)

    def _backward(self, hung: Hung, text: Tensor) -> float:
        weight = self.config.position_weight ** (hung.depth.flatten() - 1)
        scale = weight / weight.sum()
        total = 0.0
        for place, part in parts(self.target, hung, text, self.config.teacher_temperature):
            guess, _ = self._guesses(part)
            loss = (row_losses(self.config.loss, guess, part) * scale[place]).sum()
            trained = list(self.parameters.values())
            torch.autograd.backward(loss / self.config.accumulate, inputs=trained)
            total += float(loss.detach())
        return total

    def _guesses(self, part: Part) -> tuple[Guess, Guess]:
        head, tables = self.look_ahead.head, self.target.embeddings
        assert head is not None, "there is a head to train"
        before = tables.inputs.detach()[part.before(head.tokens)]
        outputs = tables.outputs.detach()[head.listed]
        logits = head.logits(part.hidden, before, part.depth, outputs)
        guess = Guess(logits.float(), head.listed.expand(len(logits), -1))
        return guess, guess
