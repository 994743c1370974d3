"""The step of the method over a batch of texts that may join and leave between steps.

Ids in, ids out: run the pass, judge, settle, draft. Plain decoding is a plan, not a second loop.
Text, stop strings and streams are left to `generate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import get_args

import torch
from torch import Tensor

from passlm.decoding.distribution import Noise
from passlm.decoding.stopping import cut_block
from passlm.decoding.text import Request, Row
from passlm.drafts.draft_head import HeadSampler
from passlm.drafts.sampler_head import Draws, GroupSampler
from passlm.errors import InputError
from passlm.kernels.topk import likeliest
from passlm.model.cache import RowCache
from passlm.model.pass_records import LookAheadRows, PassOutput
from passlm.model.target import PREFILL_CHUNK, Target
from passlm.outputs import FinishReason, Step
from passlm.plan import Chain, Guessing, Shared


class PromptError(InputError):
    """A prompt that cannot be decoded: empty, too long, or with unknown ids; one line."""


@dataclass(frozen=True)
class Reading:
    """A text whose prompt is being read, not yet in the batch.

    Attributes:
        row: the text.
        cache: what is read of it.
    """

    row: Row
    cache: RowCache

    @property
    def left(self) -> int:
        """Tokens still to be read: all but the last, which is the first root."""
        return len(self.row.tokens) - 1 - self.cache.lengths[0]


Observer = Callable[[Row, Tensor, Sequence[int]], None]
"""Sees each pass of each text before it is settled: the text as it was, with the candidates it
verified, the logits of its real rows `[1 + M, V]`, and the tokens that settle, none of them cut."""


class Decoder:
    """Decodes a batch of texts, a pass at a time.

    Args:
        target: the frozen model.
        look_ahead: look-ahead rows; None where every request's strategy does without.
        observer: looks on; None lets nobody.

    Raises:
        UnsupportedModelError: the rows have a sampler head and the output layer's weights are not
            plain.
    """

    def __init__(
        self,
        target: Target,
        look_ahead: LookAheadRows | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.target = target
        self.look_ahead = look_ahead
        self.observer = observer
        self._sampler = None if look_ahead is None else look_ahead.sampler
        self._tables = None if self._sampler is None else target.embeddings
        self.rows: list[Row] = []
        self.settled: list[tuple[Row, Step]] = []
        self._cache: RowCache = target.new_cache(batch=0)

    @property
    def slots(self) -> int:
        """Tokens that the batch has memory for: as many for each text as for the longest."""
        return self._cache.held * self._cache.capacity

    def join(self, request: Request) -> Row:
        """Take a text into the batch; its prompt is prefilled now.

        Raises:
            PromptError: the prompt is empty, holds unknown ids, or fills the model's context.
        """
        reading = self.begin(request)
        while reading.left:
            self.read(reading, PREFILL_CHUNK)
        return self.admit(reading)

    def begin(self, request: Request, known: RowCache | None = None) -> Reading:
        """A text that is to join once its prompt is read, which may be done bit by bit.

        Args:
            request: the text.
            known: keys and values of the first tokens of its prompt, fewer than all; used up.

        Raises:
            PromptError: as for `join`.
        """
        room, full = self._room(request)
        row = Row(request, room, full, Noise(request.seed), list(request.prompt))
        return Reading(row, self.target.new_cache() if known is None else known)

    def read(self, reading: Reading, tokens: int) -> None:
        """Prefill up to so many further tokens of a prompt."""
        start = reading.cache.lengths[0]
        end = start + min(tokens, reading.left)
        if end > start:
            self.target.extend(reading.cache, reading.row.tokens[start:end])

    def admit(self, reading: Reading) -> Row:
        """Take a text whose prompt is read into the batch."""
        self._cache.append(reading.cache)
        self.rows.append(reading.row)
        return reading.row

    def copied(self, row: Row, count: int) -> RowCache:
        """Keys and values of the first tokens of a text, at most all but its last.

        Raises:
            ValueError: the text is not in the batch.
        """
        index = self.rows.index(row)
        return self._cache.copied(index, count)

    def leave(self, rows: Iterable[Row]) -> None:
        """Take texts out of the batch, finished or not; the last ones take their places."""
        leaving = set(map(id, rows))
        stay = [index for index, row in enumerate(self.rows) if id(row) not in leaving]
        if len(stay) < len(self.rows):
            kept = closed_up(stay)
            self.rows = [self.rows[index] for index in kept]
            self._cache.keep(kept)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Step]]:
        """One pass for every text of the batch; those that end leave it.

        If it raises, all texts are still there, and `settled` says whether they are a pass ahead.

        Returns:
            What each row settled, in the batch's order.
        """
        self.settled = []
        rows = list(self.rows)
        for row in rows:
            row.stand_among(len(rows))
        self._draft_by_head(rows)
        chains = [row.chains() for row in rows]
        context = self.target.context
        agreed = None if self.target.in_line else agreed_pass(rows, chains)
        passes = [
            row.choose_plan(own, context, agreed if row.chooser else None)
            for row, own in zip(rows, chains, strict=True)
        ]
        output = self.target.run(self._cache, passes, self.look_ahead)
        real = [(index, slice(0, 1 + row.plan.candidates)) for index, row in enumerate(rows)]
        judged = self._judge(rows, output.of(real))
        steps = [
            self._settle(index, row, tokens)
            for index, (row, tokens) in enumerate(zip(rows, judged, strict=True))
        ]
        self.settled = list(zip(rows, steps, strict=True))
        self._draft(rows, steps, output)
        self.leave([row for row, step in self.settled if step.finish_reason])
        return self.settled

    def _draft_by_head(self, rows: Sequence[Row]) -> None:
        """Let the draft head guess for the texts that have no better candidates at hand."""
        head = None if self.look_ahead is None else self.look_ahead.head
        if head is None:
            return
        lengths = [row.head_tokens(self.target.context, head.depths) for row in rows]
        asked = [(row, length) for row, length in zip(rows, lengths, strict=True) if length]
        for guessing in get_args(Guessing):
            some = [(row, length) for row, length in asked if row.guessing == guessing]
            if not some:
                continue
            drafting = [row for row, _ in some]
            for row in drafting:
                row.begin_draft("head")
            hidden = [row.hidden for row in drafting if row.hidden is not None]
            sampler = HeadSampler(head, hidden, [length for _, length in some])
            if guessing == "drawn":
                draft_together(drafting, sampler)
                continue
            knowing = guessing == "knowing"
            known = draws_ahead(some, len(head.inputs), head.places) if knowing else None
            guesses = sampler.likeliest([row.tokens for row in drafting], known)
            for row, own in zip(drafting, guesses, strict=True):
                row.take([token for token, _ in own], [sure for _, sure in own])

    def _judge(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[list[int]]:
        """What the pass settles of each text; greedy ones look for their best tokens together."""
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

    def _settle(self, index: int, row: Row, settled: list[int]) -> Step:
        judged, accepted = len(row.candidates), len(settled) - 1
        kept, reason = cut_block(settled, row.request.eos, row.room, row.full)
        row.tokens += settled[:kept]
        row.room -= kept
        self._cache.settle(index, 1 + accepted)
        step = Step(tuple(settled), accepted, judged, reason)
        return step if reason is None else step.cut(kept, reason)

    def _draft(self, rows: Sequence[Row], steps: Sequence[Step], output: PassOutput) -> None:
        """Let the texts that go on draft from the group on their last accepted row."""
        places = []
        for index, (row, step) in enumerate(zip(rows, steps, strict=True)):
            if step.finish_reason is None:
                row.begin_draft()
                row.hidden = None if output.hidden is None else output.hidden[index][step.accepted]
                if row.plan.groups[step.accepted]:
                    places.append((index, row.plan.group(step.accepted)))
        drafting = [rows[index] for index, _ in places]
        groups = output.of(places)
        if self._sampler is None or self._tables is None:
            for row, group in zip(drafting, groups, strict=True):
                row.draft(group)
        elif places:
            assert output.hidden is not None, "a pass with a sampler head keeps what it takes"
            hidden = [output.hidden[index][at] for index, at in places]
            self._draft_from(list(zip(drafting, groups, hidden, strict=True)))

    def _draft_from(self, groups: Sequence[tuple[Row, Tensor, Tensor]]) -> None:
        """Let texts draft by the sampler head from logits and hidden states of their groups."""
        assert self._sampler is not None, "there is a sampler head"
        assert self._tables is not None, "there is a sampler head"
        for guessing in get_args(Guessing):
            some = [group for group in groups if group[0].guessing == guessing]
            if not some:
                continue
            rows = [row for row, _, _ in some]
            logits, hidden = [own for _, own, _ in some], [own for _, _, own in some]
            sampler = GroupSampler(self._sampler, self._tables, logits, hidden)
            if guessing == "drawn":
                draft_together(rows, sampler)
                continue
            asked = list(zip(rows, sampler.lengths, strict=True))
            known = draws_ahead(asked, logits[0].shape[1]) if guessing == "knowing" else None
            drafted = sampler.likeliest([row.tokens for row in rows], known)
            for row, tokens in zip(rows, drafted, strict=True):
                row.take(tokens)

    def _room(self, request: Request) -> tuple[int, FinishReason]:
        """How many tokens may be written, and why no more."""
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
    """These, in rising order, so that few change their place: the last ones fill the gaps."""
    places = range(len(indices))
    there = set(indices)
    moving = [index for index in indices if index >= len(indices)]
    return [place if place in there else moving.pop() for place in places]


def draft_together(rows: Sequence[Row], sampler: GroupSampler | HeadSampler) -> None:
    """Let texts draw candidates, all of them their first one, then the next.

    Args:
        rows: the texts, which have begun.
        sampler: of their groups, or behind their last rows, in this order.
    """
    for depth in range(max(sampler.lengths)):
        going = [at for at, length in enumerate(sampler.lengths) if depth < length]
        histories = [[*rows[at].tokens, *rows[at].drafted] for at in going]
        shortlists, logits = sampler.shortlists(depth, going, histories)
        for at, among, own in zip(going, shortlists, logits[:, None], strict=True):
            rows[at].draw(own, among)


def draws_ahead(
    asked: Sequence[tuple[Row, int]], vocabulary: int, listed: Tensor | None = None
) -> Draws:
    """What is known of the next draws of some texts, of so many of each.

    Args:
        asked: the texts, and how many tokens of each are to be guessed.
        vocabulary: how many tokens noise is made for.
        listed: those that may be guessed, on the CPU; None for all.
    """
    longest = max(length for _, length in asked)
    noise = [row.noise_ahead(longest, vocabulary, listed) for row, _ in asked]
    distributions = [row.request.distribution for row, _ in asked]
    weights = [distribution.noise_weight for distribution in distributions]
    temperatures = [distribution.temperature for distribution in distributions]
    return Draws(torch.stack(noise), temperatures, weights)


def agreed_pass(rows: Sequence[Row], chains: Sequence[Sequence[Chain]]) -> Shared | None:
    """The pass that is worth most to all texts of the batch; None to a text alone.

    It is as long as its longest text makes it, and look-ahead rows of one cost all: what a text
    does not use is lost.
    """
    pairs = zip(rows, chains, strict=True)
    choosing = [(row.chooser, own) for row, own in pairs if row.chooser is not None]
    if len(rows) < 2 or not choosing:
        return None

    def worth(shared: Shared) -> float:
        return sum(chooser.worth(own, shared) for chooser, own in choosing)

    return max(choosing[0][0].passes, key=worth)
