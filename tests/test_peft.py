"""Adapters of the peft library: the adapted model's text, in the library and behind the hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, generate, look_ahead_rows, prompt, requests_for, run

from passlm import custom_generate
from passlm.decoding.strategies import OnePass
from passlm.lookahead.trained import LookAhead
from passlm.model.target import Target

NEW = 24
TOKENS = prompt(11)


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A tiny llama with a LoRA that changes its text."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=16)
    model = get_peft_model(ARCHITECTURES["llama"].build(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def text(adapted: Any) -> list[int]:
    """What transformers writes with the adapter, which is not what it writes without."""
    with_adapter = generate(adapted, TOKENS, NEW)[0]
    with adapted.disable_adapter():
        assert generate(adapted, TOKENS, NEW)[0] != with_adapter
    return with_adapter


@pytest.mark.parametrize("method", ["ar", "two-pass", "one-pass"])
def test_the_hook_decodes_the_adapted_model(adapted: Any, text: list[int], method: str) -> None:
    """Catches the base model's text, and layers swapped for a pass that drop the adapter."""
    rows = None if method == "ar" else LookAhead.mean(Target(adapted.get_base_model()), 3, "tiny")
    ids = torch.tensor([TOKENS])
    hook = custom_generate(lookahead=rows, method=method)
    written = adapted.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        custom_generate=hook,
    )
    assert written[0, len(TOKENS) :].tolist() == text


def test_the_library_decodes_the_adapted_model(adapted: Any, text: list[int]) -> None:
    """Catches packed weights that were read from the base layers."""
    target = Target(adapted.get_base_model(), pack=True)
    rows = look_ahead_rows(target, 3)
    (request,) = requests_for([TOKENS], OnePass(3), new=NEW)
    assert run(target, [request], rows).texts == [text]
