"""One text under way: what was asked, what is settled, what is drafted behind it.

Its passes are chosen, judged and drafted from here; running them, for a whole batch, is left to
`decoder.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from passlm.decoding import judge
from passlm.decoding.distribution import NOISE_WEIGHT, Noise, Purpose, TokenDistribution, processors
from passlm.decoding.judge import Computed, Rows, Verdict
from passlm.drafts.prompt_lookup import PromptLookup
from passlm.drafts.sampler_head import Shortlist
from passlm.kernels.topk import likeliest
from passlm.model.pass_records import PassRow
from passlm.outputs import FinishReason
from passlm.params import Draft, Judge, SamplingParams
from passlm.plan import (
    Adaptive,
    Chain,
    Choice,
    Chooser,
    FixedChooser,
    Guessing,
    Limits,
    Plan,
    Shared,
    Source,
    Strategy,
    autoregressive,
)


@dataclass(frozen=True)
class Request:
    """One text to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: write at most this many.
        eos: ids that end the text.
        strategy: which plan each pass takes, or what chooses it from what is accepted.
        distribution: logits to probabilities, for target and draft.
        seed: of all its draws; None takes a fresh one.
        judge: how candidates are accepted.
        draft: how candidates are drawn.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    distribution: TokenDistribution
    eos: frozenset[int] = frozenset()
    strategy: Strategy | Adaptive = autoregressive
    seed: int | None = None
    judge: Judge = "coupled"
    draft: Draft = "sampled"

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_new_tokens: int,
        strategy: Strategy | Adaptive = autoregressive,
        eos: Collection[int] = (),
        ignore_eos: bool = False,
    ) -> Request:
        """A request from a user's parameters."""
        chain = processors(sampling, len(prompt), () if ignore_eos else eos)
        return cls(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            distribution=TokenDistribution(chain, greedy=sampling.temperature == 0),
            eos=frozenset() if ignore_eos else frozenset(eos),
            strategy=strategy,
            seed=sampling.seed,
            judge=sampling.judge,
            draft=sampling.draft,
        )


