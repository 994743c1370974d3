"""Transformers' logits processors for sampling parameters, and faster forms of some of them.

Applying them is left to `distribution.py`.
"""

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

_NUCLEI = 128, 2048  # numbers of best tokens to search for a nucleus before all are sorted


class TopK(TopKLogitsWarper):
    """Transformers' top-k with a faster search for the best tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[R, V]` with those below the `k` best set to `filter_value`."""
        best, _ = shortlist(scores, min(self.top_k, scores.shape[-1]))
        return scores.masked_fill(scores < best[:, -1:], self.filter_value)


class TopP(TopPLogitsWarper):
    """Transformers' top-p, without sorting the whole vocabulary where a few tokens are enough.

    A token is kept if the probabilities of all better tokens sum to less than `top_p`. Transformers
    sums from the worst token up, so that rounding may decide differently about a token at the
    border.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[R, V]` with those outside the nucleus set to `filter_value`."""
        counts = [n for n in _NUCLEI if n < scores.shape[-1] and scores.device.type == "cpu"]
        total = scores.logsumexp(-1, keepdim=True)
        for count in counts:
            best, places = shortlist(scores, count)
            probabilities = (best - total).exp()
            sums = probabilities.cumsum(-1)
            if bool((sums[:, -1] > self.top_p).all()):
                kept = sums - probabilities < self.top_p
                kept[:, : self.min_tokens_to_keep] = True
                filtered = torch.full_like(scores, self.filter_value)
                return filtered.scatter_(1, places, best.masked_fill(~kept, self.filter_value))
        processed: Tensor = super().__call__(input_ids, scores)
        return processed


def processors(
    params: SamplingParams, prompt_tokens: int, eos: Collection[int]
) -> LogitsProcessorList:
    """Return transformers' processors for sampling parameters, in the order of its `generate`.

    Args:
        params: the user's parameters.
        prompt_tokens: length of the prompt, for processors that read only the new tokens.
        eos: end-of-sequence ids, which `min_new_tokens` suppresses.
    """
    chosen = LogitsProcessorList()
    if params.logit_bias:
        bias = [[[token], float(value)] for token, value in params.logit_bias.items()]
        chosen.append(SequenceBiasLogitsProcessor(bias))  # type: ignore[arg-type]
    if params.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        chosen.append(
            NewTokensPenalty(prompt_tokens, params.presence_penalty, params.frequency_penalty)
        )
    if params.bad_words:
        words = [list(word) for word in params.bad_words]
        chosen.append(NoBadWordsLogitsProcessor(words, eos_token_id=list(eos) or None))
    if params.min_new_tokens and eos:
        chosen.append(MinNewTokens(prompt_tokens, int(params.min_new_tokens), list(eos)))
    chosen.extend(params.processors)
    if params.temperature > 0:
        chosen.extend(_warpers(params))
    return chosen


class MinNewTokens(MinNewTokensLengthLogitsProcessor):
    """Transformers' minimum length on the scores' device; the original is built for one device."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[1, V]`, minus infinity for `eos` while there are too few new tokens."""
        self.eos_token_id = self.eos_token_id.to(scores.device)
        processed: Tensor = super().__call__(input_ids, scores)
        return processed


class NewTokensPenalty(LogitsProcessor):
    """Presence and frequency penalties of the OpenAI API, for tokens generated so far.

    Subtracts `presence` from the logit of each generated token, and `frequency` once for each of
    its occurrences. Transformers has no such processor.

    Args:
        prompt_tokens: length of the prompt, whose tokens are not penalized.
        presence: presence penalty, -2 to 2.
        frequency: frequency penalty, -2 to 2.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.prompt_tokens = prompt_tokens
        self.presence = presence
        self.frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[1, V]` of the token after `input_ids`, `[1, T]`, minus the penalties."""
        tokens, counts = torch.unique(input_ids[0, self.prompt_tokens :], return_counts=True)
        penalized = scores.clone()
        penalized[0, tokens] -= self.presence + self.frequency * counts.to(scores.dtype)
        return penalized


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
    """Return the faster form of a processor of transformers; without one, the processor itself."""
    if type(processor) is TopKLogitsWarper:
        return TopK(processor.top_k, processor.filter_value)
    if type(processor) is TopPLogitsWarper:
        kept = processor.min_tokens_to_keep
        return TopP(processor.top_p, processor.filter_value, kept)
    return processor
