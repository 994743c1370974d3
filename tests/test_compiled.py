"""Compiled passes give the texts of eager ones, are kept, and are given up loudly."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from small_llama import randomised, small_llama
from tiny import ARCHITECTURES, random_look_ahead
from torch import Tensor
from transformers import PreTrainedModel

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import Adaptive, ByHead, OnePass, Strategy, TwoPass, autoregressive
from passlm.decoding.text import Row
from passlm.kernels import linear, native
from passlm.layers import attention
from passlm.layers.int8 import quantized
from passlm.lookahead.trained import LookAhead
from passlm.model import compiled
from passlm.model.target import Target
from passlm.params import SamplingParams
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve
from passlm.provenance import staging

PROMPTS = ([1, 2, 3, 4, 5], [7], [3] * 110)  # the last one crosses a block of the cache
GREEDY, TEMPERED = SamplingParams(), SamplingParams(temperature=0.9, seed=1)
CHEAP = CostCurve((1, 41), (1.0, 1.2), (1, 6), (0.02, 0.02))
PLANS = (autoregressive, TwoPass(3), OnePass(2), AutoPlan(CHEAP, (0.6, 0.5, 0.4)))


def roomy_llama() -> PreTrainedModel:
    """A model whose context is longer than a block of the cache."""
    model = small_llama()
    model.config.max_position_embeddings = 512
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: compiling takes its time."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def look_ahead() -> LookAhead:
    """Files of which every part has an effect."""
    target = Target(roomy_llama())
    return randomised(
        LookAhead.mean(target, 3, "small").extended(target, 4, (), 16), 0.2, shortlist=16
    )


def texts(
    target: Target,
    look_ahead: LookAhead | None,
    plan: Strategy | Adaptive,
    sampling: SamplingParams,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> tuple[list[list[int]], int]:
    """What is written in one batch, and how many candidates were accepted."""
    decoder = Decoder(target, None if look_ahead is None else look_ahead.rows(target))
    rows = [decoder.join(Request.of(prompt, sampling, 40, plan)) for prompt in prompts]
    accepted = 0
    while decoder.rows:
        accepted += sum(step.accepted for _, step in decoder.step())
    return [row.tokens for row in rows], accepted


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, TEMPERED], ids=["greedy", "tempered"])
@pytest.mark.parametrize("plan", PLANS, ids=["plain", "two-pass", "one-pass", "chosen"])
def test_compiled_passes_write_the_same(
    folder: Path, look_ahead: LookAhead, plan: Strategy | Adaptive, sampling: SamplingParams
) -> None:
    """Catches cache slots, masks or positions that the graph takes for others, LoRA that reaches
    real rows, and a graph that holds for its example's sizes alone."""
    eager, fast = Target(roomy_llama()), Target(roomy_llama(), compiled=folder)
    expected = texts(eager, look_ahead, plan, sampling)
    found = texts(fast, look_ahead, plan, sampling)
    assert found[0] == expected[0]
    # Where rows stand in one line, texts of a batch need not agree on a pass.
    assert found[1] == expected[1] or (isinstance(plan, AutoPlan) and fast.in_line)
    alone = texts(fast, look_ahead, plan, sampling, PROMPTS[2:])[0]
    assert alone == texts(eager, look_ahead, plan, sampling, PROMPTS[2:])[0]
    assert fast.engine == "compiled"
    assert expected[1] > 0 or plan is autoregressive


