"""Estimate the memory that training needs, before anything large is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from passlm.errors import InputError
from passlm.train.config import TrainConfig
from passlm.train.loss import PART_NUMBERS

_GIB = 2**30
_KEPT_A_LAYER = 24  # vectors of d_model kept per row and layer for the backward pass, measured
_LOGITS_COPIES = 6  # copies of a part's logits: the teacher's, the rows', their gradients


class NotEnoughMemoryError(InputError):
    """Training does not fit into memory; a one-line message."""


@dataclass(frozen=True)
class Place:
    """Device of a process, and the processes that share it.

    Attributes:
        device: Name of the device in torch.
        shards: Number of processes that the target's layers are sharded over.
        neighbours: Number of processes that share the device's memory, including this one.
    """

    device: str
    shards: int = 1
    neighbours: int = 1


def needed(
    config: PreTrainedConfig, dtype: torch.dtype, train: TrainConfig, rows: int, shards: int = 1
) -> int:
    """Estimate the memory that training needs in one process, in bytes.

    Args:
        config: Configuration of the target.
        dtype: Type of the target's weights.
        train: Settings of the run.
        rows: Look-ahead rows per sequence.
        shards: Number of processes that the target's layers are sharded over.
    """
    text: Any = config.get_text_config()
    with torch.device("meta"):  # shapes only
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    weights = _weights(model, int(text.num_hidden_layers), shards) * dtype.itemsize
    cache: int = (
        train.sequences * train.sequence_tokens * text.hidden_size * text.num_hidden_layers * 2
    )
    if train.kind == "head":
        held = _head_bytes(text, dtype, train, rows)
    else:
        kept = 1 if train.gradient_checkpointing else _KEPT_A_LAYER
        numbers = train.sequences * rows * text.hidden_size * text.num_hidden_layers * kept
        held = numbers * dtype.itemsize
    logits = PART_NUMBERS * 4 * _LOGITS_COPIES
    total: int = weights + held + cache * dtype.itemsize + logits
    return total


def _head_bytes(text: Any, dtype: torch.dtype, train: TrainConfig, rows: int) -> int:
    """Return the bytes of hidden states and float16 probabilities kept for a draft head.

    A step also copies the hidden states of all sequences, and both tensors for the rows it draws.
    """
    listed = min(train.head_vocabulary, text.vocab_size)
    hidden, chances = text.hidden_size * dtype.itemsize, listed * 2
    kept = max(train.head_texts, train.sequences) * train.sequence_tokens
    total: int = kept * (2 * hidden + chances) + train.sequences * rows * (hidden + chances)
    return total


def _weights(model: Any, layers: int, shards: int) -> int:
    """Return the parameters per process: all, or a share of the layers plus the active one."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    whole = {p for table in tables if table is not None for p in table.parameters()}
    outside: int = sum(p.numel() for p in whole)
    inside: int = sum(p.numel() for p in model.parameters()) - outside
    return outside + (inside if shards == 1 else inside // shards + inside // layers)


def available(device: str) -> int | None:
    """Return the free memory of a device in bytes; None if it cannot be determined."""
    try:
        if torch.device(device).type == "cuda":
            return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (RuntimeError, AssertionError):  # no such device; loading reports it
        return None
    return int(psutil.virtual_memory().available)


def check(
    config: PreTrainedConfig, dtype: torch.dtype, place: Place, train: TrainConfig, rows: int
) -> None:
    """Refuse to start a run that would exhaust the memory.

    Raises:
        NotEnoughMemoryError: More memory is needed than is free; the message says how much.
    """
    wanted = needed(config, dtype, train, rows, place.shards) * place.neighbours
    free = available(place.device)
    if free is not None and wanted > free:
        lower = "--sequences or --anchors, --gradient-checkpointing"
        if train.kind == "head":
            lower = "--head-texts, --anchors or --head-vocabulary"
        raise NotEnoughMemoryError(
            f"training takes about {wanted / _GIB:.1f} GiB and {free / _GIB:.1f} GiB are free on "
            f"{place.device}: use --dtype bfloat16, a lower {lower}, or a smaller model"
        )
