"""Look-ahead folders: what is kept, and what a damaged or foreign one gives."""

from __future__ import annotations

import io
import json
import logging
import pickle
import struct
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from small_llama import (
    VOCABULARY,
    counting_llama,
    counting_look_ahead_with_parts,
    small_llama,
)
from torch import Tensor

from passlm.drafts.sampler_head import SamplerHead
from passlm.layers.fingerprint import Fingerprint
from passlm.layers.lora import GatedLora
from passlm.lookahead import trained
from passlm.lookahead.trained import (
    CARD_FILE,
    TENSORS_FILE,
    Card,
    LookAhead,
    LookAheadError,
    load,
    load_for,
    locate,
    push_to_hub,
)
from passlm.model.target import Target

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
    card = Card(
        "é/model",
        counting_llama().fingerprint,
        2,
        training=training,
        accepted_length={"code": 0.5},
        licence="mit",
    )
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
    assert mean.rows(target).inputs.dtype == target.dtype


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


@pytest.mark.parametrize("version", [0, 3, "1", None, 1.5, True, "a\nb", [1] * 1000])
def test_another_format_version_is_refused_by_number(folder: Path, version: Any) -> None:
    """Catches files of a later passlm that are read as far as they look familiar."""
    message = refusal(_with(folder, ["format_version"], version))
    assert "version" in message
    assert "reads (1, 2)" in message
    assert len(message) < 400


def _with(folder: Path, path: list[str], value: Any, whole: Card = SMALL) -> Path:
    """The folder, one value of its card replaced; `...` removes it, and no path none."""
    card = json.loads(whole.to_json())
    place = card
    for name in path[:-1]:
        place = place[name]
    if value is ...:
        del place[path[-1]]
    elif path:
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
        *((["chances"], value) for value in (1, [], {"look_ahead": 3}, {"head": [0.5, 2.0]})),
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


# With a gated LoRA and a sampler head

WHOLE_PARTS = {
    "embeddings": torch.arange(24.0).reshape(TOKENS, WIDTH),
    "lora.A.q": torch.arange(32.0).reshape(4, WIDTH),
    "lora.A.o": torch.arange(16.0).reshape(2, WIDTH),
    "lora.B.q": torch.ones(8, 2),
    "lora.B.k": torch.ones(4, 2),
    "lora.B.o": torch.ones(8, 2),
    "sampler.hidden_in": torch.arange(40.0).reshape(5, WIDTH),
    "sampler.token_in": torch.ones(5, WIDTH),
    "sampler.out": torch.ones(WIDTH, 5),
}


def with_parts() -> LookAhead:
    """A LoRA of rank 2 on three layers, and a head of width 5."""
    whole = {name: tensor.clone() for name, tensor in WHOLE_PARTS.items()}
    lora = GatedLora.of_tensors([("q", "k"), ("o",)], whole)
    names = (f"sampler.{name}" for name in SamplerHead.NAMES)
    return LookAhead(
        whole["embeddings"], SMALL, lora, SamplerHead(*(whole[n] for n in names), shortlist=3)
    )


@pytest.fixture
def parts_folder(tmp_path: Path) -> Path:
    """A sound folder of these."""
    with_parts().save(tmp_path)
    return tmp_path


