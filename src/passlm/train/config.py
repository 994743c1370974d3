"""Settings of a training run; the command line's flags are derived from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from passlm.errors import InputError

Loss = Literal["distillation", "cross-entropy", "acceptance"]
Kind = Literal["embeddings", "lora", "sampler", "head"]
"""What to train. Each kind includes those before it, except `head`: a draft head is trained alone
and added to existing files; see `docs/training.md`."""


class ConfigError(InputError):
    """Setting outside its range; a one-line message with the expected range."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Raises:
        ConfigError: A value lies outside its range.
    """

    kind: Kind = field(
        default="sampler",
        metadata={
            "help": "what to train: embeddings alone, with a gated LoRA, with a sampler head too; "
            "or a draft head for the files of --start-from"
        },
    )
    lookahead_tokens: int = field(
        default=6, metadata={"help": "number of look-ahead rows to train, L"}
    )
    lora_rank: int = field(default=12, metadata={"help": "rank of each layer's low-rank update"})
    lora_layers: tuple[str, ...] = field(
        default=(),
        metadata={"help": "pattern of the linear layers to update, may be repeated; default all"},
    )
    sampler_width: int = field(default=640, metadata={"help": "width of the sampler head"})
    sampler_tokens: int = field(
        default=2,
        metadata={"help": "number of preceding tokens that the sampler head takes as input"},
    )
    head_width: int = field(default=640, metadata={"help": "width of the draft head"})
    head_tokens: int = field(
        default=2,
        metadata={"help": "number of preceding tokens that the draft head takes as input"},
    )
    head_depths: int = field(
        default=3, metadata={"help": "number of tokens that the draft head proposes after a row"}
    )
    head_vocabulary: int = field(
        default=4096,
        metadata={
            "help": "size of the draft head's vocabulary: the most frequent tokens of the text"
        },
    )
    head_texts: int = field(
        default=64,
        metadata={"help": "number of latest sequences from which a draft head's anchors are drawn"},
    )
    steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    sequences: int = field(default=1, metadata={"help": "sequences per batch"})
    accumulate: int = field(
        default=1,
        metadata={"help": "number of batches whose gradients are accumulated in one step"},
    )
    sequence_tokens: int = field(default=256, metadata={"help": "tokens per sequence"})
    anchors: int = field(
        default=160,
        metadata={
            "help": "real rows per sequence that carry a look-ahead group; for a draft head, drawn "
            "from the latest sequences"
        },
    )
    keep: float = field(
        default=0.5,
        metadata={
            "help": "share of the groups that continue to the next row; 1 trains complete groups"
        },
    )
    loss: Loss = field(
        default="distillation",
        metadata={
            "help": "train towards the model's own distribution, the text's tokens, or acceptance"
        },
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "temperature of the model's distribution that is learnt"}
    )
    position_weight: float = field(
        default=1.0,
        metadata={"help": "row j has this value to the power of j - 1 as its weight in the loss"},
    )
    learning_rate: float = field(
        default=0.01,
        metadata={"help": "peak learning rate of the embeddings; all rates follow a cosine"},
    )
    lora_learning_rate: float = field(
        default=0.002, metadata={"help": "peak learning rate of the LoRA"}
    )
    sampler_learning_rate: float = field(
        default=0.001, metadata={"help": "peak learning rate of the sampler head"}
    )
    head_learning_rate: float = field(
        default=0.002, metadata={"help": "peak learning rate of the draft head"}
    )
    warmup: int = field(default=20, metadata={"help": "steps until the peak learning rate"})
    clip: float = field(
        default=1.0, metadata={"help": "maximum gradient norm; 0 disables clipping"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute layers in the backward pass to save memory"}
    )
    held_out: float = field(default=0.02, metadata={"help": "share of the documents held out"})
    evaluate_every: int = field(
        default=100, metadata={"help": "steps between evaluations on held-out text"}
    )
    evaluate_texts: int = field(default=24, metadata={"help": "held-out sequences per evaluation"})
    checkpoint_every: int = field(default=50, metadata={"help": "steps between checkpoints"})
    seed: int = field(
        default=0, metadata={"help": "seed of data order, anchors and initial values"}
    )

    def __post_init__(self) -> None:
        for name in (
            "lookahead_tokens",
            "lora_rank",
            "sampler_width",
            "sampler_tokens",
            "head_width",
            "head_tokens",
            "head_depths",
            "head_vocabulary",
            "head_texts",
            "steps",
            "sequences",
            "accumulate",
            "anchors",
            "evaluate_every",
            "evaluate_texts",
            "checkpoint_every",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        own = (
            1 if self.kind == "head" else self.anchors
        )  # a draft head's are drawn from several sequences
        needed = own + self.reach + 1
        _require(
            self.sequence_tokens >= needed,
            "sequence_tokens",
            self.sequence_tokens,
            f"{needed} or more, to hold the anchors and the tokens that follow them",
        )
        _require(0 < self.keep <= 1, "keep", self.keep, "above 0 and at most 1")
        _require(self.loss in get_args(Loss), "loss", self.loss, " or ".join(get_args(Loss)))
        _require(self.kind in get_args(Kind), "kind", self.kind, " or ".join(get_args(Kind)))
        for name in (
            "learning_rate",
            "lora_learning_rate",
            "sampler_learning_rate",
            "head_learning_rate",
            "teacher_temperature",
            "position_weight",
        ):
            value = getattr(self, name)
            _require(0 < value < float("inf"), name, value, "a number above 0")
        _require(
            not (self.kind == "head" and self.gradient_checkpointing),
            "gradient_checkpointing",
            True,
            "left out for a draft head, which needs no gradients in the model's layers",
        )
        _require(self.clip >= 0, "clip", self.clip, "0 or more")
        _require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        _require(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")

    @property
    def reach(self) -> int:
        """Number of tokens proposed after an anchor."""
        return self.head_depths if self.kind == "head" else self.lookahead_tokens


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name.replace('_', '-')} is {value}: it must be {expected}")
