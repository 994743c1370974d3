"""Attention of a few rows over a long KV cache on a CPU, reading keys and values once for all rows.

Models get this function through transformers' table of attention functions, for the duration of a
pass. Where this machine has our operators (`kernels/native.py`), `cpp/attention.cpp` computes it,
and the output of a row does not depend on the other rows. Elsewhere torch's kernel does. With
grouped-query attention and a mask, transformers copies the keys and values for every query head
before it calls that kernel; here the queries of heads that share keys are stacked as further rows
instead, each with the mask of its row.

The rows of several sequences can be packed into one line, so that each sequence costs its own rows
and not as many as the longest one has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from passlm.kernels import native

NAME = "passlm_grouped"
# Options with which transformers' sdpa function is called instead.
_ELSEWHERE = ("position_bias", "cache", "softcap", "output_attentions")
_TYPES = (torch.bfloat16, torch.float32)
_OPERATOR = "passlm::rows_attention"

torch.library.define(
    _OPERATOR,
    "(Tensor query, Tensor keys, Tensor values, Tensor mask, Tensor texts, float scale, "
    "int threads) -> Tensor",
)


@torch.library.register_fake(_OPERATOR)  # type: ignore[untyped-decorator]
def _shape(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    texts: Tensor,
    scale: float,
    threads: int,
) -> Tensor:
    lines, heads, rows, width = query.shape
    return query.new_empty(lines, rows, heads, width)


_texts: ContextVar[Tensor | None] = ContextVar("texts", default=None)  # see `grouped`


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the signature of transformers' `sdpa_attention_forward`.

    Where the rows of several sequences are packed into one line, `query` is
    `[1, heads, N, d_head]` and the mask `[1, 1, N, S]`; `key` and `value` hold every sequence.

    Args:
        module: the layer.
        query: `[B, heads, Q, d_head]`.
        key: `[B, key heads, S, d_head]`.
        value: like `key`.
        attention_mask: additive, `[B, 1, Q, S]`. A mask with one entry for each head is passed on
            to transformers' function.
        scaling: factor of the scores; `d_head ** -0.5` if None.
        **given: further options of the layer.

    Returns:
        The output, `[B, Q, heads, d_head]`, and None for the attention weights.
    """
    groups, width = query.shape[1] // key.shape[1], query.shape[-1]
    special = any(given.get(name) is not None for name in _ELSEWHERE)
    by_head = attention_mask is not None and attention_mask.shape[1] != 1
    texts = _texts.get()
    if not special and not by_head and _has_operator(query, key, value, attention_mask):
        computed: Tensor = torch.ops.passlm.rows_attention(
            query,
            key,
            value,
            query.new_empty(0) if attention_mask is None else attention_mask,
            query.new_empty(0, dtype=torch.long) if texts is None else texts,
            width**-0.5 if scaling is None else scaling,
            torch.get_num_threads(),
        )
        return computed, None
    if texts is not None:  # each row as a sequence of its own
        apart = None if attention_mask is None else attention_mask.transpose(0, 2)
        single, _ = sdpa_attention_forward(
            module, query.transpose(0, 2), key[texts], value[texts], apart, scaling=scaling, **given
        )
        return single.transpose(0, 1), None
    if groups == 1 or attention_mask is None or by_head or special:
        plain, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **given
        )
        return plain, None
    return _stacked(query, key, value, attention_mask, scaling), None


def _stacked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """Attend with the query heads that share keys stacked as rows; `[B, Q, heads, d_head]`."""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    # `clone` copies unconditionally. `reshape` and `contiguous` check whether there is one row,
    # which a graph traced for any number of rows cannot tell.
    stacked = query.clone(memory_format=torch.contiguous_format)
    output = torch.nn.functional.scaled_dot_product_attention(
        stacked.view(batch, key.shape[1], groups * rows, width),
        key,
        value,
        attn_mask=mask.repeat(1, 1, groups, 1),
        scale=scaling,
    ).clone(memory_format=torch.contiguous_format)
    apart = output.view(batch, heads, rows, value.shape[-1]).transpose(1, 2)
    return apart.clone(memory_format=torch.contiguous_format)


def _has_operator(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether our own operator supports these tensors."""
    # Without a mask, several rows may imply causal attention.
    plain = query.shape[2] == 1 if mask is None else mask.dtype in _TYPES
    same = query.dtype in _TYPES and key.shape[-1] == value.shape[-1] == query.shape[-1]
    return plain and same and native.available()


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_group(model: PreTrainedModel) -> bool:
    """Return whether a model looks up its attention in transformers' table and is faster with ours.

    On a GPU, torch's kernels share keys and values between heads themselves.
    """
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    shared = (getattr(config, "num_key_value_heads", None) or heads) < heads
    takes = bool(getattr(model, "_supports_attention_backend", False))
    gains = shared or native.available()
    return gains and takes and config._attn_implementation == "sdpa" and model.device.type == "cpu"


def can_stand_in_line(model: PreTrainedModel) -> bool:
    """Return whether rows of several sequences can share one line without copying the KV cache.

    A layer with attention options that our operator does not support still makes that copy, one for
    each row.
    """
    return can_group(model) and native.available() and model.dtype in _TYPES


@contextmanager
def grouped(model: PreTrainedModel, texts: Tensor | None = None) -> Iterator[None]:
    """Make `grouped_attention` the attention of a model's layers inside a `with` block.

    Args:
        model: the model.
        texts: the batch row of the cache that each row belongs to, `[N]`, where all rows are packed
            into one line; None where every sequence has a line of its own.
    """
    config: Any = model.config.get_text_config()
    before, token = config._attn_implementation, _texts.set(texts)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _texts.reset(token)
