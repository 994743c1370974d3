"""Logits to the distribution that the next token is drawn from.

Draft, target and plain decoding all use `TokenDistribution`, with transformers' own processors in
transformers' own order. Greedy decoding is its one-hot case. Building the processors is left to
`processors.py`, accepting candidates to `judge.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

from passlm.decoding.processors import TopK, TopP, faster
from passlm.kernels.topk import likeliest

# These read the scores alone, so all rows of a pass are processed at once. A user's subclass may
# read more.
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
# These treat all tokens alike, so they may be given the scores of some tokens alone.
_CUTS = (MinPLogitsWarper, TopK, TopP)
_ALIKE = (TemperatureLogitsWarper, *_CUTS)
NOISE_WEIGHT = 0.7  # exponent of the noise in a guess at a draw; see `judge.guess`
_CUT_NOISE_WEIGHT = 0.5  # the same where some tokens are still to be cut off


class TokenDistribution:
    """The distribution of the next token, for every row of one sequence.

    Args:
        processors: transformers' processors, warpers included, in order.
        greedy: return the one-hot distribution on the best token.

    Attributes:
        reads_history: whether a processor reads more than the scores.
        treats_alike: whether all processors treat all tokens alike.
        takes_likeliest: whether the token of the largest logit has probability 1.
        temperature: divisor of the logits; 0 for greedy decoding.
        noise_weight: exponent of the noise in a guess from logits before any cut; see
            `judge.guess`.
    """

    def __init__(self, processors: LogitsProcessorList, greedy: bool) -> None:
        self.processors = processors = LogitsProcessorList(map(faster, processors))
        self.greedy = greedy
        self.reads_history = any(type(p) not in _BLIND for p in processors)
        self.treats_alike = all(type(p) in _ALIKE for p in processors)
        self.takes_likeliest = greedy and not processors
        divisors = [p.temperature for p in processors if type(p) is TemperatureLogitsWarper]
        self.temperature = 0.0 if greedy else math.prod(divisors)
        self.noise_weight = 0.0 if greedy else _noise_weight(processors)

    def __call__(self, logits: Tensor, history: Sequence[int], tail: Sequence[int] = ()) -> Tensor:
        """Return probabilities of the token that follows each row.

        Args:
            logits: `[R, V]`, of any floating type. Where `treats_alike`, those of some tokens are
                enough if all others have probability 0.
            history: settled token ids of the sequence, which every row follows.
            tail: candidates after the history; row `i` follows the first `i` of them.

        Returns:
            `[R, V]` float32, each row summing to 1.
        """
        scores = self._processed(logits.float(), history, tail)
        if self.greedy:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)
        return scores.softmax(-1)

    def best(self, logits: Tensor, history: Sequence[int], tail: Sequence[int] = ()) -> Tensor:
        """Return the likeliest token after each row, `[R]`; arguments are those of a call."""
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


def _noise_weight(processors: Sequence[object]) -> float:
    """Return the exponent of the noise; it is smaller where fewer tokens can be drawn.

    Shares of right guesses with weights of 0, 0.35, 0.5 and 0.7: at top-p 0.5, 0.371, 0.378, 0.378
    and 0.367; with the best 3 tokens, 0.345, 0.369, 0.377 and 0.365; with all: docs/log.md.
    """
    if any(type(p) is TopK and p.top_k == 1 for p in processors):
        return 0.0
    if not any(type(p) in _CUTS for p in processors):
        return NOISE_WEIGHT
    left = [p.top_p for p in processors if type(p) is TopP]
    left += [1 - p.min_p for p in processors if type(p) is MinPLogitsWarper]
    return min([_CUT_NOISE_WEIGHT, *left])
