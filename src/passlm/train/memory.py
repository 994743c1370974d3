"""How much memory training takes, told before anything large is loaded."""

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
_KEPT_A_LAYER = 24  # numbers of d_model kept for the gradients of a row in a layer, measured
_LOGITS_COPIES = 6  # of a part's logits: the teacher's, the rows', their gradients


class NotEnoughMemoryError(InputError):
    """The target does not fit into memory; one line."""


@dataclass(frozen=True)
class Place:
    """Where a process trains.

    Attributes:
        device: as torch names it.
        shards: how many processes the target's layers are split over.
        neighbours: how many processes share the device's memory, this one included.
    """

    device: str
    shards: int = 1
    neighbours: int = 1


def needed(
    config: PreTrainedConfig, dtype: torch.dtype, train: TrainConfig, rows: int, shards: int = 1
) -> int:
    """Bytes that training takes, about, in one process.

    Args:
        config: of the target.
        dtype: of its weights.
        train: the settings.
        rows: look-ahead rows of a text.
        shards: how many processes the target's layers are split over.
    """
    text: Any = config.get_text_config()
    with torch.device("meta"):  # shapes alone
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    weights = _weights(model, int(text.num_hidden_layers), shards) * dtype.itemsize
    cache: int = (
        train.sequences * train.sequence_tokens * text.hidden_size * text.num_hidden_layers * 2
    )
    if train.kind == "head":
        held = _of_texts(text, dtype, train, rows)
    else:
        kept = 1 if train.gradient_checkpointing else _KEPT_A_LAYER
        numbers = train.sequences * rows * text.hidden_size * text.num_hidden_layers * kept
        held = numbers * dtype.itemsize
    logits = PART_NUMBERS * 4 * _LOGITS_COPIES
    total: int = weights + held + cache * dtype.itemsize + logits
    return total


def _of_texts(text: Any, dtype: torch.dtype, train: TrainConfig, rows: int) -> int:
    """What a draft head's anchors are drawn from: hidden states, and chances in float16.

    A step has copies: of the hidden states of all texts, and of all for the rows that it draws.
    """
    listed = min(train.head_vocabulary, text.vocab_size)
    hidden, chances = text.hidden_size * dtype.itemsize, listed * 2
    kept = max(train.head_texts, train.sequences) * train.sequence_tokens
    total: int = kept * (2 * hidden + chances) + train.sequences * rows * (hidden + chances)
    return total


def _weights(model: Any, layers: int, shards: int) -> int:
    """Numbers in a process: everything, or a share of the layers and one that computes."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    whole = {p for table in tables if table is not None for p in table.parameters()}
    outside: int = sum(p.numel() for p in whole)
    inside: int = sum(p.numel() for p in model.parameters()) - outside
    return outside + (inside if shards == 1 else inside // shards + inside // layers)


def available(device: str) -> int | None:
    """Bytes that are free where the target is to lie; None where that cannot be told."""
    try:
        if torch.device(device).type == "cuda":
            return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (RuntimeError, AssertionError):  # no such device, which loading explains
        return None
    return int(psutil.virtual_memory().available)


def check(
    config: PreTrainedConfig, dtype: torch.dtype, place: Place, train: TrainConfig, rows: int
) -> None:
    """Refuse to start what would not end.

    Raises:
        NotEnoughMemoryError: more is needed than is free; says how much.
    """
    wanted = needed(config, dtype, train, rows, place.shards) * place.neighbours
    free = available(place.device)
    if free is not None and wanted > free:
        fewer = "--sequences or --anchors, --gradient-checkpointing"
        if train.kind == "head":
            fewer = "--head-texts, --anchors or --head-vocabulary"
        raise NotEnoughMemoryError(
            f"training takes about {wanted / _GIB:.1f} GiB and {free / _GIB:.1f} GiB are free on "
            f"{place.device}: take --dtype bfloat16, fewer {fewer}, or a smaller model"
        )
