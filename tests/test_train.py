"""Training: what it may touch, that it can be interrupted, and that its figures are decoding's."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_llama import (
    BLANKS,
    VOCABULARY,
    counting,
    counting_llama,
    counting_look_ahead,
    counting_look_ahead_with_parts,
    counting_mistral,
    randomised,
    small_llama,
    trainer,
    training,
)
from torch import Tensor

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import OnePass, Strategy, TwoPass
from passlm.model.pass_records import Hung, LookAheadRows
from passlm.model.target import Target
from passlm.model.training import look_ahead_pass
from passlm.outputs import Stats
from passlm.params import SamplingParams
from passlm.plan import Plan
from passlm.train import head, loop
from passlm.train.config import ConfigError, Loss, TrainConfig
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
from passlm.train.loss import (
    Guess,
    Part,
    _reached,
    accepted_lengths,
    cross_entropy,
    distillation,
    parts,
    row_losses,
)

CONFIG = TrainConfig(
    kind="embeddings",
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


KINDS = {
    "embeddings": CONFIG,
    "lora": replace(CONFIG, kind="lora", lora_rank=3, lora_learning_rate=0.01),
    "sampler": replace(
        CONFIG,
        kind="sampler",
        lora_rank=3,
        lora_layers=("q_proj", "v_proj", "mlp.*"),
        lora_learning_rate=0.01,
        sampler_width=8,
        sampler_learning_rate=0.01,
        accumulate=2,
        sequences=1,
    ),
    "head": replace(
        CONFIG, kind="head", head_width=24, head_depths=3, head_texts=5, head_learning_rate=0.03
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def finish(run: Trainer) -> list[Progress]:
    """Train to the end."""
    return list(run.run())


def without_seconds(history: list[Progress]) -> list[Progress]:
    """Figures that do not depend on the machine's speed."""
    return [replace(progress, seconds=0.0) for progress in history]


# Interruption


@cache
def _unbroken(folder: Path, kind: str) -> Trainer:
    run = trainer(folder / kind, KINDS[kind])
    finish(run)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs that nothing interrupted are kept."""
    return tmp_path_factory.mktemp("unbroken")


@pytest.fixture
def unbroken(folder: Path) -> Trainer:
    """A run of six steps that nothing interrupted."""
    return _unbroken(folder, "embeddings")


def same(one: Trainer, other: Trainer) -> bool:
    """Whether two runs trained the same parameters to the same bits."""
    mine, theirs = one.parameters, other.parameters
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


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


@every_kind
@pytest.mark.parametrize("end", [stopped, killed])
@pytest.mark.parametrize("after", [2, 3])
def test_resuming_gives_the_numbers_of_an_unbroken_run(
    end: Callable[[Trainer, int], None], after: int, kind: str, folder: Path, tmp_path: Path
) -> None:
    """Catches a state that is not kept: Adam's moments or count, those of a part, the data's
    place, the anchors, the learning rates. The bits are equal, the history has every step once."""
    unbroken = _unbroken(folder, kind)
    end(trainer(tmp_path, KINDS[kind]), after)
    again = trainer(tmp_path, KINDS[kind])
    again.resume()
    assert again.steps_done == (after if end is stopped else 2)
    finish(again)
    assert same(again, unbroken)
    history = read_history(tmp_path)
    assert [progress.step for progress in history] == [1, 2, 3, 4, 5, 6]
    assert without_seconds(history) == without_seconds(read_history(unbroken.folder))
    assert all(a.seconds <= b.seconds for a, b in pairwise(history))


def kept(run: Trainer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A run's checkpoint: the tensors, and what is said of them but for the seconds."""
    with safe_open(run.folder / CHECKPOINT, framework="pt") as file:
        about = file.metadata()
    del about["seconds"]
    return load_file(run.folder / CHECKPOINT), about


