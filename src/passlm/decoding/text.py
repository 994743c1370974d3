"""One sequence under generation: its request, its settled tokens, and the candidates behind them.

Chooses and judges the sequence's passes and draws its candidates. Running the passes of a batch is
left to `decoder.py`, proposing candidates to `drafts/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from passlm.decoding import judge
from passlm.decoding.distribution import NOISE_WEIGHT
from passlm.decoding.judge import Computed, Rows, Verdict
from passlm.decoding.noise import Noise, Purpose, SettlingNoise
from passlm.decoding.request import Request
from passlm.decoding.strategies import (
    Adaptive,
    Choice,
    Chooser,
    FixedChooser,
    Limits,
    PassSize,
)
from passlm.drafts.protocol import DraftBuilder
from passlm.drafts.sampler_head import Shortlist
from passlm.kernels.topk import likeliest
from passlm.model.pass_records import PassRow
from passlm.outputs import FinishReason
from passlm.plan import (
    Chain,
    Guessing,
    Plan,
    Source,
)


@dataclass(eq=False)
class Row:
    """One sequence under generation, a row of the decoder's batch.

    Attributes:
        request: what was asked.
        room: tokens that may still be generated.
        full: the finish reason when `room` runs out.
        noise: the sampling noise of the sequence.
        tokens: settled ids, prompt included; the last one is the root.
        context: positions of the model; None without a limit.
        proposed: candidates proposed for the next pass, those of later drafters first.
        choice: candidates and plan of the current pass.
    """

    request: Request
    room: int
    full: FinishReason
    noise: Noise
    tokens: list[int]
    context: int | None = None
    proposed: list[Chain] = field(default_factory=list)
    choice: Choice = field(default=Choice(None, Plan(0, (0,))))

    def __post_init__(self) -> None:
        asked = self.request.strategy
        self._chooser: Chooser = (
            asked.begin(self.guessing) if isinstance(asked, Adaptive) else FixedChooser(asked)
        )
        self._batch_size = 0  # as the chooser knows it
        self._settling = SettlingNoise(self.noise)
        self._follows_noise = False

    @property
    def candidates(self) -> list[int]:
        """The draft tokens that the current pass verifies."""
        return self.choice.candidates

    @property
    def plan(self) -> Plan:
        """The plan of the current pass."""
        return self.choice.plan

    @property
    def chooser(self) -> Chooser | None:
        """What takes part in agreeing on the batch's next pass.

        None where plans are fixed, and for a sequence sampled under the rejection judge: its
        tokens depend on its plans, which therefore may not depend on the rest of the batch.
        """
        follows = self.request.judge == "rejection" and not self.request.distribution.greedy
        return self._chooser if self._chooser.passes and not follows else None

    @property
    def drafts(self) -> bool:
        """Whether the sequence takes candidates from drafters."""
        return self._chooser.drafts

    @property
    def guessing(self) -> Guessing:
        """How candidates are made from logits.

        The coupled judge accepts a candidate if it is the token to come, so the likeliest token
        is a good candidate, and a better one is the token that the position's known noise makes
        likely to be drawn. Processors that treat tokens differently need the draw itself.
        """
        request = self.request
        if self._draws_for_rejection or not request.distribution.treats_alike:
            return "drawn"
        shared = not request.distribution.greedy and request.draft == "sampled"
        return "knowing" if shared else "likeliest"

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 0 for greedy decoding."""
        return self.request.distribution.temperature

    @property
    def noise_weight(self) -> float:
        """Exponent of the noise in a guess; see `judge.guess`."""
        return self.request.distribution.noise_weight

    @property
    def follows_noise(self) -> bool:
        """Whether the choice of candidates to verify has depended on the sampling noise."""
        return self._follows_noise

    @property
    def _draws_for_rejection(self) -> bool:
        """Whether candidates must be plain draws from `q`, as the rejection judge assumes.

        Selecting among them by their tokens would change their distribution.
        """
        request = self.request
        sampled = not request.distribution.greedy and request.draft == "sampled"
        return sampled and request.judge == "rejection"

    def _limits(self, shared: PassSize | None = None) -> Limits:
        span = None if self.context is None else self.context - len(self.tokens)
        return Limits(self.room, span, shared)

    def begin_step(self, batch_size: int) -> None:
        """Drop the last pass's proposals and update the chooser's batch size if it changed.

        Sizes are compared between steps, so a sequence that replaces another is not a change.
        """
        self.proposed = []
        if self.chooser is not None and batch_size != self._batch_size:
            self._batch_size = batch_size
            self.chooser.resize(batch_size)

    def draft_length(self, source: Source) -> int:
        """Return the number of tokens a drafter should propose for the next pass (0: none)."""
        most = self._limits().candidates
        return self._chooser.draft_length(source, self.proposed, most) if most else 0

    def choose_plan(self, shared: PassSize | None = None) -> PassRow:
        """Choose the next pass from the proposals, within what can still be of use.

        Args:
            shared: what the sequences of the batch agreed on.
        """
        self.choice = self._chooser.choose(self.proposed, self._limits(shared))
        return PassRow([self.tokens[-1], *self.candidates], self.plan)

    def judge(self, logits: Tensor, best: Sequence[int] | None = None) -> list[int]:
        """Return the tokens that a pass settles: accepted candidates and one more.

        Args:
            logits: the pass's real rows, `[1 + M, V]`.
            best: the likeliest token of each row, if known already.
        """
        candidates = self.candidates
        distribution = self.request.distribution
        if distribution.greedy:
            if best is None:
                best = distribution.best(logits, self.tokens, candidates).tolist()
            verdict, confidences = judge.greedy(best, candidates), list[float]()
        else:
            verdict, confidences = self._verdict(logits)
        block = [*candidates[: verdict.accepted], verdict.token]
        self._chooser.learn(self.choice, block, confidences)
        return block

    def _verdict(self, logits: Tensor) -> tuple[Verdict, list[float]]:
        """Judge sampled candidates.

        Args:
            logits: the pass's real rows, `[1 + M, V]`.

        Returns:
            The verdict, and the likeliest token's probability for each token that settles.
        """
        candidates, size = self.candidates, logits.shape[1]
        highest: dict[int, Tensor] = {}

        def p(row: int) -> Tensor:
            history = [*self.tokens, *candidates[:row]]
            made = self.request.distribution(logits[row : row + 1], history)[0]
            highest[row] = made.max()
            return made

        def noise(row: int) -> Tensor:
            return self._settling.at(len(self.tokens) + row, size)

        rows, exponential = Computed(p), Computed(noise)
        if self.request.judge == "coupled":
            verdict = judge.coupled(rows, candidates, exponential)
        else:
            uniform = self.noise.uniform(len(self.tokens), len(candidates), Purpose.ACCEPT)
            q = self._drawn_from(logits)
            verdict = judge.rejection(rows, q, candidates, uniform, exponential)
        settled = [highest[row] for row in range(1 + verdict.accepted)]
        return verdict, torch.stack(settled).tolist()

    def _drawn_from(self, logits: Tensor) -> Rows:
        """Return `q` of the candidates, one-hot for those that are not draws."""
        chain = self.choice.chain
        if chain is not None and chain.q is not None:
            return chain.q

        def one_hot(row: int) -> Tensor:
            zeros = torch.zeros(logits.shape[1], device=logits.device)
            zeros[self.candidates[row]] = 1.0
            return zeros

        return Computed(one_hot)

    def settle(self, tokens: Sequence[int]) -> None:
        """Append tokens and drop the noise of the positions they fill."""
        self.tokens += tokens
        self.room -= len(tokens)
        self._settling.drop(len(self.tokens))

    def draw(self, draft: DraftBuilder, logits: Tensor, among: Shortlist | None = None) -> None:
        """Draw the next candidates of a draft; see `drafts.protocol.DraftSequence`."""
        distribution = self.request.distribution
        if distribution.reads_history and len(logits) > 1:
            for row in logits:
                self.draw(draft, row[None], among)
            return
        history = [*self.tokens, *draft.tokens]
        listed, given = among, logits
        if among is not None and not distribution.treats_alike:
            logits, among = among.of_all(logits), None
        if distribution.greedy or self.request.draft == "greedy":
            # Processors that treat tokens alike keep their order.
            alike = distribution.treats_alike
            drawn = likeliest(logits) if alike else distribution.best(logits, history)
        else:
            drawn = self._sampled(draft, distribution(logits, history), among)
        tokens = (drawn if among is None else among.tokens[drawn]).tolist()
        draft.tokens += tokens
        if draft.sure and not self._draws_for_rejection:
            assert listed is not None, "a draft with probabilities is drawn from a shortlist"
            # The sum is empty where processors forbid every listed token.
            chances = given.softmax(-1)[0, listed.tokens == tokens[0]]
            draft.sureness.append(float(chances.sum()))

    def _sampled(self, draft: DraftBuilder, q: Tensor, among: Shortlist | None) -> Tensor:
        """Draw indices from `q`, `[R]`; keep `q` in the draft where the judge needs it."""
        size = q.shape[1] if among is None else among.vocabulary
        start, count = len(self.tokens) + len(draft.tokens), len(q)
        # Coupled drafts share the noise that settles their position; rejection needs its own.
        coupled = self.request.judge == "coupled"
        if coupled:
            self._follows_noise |= draft.sure and bool(self._chooser.passes)
            noise = self._settling.ahead(start, count, size)
        else:
            noise = self.noise.exponentials(start, count, Purpose.DRAFT, size)
        race = noise if among is None else noise[:, among.tokens.cpu()]
        drawn = judge.guess(q, race, NOISE_WEIGHT) if coupled else judge.draw(q, race)
        if self.request.judge == "rejection":
            whole = q if among is None else q.new_zeros(1, size).index_copy_(1, among.tokens, q)
            draft.q = whole if draft.q is None else torch.cat([draft.q, whole])
        return drawn

    def noise_ahead(
        self, count: int, vocabulary: int, listed: Tensor | None = None, sureness: bool = False
    ) -> Tensor:
        """Return the noise that will settle the next positions; see `DraftSequence`."""
        self._follows_noise |= sureness and bool(self._chooser.passes)
        return self._settling.ahead(len(self.tokens), count, vocabulary, listed)