@pytest.mark.slow
def test_one_package_serves_passes_with_and_without_look_ahead_rows(folder: Path) -> None:
    """Catches a second copy of the weights in memory, layers joined in another order than they are
    called in, and the update of one of them added to its neighbour."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = small_llama(**sizes, num_key_value_heads=4)
    model.config.max_position_embeddings = 512
    eager, fast = Target(model), Target(model, compiled=folder)
    look_ahead = randomised(
        LookAhead.mean(eager, 3, "small").extended(eager, 4, (), 16), 0.2, shortlist=16
    )
    fast.expect(look_ahead.rows(fast))
    for plan in (autoregressive, OnePass(2)):
        assert texts(fast, look_ahead, plan, GREEDY) == texts(eager, look_ahead, plan, GREEDY)
    assert texts(fast, None, autoregressive, GREEDY) == texts(eager, None, autoregressive, GREEDY)
    assert fast.engine == "compiled"
    if linear.preferred():
        assert fast._compiled is not None
        assert len(fast._compiled._packages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, TEMPERED], ids=["greedy", "tempered"])
def test_a_draft_head_guesses_the_same(folder: Path, sampling: SamplingParams) -> None:
    """Catches hidden states of compiled passes that are of other rows, or not normed as the eager
    ones are: texts would stay the same and guesses would not."""
    eager, fast = Target(roomy_llama()), Target(roomy_llama(), compiled=folder)
    look_ahead = random_look_ahead(eager, 3, head_width=8)
    expected = guesses(eager, look_ahead, sampling)
    assert guesses(fast, look_ahead, sampling) == expected
    assert fast.engine == "compiled"
    assert {len(verified) for _, verified in expected} >= {0, 3}  # none in the first pass


def guesses(
    target: Target, look_ahead: LookAhead, sampling: SamplingParams
) -> list[tuple[int, list[int]]]:
    """The candidates of every pass of a batch, and how many tokens its text then had."""
    verified: list[tuple[int, list[int]]] = []

    def note(row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        verified.append((len(row.tokens), list(row.candidates)))

    decoder = Decoder(target, look_ahead.rows(target), note)
    for prompt in PROMPTS:
        decoder.join(Request.of(prompt, sampling, 30, ByHead(3)))
    while decoder.rows:
        decoder.step()
    return verified


@pytest.mark.slow
@pytest.mark.parametrize("form", ["a line for each text", "copies"])
def test_where_our_attention_does_not_compute(
    tmp_path: Path, look_ahead: LookAhead, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Catches the passes of other machines and models, which nobody would see here: with as many
    rows for every text as for the longest, and with keys and values copied for each row."""
    if form == "copies":
        monkeypatch.setattr(attention, "_has_operator", lambda *_: False)
    else:
        monkeypatch.setattr(compiled, "can_stand_in_line", lambda _: False)
    eager, fast = Target(roomy_llama()), Target(roomy_llama(), compiled=tmp_path)
    for plan in (TwoPass(3), AutoPlan(CHEAP, (0.6, 0.5, 0.4))):
        expected = texts(eager, look_ahead, plan, GREEDY)
        assert texts(fast, look_ahead, plan, GREEDY)[0] == expected[0]
    assert fast.engine == "compiled"
    assert fast.in_line == (form == "copies" and native.available())


@pytest.mark.slow
def test_layers_of_two_kinds(folder: Path, tiny_target: Callable[[str], Target]) -> None:
    """Catches a sliding window that is lost, and masks given to the wrong layers."""
    eager = tiny_target("gemma3")
    fast = Target(eager.model, compiled=folder)
    for plan in (autoregressive, AutoPlan(CHEAP)):
        assert texts(fast, None, plan, GREEDY)[0] == texts(eager, None, plan, GREEDY)[0]
    assert fast.engine == "compiled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"), [("falcon", {}), ("opt", {"word_embed_proj_dim": 16})]
)
def test_sizes_that_the_configuration_does_not_say(
    folder: Path, name: str, changes: dict[str, int]
) -> None:
    """Catches a cache with as many heads, or as wide ones, as llama's names would make them."""
    model = ARCHITECTURES[name].build(**changes)
    eager, fast = Target(model), Target(model, compiled=folder)
    for plan in (autoregressive, AutoPlan(CHEAP)):
        expected = texts(eager, None, plan, GREEDY, PROMPTS[:2])[0]
        assert texts(fast, None, plan, GREEDY, PROMPTS[:2])[0] == expected
    assert fast.engine == ("eager" if name == "falcon" else "compiled")  # it cannot be traced


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="int8 weights need our own products")
def test_rounded_layers_of_a_float16_model(tmp_path: Path) -> None:
    """Catches rows of a type that the products do not take, met after minutes of compiling."""
    model = quantized(roomy_llama().to(torch.float16))
    fast = Target(model, compiled=tmp_path)
    found = texts(fast, None, autoregressive, GREEDY, PROMPTS[:2])[0]
    assert found == texts(Target(model), None, autoregressive, GREEDY, PROMPTS[:2])[0]
    assert fast.engine == "compiled, int8"


