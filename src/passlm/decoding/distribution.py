"""Turn logits into the distribution that the next token is drawn from.

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

# These processors read only the scores, not the tokens so far, so all rows of a pass are processed
# at once. Types are compared exactly, since a user's subclass may read more.
_SCORES_ONLY = (
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
# These treat all tokens alike, so they may be given the scores of a shortlist alone.
_CUTOFFS = (MinPLogitsWarper, TopK, TopP)
_ALIKE = (TemperatureLogitsWarper, *_CUTOFFS)
NOISE_WEIGHT = 0.7  # exponent of the noise in a guess; see `judge.guess`
_CUTOFF_NOISE_WEIGHT = 0.5  # largest exponent where unlikely tokens are cut off later


class TokenDistribution:
    """The distribution of the next token, for every row of one sequence.

    Args:
        processors: transformers' processors, warpers included, in order.
        greedy: whether the distribution is one-hot on the best token.

    Attributes:
        processors: the same, in their faster forms.
        greedy: the same.
        reads_history: whether a processor may read more than the scores.
        treats_alike: whether all processors treat all tokens alike, so that a shortlist is enough.
        takes_likeliest: whether the token of the largest logit has probability 1.
        temperature: divisor of the logits; 0 for greedy decoding.
        noise_weight: exponent of the noise in a guess from unprocessed logits; see `judge.guess`.
    """

    def __init__(self, processors: LogitsProcessorList, greedy: bool) -> None:
        self.processors = processors = LogitsProcessorList(map(faster, processors))
        self.greedy = greedy
        self.reads_history = any(type(p) not in _SCORES_ONLY for p in processors)
        self.treats_alike = all(type(p) in _ALIKE for p in processors)
        self.takes_likeliest = greedy and not processors
        divisors = [p.temperature for p in processors if type(p) is TemperatureLogitsWarper]
        self.temperature = 0.0 if greedy else math.prod(divisors)
        self.noise_weight = 0.0 if greedy else _noise_weight(processors)

    def __call__(self, logits: Tensor, history: Sequence[int], tail: Sequence[int] = ()) -> Tensor:
        """Return the probabilities of the token after each row.

        Args:
            logits: `[R, V]`, of any floating type. If `treats_alike`, the logits of some tokens are
                enough where all others have probability 0.
            history: settled token ids of the sequence, which come before every row.
            tail: candidates after the history; row `i` follows the first `i` of them.

        Returns:
            `[R, V]` float32, each row summing to 1.
        """
        scores = self._processed(logits.float(), history, tail)
        if self.greedy:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)
        return scores.softmax(-1)

    def best(self, logits: Tensor, history: Sequence[int], tail: Sequence[int] = ()) -> Tensor:
        """Return the likeliest token after each row, `[R]`; for the arguments see `__call__`."""
        return likeliest(self._processed(logits.float(), history, tail))

    def _processed(self, scores: Tensor, history: Sequence[int], tail: Sequence[int]) -> Tensor:
        if not self.processors:
            return scores
        if not self.reads_history:
            no_ids = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
            return self._process(no_ids, scores)
        ids = torch.tensor([[*history, *tail]], device=scores.device)
        first = len(history)
        rows = [
            self._process(ids[:, : first + row], scores[row : row + 1])
            for row in range(len(scores))
        ]
        return torch.cat(rows)

    def _process(self, ids: Tensor, scores: Tensor) -> Tensor:
        processed: Tensor = self.processors(ids, scores)  # type: ignore[arg-type]
        return processed


def _noise_weight(processors: Sequence[object]) -> float:
    """Return the exponent of the noise; it is smaller where fewer tokens can be drawn.

    Shares of correct guesses with exponents of 0, 0.35, 0.5 and 0.7: 0.371, 0.378, 0.378 and 0.367
    at top-p 0.5; 0.345, 0.369, 0.377 and 0.365 at top-k 3. See docs/log.md for those without
    cutoffs.
    """
    if any(type(p) is TopK and p.top_k == 1 for p in processors):
        return 0.0
    if not any(type(p) in _CUTOFFS for p in processors):
        return NOISE_WEIGHT
    kept = [p.top_p for p in processors if type(p) is TopP]
    kept += [1 - p.min_p for p in processors if type(p) is MinPLogitsWarper]
    return min([_CUTOFF_NOISE_WEIGHT, *kept])