@dataclass(eq=False)
class Row:
    """One text under way: what is settled, and the candidates behind it.

    Attributes:
        request: what was asked.
        room: how many tokens may still be written.
        full: why the text ends where `room` runs out.
        tokens: settled ids, prompt included; the last one is the root.
        drafted: draft tokens behind it.
        drafted_by: a look-ahead group, or the draft head.
        sureness: how sure a draft head was of them.
        q: the distributions they were drawn from, `[M, V]`, where the judge needs them: not of
            greedy drafts, whose `q` is one-hot.
        choice: what the pass under way verifies and computes.
        hidden: what the output layer was given for the row that the root was drawn from,
            `[d_model]`; None before the first pass, and where passes do not keep it.
    """

    request: Request
    room: int
    full: FinishReason
    noise: Noise
    tokens: list[int]
    drafted: list[int] = field(default_factory=list)
    q: Tensor | None = None
    choice: Choice = field(default=Choice(None, Plan(0, (0,))))
    drafted_by: Source = "look-ahead"
    sureness: list[float] = field(default_factory=list)
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        asked = self.request.strategy
        self._chooser: Chooser = (
            asked.begin(self.guessing) if isinstance(asked, Adaptive) else FixedChooser(asked)
        )
        self._lookup = PromptLookup() if self._chooser.lookup else None
        self._texts = 0  # of the batch, as the chooser knows it
        self._known_noise: dict[int, Tensor] = {}  # by position, of drafted ones
        self._follows_noise = False

    @property
    def candidates(self) -> list[int]:
        """The draft tokens that the pass under way verifies."""
        return self.choice.candidates

    @property
    def plan(self) -> Plan:
        """What the pass under way computes."""
        return self.choice.plan

    @property
    def chooser(self) -> Chooser | None:
        """What agrees with other texts on a pass; None where plans are fixed or make the text.

        A text that is sampled under the rejection judge follows its plans: they may not depend on
        what else is in the batch.
        """
        follows = self.request.judge == "rejection" and not self.request.distribution.greedy
        return self._chooser if self._chooser.passes and not follows else None

    def head_tokens(self, context: int | None, depths: int) -> int:
        """How many tokens the draft head is to guess before the next pass.

        Args:
            context: positions that the model has; None without a limit.
            depths: tokens that the head can guess.
        """
        if self.hidden is None or self.drafted:
            return 0
        most = min(depths, self._limits(context).candidates)
        return self._chooser.drafts(self.chains(), most) if most else 0

    def _limits(self, context: int | None, shared: Shared | None = None) -> Limits:
        span = None if context is None else context - len(self.tokens)
        return Limits(self.room, span, shared)

    def stand_among(self, texts: int) -> None:
        """Let a chooser that follows the batch's size know it, where it is another than before.

        Told as a step begins: that a text leaves and the next takes its place is no change.
        """
        if self.chooser is not None and texts != self._texts:
            self._texts = texts
            self.chooser.resize(texts)

    def choose_plan(
        self, chains: Sequence[Chain], context: int | None, shared: Shared | None = None
    ) -> PassRow:
        """The next pass: candidates and groups that could still be of use.

        Args:
            chains: what `chains` gave.
            context: positions that the model has; None without a limit.
            shared: what the texts of the batch agreed on.
        """
        self.choice = self._chooser.choose(chains, self._limits(context, shared))
        return PassRow([self.tokens[-1], *self.candidates], self.plan)

    def chains(self) -> list[Chain]:
        """The candidates at hand: those drafted, and those copied."""
        chains = []
        if self.drafted:
            sureness = () if self._draws_for_rejection else tuple(self.sureness)
            chains.append(Chain(tuple(self.drafted), self.drafted_by, sureness=sureness))
        if self._lookup is not None:
            found, evidence = self._lookup.find(self.tokens, self._chooser.lookup)
            if found:
                chains.append(Chain(tuple(found), "lookup", evidence))
        return chains

    @property
    def _draws_for_rejection(self) -> bool:
        """Whether candidates are draws from `q`, which they are no more once they are picked over.

        The rejection judge takes them for such: nothing may depend on which tokens were drawn.
        """
        request = self.request
        sampled = not request.distribution.greedy and request.draft == "sampled"
        return sampled and request.judge == "rejection"

    def judge(self, logits: Tensor, best: Sequence[int] | None = None) -> list[int]:
        """The tokens that a pass settles: accepted candidates and one drawn behind them.

        Args:
            logits: the pass's real rows, `[1 + M, V]`.
            best: the likeliest token of each, where somebody has found them already.
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
        """On the candidates, by the logits after the root and after each of them, `[1 + M, V]`.

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
            return self._settling_noise(len(self.tokens) + row, size)

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
        """`q` of the candidates: of those that are no draw it is one-hot."""
        chain = self.choice.chain
        if chain is not None and chain.source != "lookup" and self.q is not None:
            return self.q

        def one_hot(row: int) -> Tensor:
            zeros = torch.zeros(logits.shape[1], device=logits.device)
            zeros[self.candidates[row]] = 1.0
            return zeros

        return Computed(one_hot)

    def begin_draft(self, source: Source = "look-ahead") -> None:
        """Forget what was drafted before; what is drawn from now on comes from this source."""
        self.drafted, self.sureness, self.q, self.drafted_by = [], [], None, source
        known = self._known_noise.items()
        self._known_noise = {at: noise for at, noise in known if at >= len(self.tokens)}

    def draft(self, group: Tensor) -> None:
        """Draw the next candidates from a look-ahead group without a sampler head.

        Args:
            group: its logits, `[l, V]`.
        """
        self.begin_draft()
        together = 1 if self.request.distribution.reads_history else len(group)
        for start in range(0, len(group), together):
            self.draw(group[start : start + together])

    @property
    def guessing(self) -> Guessing:
        """How its candidates are made.

        The coupled judge asks no more of a candidate than that it is the token to come, so that
        the likeliest will do, and better the one that is it once the noise of its place is known.
        Where processors tell tokens apart, they have a say in what is likely.
        """
        request = self.request
        if self._draws_for_rejection or not request.distribution.treats_alike:
            return "drawn"
        shared = not request.distribution.greedy and request.draft == "sampled"
        return "knowing" if shared else "likeliest"

    @property
    def follows_noise(self) -> bool:
        """Whether what is verified has depended on the noise of the draws."""
        return self._follows_noise

    def noise_ahead(self, count: int, vocabulary: int, listed: Tensor | None = None) -> Tensor:
        """What will settle the next positions, of listed tokens or all, `[count, K]`."""
        start = len(self.tokens)
        noise = [self._noise_known(start + i, vocabulary) for i in range(count)]
        return torch.stack(noise if listed is None else [own[listed] for own in noise])

    def take(self, tokens: Sequence[int], sureness: Sequence[float] = ()) -> None:
        """Make these tokens the candidates behind those drafted already.

        Args:
            tokens: their ids.
            sureness: how sure a draft head is of each.
        """
        self.drafted += tokens
        self.sureness += sureness

    def draw(self, logits: Tensor, among: Shortlist | None = None) -> None:
        """Draw candidates behind those drafted already.

        Args:
            logits: `[R, V]`; or `[1, K]`, of the tokens of a shortlist alone.
            among: that shortlist.
        """
        distribution = self.request.distribution
        history = [*self.tokens, *self.drafted]
        listed, given = among, logits
        if among is not None and not distribution.treats_alike:
            logits, among = among.of_all(logits), None
        if distribution.greedy or self.request.draft == "greedy":
            # What treats tokens alike leaves their order.
            alike = distribution.treats_alike
            drawn = likeliest(logits) if alike else distribution.best(logits, history)
        else:
            drawn = self._sampled(distribution(logits, history), among)
        tokens = (drawn if among is None else among.tokens[drawn]).tolist()
        self.drafted += tokens
        if self.drafted_by == "head":
            assert listed is not None, "a draft head guesses among listed tokens"
            # No listed token where processors forbid them all.
            chances = given.softmax(-1)[0, listed.tokens == tokens[0]]
            self.sureness.append(float(chances.sum()))

    def _sampled(self, q: Tensor, among: Shortlist | None) -> Tensor:
        """Places drawn from `q`, which is kept where the judge needs it, `[R]`."""
        size = q.shape[1] if among is None else among.vocabulary
        start, count = len(self.tokens) + len(self.drafted), len(q)
        # Coupled drafts share the noise that will settle their position; rejection needs its own.
        coupled = self.request.judge == "coupled"
        if coupled:
            noise = torch.stack([self._noise_known(start + i, size) for i in range(count)])
        else:
            noise = self.noise.exponentials(start, count, Purpose.DRAFT, size)
        race = noise if among is None else noise[:, among.tokens.cpu()]
        drawn = judge.guess(q, race, NOISE_WEIGHT) if coupled else judge.draw(q, race)
        if self.request.judge == "rejection":
            whole = q if among is None else q.new_zeros(1, size).index_copy_(1, among.tokens, q)
            self.q = whole if self.q is None else torch.cat([self.q, whole])
        return drawn

    def _noise_known(self, position: int, size: int) -> Tensor:
        """What settles a position, for a draft, `[size]`; kept for the judge."""
        if self.drafted_by == "head":
            self._follows_noise |= bool(self._chooser.passes)
        self._known_noise[position] = self._settling_noise(position, size)
        return self._known_noise[position]

    def _settling_noise(self, position: int, size: int) -> Tensor:
        """What settles a position, `[size]`; made once where the draft shared it.

        A model may have more logits than embeddings: the first numbers do not depend on how many.
        """
        known = self._known_noise.get(position)
        if known is None or len(known) < size:
            return self.noise.exponential(position, Purpose.SETTLE, size)
        return known[:size]
