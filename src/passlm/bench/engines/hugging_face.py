"""Decode with transformers' own `generate`: plain, with prompt lookup, or with a draft model.

These methods use the same weights, process and settings as passlm's own methods.
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
LOOKUP_TOKENS = 10  # number of candidates of transformers' prompt lookup


class _FirstToken(BaseStreamer):
    """A streamer that records the time at which the first new id arrives."""

    received_at: float | None = None
    _prompt = True

    def put(self, value: Tensor) -> None:
        """Note the time of the first new id; `generate` puts the prompt before it."""
        if self._prompt:
            self._prompt = False
        elif self.received_at is None:
            self.received_at = time.perf_counter()

    def end(self) -> None:
        """Do nothing, since no token is buffered."""


@dataclass(frozen=True)
class TransformersGenerate:
    """Decoding with transformers' `generate`, on the model as it was loaded.

    Attributes:
        model: the model that decodes.
        eos: token ids that end a sequence.
        ignore_eos: whether to continue after these ids.
        lookup_tokens: number of candidates of prompt lookup; None for no prompt lookup.
        assistant: the draft model, whose generation config sets the number of draft tokens; None
            for no draft model.
    """

    model: PreTrainedModel
    eos: frozenset[int]
    ignore_eos: bool
    lookup_tokens: int | None = None
    assistant: PreTrainedModel | None = None

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_new_tokens: int
    ) -> Record:
        """Decode one prompt; see `Decode`."""
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
        return Record(
            tokens, seconds, first_token_seconds=first.received_at and first.received_at - begun
        )

    def _options(self, sampling: SamplingParams) -> dict[str, Any]:
        """Return the arguments of `generate`.

        All settings are given, because `generate` takes missing ones from the model's generation
        config.
        """
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
    """Check that a draft model is given if, and only if, a method uses it.

    Args:
        names: names of the methods.
        assistant: the draft model or its name; None if none is given.

    Raises:
        MethodError: a method needs a draft model and none is given, or the other way round.
    """
    if ASSISTED in names and assistant is None:
        raise MethodError(
            f"method {ASSISTED} needs a draft model: give a smaller model of the same family with "
            "--assistant"
        )
    if assistant is not None and ASSISTED not in names:
        raise MethodError(f"--assistant is only for method {ASSISTED}: add it to --methods")


def load_assistant(name: str, lm: Generator) -> PreTrainedModel:
    """Load the draft model, with the data type and on the device of the target model.

    Args:
        name: hub id, folder or GGUF file of the draft model.
        lm: the target model.

    Raises:
        ModelError: the draft model cannot be loaded.
        MethodError: its vocabulary or number of logits differs from the target's.
    """
    loaded = load_model(name, dtype=lm.target.dtype, device=str(lm.target.device))
    if loaded.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise MethodError(
            f"the vocabulary of --assistant {name} differs from the model's, and method "
            f"{ASSISTED} needs the same: give a smaller model of the same family"
        )
    draft_size, target_size = (
        one.config.get_text_config().vocab_size for one in (loaded.model, lm.target.model)
    )
    if draft_size != target_size:  # embedding tables padded to different sizes
        raise MethodError(
            f"--assistant {name} has {draft_size} logits per token, the model {target_size}, and "
            f"method {ASSISTED} needs equally many: give another draft model"
        )
    return loaded.model
