"""Look-ahead folders: what is kept, and what a damaged or foreign one gives."""

from __future__ import annotations

import io
import json
import logging
import pickle
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from small_llama import VOCABULARY, counting_llama, small_llama

from passlm import lookahead
from passlm.lookahead import (
    CARD_FILE,
    TENSORS_FILE,
    Card,
    Fingerprint,
    LookAhead,
    LookAheadError,
    fingerprint,
    load,
    locate,
    push_to_hub,
)
from passlm.target import Target

TOKENS, WIDTH = 3, 8
SMALL = Card("some/base", Fingerprint("llama", WIDTH, 16, 2, (0.5, -0.25)), TOKENS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder of three rows of eight numbers."""
    LookAhead(torch.arange(24.0).reshape(TOKENS, WIDTH), SMALL).save(tmp_path)
    return tmp_path


def refusal(folder: Path) -> str:
    """The message a folder is refused with; any other error fails the test."""
    with pytest.raises(LookAheadError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def problem(folder: Path) -> str | None:
    """The same for a folder that may be sound; None if it is."""
    try:
        load(folder)
    except LookAheadError as error:
        return str(error)
    return None


# Kept and read


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    """Catches a field of the card, or a bit of the rows, lost on the way."""
    training = {"steps": 5, "data": ["a", "b"], "nested": {"loss": 1.25}}
    card = Card("é/model", fingerprint(counting_llama()), 2, training, {"code": 0.5}, "mit")
    rows = torch.randn(2, counting_llama().d_model, generator=torch.Generator().manual_seed(0))
    LookAhead(rows, card).save(tmp_path / "new")
    loaded = load(tmp_path / "new")
    assert loaded.card == card
    assert loaded.tokens == 2
    assert torch.equal(loaded.embeddings, rows)
    assert loaded.embeddings.requires_grad
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [CARD_FILE, TENSORS_FILE]


def test_a_failed_write_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a file where a whole one was: a full disk in the middle of saving."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        LookAhead(torch.zeros(TOKENS, WIDTH), SMALL).save(folder)
    monkeypatch.undo()
    assert float(load(folder).embeddings.detach().sum()) == 276
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_another_float_type_are_read_as_float32(folder: Path, dtype: torch.dtype) -> None:
    """Catches rows trained on in 16 bits."""
    _write(folder, {"embeddings": torch.ones(TOKENS, WIDTH, dtype=dtype)})
    assert load(folder).embeddings.dtype == torch.float32


def test_rows_start_from_the_mean_or_from_one_token() -> None:
    """Catches a mean over the wrong axis, and the row before or after the token asked for."""
    target = counting_llama()
    table = target.model.get_input_embeddings().weight
    mean, fixed = LookAhead.mean(target, 3, "m"), LookAhead.fixed_token(target, 5, 2, "m")
    torch.testing.assert_close(mean.embeddings, table.mean(0).expand(3, -1))
    assert torch.equal(fixed.embeddings, table[5].expand(2, -1))
    assert (mean.tokens, fixed.tokens, fixed.card.look_ahead_tokens) == (3, 2, 2)
    assert fixed.card.training["token"] == 5
    mean.check(target)
    assert mean.inputs(target).dtype == target.dtype


def test_rows_are_a_copy() -> None:
    """Catches training that changes the embedding table of the target."""
    target = counting_llama()
    fixed = LookAhead.fixed_token(target, 5, 2, "m")
    with torch.no_grad():
        fixed.embeddings.zero_()
    assert float(target.model.get_input_embeddings().weight[5].abs().sum()) > 0


# Damage


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / TENSORS_FILE).write_bytes(save_tensors(tensors))


def _raw(dtype: str, count: int) -> bytes:
    """A safetensors file that claims rows of this type, of `count` bytes."""
    about = {"dtype": dtype, "shape": [TOKENS, WIDTH], "data_offsets": [0, count]}
    header = json.dumps({"embeddings": about}).encode()
    return struct.pack("<Q", len(header)) + header + b"\1" * count


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"embeddings": torch.zeros(TOKENS, WIDTH)}, buffer)
    return buffer.getvalue()


class Exploding:
    """Unpickling it would run its code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


NUMBERS = torch.ones(TOKENS, WIDTH)
DAMAGED_TENSORS = {
    "empty": b"",
    "truncated": save_tensors({"embeddings": NUMBERS})[:-4],
    "headless": save_tensors({"embeddings": NUMBERS})[20:],
    "longer": save_tensors({"embeddings": NUMBERS}) + b"\0\0\0\0",
    "torch-file": _torch_file(),
    "pickle": pickle.dumps(Exploding()),
    "text": b"404 Not Found",
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "unknown-type": _raw("Q7", 24),
    "type-torch-lacks": _raw("F4", 12),
    "other-name": save_tensors({"rows": NUMBERS}),
    "extra": save_tensors({"embeddings": NUMBERS, "a\nb": NUMBERS.clone()}),
    "fewer-rows": save_tensors({"embeddings": NUMBERS[:2].clone()}),
    "narrower": save_tensors({"embeddings": NUMBERS[:, :4].clone()}),
    "flat": save_tensors({"embeddings": NUMBERS.flatten()}),
    "transposed": save_tensors({"embeddings": NUMBERS.T.contiguous()}),
    "whole-numbers": save_tensors({"embeddings": NUMBERS.long()}),
    "nan": save_tensors({"embeddings": torch.full((TOKENS, WIDTH), float("nan"))}),
    "infinite": save_tensors({"embeddings": NUMBERS / 0}),
    "too-large": save_tensors({"embeddings": NUMBERS.double() * 1e300}),
    "8-bit-nan": _raw("F8_E4M3", 24).replace(b"\1", b"\x7f"),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_damaged_tensors_are_refused_by_name(folder: Path, damage: str) -> None:
    """Catches a traceback, a pickle that is run, and rows that decode to nothing but misses."""
    (folder / TENSORS_FILE).write_bytes(DAMAGED_TENSORS[damage])
    assert str(folder / TENSORS_FILE) in refusal(folder)


def test_rows_of_another_shape_than_the_card_says_name_both(folder: Path) -> None:
    """Catches a message that leaves one to guess which of the two files is wrong."""
    _write(folder, {"embeddings": torch.ones(2, WIDTH)})
    message = refusal(folder)
    assert "(2, 8)" in message
    assert "(3, 8)" in message


@pytest.mark.parametrize("name", [CARD_FILE, TENSORS_FILE])
def test_a_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    """Catches a FileNotFoundError on the screen."""
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder)
    (folder / name).mkdir()  # a folder in its place is no better
    assert str(folder / name) in refusal(folder)


DAMAGED_CARDS = {
    "empty": "",
    "half": SMALL.to_json()[:90],
    "list": "[]",
    "null": "null",
    "number": "1",
    "text": '"card"',
    "bottomless": "[" * 100_000,
    "many-digits": "1" * 10_000,
    "html": "<html></html>",
}


@pytest.mark.parametrize("damage", DAMAGED_CARDS)
def test_a_damaged_card_is_refused_by_name(folder: Path, damage: str) -> None:
    """Catches a traceback where the JSON is broken, or is no object."""
    (folder / CARD_FILE).write_text(DAMAGED_CARDS[damage])
    assert str(folder / CARD_FILE) in refusal(folder)


def test_a_card_that_is_not_text_is_refused(folder: Path) -> None:
    """Catches a UnicodeDecodeError on the screen."""
    (folder / CARD_FILE).write_bytes(b"\xff\xfe{}")
    assert str(folder / CARD_FILE) in refusal(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5, "a\nb", [1] * 1000])
