"""A llama that learns to count in a second, its text, and helpers to decode with it.

Random weights are enough to compare ways of decoding; what look-ahead rows guess right has to be
learnt. So this model is trained on texts that count modulo 16 in steps of 1 to 3, with some runs
of tokens blanked out: look-ahead rows need only find out what a blank is. Nothing here asserts;
that is left to the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.text import Row
from passlm.drafts.draft_head import DraftHead
from passlm.lookahead.trained import LookAhead
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target
from passlm.outputs import Step
from passlm.train.config import TrainConfig
from passlm.train.data import Document, TokenWindows
from passlm.train.head import HeadTrainer
from passlm.train.loop import Trainer

NUMBERS = 16
BLANKS = 4  # ids behind the numbers, for the first to fourth token of a blanked run
VOCABULARY = NUMBERS + BLANKS
WINDOW = 8
_FIRST = ord("a")  # the character of id 0
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def small_llama(
    vocabulary: int = VOCABULARY, seed: int = 0, scale: float = 0.1, **sizes: int
) -> PreTrainedModel:
    """A llama of random weights of this standard deviation, float32; of other sizes where given."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**_SIZES, **sizes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


def counting(texts: int, tokens: int, seed: int) -> Tensor:
    """Texts that count, `[texts, tokens]`; at one token in ten the step changes."""
    draw = np.random.default_rng(seed)
    steps = draw.integers(1, 4, (texts, tokens))
    changes = draw.random((texts, tokens)) < 0.1
    latest = np.maximum.accumulate(np.where(changes, np.arange(tokens), 0), axis=1)
    numbers = draw.integers(NUMBERS, size=(texts, 1)) + np.cumsum(
        np.take_along_axis(steps, latest, axis=1), axis=1
    )
    return torch.from_numpy(numbers % NUMBERS)


def blanked(texts: Tensor, seed: int) -> Tensor:
    """The texts `[B, S]` with a run in each twelve tokens replaced by blanks."""
    draw = np.random.default_rng(seed)
    starts = np.arange(3, texts.shape[1] - 12, 12) + draw.integers(8, size=(len(texts), 1))
    places = torch.from_numpy(starts[:, :, None] + np.arange(BLANKS)).flatten(1)
    blanks = torch.arange(NUMBERS, VOCABULARY).repeat(places.shape[1] // BLANKS)
    return texts.scatter(1, places, blanks.expand_as(places))


@cache
def counting_llama() -> Target:
    """A llama trained on such texts; tests leave it as it is."""
    model = small_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        text = counting(16, 48, seed=step)
        loss = model(input_ids=blanked(text, seed=step), labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Target(model.requires_grad_(False))


@cache
def counting_mistral() -> Target:
    """The same weights in a mistral, whose rows see no further back than `WINDOW` positions."""
    config = MistralConfig(vocab_size=VOCABULARY, sliding_window=WINDOW, **_SIZES)
    model = MistralForCausalLM(config).eval()
    model.load_state_dict(counting_llama().model.state_dict())
    return Target(model.requires_grad_(False))


def windows(seed: int, length: int, documents: int = 12) -> TokenWindows:
    """Counting texts to train on."""
    ids = counting(documents, 3 * length, 1000 + seed).tolist()
    texts = ["".join(chr(_FIRST + token) for token in text) for text in ids]

    def tokenize(batch: list[str]) -> list[list[int]]:
        return [[ord(character) - _FIRST for character in text] for text in batch]

    return TokenWindows([Document(Path("text"), t) for t in texts], tokenize, 0, length, seed)


def trainer(
    folder: Path, config: TrainConfig, target: Target | None = None, text_seed: int = 1
) -> Trainer:
    """A run on counting texts from the mean embedding on, with what its kind trains."""
    target = target or counting_llama()
    mean = LookAhead.mean(target, config.lookahead_tokens, "counting")
    rank = 0 if config.kind == "embeddings" else config.lora_rank
    width = config.sampler_width if config.kind == "sampler" else 0
    if config.kind == "head":
        rank = width = 0
    look_ahead = mean.extended(
        target, rank, config.lora_layers, width, config.seed, config.sampler_tokens
    )
    if config.kind == "head":
        shape = config.head_width, config.head_tokens, config.head_depths
        head = DraftHead.start(target.d_model, *shape, torch.arange(NUMBERS), config.seed)
        look_ahead = LookAhead(look_ahead.embeddings, look_ahead.card, head=head)
    return training(folder, config, look_ahead, target, text_seed)


def training(
    folder: Path, config: TrainConfig, look_ahead: LookAhead, target: Target, text_seed: int = 1
) -> Trainer:
    """A run on counting texts that goes on from some look-ahead."""
    length = config.sequence_tokens
    texts, held_out = windows(text_seed, length), windows(2, length)
    kind = HeadTrainer if config.kind == "head" else Trainer
    return kind(target, look_ahead, texts, held_out, config, folder)


_BRIEFLY = TrainConfig(
    kind="embeddings",
    lookahead_tokens=BLANKS,
    steps=20,
    sequences=2,
    sequence_tokens=48,
    anchors=24,
    keep=1.0,
    learning_rate=0.1,
    warmup=3,
    evaluate_every=20,
    evaluate_texts=1,
)


@cache
def counting_look_ahead() -> LookAhead:
    """Look-ahead rows trained for the counting llama until about one in two is accepted."""
    with TemporaryDirectory() as folder:
        run = trainer(Path(folder), _BRIEFLY)
        for _ in run.run():
            pass
    return run.look_ahead


@cache
def counting_look_ahead_with_parts() -> LookAhead:
    """The same with a gated LoRA and a sampler head, random ones that were trained for a moment."""
    target = counting_llama()
    look_ahead = randomised(
        counting_look_ahead().extended(target, 4, (), 16, sampler_tokens=2), 0.2
    )
    config = replace(_BRIEFLY, kind="sampler", lora_rank=4, sampler_width=16, steps=8)
    with TemporaryDirectory() as folder:
        for _ in training(Path(folder), config, look_ahead, target).run():
            pass
    return look_ahead


def randomised(look_ahead: LookAhead, scale: float, shortlist: int = 6) -> LookAhead:
    """Its LoRA and sampler head no longer without effect, and the shortlist below `NUMBERS`."""
    generator = torch.Generator().manual_seed(0)
    lora, sampler = look_ahead.lora, look_ahead.sampler
    silent = [*(lora.up if lora is not None else ()), *([] if sampler is None else [sampler.out])]
    for tensor in silent:
        tensor.data.copy_(scale * torch.randn(tensor.shape, generator=generator))
    if sampler is not None:
        sampler.shortlist = shortlist
    return LookAhead(look_ahead.embeddings, look_ahead.card, lora, sampler)


def decode(
    target: Target, requests: Sequence[Request], look_ahead: LookAheadRows | None = None
) -> list[tuple[list[int], list[Step]]]:
    """Decode requests as one batch; the new tokens and the steps of each."""
    decoder = Decoder(target, look_ahead)
    rows = [decoder.join(request) for request in requests]
    steps: dict[Row, list[Step]] = {row: [] for row in rows}
    while decoder.rows:
        for row, step in decoder.step():
            steps[row].append(step)
    return [(row.tokens[len(row.request.prompt) :], steps[row]) for row in rows]
