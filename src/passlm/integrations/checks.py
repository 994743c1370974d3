"""Refuse what `generate` may be asked for and PaSS cannot honour, by name."""

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
    "output_attentions": "a pass over look-ahead rows has other ones",
    "output_hidden_states": "a pass over look-ahead rows has other ones",
    "prefill_chunk_size": "prompts are prefilled in chunks anyway",
    "compile_config": "PaSS calls the model as it is",
}
_STATEFUL_PROCESSORS = (
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)
_MODEL_INPUTS = ("attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep")


class GenerateError(InputError):
    """Something asked of transformers' `generate` that PaSS cannot do; one line."""


def refuse(
    config: GenerationConfig,
    processors: LogitsProcessorList,
    given: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
) -> None:
    """Make sure that PaSS can honour what `generate` was asked for.

    Args:
        config: every option, prepared.
        processors: for the whole batch.
        given: `generate`'s arguments that are not part of the others: `assistant_model`, ...
        model_kwargs: what goes to the model beside the ids.

    Raises:
        GenerateError: it cannot; names the first such option and says what to do.
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
            f"generate was asked for {mode.value.replace('_', ' ')}: PaSS decodes by greedy search "
            "or sampling, so leave out what asks for more (num_beams, assistant_model, ...)"
        )
    if given.get("synced_gpus"):
        yield "generate was given synced_gpus: PaSS decodes on one process, so leave it out"
    for name, reason in _REFUSED_OPTIONS.items():
        if getattr(config, name, None):
            yield f"generate was given {name}, and with PaSS {reason}: leave it out"


def _cache_complaints(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> Iterator[str]:
    if config.cache_implementation not in (None, "dynamic"):
        yield (
            f"generate was given cache_implementation={config.cache_implementation!r}: PaSS needs "
            "a cache of its own, so leave it out"
        )
    if not model_kwargs.get("use_cache", True):
        yield "generate was given use_cache=False: PaSS needs its cache, so leave it out"
    name, cache = given_cache(model_kwargs)
    # An empty one is prepared by `generate` itself. A user's own would be expected to be filled.
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        yield (
            f"generate was given {name}: PaSS can neither continue nor fill a cache that "
            "is not its own, so give the whole text as input_ids and leave it out"
        )


def _input_complaints(
    processors: LogitsProcessorList, model_kwargs: Mapping[str, Any]
) -> Iterator[str]:
    for name, value in model_kwargs.items():
        if value is not None and name not in _MODEL_INPUTS:
            yield f"generate was given {name}: PaSS takes text as input_ids alone, so leave it out"
    for processor in processors:
        if isinstance(processor, _STATEFUL_PROCESSORS):
            yield (
                f"{type(processor).__name__} keeps a state from token to token, which refused "
                "candidates would spoil: leave out the option or processor that asks for it"
            )


def seen_ids(ids: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
    """Which ids are text and not padding, `[B, P]` bool; padding is on the left alone.

    Raises:
        GenerateError: the mask hides something else, or positions do not count the text.
    """
    mask = model_kwargs.get("attention_mask")  # `generate` drops one without padding
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) != 0
    if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise GenerateError(
            "attention_mask hides ids behind the beginning of a prompt: pad on the left, with "
            "tokenizer.padding_side='left', and hide nothing else"
        )
    positions = model_kwargs.get("position_ids")
    counted = seen.long().cumsum(-1) - 1
    if positions is not None and bool(((positions.to(ids.device) != counted) & seen).any()):
        raise GenerateError(
            "generate was given position_ids that do not count each prompt from 0: leave them out"
        )
    return seen
