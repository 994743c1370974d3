"""The trained part: look-ahead embeddings, their folder on disk, the check against a target.

Training them is left to `train/`, using them to `decode.py`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from passlm.errors import InputError
from passlm.params import ParameterError
from passlm.provenance import write_atomically
from passlm.target import Target

FORMAT_VERSION = 1
DEFAULT_GROUP = 1  # where nothing else is asked for: the fastest measured, see docs/log.md
CARD_FILE = "lookahead.json"
TENSORS_FILE = "lookahead.safetensors"
SHIPPED = Path(__file__).parent / "shipped"
_SAMPLES = 64  # weights kept to tell two targets of one shape apart
# bfloat16 rounds a weight by up to 0.4 %, on average 0.14 %; other weights differ by far more.
_SAME_WEIGHTS = 0.004
_NO_WEIGHT = 1e30  # a sampled weight is smaller: sums stay finite in float32

_log = logging.getLogger(__name__)


class LookAheadError(InputError):
    """Look-ahead files that are missing, damaged, or made for another model; one line."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells one target from another.

    Attributes:
        model_type: the architecture's name in transformers.
        d_model: numbers in an input embedding.
        vocabulary: number of token ids.
        layers: number of decoder layers.
        sample: weights at fixed places of the input embeddings and of a middle layer.
    """

    model_type: str
    d_model: int
    vocabulary: int
    layers: int
    sample: tuple[float, ...]

    @property
    def shape(self) -> str:
        """The part that must agree, in words."""
        return (
            f"{self.model_type} with d_model {self.d_model}, {self.layers} layers, "
            f"vocabulary {self.vocabulary}"
        )

    def same_weights(self, other: Fingerprint) -> bool:
        """Whether the samples agree up to the rounding of a 16-bit type."""
        mine, theirs = torch.tensor(self.sample), torch.tensor(other.sample)
        if mine.shape != theirs.shape:
            return False
        return bool((mine - theirs).abs().mean() <= _SAME_WEIGHTS * mine.abs().mean())


def fingerprint(target: Target) -> Fingerprint:
    """The fingerprint of a loaded target."""
    weights = [p for p in target.model.parameters() if p.ndim == 2]
    sampled = [
        _spread(weights[0], _SAMPLES // 2),
        _spread(weights[len(weights) // 2], _SAMPLES // 2),
    ]
    return Fingerprint(
        model_type=str(target.config.model_type),
        d_model=target.d_model,
        vocabulary=target.vocabulary,
        layers=int(target.config.num_hidden_layers),
        sample=tuple(float(f"{value:.6g}") for value in torch.cat(sampled).tolist()),
    )


def _spread(weight: Tensor, count: int) -> Tensor:
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().cpu()


@dataclass(frozen=True)
class Card:
    """What `lookahead.json` says.

    Attributes:
        base_model: the name of the target it was trained for.
        target: that target's fingerprint.
        look_ahead_tokens: number of look-ahead rows, `L`.
        training: how it was trained: data, steps, loss, time, machine.
        accepted_length: measured mean accepted length by suite.
        licence: of the files.
    """

    base_model: str
    target: Fingerprint
    look_ahead_tokens: int
    training: Mapping[str, Any] = field(default_factory=dict)
    accepted_length: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "apache-2.0"

    def to_json(self) -> str:
        """The file's text."""
        content = {
            "format_version": FORMAT_VERSION,
            "d_model": self.target.d_model,
            "lora": None,
            **asdict(self),
        }
        return json.dumps(content, indent=2) + "\n"


