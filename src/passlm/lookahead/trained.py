"""Trained look-ahead files: the embeddings, their folder on disk, the check against a target.

The card is left to `card.py`, training to `train/`, use of the rows to `decoding/decoder.py`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from passlm.drafts.draft_head import AppliedHead, DraftHead
from passlm.drafts.sampler_head import SamplerHead
from passlm.layers.fingerprint import Fingerprint
from passlm.layers.int8 import rounded
from passlm.layers.lora import GatedLora, LoraError, groups_of
from passlm.lookahead.card import (
    Card,
    LookAheadError,
    first_line,
    read_card,
    whole_number,
)
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target
from passlm.params import ParameterError
from passlm.provenance import write_together

# Default group lengths: the fastest ones measured; see docs/log.md.
_WEAK_DRAFTS = {"one-pass": 1, "two-pass": 1}
_STRONG_DRAFTS = {"two-pass": 4, "one-pass": 1}
DEFAULT_SHIPPED = "best"
CARD_FILE = "lookahead.json"
TENSORS_FILE = "lookahead.safetensors"
SHIPPED = Path(__file__).parents[1] / "shipped"
# Small tensors and token ids. All other tensors are matrices, stored as int8 with a scale per row.
_IDS = "head.listed"
_STORED_AS = {"embeddings": torch.float32, _IDS: torch.int32}
_SCALE = ".scale"  # suffix of a matrix's name

_log = logging.getLogger(__name__)


class LookAhead(nn.Module):
    """Look-ahead embeddings `LA_1..LA_L` for one target, with optional trained modules.

    Args:
        embeddings: `[L, d_model]`. All parameters are kept in float32.
        card: Description of the files and of their target.
        lora: Updates of the target's layers that apply to look-ahead rows.
        sampler: Sampler head, which rescores the look-ahead rows' candidates.
        head: Draft head, which needs no look-ahead rows.
    """

    def __init__(
        self,
        embeddings: Tensor,
        card: Card,
        lora: GatedLora | None = None,
        sampler: SamplerHead | None = None,
        head: DraftHead | None = None,
    ) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.detach().clone().float())
        self.lora = None if lora is None else lora.float()
        self.sampler = None if sampler is None else sampler.float()
        self.head = None if head is None else head.float()
        self.card = replace(
            card,
            lora=None if lora is None else lora.description(),
            sampler=None if sampler is None else sampler.description(),
            head=None if head is None else {**(card.head or {}), **head.description()},
        )

    @property
    def tokens(self) -> int:
        """Number of look-ahead rows, `L`."""
        return int(self.embeddings.shape[0])

    @property
    def numbers(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def digest(self, head: bool | None = None) -> str:
        """Return a hash of all trained parameters.

        Args:
            head: True for the draft head's parameters alone, False for all others, None for both.
        """
        found = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if head in (None, name.startswith("head.")):
                values: Tensor = tensor.detach().cpu().float().contiguous()
                found.update(f"{name} {tuple(values.shape)} ".encode() + values.numpy().tobytes())
        return found.hexdigest()

    def rows(self, target: Target) -> LookAheadRows:
        """Return rows for decoding: copies in the target's dtype and on its device.

        Later changes to this object do not affect the copies.

        Raises:
            UnsupportedModelError: There is a draft head, and the target's output layer does not
                have plain weights.
        """
        sampler = None
        if self.sampler is not None:
            sampler = self.sampler.copied(target.device, target.dtype)
        inputs = self.embeddings.detach().to(target.device, target.dtype, copy=True)
        lora = None if self.lora is None else self.lora.on(target.model, target.dtype)
        head = None
        if self.head is not None:
            head = AppliedHead.of(self.head, target.embeddings, target.dtype)
        return LookAheadRows(inputs, lora, sampler, head)

    def trained_rows(self, target: Target) -> LookAheadRows:
        """Return rows for training, which share the parameters of this object."""
        lora = None if self.lora is None else self.lora.on(target.model)
        return LookAheadRows(self.embeddings, lora, self.sampler)

    def extended(
        self,
        target: Target,
        rank: int,
        layers: Sequence[str],
        sampler_width: int,
        seed: int = 0,
        sampler_tokens: int = 1,
    ) -> LookAhead:
        """Return the same embeddings with a new gated LoRA and sampler head.

        The new modules are initialised so that the output is unchanged.

        Args:
            target: Model that the files are for.
            rank: Rank of the LoRA; 0 for none.
            layers: Shell patterns of the linear layers to update; empty for all.
            sampler_width: Width of the sampler head; 0 for none.
            seed: Seed of the initial values.
            sampler_tokens: Number of preceding tokens that the sampler head takes as input for
                each row.

        Raises:
            LoraError: The rank is larger than a layer, or a pattern matches nothing.
        """
        lora = sampler = None
        if rank:
            groups = groups_of(target.model, target.probe, layers)
            lora = GatedLora.start(target.model, groups, rank, seed)
        if sampler_width:
            sampler = SamplerHead.start(
                target.d_model, sampler_width, seed=seed, tokens=sampler_tokens
            )
        return LookAhead(self.embeddings, self.card, lora, sampler)

    def tensors(self) -> dict[str, Tensor]:
        """Return all trained tensors, by the name under which they are stored."""
        named: dict[str, Tensor] = {"embeddings": self.embeddings}
        for part in (self.lora, self.sampler, self.head):
            named |= {} if part is None else part.tensors()
        return named

    @classmethod
    def mean(cls, target: Target, tokens: int, base_model: str) -> LookAhead:
        """Initialise every row to the mean input embedding, where training starts."""
        every = torch.arange(target.vocabulary, device=target.device)
        rows = target.embed(every).detach().float().mean(0).repeat(tokens, 1)
        return cls(rows, Card(base_model, target.fingerprint, tokens))

    @classmethod
    def fixed_token(cls, target: Target, token: int, tokens: int, base_model: str) -> LookAhead:
        """Set every row to the embedding of one existing token: the paper's untrained baseline."""
        row = target.embed(torch.tensor([token], device=target.device)).detach()
        training = {"kind": "fixed-token", "token": token}
        return cls(
            row.repeat(tokens, 1), Card(base_model, target.fingerprint, tokens, training=training)
        )

    def group_length(self, wanted: int | None, method: str = "two-pass") -> int:
        """Return the length of the look-ahead groups to decode with.

        Args:
            wanted: Requested length; None for the method's default.
            method: Name of the decoding method.

        Raises:
            ParameterError: The length is below 1 or above the number of look-ahead rows.
        """
        usual = _WEAK_DRAFTS if self.sampler is None else _STRONG_DRAFTS
        length = min(usual.get(method, self.tokens), self.tokens) if wanted is None else wanted
        if not 1 <= length <= self.tokens:
            raise ParameterError(
                f"lookahead_tokens is {length}: these look-ahead files have rows for 1 to "
                f"{self.tokens}"
            )
        return length

    def check(self, target: Target) -> None:
        """Check that these files were made for this target.

        Other weights of the same shape cause only a warning: the output remains the target's own,
        but fewer candidates may be accepted.

        Raises:
            LookAheadError: The target has another shape; the message names both.
        """
        mine, theirs = self.card.target, target.fingerprint
        if mine.shape != theirs.shape:
            raise LookAheadError(
                f"look-ahead files made for {self.card.base_model} ({mine.shape}) do not fit "
                f"this model ({theirs.shape}): train files for it with 'passlm train'"
            )
        if not mine.same_weights(theirs):
            _log.warning(
                "look-ahead files were made for %s; this model has the same shape but other "
                "weights: fewer candidates may be accepted",
                self.card.base_model,
            )
        if self.lora is not None:
            try:
                self.lora.check(target.model)
            except LoraError as error:
                raise LookAheadError(
                    f"look-ahead files made for {self.card.base_model} do not fit this model: "
                    f"{error}"
                ) from error

    def save(self, folder: Path) -> None:
        """Write the folder completely or not at all; after an interruption it has no card.

        Raises:
            OSError: The folder cannot be written; its previous content is unchanged.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors().items():
            tensors |= _stored(name, tensor.detach().cpu())
        files = {folder / TENSORS_FILE: save_tensors(tensors)}
        write_together({**files, folder / CARD_FILE: self.card.to_json()})


def load(folder: Path) -> LookAhead:
    """Read a look-ahead folder. Only JSON and safetensors are read, never pickle.

    Raises:
        LookAheadError: A file is missing or damaged; names it.
    """
    card = read_card(folder / CARD_FILE)
    path = folder / TENSORS_FILE
    try:
        tensors = load_tensors(path.read_bytes())
    except OSError as error:
        raise LookAheadError(f"cannot read {path}: {error.strerror}") from error
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch lacks
        raise LookAheadError(f"{path} is damaged: {first_line(error)}") from error
    try:
        tensors = _restored(tensors)
        _check_tensors(path, tensors, card)
        parts = _lora(card, tensors), _sampler(card, tensors), _head(card, tensors)
        return LookAhead(tensors["embeddings"], card, *parts)
    except (LoraError, KeyError, TypeError, ValueError) as error:
        raise LookAheadError(f"{path} does not fit its card: {first_line(error)}") from error


def _stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors that represent a tensor in the file, by name."""
    if name in _STORED_AS:
        return {name: tensor.to(_STORED_AS[name]).contiguous()}
    whole, scale = rounded(tensor.float())
    return {name: whole.contiguous(), name + _SCALE: scale.contiguous()}


