"""Check whether a model is supported, and read its kinds of attention from its configuration.

Does not change the model. Using it is left to `target.py`.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from passlm.errors import InputError
from passlm.model.compat import cache_name, newer_than_tested

_FORWARD_ARGUMENTS = ("inputs_embeds", "position_ids", "attention_mask")
_LAYER_KINDS = ("full_attention", "sliding_attention")


class UnsupportedModelError(InputError):
    """A model that cannot be decoded by plans; the message says why."""


def check_supported(model: PreTrainedModel) -> None:
    """Raise an error that names the reason if a model cannot be decoded by plans.

    Raises:
        UnsupportedModelError: the model is not a decoder, has state that cannot be rolled back,
            positions or attention that look-ahead rows cannot be given, or an attention kernel
            without masks.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    reason = (
        _reason_by_class(model)
        or _reason_by_layers(config)
        or _reason_by_forward(model)
        or _reason_by_positions(config)
    )
    if reason:
        raise UnsupportedModelError(f"{name} ({config.model_type}) is not supported: {reason}")
    if attention(model) not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"{name} was loaded with attn_implementation={attention(model)!r}, which takes no "
            "mask for look-ahead rows: load it with attn_implementation='sdpa'"
        )


def _reason_by_class(model: PreTrainedModel) -> str | None:
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and PaSS needs a decoder-only model"
    if getattr(model, "_is_stateful", False):
        return "its recurrent state cannot be rolled back when a candidate is refused"
    if not model.can_generate():
        return "it is not a causal language model"
    # add_cross_attention marks encoders that can also be used as decoders. is_decoder alone does
    # not: gpt_neox has it as well.
    is_decoder = getattr(model.config, "is_decoder", True)
    if hasattr(model.config, "add_cross_attention") and not is_decoder:
        return "it is an encoder, whose tokens attend to later ones (its is_decoder is False)"
    return None


def _reason_by_layers(config: Any) -> str | None:
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(kinds - set(_LAYER_KINDS))
    if unknown:
        return (
            f"its {', '.join(unknown)} layers keep a state that cannot be rolled back, or attend "
            "to the text in a way that a mask for look-ahead rows cannot express"
        )
    return None


def _reason_by_forward(model: PreTrainedModel) -> str | None:
    accepted = inspect.signature(model.forward).parameters
    missing = [name for name in _FORWARD_ARGUMENTS if name not in accepted]
    if cache_name(model.forward) is None:
        missing.append("key-value cache")
    if missing:
        return f"its forward takes no {', '.join(missing)}{newer_than_tested()}"
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        return "its layers read token ids, which look-ahead rows do not have"
    return None


def _reason_by_positions(config: Any) -> str | None:
    if getattr(config, "alibi", False):
        return "its ALiBi positions cannot be set for look-ahead rows (rotary positions can)"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention uses a mask of its own"
    if config.model_type == "moshi":
        return "its attention ignores the sliding window that its configuration states"
    return None


def attention(model: PreTrainedModel) -> str:
    """Return the attention implementation that a model was loaded with."""
    return str(model.config.get_text_config()._attn_implementation)


def window_of(config: Any) -> int | None:
    """Return the size of the sliding window in positions; None without sliding layers.

    A row of a sliding layer sees this many positions, its own included.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def longrope_switch(config: Any) -> int | None:
    """Return the number of positions up to which longrope uses its short frequencies.

    None for models without longrope.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    by_kind = [r for r in ropes.values() if isinstance(r, dict)]  # one for each kind of layer
    switches = [
        int(rope["original_max_position_embeddings"])
        for rope in ([ropes] if "rope_type" in ropes else by_kind)
        if rope.get("rope_type") == "longrope"
    ]
    return min(switches, default=None)


def layer_kinds(config: Any, window: int | None) -> tuple[str, ...]:
    """Return the kinds of attention of a model's layers, each once.

    Args:
        config: the text part of the model's configuration.
        window: its sliding window; see `window_of`.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(dict.fromkeys(kinds))
    return ("sliding_attention",) if window else ("full_attention",)
