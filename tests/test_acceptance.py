"""What is believed of candidates, and how a text changes that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from passlm.acceptance import NOTHING, Acceptance, Shown, kind, levels
from passlm.decode import Decoder
from passlm.params import Judge, SamplingParams
from passlm.plan import Chain, Choice, Chooser, FixedChooser, autoregressive
from passlm.row import Request, Row
from passlm.target import Target

HEAD = Chain((5, 6), "head", sureness=(0.95, 0.15))


def test_counts_move_from_the_prior_and_back() -> None:
    """Catches counts that outweigh all that comes later: what was bad once would never be tried
    again."""
    counted = Acceptance([0.5])
    for _ in range(50):
        counted.forget()
        counted.count(0, False)
    assert counted[0] < 0.15
    for _ in range(3000):
        counted.forget()
    assert counted[0] == pytest.approx(0.5, abs=0.02)


def test_chains_are_counted_by_what_tells_them_apart() -> None:
    """Catches guesses of a sure and of an unsure head, or copies behind one and behind ten
    agreeing tokens, that are believed alike."""
    assert kind(Chain((5, 6, 7)))[1] == (0, 1, 2)
    assert kind(HEAD)[0] == "sureness"
    assert kind(Chain((5, 6), "head")) == ("head", (0, 1))
    assert levels("lookup", 3, 15) == (14, 15, 15)
    shown = Shown((0.5, 0.5), (0.5, 0.5))
    sure, unsure = shown.chances(kind(HEAD))
    assert sure > 0.6 > 0.3 > unsure
    few, many = (shown.chances(kind(Chain((1,), "lookup", n)))[0] for n in (1, 10))
    assert many > few
    assert shown.chances(NOTHING) == []


def test_what_is_believed_follows_the_certainty() -> None:
    """Catches odds that are not scaled, certainty that never returns, and counts that are lost."""
    shown = Shown((0.5,), ())
    key = kind(Chain((5,)))
    shown.count([], [9], [])
    assert shown.certainty == 1.0
    assert shown.chances(key) == [0.5]
    for _ in range(200):
        shown.count([], [9], [0.25])
    assert shown.certainty == pytest.approx(0.25, abs=0.01)
    assert shown.chances(key)[0] == pytest.approx(0.2, abs=0.01)  # odds of 1 times a quarter
    for _ in range(200):
        shown.count([Chain((5,))], [5], [0.25])
    assert shown.chances(key)[0] > 0.8
    for _ in range(4000):
        shown.count([], [9, 9], [1.0, 1.0])
    assert shown.certainty == pytest.approx(1.0)
    assert shown.chances(key)[0] == pytest.approx(0.5, abs=0.02)


@dataclass
class Listening:
    """Verifies two fixed candidates and keeps what is heard of them."""

    heard: list[tuple[Sequence[int], Sequence[float]]] = field(default_factory=list)

    def begin(self) -> Chooser:
        """See `Adaptive`."""
        listening = self

        class Heard(FixedChooser):
            def learn(
                self, choice: Choice, settled: Sequence[int], certain: Sequence[float] = ()
            ) -> None:
                listening.heard.append((settled, certain))

        return Heard(autoregressive)


@pytest.mark.parametrize("judge", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_hears_how_certain_its_tokens_are(
    llama: Target, judge: Judge, temperature: float
) -> None:
    """Catches a certainty that is of other rows, or taken before temperature and top-k."""
    seen: list[float] = []

    def look(row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        best = logits[0].topk(5).values / temperature if temperature else torch.zeros(1)
        seen.append(float(best.softmax(-1)[0]))

    plans = Listening()
    sampling = SamplingParams(temperature=temperature, top_k=5, seed=1, judge=judge)
    decoder = Decoder(llama, None, look)
    decoder.join(Request.of([3, 4], sampling, 6, plans))
    while decoder.rows:
        decoder.step()
    assert len(plans.heard) == 6
    if temperature:
        certain = [value for _, values in plans.heard for value in values]
        assert certain == pytest.approx(seen)
    else:
        assert all(not values for _, values in plans.heard)
