"""Transformers' own ways of decoding: plain, with its prompt lookup, with a draft model.

The same weights as our methods, in the same process and with the same settings.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from passlm.bench.engines.decoding import MethodError, Record
from passlm.generate import Generator
from passlm.loading.models import load_model
from passlm.params import SamplingParams

ASSISTED = "hf-assistant"
LOOKUP_TOKENS = 10  # candidates of transformers' prompt lookup


class _FirstToken(BaseStreamer):
    """Looks at the clock when the first new id comes."""

    told: float | None = None
    _prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt comes first."""
        if self._prompt:
            self._prompt = False
        elif self.told is None:
            self.told = time.perf_counter()

    def end(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class TransformersGenerate:
    """Transformers' own `generate` with the same settings, on the model as it was loaded.

    Attributes:
        model: that decodes.
        eos: ids that end a text.
        ignore_eos: they do not.
        lookup_tokens: how many candidates its prompt lookup takes; None without.
        assistant: drafts as many as its own settings say; None without.
    """

    model: PreTrainedModel
    eos: frozenset[int]
    ignore_eos: bool
    lookup_tokens: int | None = None
    assistant: PreTrainedModel | None = None

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_new_tokens: int
    ) -> Record:
        """See `Decode`."""
        options = self._options(sampling)
        model: Any = self.model
        torch.manual_seed(sampling.seed or 0)
        first = _FirstToken()
        begun = time.perf_counter()
        ids = torch.tensor([list(prompt)], device=self.model.device)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=first,
            **options,
        )
        tokens = tuple(written[0, len(prompt) :].tolist())
        seconds = time.perf_counter() - begun
        return Record(tokens, seconds, first_token_seconds=first.told and first.told - begun)

    def _options(self, sampling: SamplingParams) -> dict[str, Any]:
        """Every setting named, since `generate` fills gaps from the model's own settings."""
        options: dict[str, Any] = {
            "do_sample": sampling.temperature > 0,
            "num_beams": 1,
            "use_cache": True,
            "repetition_penalty": sampling.repetition_penalty,
            "min_new_tokens": sampling.min_new_tokens or None,
            "eos_token_id": None if self.ignore_eos else sorted(self.eos) or None,
            "pad_token_id": min(self.eos, default=0),  # unused in a batch of one
        }
        if self.lookup_tokens is not None:
            options["prompt_lookup_num_tokens"] = self.lookup_tokens
        if self.assistant is not None:
            options["assistant_model"] = self.assistant
        if sampling.temperature > 0:
            options |= {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p or None,
            }
        return options


def check_assistant(names: Collection[str], assistant: object | None) -> None:
    """Make sure that there is a draft model where, and only where, a method drafts with it.

    Args:
        names: of methods.
        assistant: its name, or the model.

    Raises:
        MethodError: one of the two is missing.
    """
    if ASSISTED in names and assistant is None:
        raise MethodError(
            f"method {ASSISTED} drafts with a second model: name one with --assistant, smaller and "
            "of the same family"
        )
    if assistant is not None and ASSISTED not in names:
        raise MethodError(f"--assistant is for the method {ASSISTED}: name it in --methods")


def load_assistant(name: str, lm: Generator) -> PreTrainedModel:
    """The draft model, in the type and on the device of the one it drafts for.

    Args:
        name: a hub id, folder or GGUF file.
        lm: the model that judges what is drafted.

    Raises:
        ModelError: it cannot be loaded.
        MethodError: its tokens are others.
    """
    loaded = load_model(name, dtype=lm.target.dtype, device=str(lm.target.device))
    if loaded.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise MethodError(
            f"--assistant {name} has another vocabulary than the model, and method {ASSISTED} "
            "needs the same: name a smaller model of the same family"
        )
    drafts, judges = (
        one.config.get_text_config().vocab_size for one in (loaded.model, lm.target.model)
    )
    if drafts != judges:  # tables filled up to different sizes
        raise MethodError(
            f"--assistant {name} has logits for {drafts} tokens and the model for {judges}, which "
            f"method {ASSISTED} cannot compare: name a model with as many"
        )
    return loaded.model