class LookAhead(nn.Module):
    """Look-ahead embeddings `LA_1..LA_L` for one target.

    Args:
        embeddings: `[L, d_model]`, kept in float32.
        card: what they are and whom they are for.
    """

    def __init__(self, embeddings: Tensor, card: Card) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.detach().clone().float())
        self.card = card

    @property
    def tokens(self) -> int:
        """Number of look-ahead rows, `L`."""
        return int(self.embeddings.shape[0])

    def inputs(self, target: Target) -> Tensor:
        """The rows as the target takes them, `[L, d_model]` in its type, on its device."""
        return self.embeddings.to(device=target.device, dtype=target.dtype)

    @classmethod
    def mean(cls, target: Target, tokens: int, base_model: str) -> LookAhead:
        """Every row the mean input embedding: the start of training."""
        every = torch.arange(target.vocabulary, device=target.device)
        rows = target.embed(every).detach().float().mean(0).repeat(tokens, 1)
        return cls(rows, Card(base_model, fingerprint(target), tokens))

    @classmethod
    def fixed_token(cls, target: Target, token: int, tokens: int, base_model: str) -> LookAhead:
        """Every row the embedding of one existing token: the paper's untrained baseline."""
        row = target.embed(torch.tensor([token], device=target.device)).detach()
        training = {"kind": "fixed-token", "token": token}
        return cls(row.repeat(tokens, 1), Card(base_model, fingerprint(target), tokens, training))

    def group_length(self, wanted: int | None) -> int:
        """The length of the look-ahead groups to decode with; None takes the default.

        Raises:
            ParameterError: there are not so many rows.
        """
        length = min(DEFAULT_GROUP, self.tokens) if wanted is None else wanted
        if not 1 <= length <= self.tokens:
            raise ParameterError(
                f"lookahead_tokens is {length}: these look-ahead files have rows for 1 to "
                f"{self.tokens}"
            )
        return length

    def check(self, target: Target) -> None:
        """Make sure that these rows were made for this target.

        Other weights of the same shape are a warning: the output stays the target's own, and only
        the acceptance suffers.

        Raises:
            LookAheadError: the target has another shape; names both.
        """
        mine, theirs = self.card.target, fingerprint(target)
        if mine.shape != theirs.shape:
            raise LookAheadError(
                f"look-ahead files made for {self.card.base_model} ({mine.shape}) do not fit "
                f"this model ({theirs.shape}): train some for it with 'passlm train'"
            )
        if not mine.same_weights(theirs):
            _log.warning(
                "look-ahead files were made for %s, and this model has the same shape but other "
                "weights: fewer candidates may be accepted",
                self.card.base_model,
            )

    def save(self, folder: Path) -> None:
        """Write the folder, each file whole or not at all, the card last.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"embeddings": self.embeddings.detach().cpu().contiguous()}
        write_atomically(folder / TENSORS_FILE, save_tensors(tensors))
        write_atomically(folder / CARD_FILE, self.card.to_json())


def load(folder: Path) -> LookAhead:
    """Read a look-ahead folder. Only JSON and safetensors are read, never pickle.

    Raises:
        LookAheadError: a file is missing or damaged, with its name.
    """
    card = _read_card(folder / CARD_FILE)
    path = folder / TENSORS_FILE
    try:
        tensors = load_tensors(path.read_bytes())
    except OSError as error:
        raise LookAheadError(f"cannot read {path}: {error.strerror}") from error
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type torch lacks
        raise LookAheadError(f"{path} is damaged: {_first_line(error)}") from error
    embeddings = tensors.get("embeddings")
    expected = (card.look_ahead_tokens, card.target.d_model)
    if set(tensors) != {"embeddings"} or embeddings is None:
        raise LookAheadError(f"{path} holds {sorted(tensors)}: expected 'embeddings' alone")
    if tuple(embeddings.shape) != expected or not embeddings.is_floating_point():
        raise LookAheadError(
            f"{path} holds {embeddings.dtype} embeddings of shape {tuple(embeddings.shape)}, "
            f"but its card says {expected}"
        )
    if not bool(embeddings.float().isfinite().all()):
        raise LookAheadError(f"{path} holds numbers that are not finite: train it anew")
    return LookAhead(embeddings, card)


def _read_card(path: Path) -> Card:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LookAheadError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LookAheadError(f"{path} is not JSON: {_first_line(error)}") from error
    try:
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise LookAheadError(
                f"{path} has format version {version!r:.40}, this passlm reads {FORMAT_VERSION}: "
                "use a passlm that wrote it, or train anew"
            )
        return _card(content)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LookAheadError):
            raise
        raise LookAheadError(f"{path} is damaged: bad or missing {_first_line(error)}") from error


def _card(content: dict[str, Any]) -> Card:
    target = content["target"]
    return Card(
        base_model=_line(content, "base_model"),
        target=Fingerprint(
            model_type=_line(target, "model_type"),
            d_model=_count(target, "d_model"),
            vocabulary=_count(target, "vocabulary"),
            layers=_count(target, "layers"),
            sample=_weights(target, "sample"),
        ),
        look_ahead_tokens=_count(content, "look_ahead_tokens"),
        training=_table(content, "training"),
        accepted_length=_table(content, "accepted_length"),
        licence=_line(content, "licence"),
    )


def _line(content: dict[str, Any], name: str) -> str:
    value = content[name]
    if not isinstance(value, str) or not value.isprintable():  # errors that quote it are one line
        raise ValueError(f"{name!r}")
    return value


def _count(content: dict[str, Any], name: str) -> int:
    value = content[name]
    if type(value) is not int or value < 1:  # True is an int too
        raise ValueError(f"{name!r}")
    return value


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name!r}")
    return value


def _weights(content: dict[str, Any], name: str) -> tuple[float, ...]:
    value = content[name]
    if not isinstance(value, list):
        raise ValueError(f"{name!r}")
    if not all(type(v) in (int, float) and abs(v) < _NO_WEIGHT for v in value):
        raise ValueError(f"{name!r}")
    return tuple(float(v) for v in value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def shipped(target: Target) -> dict[str, Path]:
    """The look-ahead folders that ship with the package for this target, by name."""
    found = {}
    mine = fingerprint(target)
    for path in sorted(SHIPPED.glob(f"*/*/{CARD_FILE}")):
        theirs = _read_card(path).target
        if theirs.shape == mine.shape and theirs.same_weights(mine):
            found[path.parent.name] = path.parent
    return found


def shipped_for_shape(model_type: str, d_model: int, vocabulary: int, layers: int) -> list[str]:
    """Names of the shipped look-ahead files for models of this shape."""
    shape = Fingerprint(model_type, d_model, vocabulary, layers, ()).shape
    cards = sorted(SHIPPED.glob(f"*/*/{CARD_FILE}"))
    return [path.parent.name for path in cards if _read_card(path).target.shape == shape]


def locate(name: str, target: Target) -> Path:
    """The folder that a name stands for: one shipped for the target, a folder, or a hub id.

    Raises:
        LookAheadError: there is none, with what to do.
    """
    packaged = shipped(target)
    if name in packaged:
        return packaged[name]
    if os.path.isdir(name):  # Path.is_dir raises where a name is too long
        return Path(name)
    if "/" in name and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        return _from_hub(name)
    ships = (
        f"this model has {', '.join(packaged)} shipped"
        if packaged
        else ("none ship for this model: train some with 'passlm train'")
    )
    raise LookAheadError(f"no look-ahead files {name!r}: neither a folder nor shipped ({ships})")


def load_for(target: Target, name: str | Path | None = None) -> LookAhead | None:
    """Look-ahead files that fit a target.

    Args:
        target: the loaded model.
        name: what `locate` takes; None takes what ships for the target.

    Returns:
        The rows; None where no name is given and nothing ships.

    Raises:
        LookAheadError: the files are missing, damaged or made for another model.
    """
    if name is None:
        folder = next(iter(shipped(target).values()), None)
        if folder is None:
            return None
    else:
        folder = locate(str(name), target)
    rows = load(folder)
    rows.check(target)
    return rows


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CARD_FILE, TENSORS_FILE, "README.md"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise LookAheadError(
            f"no look-ahead files {name!r}: no such folder, and the hub gave: {_first_line(error)}"
        ) from error


def push_to_hub(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a look-ahead folder, as users know it from transformers; gives the address.

    Args:
        folder: a folder that `load` reads.
        repository: `user/name`, made if missing.
        private: whether a new repository is private.

    Raises:
        LookAheadError: the folder does not load.
    """
    from huggingface_hub import HfApi

    load(folder)
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    patterns = [CARD_FILE, TENSORS_FILE, "README.md", "*.png"]
    done = api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=patterns)
    return str(done)