@every_kind
def test_checkpoint_of_a_resumed_run_is_the_same_file_but_for_its_seconds(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """Catches optimiser state that is close, but not the same, and one that is left out."""
    unbroken = _unbroken(folder, kind)
    stopped(trainer(tmp_path, KINDS[kind]), 3)
    again = trainer(tmp_path, KINDS[kind])
    again.resume()
    finish(again)
    (mine, said), (theirs, said_there) = kept(again), kept(unbroken)
    assert said == said_there
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(mine) == 4 * len(unbroken.parameters)  # and three of Adam's for each
    sizes = (tmp_path / CHECKPOINT, unbroken.folder / CHECKPOINT)
    assert abs(sizes[0].stat().st_size - sizes[1].stat().st_size) <= 32  # digits of the seconds


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


def test_another_dtype_or_start_is_refused(unbroken: Trainer) -> None:
    """Catches a run that is half in one type, or goes on from other files than it began with."""
    run = trainer(unbroken.folder, CONFIG)
    run.started_from = "abc"
    assert "--start-from is another" in refusal(run)
    half = Target(deepcopy(counting_llama().model).to(torch.bfloat16))
    said = refusal(trainer(unbroken.folder, CONFIG, half))
    assert "dtype was float32, is bfloat16" in said


def test_a_run_can_be_gone_on_with_from_its_beginning(unbroken: Trainer, tmp_path: Path) -> None:
    """Catches a run that was killed before its first checkpoint: neither new nor to be resumed."""
    run = trainer(tmp_path, CONFIG)
    next(run.run())  # the first step is done, and no checkpoint is due
    again = trainer(tmp_path, CONFIG)
    again.resume()
    assert again.steps_done == 0
    finish(again)
    assert same(again, unbroken)


def test_any_seed_draws(tmp_path: Path) -> None:
    """Catches a seed, as of a clock, that overflows in the middle of a run."""
    run = trainer(tmp_path, replace(CONFIG, seed=2**63 - 1))
    assert run.drawing(5).initial_seed() != run.drawing(6).initial_seed()


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
        *((n, 0) for n in ("lookahead_tokens", "steps", "sequences", "anchors", "accumulate")),
        *((n, 0) for n in ("evaluate_every", "evaluate_texts", "checkpoint_every", "keep")),
        *((n, 0) for n in ("lora_rank", "sampler_width", "teacher_temperature")),
        ("sequence_tokens", 166),
        ("kind", "adapter"),
        ("lora_learning_rate", 0.0),
        ("sampler_learning_rate", math.inf),
        ("teacher_temperature", math.nan),
        ("position_weight", 0.0),
        ("clip", -1.0),
        ("clip", math.nan),
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


def _nan_loss(kind: str, guess: Guess, part: Part) -> Tensor:
    return distillation(guess, part) * math.nan


def _nan_gradient(kind: str, guess: Guess, part: Part) -> Tensor:
    zero = guess.logits - guess.logits
    return distillation(guess, part) + zero.sqrt().sum(-1)  # 0, of infinite slope


@every_kind
@pytest.mark.parametrize("loss", [_nan_loss, _nan_gradient])
def test_a_loss_that_is_no_number_stops_at_the_last_good_step(
    loss: Callable[..., Tensor], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches numbers of NaN that are stepped to, and kept over the last good checkpoint; and a
    gradient of NaN that clipping makes of all parts."""
    config = replace(KINDS[kind], checkpoint_every=1)
    run = trainer(tmp_path, config)
    stopped(run, 3)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    for module in (loop, head):
        monkeypatch.setattr(module, "row_losses", loss)
    with pytest.raises(TrainingError) as caught:
        finish(run)
    assert "step 4" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())
    monkeypatch.undo()
    again = trainer(tmp_path, config)
    again.resume()
    assert again.steps_done == 3
    assert [progress.step for progress in read_history(tmp_path)] == [1, 2, 3]
    assert same(again, run)


# What is trained


@every_kind
@pytest.mark.parametrize("loss", get_args(Loss))
def test_only_the_look_ahead_is_trained_and_all_of_it(loss: Any, kind: str, tmp_path: Path) -> None:
    """Catches gradients kept for, or steps taken on, a target whose weights ask for them; and a
    part without gradients, or that the optimiser does not know."""
    target = Target(small_llama())
    assert all(weight.requires_grad for weight in target.model.parameters())
    before = {name: w.detach().clone() for name, w in target.model.named_parameters()}
    run = trainer(tmp_path, replace(KINDS[kind], steps=2, loss=loss), target)
    start = {name: p.detach().clone() for name, p in run.look_ahead.named_parameters()}
    assert any("lora" in name for name in start) == (kind in ("lora", "sampler"))
    assert any("sampler" in name for name in start) == (kind == "sampler")
    finish(run)
    for name, parameter in run.look_ahead.named_parameters():
        left = kind == "head" and not name.startswith("head.")  # is trained alone
        assert torch.equal(parameter, start[name]) == left, name
    for name, weight in target.model.named_parameters():
        assert weight.grad is None
        assert torch.equal(weight, before[name])
        assert weight.requires_grad


@every_kind
@pytest.mark.parametrize("loss", ["distillation", "cross-entropy"])
def test_training_learns_what_can_be_learnt(loss: Any, kind: str, tmp_path: Path) -> None:
    """Catches a step uphill, and a loss at rows that have nothing to do with the text."""
    config = replace(
        KINDS[kind], steps=25, loss=loss, learning_rate=0.1, keep=1.0, evaluate_every=25
    )
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


def hung_on(
    text: Tensor, groups: dict[int, int], rows: LookAheadRows, target: Target
) -> tuple[Hung, Part]:
    """Groups of these lengths hung on these real rows of one text, and all of them as a part."""
    lengths = [groups.get(place, 0) for place in range(len(text))]
    layout = Plan(len(text) - 1, tuple(lengths)).layout()
    hung = look_ahead_pass(target, text[None], [layout], rows)
    [(_, part)] = parts(target, hung, text[None])
    return hung, part


def final_guess(target: Target, rows: LookAheadRows, part: Part) -> Guess:
    """What rows guess in the end: weighed by the sampler head where there is one."""
    guess = part.guess(target)
    return guess if rows.sampler is None else part.weighed(guess, rows.sampler, target.embeddings)


ROWS = [(3, 1), (3, 2), (3, 3), (3, 4), (7, 1), (12, 1), (12, 2), (12, 3)]  # (anchor, j)


@dataclass(frozen=True)
class Known:
    """A text, groups of unequal lengths on three of its rows, and the model's own logits.

    Attributes:
        guess: over the vocabulary.
        short: over the shortlists of a sampler head, shorter than the vocabulary.
    """

    text: Tensor
    part: Part
    guess: Guess
    short: Guess
    truth: Tensor  # [S, V]

    def teacher(self, row: int) -> Tensor:
        """The model's own distribution where a row stands."""
        anchor, depth = ROWS[row]
        return self.truth[anchor + depth].softmax(-1)


@pytest.fixture(scope="module")
def known() -> Known:
    text, target = counting(1, 20, seed=5)[0], counting_llama()
    rows = counting_look_ahead_with_parts().trained_rows(target)
    with torch.no_grad():
        _, part = hung_on(text, {3: 4, 7: 1, 12: 3}, rows, target)
        guess, truth = part.guess(target), target.model(text[None]).logits[0]
        return Known(text, part, guess, final_guess(target, rows, part), truth)


def test_cross_entropy_is_to_the_token_behind_the_row(known: Known) -> None:
    """Catches a shift by one: row `(i, j)` predicts token `i + j + 1`."""
    logs = known.guess.logits.log_softmax(-1)
    naive = [-float(logs[r, known.text[i + j + 1]]) for r, (i, j) in enumerate(ROWS)]
    assert cross_entropy(known.guess, known.part).tolist() == pytest.approx(naive)


def test_distillation_is_towards_the_target_where_the_row_stands(known: Known) -> None:
    """Catches a teacher one row early or late, and a divergence the wrong way round."""
    logs = known.guess.logits.log_softmax(-1)
    naive = [-float((known.teacher(r) * logs[r]).sum()) for r in range(len(ROWS))]
    assert distillation(known.guess, known.part).tolist() == pytest.approx(naive, rel=1e-4)


def test_distillation_is_least_at_the_target_itself(known: Known) -> None:
    """Catches a loss whose floor is not the target's entropy."""
    perfect, teacher = Guess(known.part.teacher), known.part.teacher
    floor = distillation(perfect, known.part)
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    torch.testing.assert_close(floor, entropy)
    assert bool((floor <= distillation(known.guess, known.part)).all())
    assert known.part.hits(perfect).all()


def test_losses_on_a_shortlist_count_what_lies_on_it(known: Known) -> None:
    """Catches shortlist places taken for ids, a teacher normalised anew on the shortlist, which
    would make a row of no likely token important, and a wanted token off it that is learnt."""
    short, part = known.short, known.part
    assert short.tokens is not None
    assert short.tokens.shape[1] < VOCABULARY
    distilled, crossed = [], []
    for row, (anchor, depth) in enumerate(ROWS):
        ids, logs = short.tokens[row].tolist(), short.logits[row].log_softmax(-1).tolist()
        teacher, wanted = known.teacher(row).tolist(), int(known.text[anchor + depth + 1])
        distilled.append(-sum(teacher[id_] * log for id_, log in zip(ids, logs, strict=True)))
        crossed.append(-logs[ids.index(wanted)] if wanted in ids else 0.0)
    assert distillation(short, part).tolist() == pytest.approx(distilled, rel=1e-4)
    assert cross_entropy(short, part).tolist() == pytest.approx(crossed, rel=1e-4)
    best = [int(short.tokens[row, short.logits[row].argmax()]) for row in range(len(ROWS))]
    assert short.best().tolist() == best
    off = replace(part, text=torch.full_like(part.text, VOCABULARY - 1))
    ids = replace(short, tokens=torch.arange(short.tokens.shape[1]).expand_as(short.tokens))
    assert not cross_entropy(ids, off).any()


@pytest.mark.parametrize("shortlist", [False, True])
def test_refusal_counts_a_row_by_the_chance_that_it_is_reached(
    known: Known, shortlist: bool
) -> None:
    """Catches rows that count behind a refusal, weights of the group before, and a gradient
    through the weight, which would teach a row to be refused so that the next do not count."""
    guess = known.short if shortlist else known.guess
    logits = guess.logits.clone().requires_grad_()
    chances = []
    for row in range(len(ROWS)):
        teacher = known.teacher(row)
        teacher = teacher if guess.tokens is None else teacher[guess.tokens[row]]
        chances.append(torch.minimum(teacher, logits[row].softmax(-1)).sum())
    reached, naive = 1.0, []
    for (_, depth), chance in zip(ROWS, chances, strict=True):
        reached = 1.0 if depth == 1 else reached
        naive.append(reached * (1 - chance))
        reached *= float(chance.detach())
    losses = row_losses("acceptance", replace(guess, logits=logits), known.part)
    torch.testing.assert_close(losses, torch.stack(naive), rtol=1e-3, atol=1e-5)
    (mine,) = torch.autograd.grad(losses.sum(), logits)
    (theirs,) = torch.autograd.grad(torch.stack(naive).sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5), min_size=1, max_size=6)
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_a_row_is_reached_where_all_before_it_were_accepted(groups: list[list[float]]) -> None:
    """Catches a product that runs on into the next group or takes its own row in, and a chance of
    nothing that makes NaN."""
    accepted = torch.tensor([chance for group in groups for chance in group])
    depth = torch.tensor([j for group in groups for j in range(1, len(group) + 1)])
    naive = [math.prod(group[:j]) for group in groups for j in range(len(group))]
    assert _reached(accepted, depth).tolist() == pytest.approx(naive, rel=1e-3, abs=1e-4)


def test_the_teacher_is_cooled_and_its_best_token_stays(known: Known) -> None:
    """Catches a temperature on the wrong side of the loss, or multiplied instead of divided."""
    target = counting_llama()
    hung, _ = hung_on(known.text, {3: 4, 7: 1, 12: 3}, rows_of(target), target)
    [(_, warm)] = parts(target, hung, known.text[None], temperature=2.0)
    with torch.no_grad():
        torch.testing.assert_close(warm.teacher, known.part.teacher / 2, rtol=1e-4, atol=1e-5)
        guess = warm.guess(target)
        torch.testing.assert_close(guess.logits, known.guess.logits, rtol=1e-4, atol=1e-5)
        assert warm.hits(guess).tolist() == known.part.hits(known.guess).tolist()


def rows_of(target: Target) -> LookAheadRows:
    """Look-ahead rows with all parts, as training takes them."""
    return counting_look_ahead_with_parts().trained_rows(target)


# The gradients of a step

STEP = replace(KINDS["sampler"], lora_layers=(), accumulate=1, sequences=2)


def gradients(folder: Path, config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step, from parts that have an effect on."""
    run = ready(folder, config)
    loss = run.gradients(0)
    return loss, {name: p.grad.clone() for name, p in run.parameters.items() if p.grad is not None}


def ready(folder: Path, config: TrainConfig) -> Trainer:
    """A run of random parts that has not begun."""
    start = trainer(folder, config)
    return training(folder, config, randomised(start.look_ahead, 0.2), start.target)


def assert_same_gradients(
    one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]
) -> None:
    """Equal up to the rounding of float32 sums in another order."""
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    assert "embeddings" in one[1]
    for name, gradient in one[1].items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-3, atol=1e-6, msg=name)


def naive_gradients(folder: Path, config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    """The same from one graph over all rows of all texts, and losses weighed row by row."""
    run = ready(folder, config)
    texts = config.accumulate * config.sequences
    text = torch.stack([run.windows.window(index) for index in range(texts)])
    rows, target = run.look_ahead.trained_rows(run.target), run.target
    hung = look_ahead_pass(target, text, [run._layout(index) for index in range(texts)], rows)
    logits = target.logits(hung.hidden)
    total, weights = torch.zeros(()), 0.0
    with torch.no_grad():
        teachers = target.model(text).logits / config.teacher_temperature
    for index in range(texts):
        place = hung.position[index]
        part = Part(
            hung.hidden[index],
            hung.depth[index],
            text,
            (torch.full_like(place, index), place),
            teachers[index, place],
        )
        guess = Guess(logits[index])
        losses = row_losses(config.loss, guess, part)
        if rows.sampler is not None:
            weighed = part.weighed(guess, rows.sampler, target.embeddings)
            losses = losses + row_losses(config.loss, weighed, part)
        for row, depth in enumerate(hung.depth[index].tolist()):
            weight = config.position_weight ** (depth - 1)
            total, weights = total + weight * losses[row], weights + weight
    loss = total / weights
    grads = torch.autograd.grad(loss, list(run.parameters.values()))
    return float(loss.detach()), dict(zip(run.parameters, grads, strict=True))


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("kind", ["embeddings", "sampler"])
def test_gradients_of_a_step_are_those_of_the_whole_loss(
    loss: Any, kind: Any, tmp_path: Path
) -> None:
    """Catches whatever is lost on the way through parts: rows weighed by another row's depth, a
    text's gradient at another's rows, the sampler's share of the hidden states, a temperature."""
    config = replace(STEP, kind=kind, loss=loss, position_weight=0.7, teacher_temperature=1.5)
    mine = gradients(tmp_path, config)
    assert_same_gradients(mine, naive_gradients(tmp_path, config))
    unweighed = gradients(tmp_path, replace(config, position_weight=1.0))
    assert mine[0] != pytest.approx(unweighed[0], rel=1e-3)


def test_accumulating_is_the_gradient_of_all_texts_at_once(tmp_path: Path) -> None:
    """Catches a sum where a mean is due, and batches that take the same texts or anchors."""
    together = gradients(tmp_path, STEP)
    apart = gradients(tmp_path, replace(STEP, accumulate=2, sequences=1))
    assert_same_gradients(together, apart)
    half = gradients(tmp_path, replace(STEP, sequences=1))
    assert half[0] != pytest.approx(together[0], rel=1e-4)


@pytest.mark.parametrize("most", [1, 4, 15])
def test_parts_of_few_rows_are_one_part(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows lost or counted twice between parts, and groups torn in two, whose later rows
    would count as if they were always reached."""
    config = replace(STEP, loss="acceptance")
    whole = gradients(tmp_path, config)
    sizes: list[int] = []

    def counted(kind: Any, guess: Guess, part: Part) -> Tensor:
        sizes.append(len(part.depth))
        assert int(part.depth[0]) == 1
        return row_losses(kind, guess, part)

    monkeypatch.setattr(loop, "row_losses", counted)
    monkeypatch.setattr("passlm.train.loss.PART_NUMBERS", most * VOCABULARY)
    assert_same_gradients(gradients(tmp_path, config), whole)
    assert len(sizes) > 2
    assert max(sizes) <= max(most, config.lookahead_tokens)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "head"])  # has no pass
def test_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    """Catches layers computed anew without their updates, or into the cache a second time."""
    config = replace(KINDS[kind], gradient_checkpointing=False)
    plain = gradients(tmp_path, config)
    assert_same_gradients(gradients(tmp_path, replace(config, gradient_checkpointing=True)), plain)


@pytest.mark.parametrize("model", [counting_llama, counting_mistral], ids=["llama", "mistral"])
def test_checkpointing_computes_layers_anew(model: Callable[[], Target], tmp_path: Path) -> None:
    """Catches a setting without effect, and a layer left with another forward."""
    target = model()
    run = trainer(tmp_path, replace(STEP, gradient_checkpointing=True), target)
    calls: list[int] = []
    layer = target.model.model.layers[1].mlp
    hook = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run.gradients(0)
    finally:
        hook.remove()
    assert len(calls) == 3  # the text, the groups, and the groups once more
    assert all("forward" not in vars(module) for module in target.model.modules())


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_a_long_gradient_is_cut_to_its_longest(clip: float, tmp_path: Path) -> None:
    """Catches clipping each parameter by itself, a figure taken after it, and 0 that stops all."""
    loss, free = gradients(tmp_path, STEP)
    length = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    run = ready(tmp_path, replace(STEP, clip=clip))
    stopped(run, 1)
    progress = read_history(tmp_path)[-1]
    assert progress.gradient_norm == pytest.approx(length, rel=1e-4)
    assert progress.loss == pytest.approx(loss, rel=1e-4)
    shrunk = min(1.0, clip / length) if clip else 1.0
    assert clip != 1e-3 or shrunk < 0.5
    for name, parameter in run.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, shrunk * free[name], rtol=1e-3, atol=1e-7)


def test_each_part_has_its_own_rate(tmp_path: Path) -> None:
    """Catches one rate for all, or a warm-up that only the embeddings have: Adam's first step
    moves every number with a gradient by the rate."""
    config = replace(STEP, learning_rate=0.08, lora_learning_rate=0.02, sampler_learning_rate=0.01)
    run = ready(tmp_path, config)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    stopped(run, 1)
    for name, parameter in run.parameters.items():
        highest = {"e": 0.08, "l": 0.02, "s": 0.01}[name[0]]
        moved = float((parameter.detach() - before[name]).abs().max())
        assert moved == pytest.approx(highest / config.warmup, rel=0.02), name


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


LOOK_AHEADS = {"embeddings": counting_look_ahead, "sampler": counting_look_ahead_with_parts}


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
@pytest.mark.parametrize("model", [counting_llama, counting_mistral], ids=["llama", "mistral"])
@pytest.mark.parametrize("strategy", [OnePass, TwoPass], ids=["one-pass", "two-pass"])
def test_training_reports_the_accepted_length_that_decoding_counts(
    model: Callable[[], Target], strategy: Callable[[int], Strategy], look_ahead: str
) -> None:
    """Catches look-ahead rows that train at one place and decode at another, updates that act on
    other rows there, and a sampler head that is told another token.

    Each pass that judged candidates names the row their group hung on. Groups hung there on the
    finished text, all at once, must give the same accepted length one by one; moved by one row
    they must not.
    """
    target, trained = model(), LOOK_AHEADS[look_ahead]()
    decoding, training_ = trained.rows(target), trained.trained_rows(target)
    total = Stats()
    moved_hits = {-1: 0, 1: 0}
    for seed in range(3):
        prompt = counting(1, 10, seed=seed)[0].tolist()
        text, passes = decoded(target, decoding, prompt, strategy(BLANKS), total)
        assert teacher_forced(target, training_, text, passes) == [n for _, _, n in passes]
        inner = passes[:-3]  # of which the groups stay in the text when moved
        for shift in moved_hits:
            moved = [(anchor + shift, judged, n) for anchor, judged, n in inner]
            forced = teacher_forced(target, training_, text, moved)
            moved_hits[shift] += sum(n != m for n, (_, _, m) in zip(forced, inner, strict=True))
    assert min(moved_hits.values()) > 3
    assert 0.3 < total.accepted_length < BLANKS - 0.3


@pytest.mark.parametrize("left_out", ["lora", "sampler"])
def test_parity_depends_on_each_part(left_out: str) -> None:
    """Catches a parity of parts that change nothing: teacher-forced without one of them, rows do
    not give what decoding with it counts."""
    target, trained = counting_llama(), counting_look_ahead_with_parts()
    without = replace(trained.trained_rows(target), **{left_out: None})
    different = 0
    for seed in range(3):
        prompt = counting(1, 10, seed=seed)[0].tolist()
        text, passes = decoded(target, trained.rows(target), prompt, TwoPass(BLANKS), Stats())
        forced = teacher_forced(target, without, text, passes)
        different += sum(n != m for n, (_, _, m) in zip(forced, passes, strict=True))
    assert different > 3


def teacher_forced(
    target: Target, rows: LookAheadRows, text: list[int], passes: list[Pass]
) -> list[int]:
    """What each pass accepts by rows hung on the finished text; candidates cut off do not count."""
    groups = {anchor: min(BLANKS, len(text) - 1 - anchor) for anchor, _, _ in passes}
    # A row on the last token predicts one that is not there, and needs no wanted one.
    with torch.no_grad():
        _, part = hung_on(torch.tensor([*text, 0]), groups, rows, target)
        hits = part.hits(final_guess(target, rows, part))
    lengths = accepted_lengths(hits, part.depth).tolist()
    return [min(n, judged) for n, (_, judged, _) in zip(lengths, passes, strict=True)]


def decoded(
    target: Target, rows: LookAheadRows, prompt: list[int], strategy: Strategy, total: Stats
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
    rows = counting_look_ahead().rows(target)
    text, passes = decoded(target, rows, [1, 2, 3, 4, 5], OnePass(BLANKS), Stats())
    groups = {anchor: BLANKS for anchor, _, _ in passes if anchor + BLANKS + 2 < len(text)}
    with torch.no_grad():
        given_, part = hung_on(torch.tensor(text), groups, rows, target)
        late = replace(given_, position=given_.position + 1)
        [(_, moved)] = parts(target, late, torch.tensor([text]))
        lengths = [
            accepted_lengths(p.hits(p.guess(target)), p.depth).tolist() for p in (part, moved)
        ]
    counted = [accepted for anchor, _, accepted in passes if anchor in groups]
    assert lengths[0] == counted
    assert lengths[1] != counted


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
def test_groups_hung_together_are_groups_hung_alone(look_ahead: str) -> None:
    """Catches a group that sees another one, or the text behind its row."""
    target = counting_llama()
    rows = LOOK_AHEADS[look_ahead]().trained_rows(target)
    text = counting(1, 24, seed=3)[0]
    with torch.no_grad():
        together = hung_on(text, {4: 3, 5: 2, 11: 4}, rows, target)[1].guess(target).logits
        changed = text.clone()
        changed[6:] = (changed[6:] + 5) % VOCABULARY
        alone = hung_on(changed, {5: 2}, rows, target)[1].guess(target).logits
    torch.testing.assert_close(together[3:5], alone, rtol=1e-4, atol=1e-5)
