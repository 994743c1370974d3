"""What `lookahead.json` says: which target the files are for, what they hold, how they were made.

Reading and checking the tensors beside it is left to `trained.py`.
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
HELD_OUT = "held-out text, teacher-forced"  # what training measures, among accepted lengths
_READ = (1, 2)  # the first kept its matrices in bfloat16
_NO_WEIGHT = 1e30  # a sampled weight is smaller: sums stay finite in float32
_GUESSED_LENGTH = 0.5  # accepted a pass, where a card has no figures
_GUESSED_CHANCE = 0.3  # of a draft head's token, likewise
_SUREST = 0.99  # nothing measured on some texts is sure in the next one


class LookAheadError(InputError):
    """Look-ahead files that are missing, damaged, or made for another model; one line."""


@dataclass(frozen=True)
class Card:
    """What `lookahead.json` says.

    Attributes:
        base_model: the name of the target it was trained for.
        target: that target's fingerprint.
        look_ahead_tokens: number of look-ahead rows, `L`.
        lora: rank, and names of the layers by the input they share; None without.
        sampler: width and shortlist of the sampler head; None without.
        head: shape of the draft head, how it was trained, and what of its drafts is accepted; None
            without.
        training: how it was trained: data, steps, loss, time, machine.
        accepted_length: measured mean accepted length, of held-out text and by suite.
        chances: `look_ahead` and `head`, how often each candidate is accepted in greedy text once
            those before it are, of `texts` that nothing is tested on; None where that is not known.
        licence: of the files.
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
        """The file's text."""
        content = {
            "format_version": FORMAT_VERSION,
            "d_model": self.target.d_model,
            **asdict(self),
        }
        return json.dumps(content, indent=2) + "\n"

    @property
    def prior(self) -> tuple[float, ...]:
        """Chance of each look-ahead candidate, once those before it are accepted.

        Those that were measured, else what held-out text shows, else a guess. What was accepted in
        suites is left alone: plans that begin with it would be tuned on what they are tested on.
        """
        held_out = self.accepted_length.get(HELD_OUT)
        known = self._measured("look_ahead") or _given_before(_reached(held_out))
        if not known:
            mean = held_out if _is_length(held_out) else _GUESSED_LENGTH
            known = [mean / (1 + mean)]  # sum of powers: a / (1 - a)
        return _lengthened(known, self.look_ahead_tokens)

    @property
    def head_prior(self) -> tuple[float, ...]:
        """Chance of each of the draft head's tokens, once those before it are accepted.

        As `prior`. Empty without a head.
        """
        if self.head is None:
            return ()
        known = self._measured("head") or _given_before(_reached(self.head))
        return _lengthened(known or [_GUESSED_CHANCE], whole_number(dict(self.head), "depths"))

    def _measured(self, name: str) -> list[float]:
        return [min(_SUREST, chance) for chance in (self.chances or {}).get(name, ())]


def _given_before(reached: Sequence[float]) -> list[float]:
    """Chances given the rows before, from the shares of groups accepted to row 1, 2, ..."""
    pairs = pairwise([1.0, *reached])
    return [min(_SUREST, now / before) if before else 0.0 for before, now in pairs]


def _lengthened(chances: Sequence[float], wanted: int) -> tuple[float, ...]:
    """The first so many; the last one again where there are too few."""
    return tuple([*chances, *[chances[-1]] * wanted][:wanted])


def _reached(entry: object) -> list[float]:
    """Share of groups accepted to row 1, 2, ...; nothing where the figures do not say it."""
    shares = entry.get("by_position") if isinstance(entry, dict) else None
    if not isinstance(shares, list) or not all(map(_is_share, shares)):
        return []
    return [float(share) for share in shares]


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_length(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 <= value < _NO_WEIGHT  # type: ignore[operator]


def read_card(path: Path) -> Card:
    """Read a card.

    Raises:
        LookAheadError: it is missing, damaged or of another format, with its name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LookAheadError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LookAheadError(f"{path} is not JSON: {first_line(error)}") from error
    try:
        version = content["format_version"]
        if type(version) is not int or version not in _READ:
            raise LookAheadError(
                f"{path} has format version {version!r:.40}, this passlm reads {_READ}: "
                "use a passlm that wrote it, or train anew"
            )
        return _card(content)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LookAheadError):
            raise
        raise LookAheadError(f"{path} is damaged: bad or missing {first_line(error)}") from error


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
    if not isinstance(value, str) or not value.isprintable():  # errors that quote it are one line
        raise ValueError(f"{name!r}")
    return value


def whole_number(content: dict[str, Any], name: str) -> int:
    """A whole number above 0; ValueError where there is none."""
    value = content[name]
    if type(value) is not int or value < 1:  # True is an int too
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
    if not all(type(v) in (int, float) and abs(v) < _NO_WEIGHT for v in value):
        raise ValueError(f"{name!r}")
    return tuple(float(v) for v in value)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
