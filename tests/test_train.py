"""Training: what it may touch, that it can be interrupted, and that its figures are decoding's."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_llama import (
    BLANKS,
    VOCABULARY,
    counting,
    counting_llama,
    counting_look_ahead,
    counting_mistral,
    small_llama,
    trainer,
)
from torch import Tensor

from passlm.decode import Decoder, Request
from passlm.outputs import Stats
from passlm.params import SamplingParams
from passlm.plan import OnePass, Plan, Strategy, TwoPass
from passlm.target import Hung, Target
from passlm.train import loop
from passlm.train.config import ConfigError, TrainConfig
from passlm.train.loop import (
    CHECKPOINT,
    HISTORY,
    Progress,
    Trainer,
    TrainingError,
    anchored,
    group_lengths,
    read_history,
)
from passlm.train.loss import accepted_lengths, cross_entropy, distillation, greedy_hits

CONFIG = TrainConfig(
    lookahead_tokens=3,
    steps=6,
    sequences=2,
    sequence_tokens=32,
    anchors=12,
    learning_rate=0.05,
    warmup=2,
    evaluate_every=3,
    evaluate_texts=2,
    checkpoint_every=2,
)


def finish(run: Trainer) -> list[Progress]:
    """Train to the end."""
    return list(run.run())


def without_seconds(history: list[Progress]) -> list[Progress]:
    """Figures that do not depend on the machine's speed."""
    return [replace(progress, seconds=0.0) for progress in history]


