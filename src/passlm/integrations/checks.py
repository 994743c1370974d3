"""Checks that reject options of transformers' `generate` that PaSS does not support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode

from passlm.errors import InputError
from passlm.model.compat import CACHE_NAMES, given_cache

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_REFUSED_OPTIONS = {
    "output_attentions": "a pass also has look-ahead rows, so its attentions differ",
    "output_hidden_states": "a pass also has look-ahead rows, so its hidden states differ",
    "prefill_chunk_size": "prompts are always prefilled in chunks",
    "compile_config": "the model is never compiled",
}
_STATEFUL_PROCESSORS = (
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)
_MODEL_INPUTS = ("attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep")


class GenerateError(InputError):
    """An option of transformers' `generate` that PaSS does not support; a message of one line."""


def refuse(
    config: GenerationConfig,
    processors: LogitsProcessorList,
    given: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
) -> None:
    """Raise an error if `generate` was called with an option that PaSS does not support.

    Args:
        config: the prepared generation configuration.
        processors: logits processors of the whole batch.
        given: arguments of `generate` that are in none of the others, such as `assistant_model`.
        model_kwargs: arguments for the model besides the ids.

    Raises:
        GenerateError: an option is not supported; names the first such option and what to do.
    """
    complaints = chain(
        _mode_complaints(config, given),
        _cache_complaints(config, model_kwargs),
        _input_complaints(processors, model_kwargs),
    )
    complaint = next(complaints, None)
    if complaint is not None:
        raise GenerateError(complaint)


def _mode_complaints(config: GenerationConfig, given: Mapping[str, Any]) -> Iterator[str]:
    mode = config.get_generation_mode(given.get("assistant_model"))
    if mode not in _MODES:
        yield (
            f"generate was asked for {mode.value.replace('_', ' ')}: PaSS supports greedy search "
            "and sampling only, so leave out options such as num_beams and assistant_model"
        )
    if given.get("synced_gpus"):
        yield "generate was given synced_gpus: PaSS decodes in one process, so leave it out"
    for name, reason in _REFUSED_OPTIONS.items():
        if getattr(config, name, None):
            yield f"generate was given {name}, but with PaSS {reason}: leave it out"


def _cache_complaints(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> Iterator[str]:
    if config.cache_implementation not in (None, "dynamic"):
        yield (
            f"generate was given cache_implementation={config.cache_implementation!r}: PaSS uses "
            "its own cache, so leave it out"
        )
    if not model_kwargs.get("use_cache", True):
        yield "generate was given use_cache=False: PaSS needs its cache, so leave it out"
    name, cache = given_cache(model_kwargs)
    # `generate` itself passes an empty cache, which is ignored. A user who passes one expects it
    # to be read and filled.
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        yield (
            f"generate was given {name}: PaSS uses its own cache and can neither read nor fill "
            "another one, so leave it out and give the whole text as input_ids"
        )


def _input_complaints(
    processors: LogitsProcessorList, model_kwargs: Mapping[str, Any]
) -> Iterator[str]:
    for name, value in model_kwargs.items():
        if value is not None and name not in _MODEL_INPUTS:
            yield f"generate was given {name}: PaSS only takes input_ids, so leave it out"
    for processor in processors:
        if isinstance(processor, _STATEFUL_PROCESSORS):
            yield (
                f"{type(processor).__name__} keeps a state between tokens, which rejected draft "
                "tokens would corrupt: leave out the option that adds this processor"
            )


def seen_ids(ids: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
    """Return a mask that is True for tokens and False for left padding, `[B, P]` bool.

    Raises:
        GenerateError: the attention mask hides anything but left padding, or the position ids do
            not count each prompt's tokens from 0.
    """
    mask = model_kwargs.get("attention_mask")  # `generate` removes a mask without padding
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) != 0
    if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise GenerateError(
            "attention_mask hides tokens after the start of a prompt: pad on the left "
            "(tokenizer.padding_side='left') and mask nothing else"
        )
    positions = model_kwargs.get("position_ids")
    counted = seen.long().cumsum(-1) - 1
    if positions is not None and bool(((positions.to(ids.device) != counted) & seen).any()):
        raise GenerateError(
            "generate was given position_ids that do not count each prompt's tokens from 0: leave "
            "them out"
        )
    return seen
