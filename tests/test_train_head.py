"""Training a draft head: its rows, and that it is trained for what decoding asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from small_llama import counting, counting_llama, small_llama, trainer
from torch import Tensor

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import ByHead
from passlm.lookahead.trained import LookAhead
from passlm.model.target import Target
from passlm.model.training import hidden_states
from passlm.params import SamplingParams
from passlm.plan import Plan, make_layout
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve
from passlm.train.config import Loss, TrainConfig
from passlm.train.head import HeadTrainer
from passlm.train.loss import accepted_lengths, parts

CONFIG = TrainConfig(
    kind="head",
    steps=40,
    sequences=2,
    sequence_tokens=32,
    anchors=12,
    keep=0.5,
    head_width=24,
    head_depths=3,
    head_texts=5,
    head_learning_rate=0.03,
    warmup=2,
    evaluate_every=40,
    evaluate_texts=2,
)


def head_trainer(folder: Path, config: TrainConfig = CONFIG) -> HeadTrainer:
    made = trainer(folder, config)
    assert isinstance(made, HeadTrainer)
    return made


@cache
def trained() -> tuple[LookAhead, HeadTrainer]:
    """A head that guesses some of a counting text, and what trained it."""
    with TemporaryDirectory() as folder:
        run = head_trainer(Path(folder))
        for _ in run.run():
            pass
    return run.look_ahead, run


def test_anchors_come_from_the_last_texts(tmp_path: Path) -> None:
    """Catches rows of one text alone, hidden states of another token, and anchors without a token
    to guess."""
    run = head_trainer(tmp_path)
    text, hung = run.batch([8, 9])
    last = [run.windows.window(index).tolist() for index in range(6, 10)]
    assert all(one in last for one in text.tolist())
    assert hung.depth.shape == hung.position.shape == hung.text.shape
    assert len(set(hung.text.flatten().tolist())) > 2
    anchors = hung.position - hung.depth
    truth = torch.stack([hidden_states(run.target, one[None])[0] for one in text])
    torch.testing.assert_close(hung.hidden, truth[hung.text, anchors])
    assert int(hung.position.max()) + 1 < CONFIG.sequence_tokens
    assert torch.bincount(hung.depth.flatten()).tolist() == [0, 24, 12, 6]


@pytest.mark.parametrize("parts_of", [1, 5])
@pytest.mark.parametrize("loss", get_args(Loss))
def test_gradients_of_a_step_are_those_of_the_whole_loss(
    loss: Any, parts_of: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches chances of another token or place, or made anew on the list, whose float16 is the
    only loss; and a guess that counts as another's depth does."""
    config = replace(
        CONFIG, loss=loss, position_weight=0.7, teacher_temperature=1.5, anchors=40, sequences=1
    )
    run = head_trainer(tmp_path, config)
    head = run.look_ahead.head
    assert head is not None
    head.listed = torch.tensor([5, 0, *range(8, 20)])  # no longer in order, nor all
    torch.nn.init.normal_(head.out, std=0.1, generator=torch.Generator().manual_seed(0))
    for index in range(3):  # texts to draw from
        run.batch([index])
    if parts_of > 1:  # rows at a time
        monkeypatch.setattr("passlm.train.head.PART_NUMBERS", parts_of * len(head.listed))
    loss_of_step = run._backward(*reversed(run.batch([3])))
    text, hung = run.batch([3])
    total, weights = torch.zeros(()), 0.0
    losses = []
    with torch.no_grad():
        truth = [run.target.model(one[None]).logits[0] / 1.5 for one in text]
    reached = torch.ones(())
    for row, depth in enumerate(hung.depth[0].tolist()):
        one, place = int(hung.text[0, row]), int(hung.position[0, row])
        tables = run.target.embeddings
        before = tables.inputs[text[one, [place, max(place - 1, 0)]]][None]
        outputs = tables.outputs.detach()[head.listed]
        hidden = hung.hidden[:, row]
        logits = head.logits(hidden, before, torch.tensor([depth]), outputs)[0]
        teacher = truth[one][place].softmax(-1)[head.listed]
        if loss == "distillation":
            losses.append(-(teacher * logits.log_softmax(-1)).sum())
        elif loss == "cross-entropy":
            wanted = head.listed == text[one, place + 1]
            losses.append(-(logits.log_softmax(-1) * wanted).sum())
        else:
            reached = torch.ones(()) if depth == 1 else reached
            accepted = torch.minimum(teacher, logits.softmax(-1)).sum()
            losses.append(reached * (1 - accepted))
            reached = reached * accepted.detach()
        total = total + 0.7 ** (depth - 1) * losses[-1]
        weights += 0.7 ** (depth - 1)
    naive = total / weights
    assert loss_of_step == pytest.approx(float(naive.detach()), rel=1e-3)
    for name, parameter in run.parameters.items():
        (wanted,) = torch.autograd.grad(naive, parameter, retain_graph=True)
        assert parameter.grad is not None
        assert bool(wanted.any()), name
        least = 1e-3 * float(wanted.abs().max())
        torch.testing.assert_close(parameter.grad, wanted, rtol=5e-3, atol=least, msg=name)


