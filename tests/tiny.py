"""Tiny random models of every architecture the tests decode, and helpers to decode with them.

Weights are scaled so that greedy text wanders instead of repeating one token, and no model has an
end-of-sequence token. Nothing here asserts; that is left to the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from passlm.decode import Decoder, Request, Row
from passlm.outputs import Step
from passlm.params import SamplingParams
from passlm.plan import Strategy, autoregressive
from passlm.target import Target

VOCABULARY = 64
CONTEXT = 256
WINDOW = 8  # shorter than every text the tests decode
NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 5, 11, 30)

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MIXED = {"num_hidden_layers": 3, "sliding_window": WINDOW}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model.

    Attributes:
        name: what a test is called after.
        model_type: the architecture's name in transformers.
        options: of its configuration; llama-like ones come on top of common sizes.
        attention: the attention implementation it is loaded with.
        llama_like: whether the common sizes go by llama's names.
        scale: standard deviation of the weight matrices.
    """

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    llama_like: bool = True
    scale: float = 0.3

    def config(self, **changes: Any) -> PretrainedConfig:
        """Its configuration, with some options changed."""
        common = _LLAMA_LIKE if self.llama_like else {}
        return CONFIG_MAPPING[self.model_type](**{**common, **self.options, **changes})

    def build(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """A model with random weights of its own seed, in evaluation mode, float32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            self.config(**changes), attn_implementation=self.attention, dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.ndim >= 2:
                    weight.copy_(self.scale * noise)
                else:
                    weight.add_(0.1 * noise)
        return model.eval()


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama"),
        Architecture("llama-eager", "llama", attention="eager"),
        Architecture("mistral", "mistral", {"sliding_window": WINDOW}),
        Architecture("qwen2", "qwen2"),
        Architecture(
            "qwen2-mixed",
            "qwen2",
            {**_MIXED, "use_sliding_window": True, "max_window_layers": 1},
        ),
        Architecture("qwen3", "qwen3", {"head_dim": 8}),
        Architecture(
            "gemma2",
            "gemma2",
            {**_MIXED, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": _SLIDING_AND_FULL},
            attention="eager",
        ),
        Architecture(
            "gemma3",
            "gemma3_text",
            {**_MIXED, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": _SLIDING_AND_FULL},
        ),
        Architecture("gpt2", "gpt2", _GPT2, llama_like=False),
        Architecture("gpt_neox", "gpt_neox"),
        Architecture("phi", "phi"),
        Architecture("phi3", "phi3", {"sliding_window": WINDOW}),
        Architecture("olmo2", "olmo2"),
        Architecture("falcon", "falcon", {"alibi": False, "ffn_hidden_size": 48}),
        Architecture("starcoder2", "starcoder2", {"sliding_window": WINDOW}),
        Architecture("opt", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        Architecture("stablelm", "stablelm"),
        Architecture("cohere", "cohere", {"logit_scale": 1.0}),
        Architecture("granite", "granite"),
    )
}
