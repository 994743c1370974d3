"""What is believed of candidates, and how a text changes that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import (
    Adaptive,
    Choice,
    Chooser,
    FixedChooser,
    Limits,
    Strategy,
    autoregressive,
    verifying,
)
from passlm.decoding.text import Row
from passlm.model.target import Target
from passlm.params import Judge, SamplingParams
from passlm.plan import (
    Chain,
    Guessing,
)
from passlm.planning.acceptance import NO_CHAIN, Acceptance, Observed, kind_of, levels

HEAD = Chain((5, 6), "head", sureness=(0.95, 0.15))


def test_counts_move_from_the_prior_and_back() -> None:
    """Catches counts that outweigh all that comes later: what was bad once would never be tried
    again."""
    counted = Acceptance([0.5])
    for _ in range(50):
        counted.decay()
        counted.count(0, False)
    assert counted[0] < 0.15
    for _ in range(3000):
        counted.decay()
    assert counted[0] == pytest.approx(0.5, abs=0.02)


def test_chains_are_counted_by_what_tells_them_apart() -> None:
    """Catches guesses of a sure and of an unsure head, or copies behind one and behind ten
    agreeing tokens, that are believed alike."""
    assert kind_of(Chain((5, 6, 7)))[1] == (0, 1, 2)
    assert kind_of(HEAD)[0] == "sureness"
    assert kind_of(Chain((5, 6), "head")) == ("head", (0, 1))
    assert levels("lookup", 3, 15) == (14, 15, 15)
    observed = Observed((0.5, 0.5), (0.5, 0.5))
    sure, unsure = observed.chances(kind_of(HEAD))
    assert sure > 0.6 > 0.3 > unsure
    few, many = (observed.chances(kind_of(Chain((1,), "lookup", n)))[0] for n in (1, 10))
    assert many > few
    assert observed.chances(NO_CHAIN) == []


@pytest.mark.parametrize("known", [False, True])
def test_guesses_that_know_the_noise_know_how_sure_they_are(known: bool) -> None:
    """Catches a flat target held against a head that has taken it into account."""
    observed = Observed((0.5,), (0.5,), known)
    sureness, rows = kind_of(HEAD), kind_of(Chain((5,)))
    before = observed.chances(sureness)[0]
    for _ in range(200):
        observed.count([], [9], [0.25])
    left = 1.0 if known else 0.25
    assert observed.head_confidence == pytest.approx(left, abs=0.01)
    odds = before / (1 - before) * left
    assert observed.chances(sureness)[0] == pytest.approx(odds / (1 + odds), abs=0.01)
    assert observed.chances(rows)[0] == pytest.approx(0.2, abs=0.01)


def test_what_is_believed_follows_the_confidence() -> None:
    """Catches odds that are not scaled, confidence that never returns, and counts that are lost."""
    observed = Observed((0.5,), ())
    key = kind_of(Chain((5,)))
    observed.count([], [9], [])
    assert observed.confidence == 1.0
    assert observed.chances(key) == [0.5]
    for _ in range(200):
        observed.count([], [9], [0.25])
    assert observed.confidence == pytest.approx(0.25, abs=0.01)
    assert observed.chances(key)[0] == pytest.approx(0.2, abs=0.01)  # odds of 1 times a quarter
    for _ in range(200):
        observed.count([Chain((5,))], [5], [0.25])
    assert observed.chances(key)[0] > 0.8
    for _ in range(4000):
        observed.count([], [9, 9], [1.0, 1.0])
    assert observed.confidence == pytest.approx(1.0)
    assert observed.chances(key)[0] == pytest.approx(0.5, abs=0.02)


@dataclass
class Knowing:
    """Lets two tokens of a known text and a wrong one be verified, and keeps what is heard.

    Attributes:
        text: what is guessed to come.
        heard: settled tokens and confidences of each pass.
    """

    text: Sequence[int]
    heard: list[tuple[Sequence[int], Sequence[float]]] = field(default_factory=list)

    def begin(self, guessing: Guessing = "likeliest") -> Chooser:
        """See `Adaptive`."""
        knowing = self

        class Guessing(FixedChooser):
            def choose(self, chains: Sequence[Chain], limits: Limits) -> Choice:
                rest = knowing.text[-limits.room :]
                guesses = (*rest[:2], (rest[0] + 1) % 50)
                choice = Choice(Chain(guesses, "lookup"), verifying(len(guesses)))
                return choice.within(limits)

            def learn(
                self, choice: Choice, settled: Sequence[int], confidences: Sequence[float] = ()
            ) -> None:
                knowing.heard.append((settled, confidences))

        return Guessing(verifying)


@pytest.mark.parametrize("judge", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_hears_how_confident_the_target_was(
    llama: Target, judge: Judge, temperature: float
) -> None:
    """Catches confidences of other rows than those that settle, taken before temperature and
    top-k, or of greedy text, where every token is sure."""
    seen: list[float] = []

    def look(row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        if temperature:
            best = logits[: len(settled)].topk(5).values / temperature
            seen.extend(best.softmax(-1)[:, 0].tolist())

    sampling = SamplingParams(temperature=temperature, top_k=5, seed=1, judge=judge)

    def written(plans: Strategy | Adaptive) -> list[int]:
        decoder = Decoder(llama, None, look)
        row = decoder.join(Request.of([3, 4], sampling, 12, plans))
        while decoder.rows:
            decoder.step()
        return row.tokens[2:]

    known = written(autoregressive)
    seen.clear()
    knowing = Knowing(known)
    assert len(written(knowing)) == 12
    if judge == "coupled" or not temperature:
        assert max(len(settled) for settled, _ in knowing.heard) == 3
    for settled, confidences in knowing.heard:
        assert len(confidences) == (len(settled) if temperature else 0)
    heard = [value for _, confidences in knowing.heard for value in confidences]
    assert heard == pytest.approx(seen)


def test_a_row_without_a_distribution_changes_nothing() -> None:
    """Catches one token that processors left no choice for, which would end all drafting."""
    observed = Observed((0.5,), ())
    observed.count([], [9], [float("nan")])
    assert observed.confidence == 1.0
    assert observed.chances(kind_of(Chain((5,)))) == [0.5]