# Interruption


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of six steps that nothing interrupted."""
    run = trainer(tmp_path_factory.mktemp("unbroken"), CONFIG)
    finish(run)
    return run


def stopped(run: Trainer, after: int) -> None:
    """Stop as a user does: a checkpoint is kept after the step."""
    for _ in run.run(stop=lambda: run.steps_done >= after):
        pass


def killed(run: Trainer, after: int) -> None:
    """End as a crash does: nothing is kept that was not already, half a line is written."""
    for progress in run.run():
        if progress.step == after:
            break
    with (run.folder / HISTORY).open("a") as file:
        file.write('{"step": 4, "lo')


@pytest.mark.parametrize("end", [stopped, killed])
@pytest.mark.parametrize("after", [2, 3])
def test_resuming_gives_the_embeddings_of_an_unbroken_run(
    end: Callable[[Trainer, int], None], after: int, unbroken: Trainer, tmp_path: Path
) -> None:
    """Catches a state that is not kept: Adam's moments or count, the data's place, the anchors,
    the learning rate. The bits are equal, and the history has every step once."""
    end(trainer(tmp_path, CONFIG), after)
    again = trainer(tmp_path, CONFIG)
    again.resume()
    assert again.steps_done == (after if end is stopped else 2)
    finish(again)
    assert torch.equal(again.look_ahead.embeddings, unbroken.look_ahead.embeddings)
    history = read_history(tmp_path)
    assert [progress.step for progress in history] == [1, 2, 3, 4, 5, 6]
    assert without_seconds(history) == without_seconds(read_history(unbroken.folder))
    assert all(a.seconds <= b.seconds for a, b in pairwise(history))


def test_checkpoint_of_a_resumed_run_is_the_same_file_but_for_its_seconds(
    unbroken: Trainer, tmp_path: Path
) -> None:
    """Catches optimiser state that is close, but not the same."""
    stopped(trainer(tmp_path, CONFIG), 3)
    again = trainer(tmp_path, CONFIG)
    again.resume()
    finish(again)
    mine, theirs = load_file(tmp_path / CHECKPOINT), load_file(unbroken.folder / CHECKPOINT)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_finished_run_has_nothing_to_resume(unbroken: Trainer, tmp_path: Path) -> None:
    """Catches a step beyond the last one."""
    shutil.copytree(unbroken.folder, tmp_path, dirs_exist_ok=True)
    again = trainer(tmp_path, CONFIG)
    again.resume()
    assert finish(again) == []
    assert torch.equal(again.look_ahead.embeddings, unbroken.look_ahead.embeddings)


def test_starting_anew_drops_the_old_history(unbroken: Trainer, tmp_path: Path) -> None:
    """Catches two runs in one curve."""
    shutil.copytree(unbroken.folder, tmp_path, dirs_exist_ok=True)
    stopped(trainer(tmp_path, CONFIG), 1)
    assert [progress.step for progress in read_history(tmp_path)] == [1]


# Refusals


def refusal(run: Trainer) -> str:
    """The line a resumption is refused with."""
    before = run.look_ahead.embeddings.detach().clone()
    with pytest.raises(TrainingError) as caught:
        run.resume()
    assert torch.equal(run.look_ahead.embeddings, before)
    assert run.steps_done == 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_settings_are_refused_by_name(unbroken: Trainer) -> None:
    """Catches a run that goes on as another one, and a message that leaves one to guess."""
    other = replace(CONFIG, learning_rate=0.01, seed=7)
    message = refusal(trainer(unbroken.folder, other))
    assert "learning_rate was 0.05, is 0.01" in message
    assert "seed was 0, is 7" in message
    assert "warmup" not in message


def test_other_text_is_refused(unbroken: Trainer) -> None:
    """Catches a run that goes on with documents changed."""
    assert "the text or its weights differ" in refusal(
        trainer(unbroken.folder, CONFIG, text_seed=9)
    )


def test_another_model_is_refused(unbroken: Trainer) -> None:
    """Catches embeddings of one model that are trained on for another of the same width."""
    foreign = Target(small_llama(seed=1))
    assert "another model" in refusal(trainer(unbroken.folder, CONFIG, foreign))


def test_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """Catches a start from nothing where somebody meant to go on."""
    assert CHECKPOINT in refusal(trainer(tmp_path, CONFIG))


@pytest.mark.parametrize("damage", ["empty", "half", "text", "bare", "foreign", "unnamed"])
def test_a_damaged_checkpoint_is_refused(damage: str, unbroken: Trainer, tmp_path: Path) -> None:
    """Catches a traceback after a crash or a full disk."""
    whole = (unbroken.folder / CHECKPOINT).read_bytes()
    path = tmp_path / CHECKPOINT
    tensors = load_file(unbroken.folder / CHECKPOINT)
    settings_ = {"settings": json.dumps({}), "steps_done": "two", "seconds": "1"}
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case "text":
            path.write_text("404 Not Found\n")
        case "bare":  # tensors without the settings they were made with
            save_file(tensors, path)
        case "foreign":
            save_file(tensors, path, metadata=settings_)
        case "unnamed":
            save_file({"x": torch.ones(2)}, path, metadata=settings_ | {"steps_done": "2"})
    message = refusal(trainer(tmp_path, CONFIG))
    assert str(path) in message
    assert "damaged" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((n, 0) for n in ("lookahead_tokens", "steps", "sequences", "anchors")),
        *((n, 0) for n in ("evaluate_every", "evaluate_texts", "checkpoint_every", "keep")),
        ("sequence_tokens", 104),
        ("keep", 1.5),
        ("keep", math.nan),
        ("loss", "mse"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("warmup", -1),
        ("held_out", 1.0),
        ("seed", -1),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: Any) -> None:
    """Catches a setting that would train nothing, or end in a traceback an hour later."""
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})
    assert name.replace("_", "-") in str(caught.value)


# A loss that is no number


def _nan_loss(hung: Hung) -> Tensor:
    return distillation(hung) * math.nan


def _nan_gradient(hung: Hung) -> Tensor:
    return distillation(hung) + (hung.logits - hung.logits).sqrt().sum()  # 0, of infinite slope


@pytest.mark.parametrize("loss", [_nan_loss, _nan_gradient])
def test_a_loss_that_is_no_number_stops_at_the_last_good_step(
    loss: Callable[[Hung], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches embeddings of NaN that are stepped to, and kept over the last good checkpoint."""
    config = replace(CONFIG, checkpoint_every=1)
    run = trainer(tmp_path, config)
    stopped(run, 3)
    kept = run.look_ahead.embeddings.detach().clone()
    monkeypatch.setattr(loop, "loss_of", lambda kind, hung, text: loss(hung))
    with pytest.raises(TrainingError) as caught:
        finish(run)
    assert "step 4" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(run.look_ahead.embeddings, kept)
    monkeypatch.undo()
    again = trainer(tmp_path, config)
    again.resume()
    assert again.steps_done == 3
    assert [progress.step for progress in read_history(tmp_path)] == [1, 2, 3]
    assert torch.equal(again.look_ahead.embeddings, kept)


