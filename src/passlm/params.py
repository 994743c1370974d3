"""Parameters of one generation: how tokens are sampled and when to stop.

Values are validated here, once, so that no other module has to. Converting them to transformers'
logits processors is left to `decoding/distribution.py`, applying the stop conditions to
`decoding/stopping.py`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from passlm.errors import InputError

Judge = Literal["coupled", "rejection"]
Draft = Literal["sampled", "greedy"]
METHODS = ("auto", "ar", "two-pass", "one-pass")
QUANTIZED = ("int8",)  # types that weights can be rounded to
Processor = Callable[[Any, Any], Any]  # a transformers LogitsProcessor: (ids [1, T], scores [1, V])
_MIN_TEMPERATURE = 1e-6  # logits divided by much less overflow float32


class ParameterError(InputError):
    """A parameter outside its valid range.

    The message is one line that says which values are valid.
    """


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ParameterError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral)


@dataclass(frozen=True)
class SamplingParams:
    """Parameters for sampling the next token. The defaults give greedy decoding.

    Raises:
        ParameterError: a value is outside its valid range.
    """

    temperature: float = field(
        default=0.0,
        metadata={"help": "sampling temperature; 0 is greedy, 1 the model's own distribution"},
    )
    top_k: int = field(
        default=0, metadata={"help": "sample from the k most likely tokens only; 0 disables it"}
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "sample from the smallest set of tokens whose total probability reaches this "
            "value; 1 disables it"
        },
    )
    min_p: float = field(
        default=0.0,
        metadata={
            "help": "drop tokens whose probability is below this share of the most likely token's; "
            "0 disables it"
        },
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "values above 1 make tokens of the prompt and the output less likely; "
            "1 disables it"
        },
    )
    presence_penalty: float = field(
        default=0.0,
        metadata={
            "help": "subtracted from the logit of every token generated so far; from -2 to 2"
        },
    )
    frequency_penalty: float = field(
        default=0.0,
        metadata={
            "help": "subtracted from a token's logit for each time it was generated; from -2 to 2"
        },
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "maps token ids to numbers added to their logits"}
    )
    bad_words: tuple[tuple[int, ...], ...] = field(
        default=(), metadata={"help": "token sequences that must not be generated"}
    )
    min_new_tokens: int = field(
        default=0, metadata={"help": "suppress the end of sequence before this many new tokens"}
    )
    processors: tuple[Processor, ...] = field(
        default=(), metadata={"help": "additional transformers LogitsProcessor objects"}
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "random seed; the same seed gives the same output (default: a new seed each "
            "time)"
        },
    )
    judge: Judge = field(
        default="coupled",
        metadata={
            "help": "rule that accepts draft tokens; both keep the model's distribution, and with "
            "coupled the output depends on the seed but not on the drafts"
        },
    )
    draft: Draft = field(
        default="sampled",
        metadata={
            "help": "how look-ahead rows and the draft head choose draft tokens: sampled, or the "
            "most likely ones"
        },
    )

    def __post_init__(self) -> None:
        _require(
            _is_number(self.temperature)
            and (self.temperature == 0 or self.temperature >= _MIN_TEMPERATURE),
            f"temperature is {self.temperature!r}: it must be 0 (greedy) or at least "
            f"{_MIN_TEMPERATURE}",
        )
        _require(
            _is_whole(self.top_k) and self.top_k >= 0,
            f"top_k is {self.top_k!r}: it must be 0 (disabled) or a positive whole number",
        )
        _require(
            _is_number(self.top_p) and 0 < self.top_p <= 1,
            f"top_p is {self.top_p!r}: it must be above 0 and at most 1",
        )
        _require(
            _is_number(self.min_p) and 0 <= self.min_p <= 1,
            f"min_p is {self.min_p!r}: it must lie between 0 and 1",
        )
        _require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty is {self.repetition_penalty!r}: it must be positive (1 disables "
            "it)",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(
                _is_number(value) and -2 <= value <= 2,
                f"{name} is {value!r}: it must lie between -2 and 2 (0 disables it)",
            )
        _require(
            _is_whole(self.min_new_tokens) and self.min_new_tokens >= 0,
            f"min_new_tokens is {self.min_new_tokens!r}: it must be a whole number, 0 or more",
        )
        _require(
            self.seed is None or (_is_whole(self.seed) and 0 <= self.seed < 2**64),
            f"seed is {self.seed!r}: it must be a whole number between 0 and 2**64 - 1",
        )
        for token, bias in self.logit_bias.items():
            _require(
                _is_whole(token) and token >= 0 and _is_number(bias),
                f"logit_bias of {token!r} is {bias!r}: it must map token ids to finite numbers",
            )
        _require(
            self.judge in get_args(Judge),
            f"judge is {self.judge!r}: it must be one of {', '.join(get_args(Judge))}",
        )
        _require(
            self.draft in get_args(Draft),
            f"draft is {self.draft!r}: it must be one of {', '.join(get_args(Draft))}",
        )
        _require(
            all(len(word) > 0 and min(word) >= 0 for word in self.bad_words),
            "bad_words contains an empty sequence or a negative token id: remove it",
        )


@dataclass(frozen=True)
class StopParams:
    """Conditions that end a generation.

    Raises:
        ParameterError: a value is outside its valid range.
    """

    max_new_tokens: int = field(default=128, metadata={"help": "maximum number of new tokens"})
    stop: tuple[str, ...] = field(
        default=(),
        metadata={"help": "stop before this string appears; can be given several times"},
    )
    ignore_eos: bool = field(
        default=False, metadata={"help": "continue after the end-of-sequence token"}
    )

    def __post_init__(self) -> None:
        _require(
            _is_whole(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"max_new_tokens is {self.max_new_tokens!r}: it must be a whole number, 1 or more",
        )
        _require(
            not isinstance(self.stop, str),
            f"stop is the string {self.stop!r}: it must be a sequence of strings, ({self.stop!r},)",
        )
        _require(all(self.stop), "a stop string is empty: remove it or give at least one character")
