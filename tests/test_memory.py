"""How much memory training is said to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from byte_model import byte_llama
from transformers import LlamaConfig, PreTrainedConfig

from passlm.train import memory
from passlm.train.config import TrainConfig
from passlm.train.memory import NotEnoughMemoryError, Place, check, needed

TRAIN = TrainConfig()
ROWS = 300
CPU = Place("cpu")


def config(**sizes: Any) -> PreTrainedConfig:
    """A llama of a few numbers."""
    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**small, **heads, "tie_word_embeddings": False, **sizes})


TABLES = 2 * 50 * 16
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16  # attention, feed-forward, norms
WEIGHTS = TABLES + 3 * LAYER + 16


def weights(shards: int = 1, **sizes: Any) -> int:
    """Bytes of the weights alone: what is left when nothing else takes any."""
    one, two = (
        needed(config(**sizes), t, TRAIN, 0, shards) for t in (torch.float32, torch.bfloat16)
    )
    cache = TRAIN.sequence_tokens * 16 * 3 * 2
    return (one - two) * 2 - 4 * cache


def test_weights_are_counted_once() -> None:
    """Catches tables that are counted twice where they are tied, or left out."""
    assert weights() == 4 * WEIGHTS
    assert weights(tie_word_embeddings=True) == 4 * (WEIGHTS - TABLES // 2)
    model = byte_llama()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    more = needed(model.config, torch.float32, TRAIN, 0) - needed(
        model.config, torch.bfloat16, TRAIN, 0
    )
    assert more == 2 * (numbers + TRAIN.sequence_tokens * 32 * 2 * 2)


def test_a_draft_head_needs_no_gradients_in_layers() -> None:
    """Catches a head refused for rows that are kept in each layer, and copies left out."""
    head = replace(TRAIN, kind="head", head_vocabulary=30, sequences=2)
    few, many = (needed(config(), torch.float32, head, rows) for rows in (0, 2000))
    assert many - few == 2 * 2000 * (16 * 4 + 30 * 2)
    texts = needed(config(), torch.float32, replace(head, head_texts=2 * head.head_texts), 0) - few
    assert texts == head.head_texts * head.sequence_tokens * (2 * 16 * 4 + 30 * 2)
    with pytest.raises(NotEnoughMemoryError, match="head-texts"):
        check(config(hidden_size=2**22), torch.float32, CPU, head, ROWS)


def test_a_shard_holds_its_share_and_a_layer_that_computes() -> None:
    """Catches a model refused because the whole of it does not fit where a half need."""
    inside = 3 * LAYER + 16
    assert weights(shards=2) == 4 * (TABLES + inside // 2 + inside // 3)


def test_nothing_is_loaded_to_find_out() -> None:
    """Catches an estimate that takes the memory it is about: this model has 800 GB."""
    huge = config(vocab_size=100_000, hidden_size=16_384, intermediate_size=53_248)
    huge.num_hidden_layers = 60
    assert 700e9 < needed(huge, torch.float32, TRAIN, ROWS) < 2000e9


@pytest.mark.parametrize(
    ("larger", "dtype", "train", "rows"),
    [
        ({"hidden_size": 32}, torch.bfloat16, TRAIN, ROWS),
        ({"num_hidden_layers": 6}, torch.bfloat16, TRAIN, ROWS),
        ({"vocab_size": 5000}, torch.bfloat16, TRAIN, ROWS),
        ({}, torch.float32, TRAIN, ROWS),
        ({}, torch.bfloat16, replace(TRAIN, sequences=2), ROWS),
        ({}, torch.bfloat16, replace(TRAIN, sequence_tokens=512), ROWS),
        ({}, torch.bfloat16, TRAIN, 2 * ROWS),
    ],
)
def test_more_of_anything_takes_more(
    larger: dict[str, int], dtype: torch.dtype, train: TrainConfig, rows: int
) -> None:
    """Catches a figure that leaves one of the causes out, and so refuses too late."""
    before = needed(config(), torch.bfloat16, TRAIN, ROWS)
    assert needed(config(**larger), dtype, train, rows) > before


def test_layers_computed_twice_take_less() -> None:
    """Catches a cure in the message that does not count."""
    saving = replace(TRAIN, gradient_checkpointing=True)
    plain, saved = (needed(config(), torch.float32, train, ROWS) for train in (TRAIN, saving))
    assert plain - saved == ROWS * 16 * 3 * 4 * (memory._KEPT_A_LAYER - 1)


@pytest.mark.parametrize(("more", "refused"), [(-1, True), (0, False), (1, False)])
def test_what_does_not_fit_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch, more: int, refused: bool
) -> None:
    """Catches a run that ends in the operating system's killing it, and one that would have fit."""
    wanted = needed(config(), torch.float32, TRAIN, ROWS)
    monkeypatch.setattr(memory, "available", lambda _: wanted + more)
    if not refused:
        return check(config(), torch.float32, CPU, TRAIN, ROWS)
    with pytest.raises(NotEnoughMemoryError, match=r"about 0\.2 GiB and 0\.2 GiB are free on cpu"):
        check(config(), torch.float32, CPU, TRAIN, ROWS)
    return None


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches four processes that each find room for one."""
    wanted = needed(config(), torch.float32, TRAIN, ROWS)
    monkeypatch.setattr(memory, "available", lambda _: 2 * wanted)
    check(config(), torch.float32, Place("cpu", neighbours=2), TRAIN, ROWS)
    with pytest.raises(NotEnoughMemoryError):
        check(config(), torch.float32, Place("cpu", neighbours=3), TRAIN, ROWS)


def test_memory_of_a_device_that_is_none_is_not_told() -> None:
    """Catches a traceback where loading would say what is wrong with --device."""
    assert memory.available("gpu") is None
    assert memory.available("cuda:77") is None
    check(config(), torch.float32, Place("gpu"), TRAIN, ROWS)
    free = memory.available("cpu")
    assert free is not None
    assert free > 2**20
