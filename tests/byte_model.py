"""A tiny random llama that reads and writes bytes: characters span tokens, so text can tear."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from passlm.generate import Generator
from passlm.lookahead.trained import LookAhead
from passlm.model.target import Target

END = 256
CONTEXT = 192
ROWS = 4
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; `<end>` is 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = Tokenizer(BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, eos_token="<end>")
    tokenizer.chat_template = CHAT
    return tokenizer


def byte_llama() -> LlamaForCausalLM:
    """Random weights, large enough for varied greedy text."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(4)
    return model


def byte_generator() -> Generator:
    """The model with random look-ahead rows."""
    target = Target(byte_llama())
    rows = LookAhead.mean(target, ROWS, "bytes")
    rows.embeddings.data.add_(torch.randn(rows.embeddings.shape))
    return Generator(target, byte_tokenizer(), rows)


def save_folders(place: Path) -> tuple[Path, Path]:
    """The model's folder and the look-ahead folder."""
    lm = byte_generator()
    lm.target.model.save_pretrained(place / "model")
    lm.tokenizer.save_pretrained(place / "model")
    assert lm.look_ahead is not None
    lm.look_ahead.save(place / "rows")
    return place / "model", place / "rows"
