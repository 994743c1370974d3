"""From logits to the distribution a token is drawn from, and the seeded noise it is drawn with.

Draft, target and plain decoding all go through `TokenDistribution`, with transformers' own
processors in transformers' own order; greedy decoding is its one-hot case. What is accepted is
left to `judge.py`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from enum import IntEnum

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from passlm.kernels import philox
from passlm.kernels.topk import likeliest, shortlist
from passlm.params import SamplingParams

_NUCLEI = 128, 2048  # tokens among which a nucleus is looked for, before all are sorted


class TopK(TopKLogitsWarper):
    """Transformers' own, without a search of the whole vocabulary for each of the best."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[R, V]`, those below the `k` best at `filter_value`."""
        best, _ = shortlist(scores, min(self.top_k, scores.shape[-1]))
        return scores.masked_fill(scores < best[:, -1:], self.filter_value)


class TopP(TopPLogitsWarper):
    """Transformers' own on rows that a few tokens nearly fill, without sorting the others.

    A token is left if those above it have less than `top_p` together. (Transformers sums up from
    below: where that differs by rounding, a token may fall on the other side.)
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[R, V]`, those outside the nucleus at `filter_value`."""
        counts = [n for n in _NUCLEI if n < scores.shape[-1] and scores.device.type == "cpu"]
        total = scores.logsumexp(-1, keepdim=True)
        for count in counts:
            best, places = shortlist(scores, count)
            shares = (best - total).exp()
            below = shares.cumsum(-1)
            if bool((below[:, -1] > self.top_p).all()):
                left = below - shares < self.top_p
                left[:, : self.min_tokens_to_keep] = True
                made = torch.full_like(scores, self.filter_value)
                return made.scatter_(1, places, best.masked_fill(~left, self.filter_value))
        processed: Tensor = super().__call__(input_ids, scores)
        return processed


# These look at the scores alone, so all rows of a pass can go through them at once. A user's
# subclass may look at more.
_BLIND = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopK,
    TopP,
    TypicalLogitsWarper,
)
# These look at scores and not at which token has which, so they may see some tokens alone.
_CUTS = (MinPLogitsWarper, TopK, TopP)
_ALIKE = (TemperatureLogitsWarper, *_CUTS)
NOISE_WEIGHT = 0.7  # what the noise of a draw counts for in a guess at it,
_CUT_NOISE_WEIGHT = 0.5  # and from logits of which something is still to be cut off


def processors(
    params: SamplingParams, prompt_tokens: int, eos: Collection[int]
) -> LogitsProcessorList:
    """Transformers' processors for these parameters, in the order of its `generate`.

    Args:
        params: what the user asked for.
        prompt_tokens: length of the prompt, for what looks at new tokens alone.
        eos: end-of-sequence ids that `min_new_tokens` holds back.
    """
    chosen = LogitsProcessorList()
    if params.logit_bias:
        bias = [[[token], float(value)] for token, value in params.logit_bias.items()]
        chosen.append(SequenceBiasLogitsProcessor(bias))  # type: ignore[arg-type]
    if params.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        chosen.append(
            WrittenTokensPenalty(prompt_tokens, params.presence_penalty, params.frequency_penalty)
        )
    if params.bad_words:
        words = [list(word) for word in params.bad_words]
        chosen.append(NoBadWordsLogitsProcessor(words, eos_token_id=list(eos) or None))
    if params.min_new_tokens and eos:
        chosen.append(HeldBackEnd(prompt_tokens, int(params.min_new_tokens), list(eos)))
    chosen.extend(params.processors)
    if params.temperature > 0:
        chosen.extend(_warpers(params))
    return chosen


class HeldBackEnd(MinNewTokensLengthLogitsProcessor):
    """Transformers' own, wherever the scores are: it asks for their device beforehand."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[1, V]`, those of an end at minus infinity while the text is too short."""
        self.eos_token_id = self.eos_token_id.to(scores.device)
        processed: Tensor = super().__call__(input_ids, scores)
        return processed


class WrittenTokensPenalty(LogitsProcessor):
    """Presence and frequency penalties of the OpenAI API, on the tokens written so far.

    From each token's logit it takes `presence` if the token was written behind the prompt, and
    `frequency` for each time it was. Transformers has none of its own.

    Args:
        prompt_tokens: length of the prompt, which does not count.
        presence: -2 to 2.
        frequency: -2 to 2.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.prompt_tokens = prompt_tokens
        self.presence = presence
        self.frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[1, V]` of the token behind `input_ids`, `[1, T]`, with what was written less."""
        written, times = torch.unique(input_ids[0, self.prompt_tokens :], return_counts=True)
        taken = scores.clone()
        taken[0, written] -= self.presence + self.frequency * times.to(scores.dtype)
        return taken


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    chosen = LogitsProcessorList()
    if params.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chosen.append(TopKLogitsWarper(int(params.top_k)))
    if params.top_p < 1.0:
        chosen.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chosen.append(MinPLogitsWarper(params.min_p))
    return chosen