@pytest.mark.slow
def test_packages_are_kept(
    folder: Path, look_ahead: LookAhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches passes that are compiled in every process, or for every text; and a package made
    from other weights that is taken for this model's."""
    texts(Target(roomy_llama(), compiled=folder), look_ahead, TwoPass(2), GREEDY)
    asked: list[Path] = []

    def refuse(_: object, path: Path) -> None:
        asked.append(path)
        raise compiled.CompileError("not again")

    monkeypatch.setattr(compiled, "compile_to", refuse)
    texts(Target(roomy_llama(), compiled=folder), look_ahead, TwoPass(2), GREEDY)
    assert asked == []
    other = roomy_llama()
    with torch.no_grad():
        list(other.parameters())[-1].view(-1)[-1] += 1
    texts(Target(other, compiled=folder), None, autoregressive, GREEDY, PROMPTS[:1])
    assert len(asked) == 1


def test_a_machine_without_compiler_decodes_eagerly(
    tmp_path: Path,
    look_ahead: LookAhead,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a crash, a fallback nobody is told of, and a file left behind that loads wrongly."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    target = Target(roomy_llama(), compiled=tmp_path / "made")
    with caplog.at_level(logging.WARNING):
        written = texts(target, look_ahead, TwoPass(2), GREEDY)
    assert "no C++ compiler" in caplog.text
    assert caplog.text.count("run eagerly") == 1
    assert target.engine == "eager"
    assert written == texts(Target(roomy_llama()), look_ahead, TwoPass(2), GREEDY)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a traceback where the user's cache folder is read-only or full."""
    (tmp_path / "file").write_text("")
    target = Target(roomy_llama(), compiled=tmp_path / "file" / "compiled")
    with caplog.at_level(logging.WARNING):
        texts(target, None, autoregressive, GREEDY, PROMPTS[:1])
    assert target.engine == "eager"
    assert "run eagerly" in caplog.text


@pytest.mark.slow
def test_a_damaged_package_is_deleted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a package cut short by a full disk that stops every later start."""
    texts(Target(roomy_llama(), compiled=folder), None, autoregressive, GREEDY, PROMPTS[:1])
    for package in folder.glob("*.pt2"):
        (tmp_path / package.name).write_bytes(package.read_bytes()[:1000])
    count = len(list(tmp_path.iterdir()))
    target = Target(roomy_llama(), compiled=tmp_path)
    with caplog.at_level(logging.WARNING):
        texts(target, None, autoregressive, GREEDY, PROMPTS[:1])
    assert "deleted" in caplog.text
    assert len(list(tmp_path.iterdir())) == count - 1


@pytest.mark.slow
def test_a_whole_package_that_cannot_be_opened_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches minutes of compiling at every start, where there is no room to unpack it."""
    texts(Target(roomy_llama(), compiled=folder), None, autoregressive, GREEDY, PROMPTS[:1])
    before = sorted(folder.glob("*.pt2"))

    def full(path: Path) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(compiled.aot_package, "opened", full)
    target = Target(roomy_llama(), compiled=folder)
    with caplog.at_level(logging.WARNING):
        texts(target, None, autoregressive, GREEDY, PROMPTS[:1])
    assert "no space left on device" in caplog.text
    assert target.engine == "eager"
    assert sorted(folder.glob("*.pt2")) == before


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    """Catches a cache that grows by the weights' size each time compiling is killed, and one that
    takes the folder of a process that is at it."""
    with staging(tmp_path) as other, staging(tmp_path) as own:
        (own / "part").write_text("x")
        assert other.is_dir()
        left = tmp_path / f"{own.name}-of-yesterday"
        left.mkdir()
        (left / "part").write_text("x")
        os.utime(left, (0, 0))
        with staging(tmp_path):
            assert not left.exists()
        assert own.is_dir()
    assert list(tmp_path.iterdir()) == []
