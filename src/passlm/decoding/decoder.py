"""The decoding step over a batch of sequences, which may join and leave between steps.

Works on token ids: propose candidates, choose a plan, run the pass, judge, settle, remember. Plain
decoding is a plan, not a second loop. Text, stop strings and streams are left to `generate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from passlm.decoding.drafters import drafters_for
from passlm.decoding.noise import Noise
from passlm.decoding.request import Request
from passlm.decoding.stopping import cut_block
from passlm.decoding.strategies import PassSize
from passlm.decoding.text import Row
from passlm.drafts.protocol import Drafter, Verified
from passlm.errors import InputError
from passlm.kernels.topk import likeliest
from passlm.model.cache import RowCache
from passlm.model.pass_records import LookAheadRows, PassOutput, PassRow
from passlm.model.target import PREFILL_CHUNK, Target
from passlm.outputs import FinishReason, Step


class PromptError(InputError):
    """A prompt that cannot be decoded: empty, too long, or with unknown ids; one line."""


@dataclass(frozen=True)
class Reading:
    """A sequence whose prompt is being prefilled; it is not yet in the batch.

    Attributes:
        row: the sequence.
        cache: keys and values of the tokens prefilled so far.
    """

    row: Row
    cache: RowCache

    @property
    def left(self) -> int:
        """Tokens still to be prefilled: all but the last, which is the first root."""
        return len(self.row.tokens) - 1 - self.cache.lengths[0]


Observer = Callable[[Row, Tensor, Sequence[int]], None]
"""Called for each sequence of each pass before it is settled: with the sequence as it was, the
logits of its real rows `[1 + M, V]`, and the tokens that the pass settles, before any cut."""


class Decoder:
    """Decodes a batch of sequences, one pass at a time.

    Args:
        target: the frozen model.
        look_ahead: look-ahead rows; None where no request's strategy uses them.
        observer: see `Observer`.
        drafters: further sources of candidates, asked after those of `drafters_for`.

    Raises:
        UnsupportedModelError: the rows have a sampler head and the output layer's weights cannot
            be read.
    """

    def __init__(
        self,
        target: Target,
        look_ahead: LookAheadRows | None = None,
        observer: Observer | None = None,
        drafters: Sequence[Drafter] = (),
    ) -> None:
        self.target = target
        self.look_ahead = look_ahead
        self.observer = observer
        self.drafters = [*drafters_for(target, look_ahead), *drafters]
        self.rows: list[Row] = []
        self.settled: list[tuple[Row, Step]] = []
        self._cache: RowCache = target.new_cache(batch=0)

    @property
    def slots(self) -> int:
        """Tokens that the KV cache has memory for: each row's share is that of the longest."""
        return self._cache.held * self._cache.capacity

    def join(self, request: Request) -> Row:
        """Prefill a prompt and add the sequence to the batch.

        Raises:
            PromptError: the prompt is empty, holds unknown ids, or fills the model's context.
        """
        reading = self.begin(request)
        while reading.left:
            self.read(reading, PREFILL_CHUNK)
        return self.admit(reading)

    def begin(self, request: Request, known: RowCache | None = None) -> Reading:
        """Return a sequence whose prompt is then prefilled by `read`, a part at a time.

        Args:
            request: what to generate.
            known: keys and values of the first tokens of the prompt, fewer than all; used up.

        Raises:
            PromptError: as for `join`.
        """
        room, full = self._room(request)
        noise, tokens = Noise(request.seed), list(request.prompt)
        row = Row(request, room, full, noise, tokens, self.target.context)
        return Reading(row, self.target.new_cache() if known is None else known)

    def read(self, reading: Reading, tokens: int) -> None:
        """Prefill up to `tokens` further tokens of a prompt."""
        start = reading.cache.lengths[0]
        end = start + min(tokens, reading.left)
        if end > start:
            self.target.extend(reading.cache, reading.row.tokens[start:end])

    def admit(self, reading: Reading) -> Row:
        """Add a sequence whose prompt is prefilled to the batch."""
        self._cache.append(reading.cache)
        self.rows.append(reading.row)
        return reading.row

    def copied(self, row: Row, count: int) -> RowCache:
        """Return a copy of the keys and values of a sequence's first tokens, at most all but one.

        Raises:
            ValueError: the sequence is not in the batch.
        """
        index = self.rows.index(row)
        return self._cache.copied(index, count)

    def leave(self, rows: Iterable[Row]) -> None:
        """Remove sequences from the batch, finished or not; the last ones take their places."""
        leaving = set(map(id, rows))
        stay = [index for index, row in enumerate(self.rows) if id(row) not in leaving]
        if len(stay) < len(self.rows):
            kept = closed_up(stay)
            self.rows = [self.rows[index] for index in kept]
            self._cache.keep(kept)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Step]]:
        """Run one pass for every sequence of the batch; those that end leave it.

        If it raises, all sequences are still in the batch, and `settled` holds what the pass
        settled if it got that far.

        Returns:
            What each sequence settled, in the batch's order.
        """
        self.settled = []
        rows = list(self.rows)
        self._propose(rows)
        passes = self._choose(rows)
        output = self.target.run(self._cache, passes, self.look_ahead)
        judged = self._judge(rows, output)
        self.settled = self._settle(rows, judged)
        self._remember(output)
        self.leave([row for row, step in self.settled if step.finish_reason])
        return self.settled

    def _propose(self, rows: Sequence[Row]) -> None:
        """Collect the drafters' candidates for the next pass."""
        for row in rows:
            row.begin_step(len(rows))
        drafting = [row for row in rows if row.drafts]
        for drafter in self.drafters if drafting else ():
            for row, chain in zip(drafting, drafter.propose(drafting), strict=True):
                if chain is not None:
                    row.proposed.insert(0, chain)

    def _choose(self, rows: Sequence[Row]) -> list[PassRow]:
        """Choose each sequence's plan; where all pay for the longest one, they agree on a size."""
        agreed = None if self.target.in_line else agreed_pass(rows)
        return [row.choose_plan(agreed if row.chooser else None) for row in rows]

    def _judge(self, rows: Sequence[Row], output: PassOutput) -> list[list[int]]:
        """Return the tokens that the pass settles; greedy rows are searched together."""
        real = [(index, slice(0, 1 + row.plan.candidates)) for index, row in enumerate(rows)]
        logits = output.of(real)
        plain = [at for at, row in enumerate(rows) if row.request.distribution.takes_likeliest]
        best: dict[int, list[int]] = {}
        if plain:
            found = iter(likeliest(torch.cat([logits[at] for at in plain])).tolist())
            best = {at: list(islice(found, len(logits[at]))) for at in plain}
        judged = []
        for at, (row, own) in enumerate(zip(rows, logits, strict=True)):
            judged.append(row.judge(own, best.get(at)))
            if self.observer is not None:
                self.observer(row, own, judged[-1])
        return judged

    def _settle(
        self, rows: Sequence[Row], judged: Sequence[Sequence[int]]
    ) -> list[tuple[Row, Step]]:
        """Append the settled tokens, cut where a sequence ends, and keep their cache entries."""
        steps = []
        for index, (row, tokens) in enumerate(zip(rows, judged, strict=True)):
            accepted = len(tokens) - 1
            kept, reason = cut_block(tokens, row.request.eos, row.room, row.full)
            row.settle(tokens[:kept])
            self._cache.settle(index, 1 + accepted)
            step = Step(tuple(tokens), accepted, len(row.candidates), reason)
            steps.append((row, step if reason is None else step.cut(kept, reason)))
        return steps

    def _remember(self, output: PassOutput) -> None:
        """Let the drafters keep what they need of the sequences that go on."""
        verified = [
            Verified(row, index, step.accepted, row.plan.group(step.accepted))
            for index, (row, step) in enumerate(self.settled)
            if row.drafts and step.finish_reason is None
        ]
        for drafter in self.drafters if verified else ():
            drafter.remember(verified, output)

    def _room(self, request: Request) -> tuple[int, FinishReason]:
        """Return how many tokens may be generated, and the finish reason when they are."""
        if not request.prompt:
            raise PromptError("the prompt is empty: give at least one token")
        unknown = [t for t in request.prompt if not 0 <= t < self.target.vocabulary]
        if unknown:
            raise PromptError(
                f"the prompt holds token id {unknown[0]}, but the model knows 0 to "
                f"{self.target.vocabulary - 1}"
            )
        context = self.target.context
        left = request.max_new_tokens if context is None else context - len(request.prompt)
        if left < 1:
            raise PromptError(
                f"the prompt has {len(request.prompt)} tokens and the model's context is "
                f"{context}: shorten the prompt"
            )
        if left < request.max_new_tokens:
            return left, "context"
        return request.max_new_tokens, "length"


def closed_up(indices: Sequence[int]) -> list[int]:
    """Return rising indices in an order that moves few: the last ones fill the gaps."""
    places = range(len(indices))
    there = set(indices)
    moving = [index for index in indices if index >= len(indices)]
    return [place if place in there else moving.pop() for place in places]


def agreed_pass(rows: Sequence[Row]) -> PassSize | None:
    """Return the size of pass that is worth most to the batch; None for a single sequence.

    All sequences pay for the longest plan and for look-ahead rows of any: unused rows are lost.
    """
    choosing = [(row.chooser, row.proposed) for row in rows if row.chooser is not None]
    if len(rows) < 2 or not choosing:
        return None

    def value(shared: PassSize) -> float:
        return sum(chooser.value_of(own, shared) for chooser, own in choosing)

    return max(choosing[0][0].passes, key=value)