def test_parts_are_kept_in_int8_and_read_in_float32(tmp_path: Path) -> None:
    """Catches a part left out, tensors swapped, embeddings rounded with the others, a scale of
    another row, and parts trained on in 8 bits; and rows that draft otherwise than before they were
    saved."""
    target = counting_llama()
    made = counting_look_ahead_with_parts()
    made.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.card == made.card
    assert loaded.card.sampler == {"width": 16, "shortlist": 6, "tokens": 2}
    assert loaded.card.lora is not None
    assert loaded.card.lora["rank"] == 4
    assert loaded.card.lora["groups"][0] == [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    assert (loaded.numbers, loaded.tokens) == (made.numbers, made.tokens)
    mine, theirs = loaded.tensors(), made.tensors()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        off = (tensor - theirs[name]).abs().amax(-1)
        most = 0.0 if name == "embeddings" else theirs[name].abs().amax(-1) / 254 + 1e-6
        assert bool((off <= most).all()), name
        assert tensor.dtype == torch.float32
        assert tensor.requires_grad
    stored = load_tensors((tmp_path / TENSORS_FILE).read_bytes())
    matrices = [name for name in theirs if name != "embeddings"]
    assert {stored[name].dtype for name in matrices} == {torch.int8}
    assert set(stored) == {"embeddings", *matrices, *(f"{name}.scale" for name in matrices)}
    loaded.check(target)
    load_for(target, tmp_path)
    again = tmp_path / "again"
    loaded.save(again)
    for name, tensor in load(again).tensors().items():
        torch.testing.assert_close(tensor, mine[name], rtol=1e-5, atol=0)
    assert (again / CARD_FILE).read_text() == (tmp_path / CARD_FILE).read_text()


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    """Catches files trained before matrices were rounded that nobody can use any more."""
    made = counting_look_ahead_with_parts()
    made.save(tmp_path)
    tensors = {name: tensor.detach().bfloat16() for name, tensor in made.tensors().items()}
    tensors["embeddings"] = made.embeddings.detach()
    (tmp_path / TENSORS_FILE).write_bytes(save_tensors(tensors))
    _with(tmp_path, ["format_version"], 1, made.card)
    for name, tensor in load(tmp_path).tensors().items():
        assert torch.equal(tensor, tensors[name].float()), name


@pytest.mark.parametrize("scale", [torch.ones(3), torch.ones(1), torch.tensor([torch.nan] * 16)])
def test_a_bad_scale_is_refused(tmp_path: Path, scale: Tensor) -> None:
    """Catches rows scaled by broadcasting, and drafts of numbers that are none."""
    made = counting_look_ahead_with_parts()
    made.save(tmp_path)
    stored = load_tensors((tmp_path / TENSORS_FILE).read_bytes())
    assert len(stored["sampler.hidden_in"]) == 16
    content = save_tensors({**stored, "sampler.hidden_in.scale": scale})
    (tmp_path / TENSORS_FILE).write_bytes(content)
    assert str(tmp_path / TENSORS_FILE) in refusal(tmp_path)


def test_a_card_of_before_there_were_parts_still_loads(folder: Path) -> None:
    """Catches files that are refused for what they could not know."""
    for name in ("lora", "sampler"):
        _with(folder, [name], ...)
        loaded = load(folder)
        assert loaded.lora is None
        assert loaded.sampler is None


def test_a_head_of_before_it_was_told_several_tokens_still_loads(parts_folder: Path) -> None:
    """Catches files that are refused for what they could not know."""
    _with(parts_folder, ["sampler", "tokens"], ..., with_parts().card)
    assert load(parts_folder).sampler is not None


def test_only_parts_of_a_kind_may_be_kept(tmp_path: Path) -> None:
    """Catches a LoRA without a sampler head, or the other way round, that cannot be read."""
    whole = with_parts()
    for lora, sampler in ((whole.lora, None), (None, whole.sampler)):
        LookAhead(whole.embeddings, SMALL, lora, sampler).save(tmp_path)
        loaded = load(tmp_path)
        assert (loaded.lora is None) == (lora is None)
        assert (loaded.sampler is None) == (sampler is None)


DAMAGES = ("missing", "transposed", "narrower", "shorter", "flat", "nan")
# How many numbers a layer takes and gives is the target's matter: `check` compares them.
FREE = {("lora.A", "narrower"), ("lora.B", "shorter")}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name, damage in product(WHOLE_PARTS, DAMAGES)
        if name != "embeddings" and (name[:6], damage) not in FREE
    ],
)
def test_a_damaged_part_is_refused(parts_folder: Path, name: str, damage: str) -> None:
    """Catches a shape error in the middle of decoding, and rows that draft nothing but misses."""
    tensors = {key: tensor.clone() for key, tensor in WHOLE_PARTS.items()}
    tensor = tensors.pop(name)
    changed = {
        "transposed": tensor.T,
        "narrower": tensor[:, :-1],
        "shorter": tensor[:-1],
        "flat": tensor.flatten(),
        "nan": tensor / 0,
    }
    if damage != "missing":
        tensors[name] = changed[damage].contiguous()
    _write(parts_folder, tensors)
    assert str(parts_folder / TENSORS_FILE) in refusal(parts_folder)


@pytest.mark.parametrize(
    "name", ["lora.A.k", "lora.B.x", "lora.", "sampler.x", "sampler.out.x", "head", "lora.A.a\nb"]
)
def test_an_extra_tensor_is_refused(parts_folder: Path, name: str) -> None:
    """Catches numbers that were trained for something this passlm leaves out without a word."""
    _write(parts_folder, {**WHOLE_PARTS, name: torch.ones(2, WIDTH)})
    assert str(parts_folder / TENSORS_FILE) in refusal(parts_folder)


