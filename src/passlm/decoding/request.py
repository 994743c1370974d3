"""A request: one prompt to be continued, and how."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from passlm.decoding.distribution import TokenDistribution
from passlm.decoding.processors import processors
from passlm.decoding.strategies import Adaptive, Strategy, autoregressive
from passlm.params import Draft, Judge, SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: maximum number of tokens to generate.
        eos: ids that end the sequence.
        strategy: gives the plan of each pass, fixed or adapted to what is accepted.
        distribution: logits to probabilities, for target and draft.
        seed: seed of all draws; None takes a fresh one.
        judge: rule by which candidates are accepted.
        draft: rule by which candidates are drawn.
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
        """Return a request with a user's sampling parameters."""
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
