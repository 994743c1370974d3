"""A source of drafts that is defined here alone: the decoder treats it like its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
from tiny import VOCABULARY

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import FixedChooser, Limits, autoregressive, verifying
from passlm.decoding.text import Row
from passlm.drafts.protocol import Drafter, DraftSequence, PassResult, Verified
from passlm.model.target import Target
from passlm.params import SamplingParams
from passlm.plan import Chain, Guessing
from passlm.planning.acceptance import Observed, kind_of
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve

NEW_TOKENS = 40
PROMPTS = [tiny.prompt(length) for length in (3, 9, 5)]
FLAT = CostCurve((1, 9), (1.0, 1.1))  # candidates are nearly free, so a plan that knows verifies


class Oracle:
    """Proposes the true continuation, with a wrong token at a place that the text determines."""

    source = "oracle"

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts
        self.remembered = 0

    def propose(self, sequences: Sequence[DraftSequence]) -> list[Chain | None]:
        return [self._continued(one) for one in sequences]

    def _continued(self, sequence: DraftSequence) -> Chain | None:
        length, at = min(4, sequence.draft_length(self.source)), len(sequence.tokens)
        (text,) = [text for text in self._texts if text[:at] == sequence.tokens]
        tokens = list(text[at : at + length])
        wrong = random.Random(at).randrange(6)
        if wrong < len(tokens):
            tokens[wrong] = (tokens[wrong] + 1) % VOCABULARY
        return Chain(tuple(tokens), self.source) if tokens else None

    def remember(self, verified: Sequence[Verified], output: PassResult) -> None:
        assert output.of([(one.batch_row, slice(0, 1)) for one in verified]) or not verified
        self.remembered += len(verified)


def asked(strategy: Any, sampling: SamplingParams) -> list[Request]:
    return [Request.of(prompt, sampling, NEW_TOKENS, strategy) for prompt in PROMPTS]


def decoded(
    target: Target, requests: Sequence[Request], drafters: Sequence[Drafter] = ()
) -> tuple[list[list[int]], list[tuple[Row, int, int]]]:
    """The texts of a batch, and what each pass of it judged and accepted."""
    decoder = Decoder(target, tiny.look_ahead_rows(target, 2), drafters=drafters)
    rows = [decoder.join(request) for request in requests]
    passes = []
    while decoder.rows:
        passes += [(row, step.judged, step.accepted) for row, step in decoder.step()]
    return [row.tokens for row in rows], passes


SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temperature=0.9, top_k=20, seed=3),
    "penalty": SamplingParams(temperature=0.9, repetition_penalty=1.3, seed=3),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("strategy", [verifying, AutoPlan(FLAT)], ids=["fixed", "auto"])
def test_its_candidates_are_judged_and_the_text_is_the_same(
    llama: Target, strategy: Any, sampling: SamplingParams
) -> None:
    """Catches a source whose candidates are dropped, judged against another sequence's text, or
    change what is written, in a batch."""
    plain, _ = decoded(llama, asked(autoregressive, sampling))
    oracle = Oracle(plain)
    texts, passes = decoded(llama, asked(strategy, sampling), [oracle])
    assert texts == plain
    accepted = sum(own for _, _, own in passes)
    assert accepted > NEW_TOKENS
    assert len(passes) == sum(len(text) for text in plain) - sum(map(len, PROMPTS)) - accepted
    assert oracle.remembered == len(passes) - len(PROMPTS)
    assert any(judged > own for _, judged, own in passes)


@pytest.mark.parametrize("strategy", [verifying, AutoPlan(FLAT)], ids=["fixed", "auto"])
def test_under_rejection_it_changes_no_frequency(llama: Target, strategy: Any) -> None:
    """Catches candidates that are judged as draws from some distribution, which they are not.

    The second token's frequencies are compared: 600 seeds, 4.5 standard deviations for each of 5
    groups of tokens, so a false alarm has odds of less than 1 in 10,000; seeds are fixed.
    """

    class Constant(Oracle):
        """Always proposes the same two tokens."""

        def _continued(self, sequence: DraftSequence) -> Chain | None:
            length = min(2, sequence.draft_length(self.source))
            return Chain((7, 9)[:length], self.source) if length else None

    def counts(strategy: Any, drafters: Sequence[Drafter]) -> list[int]:
        found = [0] * 5
        for first in range(0, 600, 20):
            requests = [
                Request.of(
                    PROMPTS[1],
                    SamplingParams(temperature=3.0, seed=seed, judge="rejection"),
                    3,
                    strategy,
                )
                for seed in range(first, first + 20)
            ]
            for text in decoded(llama, requests, drafters)[0]:
                found[text[len(PROMPTS[1])] % 5] += 1
        return found

    plain = counts(autoregressive, [])
    drafted = counts(strategy, [Constant([])])
    for one, other in zip(plain, drafted, strict=True):
        share = (one + other) / 1200
        assert abs(one - other) < 4.5 * (1200 * share * (1 - share)) ** 0.5


def test_it_is_counted_and_planned() -> None:
    """Catches a source without counts of its own: good candidates would never be believed, and bad
    ones be verified for ever."""
    good, bad = Chain((5, 6), "good"), Chain((5, 6), "bad")
    observed = Observed((), ())
    for _ in range(30):
        observed.count([good], [5, 6, 1], [])
        observed.count([bad], [4], [])
    assert observed.chances(kind_of(good))[0] > 0.8
    assert observed.chances(kind_of(bad))[0] < 0.2
    dear = AutoPlan(CostCurve((1, 3), (1.0, 1.9))).begin()
    verified = []
    for token in (4,) * 30:
        choice = dear.choose([bad], Limits(100))
        verified.append(len(choice.candidates))
        dear.learn(choice, [token])
    assert not any(verified[10:])


def test_fixed_plans_verify_it_before_others() -> None:
    """Catches a drafter that is asked for nothing where plans are fixed."""
    chooser = FixedChooser(verifying)
    assert chooser.draft_length("oracle", [], 3) == 3
    assert chooser.draft_length("lookup", [], 3) == 0
    guessing: Guessing = "likeliest"
    assert AutoPlan(FLAT).begin(guessing).draft_length("oracle", [], 3) > 0
