"""Training of a draft head: on rows that need no pass of their own, since they are the text's.

A text goes through the target once; from the hidden states of its rows (the anchors) the head
guesses the tokens behind the one after each. Those of one text are too much alike for a step:
anchors are drawn from the last texts together. Everything else is the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
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

    @cached_property
    def _read(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        """A text and its hidden states by the text's number, the last ones remembered."""
        room = self.config.head_texts + self.config.sequences

        @lru_cache(maxsize=room)
        def read(window: int) -> tuple[Tensor, Tensor]:
            text = self.windows.window(window).to(self.target.device)
            return text, self.target.hidden(text[None])[0]

        return read

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, Hung]:
        """Anchors of the last texts up to each of these: a function of its number alone."""
        config, lengths = self.config, torch.tensor(group_lengths(self.config))
        first = max(0, windows[0] + 1 - config.head_texts)
        known = [self._read(number) for number in range(first, windows[-1] + 1)]
        text, hidden = (torch.stack(part) for part in zip(*known, strict=True))
        places = config.sequence_tokens - config.reach - 1
        texts, anchors = [], []
        for window in windows:
            oldest, draw = max(0, window + 1 - config.head_texts), self.drawing(window)
            of = torch.randint(oldest, window + 1, lengths.shape, generator=draw)
            texts.append(of - first)
            anchors.append(torch.randint(places, lengths.shape, generator=draw))
        at, anchor = (
            torch.stack(drawn).repeat_interleave(lengths, 1).to(text.device)
            for drawn in (texts, anchors)
        )
        rows = torch.cat([torch.arange(1, 1 + length) for length in lengths.tolist()])
        depth = rows.to(text.device).expand_as(at)
        return text, Hung(hidden[at, anchor], hidden, depth, anchor + depth, at)

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