@pytest.mark.parametrize("name", ["lora", "sampler"])
def test_a_part_that_the_card_does_not_name_is_refused(parts_folder: Path, name: str) -> None:
    """Catches a folder put together of two trainings, decoded with half of its numbers."""
    _with(parts_folder, [name], None, with_parts().card)
    message = refusal(parts_folder)
    assert f"{name}." in message
    tensors = {key: t for key, t in WHOLE_PARTS.items() if not key.startswith(name)}
    _write(parts_folder, tensors)
    load(parts_folder)
    _with(parts_folder, [], None, with_parts().card)  # and the other way round
    assert str(parts_folder / TENSORS_FILE) in refusal(parts_folder)


PART_VALUES: list[tuple[list[str], list[Any]]] = [
    (["lora", "rank"], [1, 3, 0, -2, "2", None, [2], 10**300, ...]),
    (["lora", "groups"], [[["q", "k"]], [["o"], ["q", "k"], ["q"]], [["k", "q"], ["o"]], ...]),
    (["lora", "groups"], [[["q"], ["k"], ["o"]], [["q", "k", "o"]], [["q", "k"], ["o", "x"]]]),
    (["lora", "groups"], [[], [[]], [["q", "k"], []], None, 5, "qko", {"q": "k"}, [[1, 2]], [5]]),
    (["lora", "groups"], [[["q", "k"], [["o"]]], [["q", "k"], ["o"], ["o"]], [[None]], [["a\nb"]]]),
    (["lora"], [1, "text", [], [["rank", 2]], {}]),
    (["sampler", "width"], [4, 6, 0, -5, None, [5], "five", 10**300, float("inf"), ...]),
    (["sampler", "width"], [float("nan")]),
    (["sampler", "shortlist"], [0, -1, 2.5, "3", None, True, [3], float("inf"), ...]),
    (["sampler", "tokens"], [0, -1, 2, 1.5, "1", None, True, [1], 10**300]),
    (["sampler"], [1, "text", [], [["width", 5]], {}]),
]


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in PART_VALUES for value in values]
)
def test_a_card_that_says_otherwise_of_its_parts_is_refused(
    parts_folder: Path, path: list[str], value: Any
) -> None:
    """Catches another rank, width or grouping than the tensors have, and a traceback at values
    that are none."""
    assert str(parts_folder) in refusal(_with(parts_folder, path, value, with_parts().card))


@given(st.sampled_from([tuple(path) for path, _ in PART_VALUES]), st.data())
@settings(deadline=None, max_examples=60)
def test_no_part_of_a_card_whatever_is_a_traceback(
    path: tuple[str, ...], data: st.DataObject
) -> None:
    """Catches what the list above forgot: it loads, checks in one line, or is refused."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        with_parts().save(folder)
        _with(folder, list(path), data.draw(JSON_VALUES), with_parts().card)
        with pytest.raises(LookAheadError) as caught:  # at the latest for its width of 8
            load(folder).check(counting_llama())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", ["layers.0.self_attn.q_proj", "model.norm", "a\nb", "lm_head"])
def test_a_lora_for_layers_that_the_model_has_not_is_refused(layer: str) -> None:
    """Catches a KeyError in the middle of loading, and a name that breaks the line."""
    target = counting_llama()
    mean = LookAhead.mean(target, 2, "some/base")
    lora = GatedLora([(layer,)], [torch.ones(2, 32)], {layer: torch.ones(32, 2)})
    with pytest.raises(LookAheadError) as caught:
        LookAhead(mean.embeddings, mean.card, lora).check(target)
    message = str(caught.value)
    assert "some/base" in message
    assert repr(layer)[1:-1] in message
    assert "\n" not in message


def test_extending_keeps_the_embeddings_and_says_so_on_the_card() -> None:
    """Catches a card that forgets a part, and an extension that begins from other rows."""
    target = counting_llama()
    mean = LookAhead.mean(target, 2, "some/base")
    whole = mean.extended(target, 3, ["q_proj", "k_proj"], 7, seed=1)
    assert torch.equal(whole.embeddings, mean.embeddings)
    assert whole.card.base_model == "some/base"
    assert whole.card.lora == {
        "rank": 3,
        "groups": [[f"model.layers.{n}.self_attn.{p}_proj" for p in "qk"] for n in range(2)],
    }
    assert whole.card.sampler == {"width": 7, "shortlist": 64, "tokens": 1}
    bare = whole.extended(target, 0, [], 0)
    assert (bare.lora, bare.sampler, bare.card.lora, bare.card.sampler) == (None,) * 4
    other = mean.extended(target, 3, ["q_proj", "k_proj"], 7, seed=2)
    assert whole.lora is not None
    assert other.lora is not None
    assert not torch.equal(whole.lora.down[0], other.lora.down[0])


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
    mine = counting_llama().fingerprint
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
    monkeypatch.setattr(trained, "SHIPPED", tmp_path)
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
