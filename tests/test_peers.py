"""Transformers' own ways of decoding, above all with a draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import byte_llama, byte_tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel

from passlm.bench.engines.decoding import MethodError
from passlm.bench.engines.hugging_face import check_assistant, load_assistant
from passlm.bench.engines.methods import Asked, Others, build
from passlm.generate import Generator
from passlm.loading.models import ModelError
from passlm.model.target import Target
from passlm.params import SamplingParams, StopParams

NEW_TOKENS = 24
IDS = [100, 101, 102, 32]


@pytest.fixture
def lm() -> Generator:
    return Generator(Target(byte_llama()), byte_tokenizer())


@pytest.fixture
def near() -> PreTrainedModel:
    """A model that often writes what the target does, and often not."""
    model = byte_llama()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def saved(model: Any, place: Path, tokenizer: Any = None) -> str:
    model.save_pretrained(place)
    (tokenizer or byte_tokenizer()).save_pretrained(place)
    return str(place)


def asked(temperature: float = 0.0, **sampling: Any) -> Asked:
    names = ("ar", "hf", "hf-assistant")
    return Asked(names, (temperature,), (2,), SamplingParams(**sampling), StopParams(NEW_TOKENS))


def test_greedy_text_with_a_draft_model_is_the_targets_own(
    lm: Generator, near: PreTrainedModel
) -> None:
    """Catches the draft model's own text, and other settings than those of `hf`."""
    for settings in ({}, {"repetition_penalty": 1.5}):
        ar, hf, assisted = build(lm, asked(**settings), "tiny", others=Others(near))
        expected = ar(IDS, 0, NEW_TOKENS).tokens
        assert hf(IDS, 0, NEW_TOKENS).tokens == expected
        assert assisted(IDS, 0, NEW_TOKENS).tokens == expected
        assert assisted.repeats_plain
        assert (assisted.plan, assisted.engine) == (None, None)


def test_the_draft_model_drafts(lm: Generator, near: PreTrainedModel) -> None:
    """Catches a named draft model that is loaded and left idle."""
    calls = {"draft": 0, "target": 0}

    def counted(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    near.register_forward_hook(counted("draft"))
    lm.target.model.register_forward_hook(counted("target"))
    *_, assisted = build(lm, asked(), "tiny", others=Others(near))
    record = assisted(IDS, 0, NEW_TOKENS)
    assert len(record.tokens) == NEW_TOKENS
    assert calls["draft"] >= NEW_TOKENS // 2
    assert 0 < calls["target"] < NEW_TOKENS
    assert record.first_token_seconds is not None
    assert 0 < record.first_token_seconds <= record.seconds


def test_sampled_text_follows_the_seed_and_the_settings(
    lm: Generator, near: PreTrainedModel
) -> None:
    """Catches a seed, a temperature or a top-k that does not reach it."""
    *_, assisted = build(lm, asked(0.9), "tiny", others=Others(near))
    texts = [assisted(IDS, seed, NEW_TOKENS).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert not assisted.repeats_plain
    ar, _, assisted = build(lm, asked(0.9, top_k=1), "tiny", others=Others(near))
    assert assisted(IDS, 3, NEW_TOKENS).tokens == ar(IDS, 3, NEW_TOKENS).tokens


def test_a_draft_model_is_named_with_its_method_and_only_then(lm: Generator) -> None:
    """Catches `hf-assistant` that runs as plain `hf`, and a flag that is not looked at."""
    check_assistant(("ar", "hf"), None)
    check_assistant(("ar", "hf-assistant"), "some")
    with pytest.raises(MethodError, match="--assistant"):
        check_assistant(("ar", "hf-assistant"), None)
    with pytest.raises(MethodError, match="--methods"):
        check_assistant(("ar", "hf"), "some")
    with pytest.raises(MethodError, match="--assistant"):
        build(lm, asked(), "tiny")


def test_a_draft_model_is_loaded_like_the_target(lm: Generator, tmp_path: Path) -> None:
    """Catches a draft in another type than the model it drafts for."""
    assistant = load_assistant(saved(byte_llama(), tmp_path), lm)
    assert assistant.dtype == lm.target.dtype == torch.float32
    ar, _, assisted = build(lm, asked(), "tiny", others=Others(assistant))
    assert assisted(IDS, 0, NEW_TOKENS).tokens == ar(IDS, 0, NEW_TOKENS).tokens


def test_another_vocabulary_is_refused(lm: Generator, tmp_path: Path) -> None:
    """Catches drafts whose ids mean something else, and an error from within transformers."""
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(MethodError, match="the vocabulary of --assistant") as error:
        load_assistant(saved(byte_llama(), tmp_path / "words", other), lm)
    assert "\n" not in str(error.value)
    padded = byte_llama()
    assert isinstance(padded, LlamaForCausalLM)
    padded.resize_token_embeddings(320)
    with pytest.raises(MethodError, match="320 logits per token, the model 257"):
        load_assistant(saved(padded, tmp_path / "padded"), lm)
    with pytest.raises(ModelError, match="nowhere"):
        load_assistant(str(tmp_path / "nowhere"), lm)
