"""How predictable the tokens were that drafting hit, missed, or left to the target.

The claim this checks: drafting finds the easy tokens. What was accepted should be likelier under
the target, at places of lower entropy, than what the target drew itself, and than candidates it
refused; rows that were trained should be accepted at harder places than `fixed-token`'s.

The distribution is the target's after all that was asked for, temperature and processors, so the
one that judged. At temperature 0 that is one-hot and says nothing: there it is the one whose best
token is taken, at temperature 1, which without penalties is the model's own. It is looked at in
runs of their own, which are not timed.
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

PROMPTS = 16  # of a suite that each method is watched on
KINDS = ("accepted", "refused", "drawn")


@dataclass
class _Tally:
    """Sums over tokens of one kind."""

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
    """An observer of a `Decoder`, which adds up what it sees."""

    def __init__(self) -> None:
        self._kinds = {kind: _Tally() for kind in KINDS}
        self._sources = {pair: _Tally() for pair in product(SOURCES, KINDS[:2])}

    def __call__(self, row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        """See `Observer`; what lies behind the end of the text is not looked at."""
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
        """For each kind and, for candidates, each source: tokens, log-probability, entropy."""
        sources = {
            source: {kind: self._sources[source, kind].means() for kind in KINDS[:2]}
            for source in SOURCES
            if any(self._sources[source, kind].count for kind in KINDS[:2])
        }
        return {**{k: t.means() for k, t in self._kinds.items()}, "by_source": sources}


def predictability(
    method: Method, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int
) -> dict[str, Any] | None:
    """Run a method once more and look on; means in nats, by the target's own distribution.

    Args:
        method: what to watch.
        prompts: of one suite, the first turn of each; at most `PROMPTS` are run.
        seeds: of each, those of the timed run, so that the texts are the same.
        max_new_tokens: of each text.

    Returns:
        `prompts`, how many were run; for tokens `accepted`, `refused` (the first of a pass) and
        `drawn` their `count`, mean `logprob` and `entropy`, and how many were `excluded`: those
        have no chance at all after top-k and the like, no logarithm, and are not in that mean;
        `by_source` the same for candidates of each origin. None for methods that are not ours.
    """
    decode = method.decode
    if not isinstance(decode, PlanDecoding):
        return None
    watch, taken = Watch(), prompts[:PROMPTS]
    for start in range(0, len(taken), method.batch_size):
        together = taken[start : start + method.batch_size]
        plans = decode.plans(len(together), max(map(len, together)) + max_new_tokens // 2)
        decoder = Decoder(decode.target, decode.look_ahead, watch)
        for prompt, seed in zip(together, seeds[start:], strict=False):
            drawn = replace(method.sampling, seed=seed)
            decoder.join(
                Request.of(prompt, drawn, max_new_tokens, plans, decode.eos, decode.ignore_eos)
            )
        while decoder.rows:
            decoder.step()
    return {"prompts": len(taken), **watch.means()}