# What is trained


@pytest.mark.parametrize("loss", ["distillation", "cross-entropy"])
def test_only_the_embeddings_are_trained(loss: Any, tmp_path: Path) -> None:
    """Catches gradients kept for, or steps taken on, a target whose weights ask for them."""
    target = Target(small_llama())
    assert all(weight.requires_grad for weight in target.model.parameters())
    before = {name: w.detach().clone() for name, w in target.model.named_parameters()}
    run = trainer(tmp_path, replace(CONFIG, steps=2, loss=loss), target)
    start = run.look_ahead.embeddings.detach().clone()
    finish(run)
    assert not torch.equal(run.look_ahead.embeddings, start)
    for name, weight in target.model.named_parameters():
        assert weight.grad is None
        assert torch.equal(weight, before[name])
        assert weight.requires_grad


@pytest.mark.parametrize("loss", ["distillation", "cross-entropy"])
def test_training_learns_what_can_be_learnt(loss: Any, tmp_path: Path) -> None:
    """Catches a step uphill, and a loss at rows that have nothing to do with the text."""
    config = replace(CONFIG, steps=25, loss=loss, learning_rate=0.1, keep=1.0, evaluate_every=25)
    run = trainer(tmp_path, config)
    untrained = sum(run.evaluate())
    history = finish(run)
    losses = [progress.loss for progress in history]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    trained = history[-1].accepted_length
    assert trained is not None
    assert trained > untrained + 0.3
    shares = history[-1].accepted_by_position
    assert shares is not None
    assert trained == pytest.approx(sum(shares))
    assert all(1 >= a >= b for a, b in pairwise(shares))


def test_the_rate_rises_then_falls(tmp_path: Path) -> None:
    """Catches a schedule off by one: the highest rate is reached at the end of the warm-up."""
    rates = [p.learning_rate for p in finish(trainer(tmp_path, CONFIG))]
    assert rates[0] == pytest.approx(0.025)
    assert rates[1] == rates[2] == pytest.approx(0.05)
    assert rates[2] > rates[3] > rates[4] > rates[5] > 0


# Groups


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.floats(0.05, 1.0),
)
@settings(deadline=None, max_examples=100)
def test_a_share_of_the_groups_goes_on_to_each_next_row(
    anchors: int, rows: int, keep: float
) -> None:
    """Catches a row that no group reaches, and totals off by one."""
    config = TrainConfig(anchors=anchors, lookahead_tokens=rows, keep=keep)
    lengths = group_lengths(config)
    assert len(lengths) == anchors
    assert max(lengths) == rows
    reaching = [sum(length > row for length in lengths) for row in range(rows)]
    assert reaching == [max(1, round(anchors * keep**row)) for row in range(rows)]
    assert sum(lengths) == sum(reaching)