def test_another_format_version_is_refused_by_number(folder: Path, version: Any) -> None:
    """Catches files of a later passlm that are read as far as they look familiar."""
    message = refusal(_with(folder, ["format_version"], version))
    assert "version" in message
    assert "reads 1" in message
    assert len(message) < 400


def _with(folder: Path, path: list[str], value: Any) -> Path:
    """The folder, one value of its card replaced; `...` removes it."""
    card = json.loads(SMALL.to_json())
    place = card
    for name in path[:-1]:
        place = place[name]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / CARD_FILE).write_text(json.dumps(card))
    return folder


WHOLE = [0, -3, 2.5, "3", None, True, float("inf"), float("nan"), [3], {}]
HOSTILE: list[tuple[list[str], list[Any]]] = [
    (["look_ahead_tokens"], [*WHOLE, 10**300, 4]),
    (["target", "d_model"], [*WHOLE, 10**300, 9]),
    (["target", "vocabulary"], WHOLE),
    (["target", "layers"], WHOLE),
    (["target", "sample"], ["123", 5, None, {"1": 2}, ["1"], [None], [[1]], [10**400], [True]]),
    (["target", "sample"], [[float("nan")], [float("inf")], [1e300]]),
    (["target", "model_type"], [1, None, "a\nb", "\x1b[31m", ["llama"]]),
    (["target"], [None, 1, "target", [], [["d_model", 8]]]),
    (["base_model"], [1, None, {"a": 1}, "a\nb", "a\x00b"]),
    (["licence"], [None, 2, "a\nb"]),
    (["training"], [None, 1, "text", [["a", 1]]]),
    (["accepted_length"], [None, 1.5, []]),
]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((path, value) for path, values in HOSTILE for value in values),
        *((path, ...) for path in {tuple(path): path for path, _ in HOSTILE}.values()),
    ],
)
def test_a_hostile_value_in_the_card_is_refused(folder: Path, path: list[str], value: Any) -> None:
    """Catches numbers too large to convert, text read as a list of digits, and line breaks that
    would reach the terminal in a later message."""
    assert str(folder) in refusal(_with(folder, path, value))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([1e308, 10**400, "\n", "3", "nan"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)
PLACES = st.sampled_from([tuple(path) for path, _ in HOSTILE] + [("d_model",), ("lora",), ("x",)])


@given(st.lists(st.tuples(PLACES, JSON_VALUES), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_no_card_whatever_is_a_traceback(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    """Catches what the list above forgot: a card loads, checks in one line, or is refused."""
    card = json.loads(SMALL.to_json())
    for path, value in changes:
        place = card
        for name in path[:-1]:
            place = place[name] if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[path[-1]] = value
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, {"embeddings": NUMBERS})
        (folder / CARD_FILE).write_text(json.dumps(card))
        with pytest.raises(LookAheadError) as caught:  # at the latest for its width of 8
            load(folder).check(counting_llama())
        assert "\n" not in str(caught.value)


@given(st.binary(max_size=60), st.integers(0, 300), st.booleans())
@settings(deadline=None, max_examples=60)
def test_no_file_whatever_is_a_traceback(junk: bytes, place: int, card: bool) -> None:
    """Catches damage that a disk or a download does: bytes overwritten anywhere in either file."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        LookAhead(NUMBERS, SMALL).save(folder)
        file = folder / (CARD_FILE if card else TENSORS_FILE)
        whole = file.read_bytes()
        file.write_bytes(whole[:place] + junk + whole[place + len(junk) :])
        message = problem(folder)
        assert message is None or (str(folder) in message and "\n" not in message)


# Whom they are for


def test_another_shape_is_refused_naming_both() -> None:
    """Catches rows of another width, or of another model, that are decoded with."""
    rows = LookAhead.mean(counting_llama(), 2, "counting/llama")
    other = Target(small_llama(VOCABULARY + 1))
    with pytest.raises(LookAheadError) as caught:
        rows.check(other)
    message = str(caught.value)
    assert "counting/llama" in message
    assert f"vocabulary {VOCABULARY}" in message
    assert f"vocabulary {VOCABULARY + 1}" in message
    assert "passlm train" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("layers", "width", "model_type"), [(3, 32, "llama"), (2, 64, "llama"), (2, 32, "mistral")]
)
def test_each_part_of_the_shape_counts(layers: int, width: int, model_type: str) -> None:
    """Catches a check of the width alone."""
    mine = fingerprint(counting_llama())
    foreign = Fingerprint(model_type, width, VOCABULARY, layers, mine.sample)
    with pytest.raises(LookAheadError):
        LookAhead(torch.zeros(2, width), Card("x", foreign, 2)).check(counting_llama())


def test_other_weights_of_the_same_shape_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Catches rows used silently with a fine-tuned model, where fewer candidates are accepted."""
    with caplog.at_level(logging.WARNING, "passlm"):
        LookAhead.mean(counting_llama(), 2, "counting/llama").check(Target(small_llama(seed=1)))
    (record,) = caplog.records
    assert "counting/llama" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_the_same_weights_in_another_type_are_no_warning(
    dtype: torch.dtype, kept: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a comparison of rounded weights bit by bit, which warns everybody for nothing."""
    made_for = Target(small_llama(seed=2, scale=0.02).to(kept))
    with caplog.at_level(logging.WARNING, "passlm"):
        LookAhead.mean(made_for, 2, "x").check(Target(small_llama(seed=2, scale=0.02).to(dtype)))
    assert not caplog.records


def test_one_layer_fine_tuned_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a fingerprint of the input embeddings alone, which fine-tuning may leave as is."""
    tuned = small_llama(seed=3)
    with torch.no_grad():
        for layer in tuned.model.layers:
            for weight in layer.parameters():
                weight.mul_(1.1)
    with caplog.at_level(logging.WARNING, "passlm"):
        LookAhead.mean(Target(small_llama(seed=3)), 2, "x").check(Target(tuned))
    assert caplog.records


# Where they are


def test_a_folder_is_located_as_it_is(folder: Path) -> None:
    """Catches a folder with one slash in its name that is looked for on the hub."""
    assert locate(str(folder), counting_llama()) == folder


def test_a_shipped_name_is_found_for_its_own_target_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shipped rows of one model that are handed to another."""
    monkeypatch.setattr(lookahead, "SHIPPED", tmp_path)
    LookAhead.mean(counting_llama(), 2, "x").save(tmp_path / "some-model" / "best")
    assert locate("best", counting_llama()) == tmp_path / "some-model" / "best"
    with pytest.raises(LookAheadError):
        locate("best", Target(small_llama(seed=1)))
    with pytest.raises(LookAheadError, match="best"):
        locate("embedings", counting_llama())  # names those that are there


@pytest.mark.parametrize("name", ["none-such", "./none", "a/b/c", "x" * 5000, "~/none", "/no/way"])
def test_a_name_that_stands_for_nothing_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a question to the hub about a path, and an OSError for a long name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    with pytest.raises(LookAheadError) as caught:
        locate(name, counting_llama())
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback of the hub's client where there is no network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("cannot reach the hub\nand more lines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(LookAheadError) as caught:
        locate("user/rows", counting_llama())
    assert "user/rows" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_downloads_the_files_that_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a download of whole repositories, pickles and all."""
    asked: dict[str, Any] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("user/rows", counting_llama()) == folder
    assert asked["name"] == "user/rows"
    assert {CARD_FILE, TENSORS_FILE} <= set(asked["patterns"])
    assert all("*" not in pattern for pattern in asked["patterns"])


def _no_network(*_: object, **__: object) -> None:
    pytest.fail("the hub was asked")


# The hub


def test_push_to_hub_sends_a_folder_that_loads_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an upload of a damaged folder, or of checkpoints beside it."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(LookAheadError):
        push_to_hub(tmp_path / "none", "me/rows")
    assert calls == []
    LookAhead.mean(Target(small_llama()), 2, "tiny").save(tmp_path)
    assert push_to_hub(tmp_path, "me/rows", private=True) == "address"
    (name, made), (_, sent) = calls
    assert (name, made["private"]) == ("me/rows", True)
    assert (sent["folder_path"], sent["repo_id"]) == (tmp_path, "me/rows")
    assert not any("checkpoint" in pattern for pattern in sent["allow_patterns"])


def test_a_hub_id_is_downloaded_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hub id taken for a folder that is missing, and files nobody asked for."""
    target = Target(small_llama())
    LookAhead.mean(target, 2, "tiny").save(tmp_path)
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate("me/rows", target) == tmp_path
    [(name, patterns)] = asked
    assert name == "me/rows"
    assert set(patterns) == {"lookahead.json", "lookahead.safetensors", "README.md"}
