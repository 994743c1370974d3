"""In bfloat16, too, drafting changes no token, where passes run by our own operators.

bfloat16 has 8 bits: two best logits are equal or neighbours every few dozen tokens, so that a sum
in another order soon gives another text.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_llama import small_llama
from tiny import GREEDY, PROMPT_LENGTHS, VOCABULARY, prompt, random_look_ahead, requests_for, run

import passlm
from passlm.decoding.strategies import OnePass, Strategy, TwoPass, autoregressive
from passlm.generate import Generator
from passlm.kernels import linear
from passlm.model.target import Target
from passlm.params import SamplingParams

pytestmark = pytest.mark.skipif(
    not linear.preferred(), reason="this machine multiplies by torch's products"
)

NEW_TOKENS = 40
SAMPLED = SamplingParams(temperature=1.0, seed=5)
TEXTS = (
    "def fibonacci(n):\n    ",
    "The old lighthouse stood at the end of the pier, and every evening",
    "Q: What is 17 times 23?\nA:",
)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("plan", [TwoPass(3), OnePass(2), OnePass(4)])
def test_a_small_model_writes_what_plain_decoding_writes(
    plan: Strategy, sampling: SamplingParams
) -> None:
    """Catches a sum whose order depends on the rows of the pass, its texts or its cache."""
    target = Target(small_llama(VOCABULARY).to(torch.bfloat16), pack=True)
    look_ahead = random_look_ahead(target, 4, rank=4, sampler_width=8).rows(target)
    prompts = [prompt(length) for length in PROMPT_LENGTHS]
    alone = [
        run(target, requests_for([given], autoregressive, sampling, NEW_TOKENS), look_ahead).texts
        for given in prompts
    ]
    found = run(target, requests_for(prompts, plan, sampling, NEW_TOKENS), look_ahead)
    assert found.texts == [texts[0] for texts in alone]


@pytest.fixture(scope="module")
def lm() -> Generator:
    return passlm.load("smollm2-135m", dtype="bfloat16")


@pytest.mark.model
@pytest.mark.parametrize("method", ["two-pass", "one-pass", "auto"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_packaged_model_writes_what_plain_decoding_writes(
    lm: Generator, method: str, temperature: float
) -> None:
    """The same for trained files, whose drafts are accepted, and for chains found in the text."""
    write: Callable[..., list[passlm.Output]] = lm.generate
    how = {"temperature": temperature, "seed": 3, "max_new_tokens": NEW_TOKENS}
    alone = [write(text, method="ar", **how)[0].text for text in TEXTS]
    assert [output.text for output in write(list(TEXTS), method=method, **how)] == alone
    assert [write(text, method=method, **how)[0].text for text in TEXTS] == alone
