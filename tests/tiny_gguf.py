"""A tiny llama with its tokenizer, as objects or a GGUF file, and what tests of loading share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from passlm.loading.models import ModelError

SPECIAL = ["<unk>", "<start>", "<end>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*SPECIAL, *ALPHABET, "th", "the", "\u0120the"]
MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the")]
TEMPLATE = "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}"
TEXT = "the cat, the h\u00e4t <end>42"


def tiny_config() -> LlamaConfig:
    """A llama of two layers with grouped heads and tied embeddings."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def tiny_model() -> LlamaForCausalLM:
    """The model that `write_gguf` writes with seed 0."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with three merges."""
    bpe = Tokenizer(BPE({token: i for i, token in enumerate(VOCABULARY)}, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ggml_rows(weight: torch.Tensor, heads: int) -> np.ndarray:
    """The rows of a query or key projection in the order that llama.cpp rotates them in."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape).numpy()


def write_gguf(path: Path, *, architecture: str = "llama", seed: int = 0) -> Path:
    """The tiny model and its tokenizer as a GGUF file of float32."""
    torch.manual_seed(seed)
    config, weights = tiny_config(), LlamaForCausalLM(tiny_config()).state_dict()
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    kinds = [TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(kinds + [TokenType.NORMAL] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for i in range(config.num_hidden_layers):
        add_layer(writer, i, config, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_layer(
    writer: GGUFWriter, i: int, config: LlamaConfig, weights: dict[str, torch.Tensor]
) -> None:
    """Write the tensors of one decoder layer under their GGUF names."""
    names = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for ours, theirs in names.items():
        tensor = weights[f"model.layers.{i}.{theirs}.weight"]
        writer.add_tensor(f"blk.{i}.{ours}.weight", tensor.numpy())
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for letter, count in heads.items():
        tensor = weights[f"model.layers.{i}.self_attn.{letter}_proj.weight"]
        writer.add_tensor(f"blk.{i}.attn_{letter}.weight", ggml_rows(tensor, count))


def complaint(call: Callable[[], object]) -> str:
    """The text of the ModelError that the call must raise, which must be one line."""
    with pytest.raises(ModelError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text
    return text
