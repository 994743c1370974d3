"""Measure how predictable accepted, refused and drawn tokens were for the target.

This tests the claim that drafting finds the easy tokens. If it holds, accepted tokens have a higher
probability under the target, and a lower entropy at their position, than refused candidates and
than tokens that the target drew itself. Trained look-ahead rows should also be accepted at harder
positions than those of `fixed-token`.

The distribution is the target's after temperature and all processors, which is the one that judged
the candidates. At temperature 0 that distribution is one-hot and carries no information. There the
distribution at temperature 1 is used, whose most likely token is taken; without penalties it is the
model's own. The measurement runs separately from the timed runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from passlm.bench.engines.decoding import PlanDecoding
from passlm.bench.engines.methods import Method
from passlm.decoding.decoder import Decoder
from passlm.decoding.distribution import TokenDistribution
from passlm.decoding.request import Request
from passlm.decoding.stopping import cut_block
from passlm.decoding.text import Row
from passlm.plan import SOURCES

PROMPTS = 16  # maximum number of prompts of a suite
KINDS = ("accepted", "refused", "drawn")


@dataclass
class _Tally:
    """Sums over the tokens of one kind."""

    count: int = 0
    excluded: int = 0
    logprob: float = 0.0
    entropy: float = 0.0

    def add(self, p: float, entropy: float) -> None:
        self.count += 1
        self.entropy += entropy
        if p > 0:
            self.logprob += math.log(p)
        else:
            self.excluded += 1

    def means(self) -> dict[str, float | int | None]:
        possible = self.count - self.excluded
        return {
            "count": self.count,
            "excluded": self.excluded,
            "logprob": self.logprob / possible if possible else None,
            "entropy": self.entropy / self.count if self.count else None,
        }


class Watch:
    """An observer of a `Decoder` that sums log-probability and entropy by kind of token."""

    def __init__(self) -> None:
        self._kinds = {kind: _Tally() for kind in KINDS}
        self._sources = {pair: _Tally() for pair in product(SOURCES, KINDS[:2])}

    def __call__(self, row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        """Count the tokens of one pass; tokens after the end of the sequence are ignored.

        See `Observer`.
        """
        candidates, accepted = row.candidates, len(settled) - 1
        kept, _ = cut_block(settled, row.request.eos, row.room, row.full)
        distribution = TokenDistribution(row.request.distribution.processors, greedy=False)
        p = distribution(logits, row.tokens, candidates)  # [1 + M, V]
        entropies = torch.special.entr(p).sum(-1)
        seen = [("accepted", at, settled[at]) for at in range(min(accepted, kept))]
        if kept > accepted:
            seen.append(("drawn", accepted, settled[accepted]))
            if accepted < len(candidates):
                seen.append(("refused", accepted, candidates[accepted]))
        for kind, at, token in seen:
            found = float(p[at, token]), float(entropies[at])
            self._kinds[kind].add(*found)
            if kind != "drawn" and row.choice.chain is not None:
                self._sources[row.choice.chain.source, kind].add(*found)

    def means(self) -> dict[str, Any]:
        """Return count, mean log-probability and mean entropy by kind, and by candidate source."""
        sources = {
            source: {kind: self._sources[source, kind].means() for kind in KINDS[:2]}
            for source in SOURCES
            if any(self._sources[source, kind].count for kind in KINDS[:2])
        }
        return {**{k: t.means() for k, t in self._kinds.items()}, "by_source": sources}


def predictability(
    method: Method, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int
) -> dict[str, Any] | None:
    """Run a method again and measure the predictability of its tokens under the target.

    Args:
        method: the method.
        prompts: the prompts of one suite, with only the first turn of chats; at most `PROMPTS` are
            run.
        seeds: the seed of each prompt in the timed run, so that the tokens are the same.
        max_new_tokens: maximum number of new tokens per sequence.

    Returns:
        None for methods other than passlm's own. Otherwise a dictionary of:

        - `prompts`: the number of prompts that were run.
        - `accepted`, `refused` (only the first of each pass) and `drawn`: for the tokens of that
          kind, their `count`, mean `logprob` and mean `entropy` in nats, and the number `excluded`.
          Excluded tokens have probability 0 after top-k and similar processors; they have no
          logarithm and are not part of the mean `logprob`.
        - `by_source`: the same for accepted and refused candidates, by the candidates' source.
    """
    decode = method.decode
    if not isinstance(decode, PlanDecoding):
        return None
    watch, chosen = Watch(), prompts[:PROMPTS]
    for start in range(0, len(chosen), method.batch_size):
        together = chosen[start : start + method.batch_size]
        plans = decode.plans(len(together), max(map(len, together)) + max_new_tokens // 2)
        decoder = Decoder(decode.target, decode.look_ahead, watch)
        for prompt, seed in zip(together, seeds[start:], strict=False):
            drawn = replace(method.sampling, seed=seed)
            decoder.join(
                Request.of(prompt, drawn, max_new_tokens, plans, decode.eos, decode.ignore_eos)
            )
        while decoder.rows:
            decoder.step()
    return {"prompts": len(chosen), **watch.means()}