def _noise_weight(processors: Sequence[object]) -> float:
    """The less is left of the vocabulary, the less there is to draw.

    Right guesses with weights of 0, 0.35, 0.5 and 0.7 at top-p 0.5: 0.371, 0.378, 0.378, 0.367; of
    the best 3 tokens: 0.345, 0.369, 0.377, 0.365; of all: docs/log.md.
    """
    if any(type(p) is TopK and p.top_k == 1 for p in processors):
        return 0.0
    if not any(type(p) in _CUTS for p in processors):
        return NOISE_WEIGHT
    left = [p.top_p for p in processors if type(p) is TopP]
    left += [1 - p.min_p for p in processors if type(p) is MinPLogitsWarper]
    return min([_CUT_NOISE_WEIGHT, *left])


def _quick(processor: LogitsProcessor) -> LogitsProcessor:
    """The same, faster, where it is one of transformers' own that has such a form here."""
    if type(processor) is TopKLogitsWarper:
        return TopK(processor.top_k, processor.filter_value)
    if type(processor) is TopPLogitsWarper:
        kept = processor.min_tokens_to_keep
        return TopP(processor.top_p, processor.filter_value, kept)
    return processor


class TokenDistribution:
    """The distribution of the next token, for every row of one text.

    Args:
        processors: transformers' processors, warpers included, in order.
        greedy: give the one-hot distribution on the best token.

    Attributes:
        reads_history: some processor looks at more than the scores.
        treats_alike: none tells tokens apart.
        takes_likeliest: it is all on the token of the largest logit.
        temperature: by which logits are divided; 0 where it is greedy.
        noise_weight: what the noise of a draw counts for in a guess from logits of which nothing
            is cut off; see `judge.guess`.
    """

    def __init__(self, processors: LogitsProcessorList, greedy: bool) -> None:
        self.processors = processors = LogitsProcessorList(map(_quick, processors))
        self.greedy = greedy
        self.reads_history = any(type(p) not in _BLIND for p in processors)
        self.treats_alike = all(type(p) in _ALIKE for p in processors)
        self.takes_likeliest = greedy and not processors
        divisors = [p.temperature for p in processors if type(p) is TemperatureLogitsWarper]
        self.temperature = 0.0 if greedy else math.prod(divisors)
        self.noise_weight = 0.0 if greedy else _noise_weight(processors)

    def __call__(self, logits: Tensor, history: Sequence[int], tail: Sequence[int] = ()) -> Tensor:
        """Probabilities of the token that follows each row.

        Args:
            logits: `[R, V]`, of any floating type; where `treats_alike`, of some tokens alone if
                all others have no chance.
            history: settled token ids of the text, which every row follows.
            tail: candidates behind the history; row `i` follows the first `i` of them.

        Returns:
            `[R, V]` float32, each row summing to 1.
        """
        scores = self._processed(logits.float(), history, tail)
        if self.greedy:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)
        return scores.softmax(-1)

    def best(self, logits: Tensor, history: Sequence[int], tail: Sequence[int] = ()) -> Tensor:
        """The likeliest token behind each row, `[R]`; arguments as of a call."""
        return likeliest(self._processed(logits.float(), history, tail))

    def _processed(self, scores: Tensor, history: Sequence[int], tail: Sequence[int]) -> Tensor:
        if not self.processors:
            return scores
        if not self.reads_history:
            unread = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
            return self._through(unread, scores)
        ids = torch.tensor([[*history, *tail]], device=scores.device)
        first = len(history)
        rows = [
            self._through(ids[:, : first + row], scores[row : row + 1])
            for row in range(len(scores))
        ]
        return torch.cat(rows)

    def _through(self, ids: Tensor, scores: Tensor) -> Tensor:
        processed: Tensor = self.processors(ids, scores)  # type: ignore[arg-type]
        return processed


class Purpose(IntEnum):
    """What a position's noise is used for; each has a stream of its own."""

    SETTLE = 0
    DRAFT = 1
    ACCEPT = 2


class Noise:
    """Random numbers made from a seed, a position and a purpose alone.

    No state runs from one draw to the next, so the numbers of a position are the same under any
    plan, alone or in a batch: `kernels/philox.py`.

    Args:
        seed: 0 to 2**64 - 1; None takes a fresh one.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = secrets.randbits(64) if seed is None else seed

    def exponential(self, position: int, purpose: Purpose, size: int) -> Tensor:
        """Standard exponential numbers, `[size]` float32.

        `argmax(p / e)` draws from `p`: the exponential race, the same as the Gumbel-max trick
        with `g = -log e`.
        """
        return philox.uniform(self.seed, position, purpose, size).neg_().log1p_().neg_()

    def exponentials(self, start: int, count: int, purpose: Purpose, size: int) -> Tensor:
        """`exponential` of `count` positions from `start` on, `[count, size]`."""
        return torch.stack([self.exponential(start + i, purpose, size) for i in range(count)])

    def uniform(self, start: int, count: int, purpose: Purpose) -> Tensor:
        """One number of `[0, 1)` for each of `count` positions from `start` on, `[count]`."""
        drawn = [philox.fine(self.seed, start + i, purpose) for i in range(count)]
        return torch.tensor(drawn, dtype=torch.float64)
