"""Attention of a few rows over a long cache, keys and values read once for all their query heads.

Where several query heads share keys and values, transformers copies these for each head before it
calls torch's attention with a mask. Here the heads' queries stand below each other as further rows
instead, each with its row's mask: the same products, without the copies. It is handed to models
through transformers' own table of attention functions, for the time of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "passlm_grouped"
_ELSEWHERE = ("position_bias", "cache", "softcap", "output_attentions")  # what sdpa knows as well


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, for `query` `[B, heads, Q, d_head]`.

    Args:
        module: the layer.
        query: `[B, heads, Q, d_head]`.
        key: `[B, key heads, S, d_head]`.
        value: like `key`.
        attention_mask: `[B, 1, Q, S]`; without one, or with one for each head, transformers'
            function is called.
        scaling: of the products.
        **given: whatever else the layer says.

    Returns:
        `[B, Q, heads, d_head]`, and no weights.
    """
    batch, heads, rows, _ = query.shape
    groups = heads // key.shape[1]
    special = any(given.get(name) is not None for name in _ELSEWHERE)
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1 or special:
        plain, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **given
        )
        return plain, None
    # Copied outright: `reshape` and `contiguous` ask whether there is one row, which a graph for
    # any number of rows cannot tell.
    stacked = query.clone(memory_format=torch.contiguous_format)
    output = torch.nn.functional.scaled_dot_product_attention(
        stacked.view(batch, key.shape[1], groups * rows, query.shape[-1]),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=scaling,
    ).clone(memory_format=torch.contiguous_format)
    by_head = output.view(batch, heads, rows, value.shape[-1]).transpose(1, 2)
    return by_head.clone(memory_format=torch.contiguous_format), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_group(model: PreTrainedModel) -> bool:
    """Whether its layers take their attention from transformers' table, and have one to gain.

    On a GPU torch's kernels share keys and values on their own.
    """
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    shared = (getattr(config, "num_key_value_heads", None) or heads) < heads
    takes = bool(getattr(model, "_supports_attention_backend", False))
    return shared and takes and config._attn_implementation == "sdpa" and model.device.type == "cpu"


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Its layers' attention is `grouped_attention` for the time being."""
    config: Any = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
