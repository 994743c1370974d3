"""Attention of a few rows over a long cache on a CPU, keys and values read once for all rows.

Handed to models through transformers' own table of attention functions, for the time of a pass.
Where this machine has our own operators (`kernels/native.py`), `cpp/attention.cpp` computes it:
what a row gives does not depend on the rows beside it. Elsewhere torch's does. Transformers copies
keys and values that several query heads share for each of them before it calls that with a mask;
here the heads' queries stand below each other instead, as further rows with their row's mask.

Rows of several texts may stand in one line, so that a text costs its own rows and not those of the
longest.
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
_ELSEWHERE = ("position_bias", "cache", "softcap", "output_attentions")  # what sdpa knows as well
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


_texts: ContextVar[Tensor | None] = ContextVar("texts", default=None)  # of the rows in one line


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

    Where rows of several texts stand in one line, `query` is `[1, heads, N, d_head]` and the mask
    likewise, while keys and values are those of all texts.

    Args:
        module: the layer.
        query: `[B, heads, Q, d_head]`.
        key: `[B, key heads, S, d_head]`.
        value: like `key`.
        attention_mask: `[B, 1, Q, S]`, numbers that are added; with one for each head transformers'
            function is called.
        scaling: of the products.
        **given: whatever else the layer says.

    Returns:
        `[B, Q, heads, d_head]`, and no weights.
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
    if texts is not None:  # each row as a text of its own
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
    """With heads that share keys below each other, `[B, Q, heads, d_head]`."""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    # Copied outright: `reshape` and `contiguous` ask whether there is one row, which a graph for
    # any number of rows cannot tell.
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
    """Whether our own operator computes this."""
    # Without a mask several rows may mean a causal one.
    plain = query.shape[2] == 1 if mask is None else mask.dtype in _TYPES
    same = query.dtype in _TYPES and key.shape[-1] == value.shape[-1] == query.shape[-1]
    return plain and same and native.available()


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_group(model: PreTrainedModel) -> bool:
    """Whether its layers take their attention from transformers' table, and gain by ours.

    On a GPU torch's kernels share keys and values on their own.
    """
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    shared = (getattr(config, "num_key_value_heads", None) or heads) < heads
    takes = bool(getattr(model, "_supports_attention_backend", False))
    gains = shared or native.available()
    return gains and takes and config._attn_implementation == "sdpa" and model.device.type == "cpu"


def can_stand_in_line(model: PreTrainedModel) -> bool:
    """Whether rows of several texts can stand in one line without a copy of the cache for each row.

    Layers whose attention our operator does not know after all make that copy.
    """
    return can_group(model) and native.available() and model.dtype in _TYPES


@contextmanager
def grouped(model: PreTrainedModel, texts: Tensor | None = None) -> Iterator[None]:
    """Its layers' attention is `grouped_attention` for the time being.

    Args:
        model: the model.
        texts: which text of the cache each row is of, `[N]`, where all rows stand in one line;
            None where every text has a line of its own.
    """
    config: Any = model.config.get_text_config()
    before, token = config._attn_implementation, _texts.set(texts)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _texts.reset(token)