def test_anchors_may_be_more_than_a_text_has_rows(tmp_path: Path) -> None:
    """Catches a bound that holds where groups are hung on one text alone."""
    run = head_trainer(tmp_path, replace(CONFIG, anchors=100, sequences=1))
    for index in range(3):
        _, hung = run.batch([index])
    assert hung.depth.shape == (1, 175)
    assert run.groups_seen == 0


def test_a_step_depends_on_its_number_alone(tmp_path: Path) -> None:
    """Catches anchors that a restart changes, and texts that are read once more for each step."""
    run, again = head_trainer(tmp_path), head_trainer(tmp_path)
    read = []
    hidden = hidden_states
    for step in range(3):
        run.batch([2 * step, 2 * step + 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "passlm.train.head.hidden_states", lambda *given: read.append(1) or hidden(*given)
        )
        text, one = run.batch([6, 7])
    assert len(read) == 2
    its_text, other = again.batch([6, 7])
    assert torch.equal(one.position, other.position)
    assert torch.equal(text[one.text, one.position], its_text[other.text, other.position])


def test_each_process_draws_from_its_own_texts(tmp_path: Path) -> None:
    """Catches processes that read unequal numbers of texts, for which sharded layers would wait."""
    run = head_trainer(tmp_path)
    run.processes = Neighbours()
    assert run._last([2, 3]) == [2, 3]
    assert run._last([14, 15]) == [10, 11, 14, 15]


class Neighbours:
    """The second of two processes."""

    place = (1, 2)

    def average(self, loss: float, parameters: Mapping[str, Tensor]) -> float:
        return loss

    def any(self, flag: bool) -> bool:
        return flag


def test_training_reports_the_accepted_length_that_decoding_counts() -> None:
    """Catches a head that trains at one place and decodes at another, or is told another token:
    each draft of a decoded text is made again on the finished text."""
    rows, run = trained()
    target = counting_llama()
    curve = CostCurve((1, 41), (1.0, 1.01), head_seconds=(0.001, 0.002, 0.003))
    plan = AutoPlan(curve, lookup=False, head=(0.7, 0.7, 0.7))
    compared = 0
    for seed in range(3):
        prompt = counting(1, 10, seed=seed)[0].tolist()
        decoder = Decoder(target, rows.rows(target))
        row = decoder.join(Request.of(prompt, SamplingParams(), 60, plan))
        passes = []
        while decoder.rows:
            anchor = len(row.tokens) - 2  # the row that the root was drawn from
            ((_, step),) = decoder.step()
            chain = row.choice.chain
            if chain is not None and step.judged == 3:
                assert chain.source == "head"
                passes.append((anchor, step.accepted))
        tokens = torch.tensor([row.tokens])
        for anchor, accepted in passes[:-2]:  # the last ones are cut
            groups = [0] * len(row.tokens)
            groups[anchor] = 3
            hung = run.hang(tokens, [make_layout(Plan(len(groups) - 1, tuple(groups)))])
            ((_, part),) = parts(target, hung, tokens)
            lengths = accepted_lengths(part.hits(run._guesses(part)[1]), part.depth)
            assert lengths.tolist() == [accepted]
            compared += accepted > 0
    assert compared > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_target_of_16_bits_trains_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """Catches products of numbers of two types, in training or in decoding."""
    target = Target(small_llama().to(dtype))
    run = trainer(tmp_path, replace(CONFIG, steps=2, evaluate_every=1), target)
    assert all(step.loss == step.loss for step in run.run())
    rows = run.look_ahead.rows(target)
    request = Request.of([1, 2, 3], SamplingParams(), 6, ByHead(2))
    decoder = Decoder(target, rows)
    row = decoder.join(request)
    while decoder.rows:
        decoder.step()
    assert len(row.tokens) == 9


def test_a_list_too_short_for_the_text_is_no_fault(tmp_path: Path) -> None:
    """Catches losses and hits that need the text's token on the list."""
    run = head_trainer(tmp_path, replace(CONFIG, steps=2, loss="cross-entropy"))
    assert run.look_ahead.head is not None
    run.look_ahead.head.listed = run.look_ahead.head.listed[:3]
    assert all(step.loss == step.loss for step in run.run())
    assert 0 <= sum(run.evaluate()) < 3
