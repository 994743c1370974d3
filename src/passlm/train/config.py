"""What a training run is asked to do; the command line's flags are made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from passlm.errors import InputError

Loss = Literal["distillation", "cross-entropy", "acceptance"]
Kind = Literal["embeddings", "lora", "sampler", "head"]
"""What is trained, each with all of those before it, but for `head`: a draft head is trained alone
and added to files that there are; see `docs/training.md`."""


class ConfigError(InputError):
    """A setting outside its range; one line that names the cure."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Raises:
        ConfigError: a value lies outside its range.
    """

    kind: Kind = field(
        default="sampler",
        metadata={
            "help": "what to train: embeddings alone, gated LoRA too, a sampler head too; or a "
            "draft head for the files of --start-from"
        },
    )
    lookahead_tokens: int = field(default=6, metadata={"help": "look-ahead rows to train, L"})
    lora_rank: int = field(default=12, metadata={"help": "of each layer's low-rank update"})
    lora_layers: tuple[str, ...] = field(
        default=(),
        metadata={"help": "pattern of linear layers with an update, may be repeated; default all"},
    )
    sampler_width: int = field(default=640, metadata={"help": "of the sampler head"})
    sampler_tokens: int = field(
        default=2, metadata={"help": "how many tokens before its own the head is told"}
    )
    head_width: int = field(default=640, metadata={"help": "of the draft head"})
    head_tokens: int = field(
        default=2,
        metadata={"help": "how many tokens before the guessed one the draft head is told"},
    )
    head_depths: int = field(
        default=3, metadata={"help": "tokens that the draft head guesses behind a row"}
    )
    head_vocabulary: int = field(
        default=4096,
        metadata={"help": "tokens that the draft head guesses among, the text's most frequent"},
    )
    head_texts: int = field(
        default=64, metadata={"help": "a draft head's anchors are drawn from so many last texts"}
    )
    steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    sequences: int = field(default=1, metadata={"help": "texts that go through at once"})
    accumulate: int = field(
        default=1, metadata={"help": "batches of texts whose gradients make one step"}
    )
    sequence_tokens: int = field(default=256, metadata={"help": "tokens of a text"})
    anchors: int = field(
        default=160,
        metadata={
            "help": "real rows of a text that carry a look-ahead group; of a draft head, drawn for "
            "each text from the last ones"
        },
    )
    keep: float = field(
        default=0.5,
        metadata={"help": "share of the groups that go on to the next row; 1 trains whole groups"},
    )
    loss: Loss = field(
        default="distillation",
        metadata={
            "help": "towards the model's own distribution, the text's tokens, or acceptance itself"
        },
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "the model's distribution is learnt at this temperature"}
    )
    position_weight: float = field(
        default=1.0, metadata={"help": "row j weighs this to the power of j - 1 in the loss"}
    )
    learning_rate: float = field(
        default=0.01, metadata={"help": "of the embeddings; highest of the cosine, as all of them"}
    )
    lora_learning_rate: float = field(default=0.002, metadata={"help": "of the LoRA"})
    sampler_learning_rate: float = field(default=0.001, metadata={"help": "of the sampler head"})
    head_learning_rate: float = field(default=0.002, metadata={"help": "of the draft head"})
    warmup: int = field(default=20, metadata={"help": "steps until the highest rate"})
    clip: float = field(default=1.0, metadata={"help": "longest gradient; 0 for any length"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute layers twice, to save memory"}
    )
    held_out: float = field(default=0.02, metadata={"help": "share of the documents held out"})
    evaluate_every: int = field(default=100, metadata={"help": "steps between held-out figures"})
    evaluate_texts: int = field(default=24, metadata={"help": "held-out texts of a figure"})
    checkpoint_every: int = field(default=50, metadata={"help": "steps between checkpoints"})
    seed: int = field(default=0, metadata={"help": "of data order, anchors and first values"})

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
        own = 1 if self.kind == "head" else self.anchors  # a draft head's are drawn from many texts
        needed = own + self.reach + 1
        _require(
            self.sequence_tokens >= needed,
            "sequence_tokens",
            self.sequence_tokens,
            f"{needed} or more, to hold the anchors and the tokens after them",
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
            "left out for a draft head, which has no gradients in the model's layers",
        )
        _require(self.clip >= 0, "clip", self.clip, "0 or more")
        _require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        _require(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")

    @property
    def reach(self) -> int:
        """Tokens that are guessed behind an anchor."""
        return self.head_depths if self.kind == "head" else self.lookahead_tokens


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name.replace('_', '-')} is {value}: it must be {expected}")