def test_whole_groups_are_all_of_full_length() -> None:
    """Catches `keep=1` that still drops some."""
    assert group_lengths(TrainConfig(anchors=5, lookahead_tokens=4, keep=1.0)) == [4] * 5


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(0, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_groups_hang_on_different_rows_with_a_token_to_predict(
    lengths: list[int], spare: int, seed: int
) -> None:
    """Catches two groups on one row, and a last row that predicts behind the end of the text."""
    tokens = len(lengths) + max(lengths) + 1 + spare
    layout = anchored(tokens, lengths, torch.Generator().manual_seed(seed))
    depth, offset = layout.look_ahead[tokens:], layout.offset[tokens:]
    assert layout.real == tokens
    assert len(depth) == sum(lengths)
    assert int((offset + 1).max()) < tokens
    anchors = (offset - depth)[depth == 1].tolist()
    assert len(set(anchors)) == len(lengths)
    hung = [int((offset - depth == anchor).sum()) for anchor in anchors]
    assert sorted(hung) == sorted(lengths)


def test_anchors_differ_from_step_to_step_and_text_to_text() -> None:
    """Catches one draw of anchors used for all: the rest of each text would never be trained on."""
    generator = torch.Generator().manual_seed(0)
    layouts = [anchored(64, [2] * 10, generator) for _ in range(3)]
    assert not torch.equal(layouts[0].offset, layouts[1].offset)
    assert not torch.equal(layouts[1].offset, layouts[2].offset)


# Losses


def hung_on(text: Tensor, groups: dict[int, int], rows: Tensor, target: Target) -> Hung:
    """Groups of these lengths hung on these real rows of one text."""
    lengths = [groups.get(place, 0) for place in range(len(text))]
    layout = Plan(len(text) - 1, tuple(lengths)).layout()
    return target.hang(text[None], [layout], rows)


@pytest.fixture(scope="module")
def hung() -> tuple[Tensor, Hung]:
    """A text, and groups of unequal lengths on three of its rows."""
    text = counting(1, 20, seed=5)[0]
    rows = counting_look_ahead().inputs(counting_llama())
    with torch.no_grad():
        return text, hung_on(text, {3: 4, 7: 1, 12: 3}, rows, counting_llama())


ROWS = [(3, 1), (3, 2), (3, 3), (3, 4), (7, 1), (12, 1), (12, 2), (12, 3)]  # (anchor, j)


def test_cross_entropy_is_to_the_token_behind_the_row(hung: tuple[Tensor, Hung]) -> None:
    """Catches a shift by one: row `(i, j)` predicts token `i + j + 1`."""
    text, given_ = hung
    logs = given_.logits[0].log_softmax(-1)
    naive = [-float(logs[r, text[i + j + 1]]) for r, (i, j) in enumerate(ROWS)]
    assert float(cross_entropy(given_, text[None])) == pytest.approx(sum(naive) / len(naive))


def test_distillation_is_towards_the_target_where_the_row_stands(
    hung: tuple[Tensor, Hung],
) -> None:
    """Catches a teacher one row early or late, and a divergence the wrong way round."""
    text, given_ = hung
    with torch.no_grad():
        teacher = counting_llama().model(text[None]).logits[0].softmax(-1)
    logs = given_.logits[0].log_softmax(-1)
    naive = [-float((teacher[i + j] * logs[r]).sum()) for r, (i, j) in enumerate(ROWS)]
    assert float(distillation(given_)) == pytest.approx(sum(naive) / len(naive), rel=1e-5)


def test_distillation_is_least_at_the_target_itself(hung: tuple[Tensor, Hung]) -> None:
    """Catches a loss whose floor is not the target's entropy."""
    _, given_ = hung
    teacher = given_.text_logits[0, [i + j for i, j in ROWS]]
    perfect = replace(given_, logits=teacher[None])
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    assert float(distillation(perfect)) == pytest.approx(float(entropy), rel=1e-5)
    assert float(distillation(perfect)) < float(distillation(given_))
    assert greedy_hits(perfect).all()


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_accepted_lengths_are_those_of_a_loop(groups: list[list[bool]]) -> None:
    """Catches hits counted behind a miss, and a group that inherits the one before it."""
    hits = torch.tensor([hit for group in groups for hit in group])
    depth = torch.tensor([j for group in groups for j in range(1, len(group) + 1)])
    naive = [[*group, False].index(False) for group in groups]
    assert accepted_lengths(hits, depth).tolist() == naive


# Parity with decoding

Pass = tuple[int, int, int]  # anchor, candidates judged, candidates accepted


@pytest.mark.parametrize("model", [counting_llama, counting_mistral], ids=["llama", "mistral"])
@pytest.mark.parametrize("strategy", [OnePass, TwoPass], ids=["one-pass", "two-pass"])
def test_training_reports_the_accepted_length_that_decoding_counts(
    model: Callable[[], Target], strategy: Callable[[int], Strategy]
) -> None:
    """Catches look-ahead rows that train at one place and decode at another.

    Each pass that judged candidates names the row their group hung on. Groups hung there on the
    finished text, all at once, must give the same accepted length one by one; moved by one row
    they must not.
    """
    target = model()
    rows = counting_look_ahead().inputs(target)
    total = Stats()
    for seed in range(3):
        prompt = counting(1, 10, seed=seed)[0].tolist()
        text, passes = decoded(target, rows, prompt, strategy(BLANKS), total)
        assert teacher_forced(target, rows, text, passes) == [n for _, _, n in passes]
        inner = passes[:-3]  # of which the groups stay in the text when moved
        for shift in (-1, 1):
            moved = [(anchor + shift, judged, n) for anchor, judged, n in inner]
            assert teacher_forced(target, rows, text, moved) != [n for _, _, n in inner]
    assert 0.3 < total.accepted_length < BLANKS - 0.3


def teacher_forced(target: Target, rows: Tensor, text: list[int], passes: list[Pass]) -> list[int]:
    """What each pass accepts by rows hung on the finished text; candidates cut off do not count."""
    groups = {anchor: min(BLANKS, len(text) - 1 - anchor) for anchor, _, _ in passes}
    with torch.no_grad():
        given_ = hung_on(torch.tensor(text), groups, rows, target)
    lengths = accepted_lengths(greedy_hits(given_)[0], given_.depth[0]).tolist()
    return [min(n, judged) for n, (_, judged, _) in zip(lengths, passes, strict=True)]


def decoded(
    target: Target, rows: Tensor, prompt: list[int], strategy: Strategy, total: Stats
) -> tuple[list[int], list[Pass]]:
    """Greedy decoding: the whole text, and each pass that judged candidates."""
    decoder = Decoder(target, rows)
    row = decoder.join(Request.of(prompt, SamplingParams(), 60, strategy))
    passes = []
    while decoder.rows:
        anchor = len(row.tokens) - 2  # the last accepted row; the token drawn behind it is root
        (_, step) = decoder.step()[0]
        total.count(step)
        if step.judged:
            passes.append((anchor, step.judged, step.accepted))
    return row.tokens, passes


def test_hits_a_row_late_are_not_what_decoding_counts() -> None:
    """Catches a parity that holds of anything: hits against the next row's target fail it."""
    target = counting_llama()
    rows = counting_look_ahead().inputs(target)
    text, passes = decoded(target, rows, [1, 2, 3, 4, 5], OnePass(BLANKS), Stats())
    groups = {anchor: BLANKS for anchor, _, _ in passes if anchor + BLANKS + 1 < len(text)}
    with torch.no_grad():
        given_ = hung_on(torch.tensor(text), groups, rows, target)
    counted = [accepted for anchor, _, accepted in passes if anchor in groups]
    assert accepted_lengths(greedy_hits(given_)[0], given_.depth[0]).tolist() == counted
    late = replace(given_, position=given_.position + 1)
    assert accepted_lengths(greedy_hits(late)[0], late.depth[0]).tolist() != counted


def test_groups_hung_together_are_groups_hung_alone() -> None:
    """Catches a group that sees another one, or the text behind its row."""
    target = counting_llama()
    rows = counting_look_ahead().inputs(target)
    text = counting(1, 24, seed=3)[0]
    with torch.no_grad():
        together = hung_on(text, {4: 3, 5: 2, 11: 4}, rows, target).logits[0]
        changed = text.clone()
        changed[6:] = (changed[6:] + 5) % VOCABULARY
        alone = hung_on(changed, {5: 2}, rows, target).logits[0]
    torch.testing.assert_close(together[3:5], alone, rtol=1e-4, atol=1e-5)
