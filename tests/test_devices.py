"""Decoding on a device that is not the CPU, as far as a machine without one can tell."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from pretend_gpu import GPU, moved, pretended_gpu
from tiny import ARCHITECTURES, prompt, random_look_ahead
from transformers import PreTrainedModel

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import Adaptive, ByHead, OnePass, Strategy, TwoPass, autoregressive
from passlm.lookahead.trained import LookAhead
from passlm.model.target import Target
from passlm.params import SamplingParams
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve
from passlm.planning.measure import measure

CHEAP = CostCurve((1, 41), (1.0, 1.2), (1, 6), (0.02, 0.02), head_seconds=(0.01, 0.01, 0.01))
PLANS: dict[str, Strategy | Adaptive] = {
    "plain": autoregressive,
    "two-pass": TwoPass(3),
    "one-pass": OnePass(2),
    "draft head": ByHead(3),
    "auto": AutoPlan(CHEAP, (0.6, 0.5, 0.4), head=(0.5, 0.4, 0.3)),
}
SAMPLINGS = {
    "greedy": SamplingParams(),
    "penalized": SamplingParams(repetition_penalty=1.2, min_new_tokens=5, bad_words=((3,),)),
    "coupled": SamplingParams(temperature=0.9, seed=1, top_k=9, logit_bias={4: 2.0}),
    "knowing": SamplingParams(temperature=0.9, seed=1, top_k=9),
    "rejection": SamplingParams(temperature=0.9, seed=1, top_p=0.9, judge="rejection"),
    "likeliest drafts": SamplingParams(
        temperature=0.9, seed=1, min_p=0.05, presence_penalty=0.5, judge="rejection", draft="greedy"
    ),
}
END = 7


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return ARCHITECTURES["llama"].build()


@pytest.fixture(scope="module")
def look_ahead(model: PreTrainedModel) -> LookAhead:
    return random_look_ahead(Target(model), 3, rank=2, sampler_width=4, head_width=8)


def written(
    target: Target, files: LookAhead, plan: Strategy | Adaptive, sampling: SamplingParams
) -> list[list[int]]:
    """What three texts come to, of which one joins later."""
    decoder = Decoder(target, files.rows(target))
    asked = [Request.of(prompt(n), sampling, 12, plan, (END,)) for n in (4, 9, 6)]
    rows = [decoder.join(one) for one in asked[:2]]
    decoder.step()
    rows.append(decoder.join(asked[2]))
    while decoder.rows:
        decoder.step()
    return [row.tokens for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("plan", PLANS)
def test_texts_are_those_of_a_cpu(
    model: PreTrainedModel, look_ahead: LookAhead, plan: str, sampling: str
) -> None:
    """Catches a tensor that stays behind: ids, masks, noise, files, what a processor keeps."""
    expected = written(Target(model), look_ahead, PLANS[plan], SAMPLINGS[sampling])
    with pretended_gpu():
        there = Target(moved(deepcopy(model)), pack=True)
        assert there.device == GPU
        found = written(there, look_ahead, PLANS[plan], SAMPLINGS[sampling])
    assert found == expected


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "falcon"])
def test_other_models(name: str) -> None:
    """Catches the same in windows and in layers that are not llama's."""
    model = ARCHITECTURES[name].build()
    files = random_look_ahead(Target(model), 2, rank=2)
    expected = written(Target(model), files, TwoPass(2), SAMPLINGS["greedy"])
    with pretended_gpu():
        there = Target(moved(deepcopy(model)))
        assert written(there, files, TwoPass(2), SAMPLINGS["greedy"]) == expected


def test_costs_can_be_measured(model: PreTrainedModel, look_ahead: LookAhead) -> None:
    """Catches a stopwatch that only knows CPUs."""
    with pretended_gpu():
        target = Target(moved(deepcopy(model)))
        curve = measure(target, look_ahead.rows(target), batch=2, context=8, rounds=1)
    assert curve.seconds[0] > 0
    assert len(curve.head_seconds) == 3


def test_what_a_gpu_refuses_is_refused() -> None:
    """Catches a test that finds nothing since everything is allowed."""
    with pretended_gpu():
        there = torch.ones(3, device=GPU)
        assert there.device == GPU
        assert (there + there).tolist() == [2.0] * 3
        assert (there * torch.tensor(2.0)).cpu().tolist() == [2.0] * 3
        for wrong in (lambda: there + torch.ones(3), lambda: torch.isin(there, torch.ones(2))):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
