"""Transformers' logits processors for sampling parameters, and faster forms of some of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from passlm.kernels.topk import shortlist
from passlm.params import SamplingParams

_NUCLEI = 128, 2048  # numbers of best tokens to search for a nucleus, before sorting all


class TopK(TopKLogitsWarper):
    """Transformers' top-k with a faster search for the best tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[R, V]` with those below the `k` best set to `filter_value`."""
        best, _ = shortlist(scores, min(self.top_k, scores.shape[-1]))
        return scores.masked_fill(scores < best[:, -1:], self.filter_value)


class TopP(TopPLogitsWarper):
    """Transformers' top-p, without sorting the whole vocabulary where few tokens are enough.

    A token is kept if those above it have less than `top_p` together. Transformers adds up from
    below; where rounding differs, a token may fall on the other side.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[R, V]` with those outside the nucleus set to `filter_value`."""
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


def processors(
    params: SamplingParams, prompt_tokens: int, eos: Collection[int]
) -> LogitsProcessorList:
    """Return transformers' processors for sampling parameters, in the order of its `generate`.

    Args:
        params: the user's parameters.
        prompt_tokens: length of the prompt, for processors that read new tokens alone.
        eos: end-of-sequence ids that `min_new_tokens` suppresses.
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
    """Transformers' minimum length, on any device: the original needs to know it beforehand."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[1, V]`, minus infinity for ends while the sequence is too short."""
        self.eos_token_id = self.eos_token_id.to(scores.device)
        processed: Tensor = super().__call__(input_ids, scores)
        return processed


class WrittenTokensPenalty(LogitsProcessor):
    """Presence and frequency penalties of the OpenAI API, on the tokens generated so far.

    Subtracts `presence` from the logit of each token that was generated, and `frequency` for each
    time it was. Transformers has no such processor.

    Args:
        prompt_tokens: length of the prompt, whose tokens do not count.
        presence: -2 to 2.
        frequency: -2 to 2.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.prompt_tokens = prompt_tokens
        self.presence = presence
        self.frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[1, V]` of the token after `input_ids`, `[1, T]`, with penalties."""
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


def faster(processor: LogitsProcessor) -> LogitsProcessor:
    """Return the faster form of one of transformers' processors, or the processor itself."""
    if type(processor) is TopKLogitsWarper:
        return TopK(processor.top_k, processor.filter_value)
    if type(processor) is TopPLogitsWarper:
        kept = processor.min_tokens_to_keep
        return TopP(processor.top_p, processor.filter_value, kept)
    return processor
