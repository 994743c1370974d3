"""Read and write `lookahead.json`: the target, content and training of look-ahead files.

Reading and checking the tensors next to it is left to `trained.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from passlm.errors import InputError
from passlm.layers.fingerprint import Fingerprint

FORMAT_VERSION = 2
HELD_OUT = "held-out text, teacher-forced"  # key of training's own measurement in `accepted_length`
_READABLE = (1, 2)  # version 1 stored its matrices in bfloat16
_WEIGHT_BOUND = 1e30  # bound on sampled weights: sums stay finite in float32
_DEFAULT_LENGTH = 0.5  # accepted length assumed if a card has no measurement
_DEFAULT_CHANCE = 0.3  # acceptance rate assumed for a draft head's tokens, likewise
_MAX_CHANCE = 0.99  # upper bound on a measured rate: the next text may differ


class LookAheadError(InputError):
    """Look-ahead files that are missing, damaged or made for another model; a one-line message."""


@dataclass(frozen=True)
class Card:
    """Content of `lookahead.json`.

    Attributes:
        base_model: Name of the target that the files were trained for.
        target: Fingerprint of that target.
        look_ahead_tokens: Number of look-ahead rows, `L`.
        lora: Rank, and layer names grouped by shared input; None without a LoRA.
        sampler: Width and shortlist of the sampler head; None without one.
        head: Shape, training and acceptance of the draft head; None without one.
        training: How the files were trained: data, steps, loss, time, machine.
        accepted_length: Measured mean accepted length, on held-out text and by suite.
        chances: Under `look_ahead` and `head`, the greedy acceptance rate of each candidate given
            that those before it were accepted. Measured on `texts`, which no benchmark uses. None
            if unknown.
        licence: Licence of the files.
    """

    base_model: str
    target: Fingerprint
    look_ahead_tokens: int
    lora: Mapping[str, Any] | None = None
    sampler: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    accepted_length: Mapping[str, Any] = field(default_factory=dict)
    chances: Mapping[str, Any] | None = None
    licence: str = "apache-2.0"

    def to_json(self) -> str:
        """Return the text of the file."""
        content = {
            "format_version": FORMAT_VERSION,
            "d_model": self.target.d_model,
            **asdict(self),
        }
        return json.dumps(content, indent=2) + "\n"

    @property
    def prior(self) -> tuple[float, ...]:
        """Acceptance rate of each look-ahead candidate, given that those before it are accepted.

        The measured rates if the card has them, else rates derived from held-out text, else a
        default. Rates measured on benchmark suites are not used: plans that start from them would
        be tuned on the text they are tested on.
        """
        held_out = self.accepted_length.get(HELD_OUT)
        known = self._measured("look_ahead") or _given_before(_reached(held_out))
        if not known:
            mean = held_out if _is_length(held_out) else _DEFAULT_LENGTH
            known = [mean / (1 + mean)]  # sum of powers: a / (1 - a)
        return _padded(known, self.look_ahead_tokens)

    @property
    def head_prior(self) -> tuple[float, ...]:
        """Acceptance rate of each draft-head token, given that those before it are accepted.

        Derived as in `prior`. Empty without a head.
        """
        if self.head is None:
            return ()
        known = self._measured("head") or _given_before(_reached(self.head))
        return _padded(known or [_DEFAULT_CHANCE], whole_number(dict(self.head), "depths"))

    def _measured(self, name: str) -> list[float]:
        return [min(_MAX_CHANCE, chance) for chance in (self.chances or {}).get(name, ())]


def _given_before(reached: Sequence[float]) -> list[float]:
    """Return conditional acceptance rates from the shares of groups accepted up to row 1, 2, ..."""
    pairs = pairwise([1.0, *reached])
    return [min(_MAX_CHANCE, now / before) if before else 0.0 for before, now in pairs]


def _padded(chances: Sequence[float], wanted: int) -> tuple[float, ...]:
    """Return the first `wanted` rates; repeat the last one if there are too few."""
    return tuple([*chances, *[chances[-1]] * wanted][:wanted])


def _reached(entry: object) -> list[float]:
    """Return the share of groups accepted up to row 1, 2, ...; empty if not recorded."""
    shares = entry.get("by_position") if isinstance(entry, dict) else None
    if not isinstance(shares, list) or not all(map(_is_share, shares)):
        return []
    return [float(share) for share in shares]


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_length(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 <= value < _WEIGHT_BOUND  # type: ignore[operator]


def read_card(path: Path) -> Card:
    """Read a card.

    Raises:
        LookAheadError: The file is missing, damaged or of another format; names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LookAheadError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LookAheadError(f"{path} is not JSON: {first_line(error)}") from error
    try:
        version = content["format_version"]
        if type(version) is not int or version not in _READABLE:
            raise LookAheadError(
                f"{path} has format version {version!r:.40}, this passlm reads {_READABLE}: "
                "use the version of passlm that wrote it, or train again"
            )
        return _card(content)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LookAheadError):
            raise
        raise LookAheadError(
            f"{path} is damaged: invalid or missing {first_line(error)}"
        ) from error


def _card(content: dict[str, Any]) -> Card:
    target = content["target"]
    return Card(
        base_model=_line(content, "base_model"),
        target=Fingerprint(
            model_type=_line(target, "model_type"),
            d_model=whole_number(target, "d_model"),
            vocabulary=whole_number(target, "vocabulary"),
            layers=whole_number(target, "layers"),
            sample=_weights(target, "sample"),
        ),
        look_ahead_tokens=whole_number(content, "look_ahead_tokens"),
        lora=_optional_table(content, "lora"),
        sampler=_optional_table(content, "sampler"),
        head=_optional_table(content, "head"),
        training=_table(content, "training"),
        accepted_length=_table(content, "accepted_length"),
        chances=_chances(content),
        licence=_line(content, "licence"),
    )


def _line(content: dict[str, Any], name: str) -> str:
    value = content[name]
    if (
        not isinstance(value, str) or not value.isprintable()
    ):  # keeps error messages that quote it on one line
        raise ValueError(f"{name!r}")
    return value


def whole_number(content: dict[str, Any], name: str) -> int:
    """Return a positive integer from a table.

    Raises:
        KeyError: The name is missing.
        ValueError: The value is not a positive integer.
    """
    value = content[name]
    if type(value) is not int or value < 1:  # bool is a subclass of int
        raise ValueError(f"{name!r}")
    return value


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name!r}")
    return value


def _optional_table(content: dict[str, Any], name: str) -> dict[str, Any] | None:
    return None if content.get(name) is None else _table(content, name)


def _chances(content: dict[str, Any]) -> dict[str, Any] | None:
    table = _optional_table(content, "chances")
    for name in ("look_ahead", "head"):
        values = (table or {}).get(name, [])
        if not isinstance(values, list) or not all(map(_is_share, values)):
            raise ValueError(f"'chances', {name!r}")
    return table


def _weights(content: dict[str, Any], name: str) -> tuple[float, ...]:
    value = content[name]
    if not isinstance(value, list):
        raise ValueError(f"{name!r}")
    if not all(type(v) in (int, float) and abs(v) < _WEIGHT_BOUND for v in value):
        raise ValueError(f"{name!r}")
    return tuple(float(v) for v in value)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