def _restored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file in float32, by name.

    Raises:
        ValueError: A scale does not match its matrix, or a tensor has the wrong dtype.
    """
    restored: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        scale = stored.get(name + _SCALE)
        if scale is not None:
            if tensor.ndim != 2 or scale.shape != tensor.shape[:1]:
                raise ValueError(f"the scale of {name} does not match its shape")
            restored[name] = tensor.float() * scale.float()[:, None]
        elif name.removesuffix(_SCALE) not in stored or not name.endswith(_SCALE):
            if tensor.is_floating_point() == (name == _IDS):
                raise ValueError(f"{name} is stored as {tensor.dtype}")
            restored[name] = tensor.float()
    return restored


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], card: Card) -> None:
    embeddings = tensors.get("embeddings")
    expected = (card.look_ahead_tokens, card.target.d_model)
    known = {"embeddings"} | {name for name in tensors if name.startswith(_part_prefixes(card))}
    if set(tensors) != known or embeddings is None:
        strange = ", ".join(sorted(set(tensors) - known)) or "no embeddings"
        raise LookAheadError(f"{path} holds {strange!r:.80}, which does not match its card")
    if tuple(embeddings.shape) != expected:
        raise LookAheadError(
            f"{path} holds embeddings of shape {tuple(embeddings.shape)}, but its card says "
            f"{expected}"
        )
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise LookAheadError(f"{path} holds numbers that are not finite: train again")


def _part_prefixes(card: Card) -> tuple[str, ...]:
    parts = (("lora.", card.lora), ("sampler.", card.sampler), ("head.", card.head))
    return tuple(prefix for prefix, part in parts if part is not None)


def _lora(card: Card, tensors: Mapping[str, Tensor]) -> GatedLora | None:
    if card.lora is None:
        return None
    lora = GatedLora.of_tensors([tuple(group) for group in card.lora["groups"]], tensors)
    stored = sum(name.startswith("lora.") for name in tensors)
    if lora.rank != card.lora["rank"] or len(lora.tensors()) != stored:
        raise LoraError("rank or layers of the LoRA do not match")
    return lora


def _sampler(card: Card, tensors: Mapping[str, Tensor]) -> SamplerHead | None:
    if card.sampler is None:
        return None
    hidden_in, token_in, out = (tensors[f"sampler.{name}"] for name in SamplerHead.NAMES)
    width, d_model = whole_number(dict(card.sampler), "width"), card.target.d_model
    if sum(name.startswith("sampler.") for name in tensors) != len(SamplerHead.NAMES):
        raise ValueError("unexpected tensors in the sampler head")
    # Old cards lack "tokens": their heads take one token as input.
    told = whole_number({"tokens": 1, **card.sampler}, "tokens") * d_model
    shapes = [tuple(t.shape) for t in (hidden_in, token_in, out)]
    if shapes != [(width, d_model), (width, told), (d_model, width)]:
        raise ValueError(f"the sampler head is not of width {width} for {told // d_model} tokens")
    return SamplerHead(hidden_in, token_in, out, whole_number(dict(card.sampler), "shortlist"))


def _head(card: Card, tensors: Mapping[str, Tensor]) -> DraftHead | None:
    if card.head is None:
        return None
    described = dict(card.head)
    width, depths = whole_number(described, "width"), whole_number(described, "depths")
    told, listed = whole_number(described, "tokens"), whole_number(described, "listed")
    d_model = card.target.d_model
    shapes = (width, d_model), (width, told * d_model), (depths, width), (d_model, width), (listed,)
    found = [tensors[f"head.{name}"] for name in DraftHead.NAMES]
    if [tuple(t.shape) for t in found] != list(shapes):
        raise ValueError("the draft head has an unexpected shape")
    ids = found[-1]
    if not bool(((ids >= 0) & (ids < card.target.vocabulary) & (ids == ids.round())).all()):
        raise ValueError("the draft head lists tokens outside the model's vocabulary")
    if sum(name.startswith("head.") for name in tensors) != len(found):
        raise ValueError("unexpected tensors in the draft head")
    return DraftHead(*found)


def shipped(target: Target) -> dict[str, Path]:
    """Return the look-ahead folders shipped with the package for this target, by name."""
    found = {}
    mine = target.fingerprint
    for path in sorted(SHIPPED.glob(f"*/*/{CARD_FILE}")):
        theirs = read_card(path).target
        if theirs.shape == mine.shape and theirs.same_weights(mine):
            found[path.parent.name] = path.parent
    return found


def shipped_for_shape(model_type: str, d_model: int, vocabulary: int, layers: int) -> list[str]:
    """Return the names of the shipped look-ahead files for models of this shape."""
    shape = Fingerprint(model_type, d_model, vocabulary, layers, ()).shape
    cards = sorted(SHIPPED.glob(f"*/*/{CARD_FILE}"))
    return [path.parent.name for path in cards if read_card(path).target.shape == shape]


def locate(name: str, target: Target) -> Path:
    """Return the folder that a name refers to.

    The name is one shipped for the target, a folder or a hub id, in this order of precedence.

    Raises:
        LookAheadError: There is no such folder; the message says what to do.
    """
    packaged = shipped(target)
    if name in packaged:
        return packaged[name]
    if os.path.isdir(name):  # Path.is_dir raises on a name that is too long
        return Path(name)
    if "/" in name and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        return _from_hub(name)
    ships = (
        f"shipped for this model: {', '.join(packaged)}"
        if packaged
        else ("none are shipped for this model: train some with 'passlm train'")
    )
    raise LookAheadError(
        f"no look-ahead files {name!r}: neither a folder nor a shipped name ({ships})"
    )


def load_for(target: Target, name: str | Path | None = None) -> LookAhead | None:
    """Load look-ahead files that fit a target.

    Args:
        target: Loaded model.
        name: As for `locate`; None for the files shipped for the target.

    Returns:
        The files; None if `name` is None and none are shipped for the target.

    Raises:
        LookAheadError: The files are missing, damaged or made for another model.
    """
    if name is None:
        packaged = shipped(target)
        if not packaged:
            return None
        folder = packaged.get(DEFAULT_SHIPPED, next(iter(packaged.values())))
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
            f"no look-ahead files {name!r}: no such folder, and the hub says: {first_line(error)}"
        ) from error


def push_to_hub(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a look-ahead folder to the Hugging Face hub and return its URL.

    Args:
        folder: A folder that `load` can read.
        repository: `user/name`; created if missing.
        private: Make a new repository private.

    Raises:
        LookAheadError: The folder does not load.
    """
    from huggingface_hub import HfApi

    load(folder)
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    patterns = [CARD_FILE, TENSORS_FILE, "README.md", "*.png"]
    done = api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=patterns)
    return str(done)
