"""The draft head: its numbers, its files, and what it drafts in a decoder."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

from passlm.decoding.decoder import Decoder
from passlm.decoding.noise import Noise, Purpose
from passlm.decoding.request import Request
from passlm.decoding.strategies import ByHead, Limits, autoregressive
from passlm.drafts.draft_head import AppliedHead, DraftHead, HeadSampler
from passlm.drafts.sampler_head import Draws, Embeddings
from passlm.kernels.linear import preferred
from passlm.lookahead import trained
from passlm.lookahead.trained import LookAhead, LookAheadError
from passlm.model.target import Target
from passlm.model.training import hidden_states
from passlm.params import Draft, SamplingParams
from passlm.plan import Chain
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve

VOCABULARY, D, WIDTH, TOLD, DEPTHS, LISTED = 40, 16, 12, 2, 3, 30


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tables() -> Embeddings:
    return Embeddings(noise(VOCABULARY, D, seed=1), noise(VOCABULARY, D, seed=2))


@pytest.fixture
def head() -> DraftHead:
    listed = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))[:LISTED]
    made = DraftHead.start(D, WIDTH, TOLD, DEPTHS, listed)
    made.out.data.copy_(noise(D, WIDTH, seed=4))
    made.depth_in.data.copy_(noise(DEPTHS, WIDTH, seed=5))
    return made


def by_hand(head: DraftHead, tables: Embeddings, hidden: Tensor, text: list[int], j: int) -> Tensor:
    """The definition, for one guess `j` tokens behind its row."""

    def normed(row: Tensor) -> Tensor:
        return row / (row.square().mean() + 1e-6).sqrt()

    told = torch.cat([normed(tables.inputs[token]) for token in (text[-1], text[-2])])
    inner = silu(head.hidden_in @ normed(hidden) + head.token_in @ told + head.depth_in[j - 1])
    return tables.outputs[head.listed] @ (head.out @ inner)


def test_logits_are_those_of_the_definition(head: DraftHead, tables: Embeddings) -> None:
    """Catches tokens told in the wrong order, another depth's numbers, unlisted rows."""
    texts, depths = [[5, 9], [7, 1], [3, 3]], torch.tensor([1, 3, 2])
    hidden = noise(3, D, seed=6)
    before = tables.inputs[torch.tensor([text[::-1] for text in texts])]
    found = head.logits(hidden, before, depths, tables.outputs[head.listed])
    for row, text in enumerate(texts):
        expected = by_hand(head, tables, hidden[row], text, int(depths[row]))
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 0.02 if preferred() else 1e-5), (torch.bfloat16, 0.03)]
)
def test_decoding_takes_the_same_numbers(
    head: DraftHead, tables: Embeddings, dtype: torch.dtype, close: float
) -> None:
    """Catches places of the list taken for ids, another text's hidden state or history, later
    training that reaches a copy, and numbers that depend on the texts beside."""
    tables = Embeddings(tables.inputs.to(dtype), tables.outputs.to(dtype))
    exact = Embeddings(tables.inputs.float(), tables.outputs.float())
    hidden, texts = noise(3, D, seed=7), [[1, 2, 3], [4], [5, 6]]
    expected = [
        by_hand(head, exact, hidden[n], text if len(text) > 1 else text * 2, 2)
        for n, text in enumerate(texts)
    ]
    applied = AppliedHead.of(head, tables, dtype)
    ids, before = head.listed.tolist(), deepcopy(head)
    head.out.data.zero_()
    sampler = HeadSampler(applied, list(hidden), [2, 2, 2])
    shortlists, logits = sampler.shortlists(1, [2, 0, 1], [texts[2], texts[0], texts[1]])
    for at, n in enumerate((2, 0, 1)):
        order = [ids.index(token) for token in shortlists[at].tokens.tolist()]
        assert shortlists[at].vocabulary == VOCABULARY
        wanted = expected[n].detach()
        scale = float(wanted.abs().max())
        torch.testing.assert_close(logits[at], wanted[order], rtol=close, atol=close * scale)
        assert bool((logits[at].diff() <= 0).all())
    found = HeadSampler(applied, list(hidden), [1, 3, 2]).likeliest(texts)
    assert list(map(len, found)) == [1, 3, 2]
    for n, text in enumerate(texts):
        told = text if len(text) > 1 else text * 2
        for j, (token, sure) in enumerate(found[n], start=1):
            chances = by_hand(before, exact, hidden[n], told, j).detach().softmax(-1)
            assert chances[ids.index(token)] == pytest.approx(float(chances.max()), rel=0.1)
            assert sure == pytest.approx(float(chances.max()), rel=0.1)
            told = [*told, token]
    if preferred():
        alone = HeadSampler(applied, [hidden[2]], [2]).shortlists(1, [0], [texts[2]])[1]
        assert torch.equal(alone[0], logits[0])


@pytest.mark.skipif(not preferred(), reason="no operators of our own here")
@pytest.mark.parametrize("told", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guesses_in_one_call_are_those_of_torch(told: int, dtype: torch.dtype) -> None:
    """Catches another order of the told tokens, numbers behind the end of a register, guesses of a
    text that wanted none, and another text's; sizes are no multiples of anything."""
    d_model, width, listed, texts = 20, 13, 37, 9
    tables = Embeddings(noise(70, d_model, seed=1).to(dtype), noise(70, d_model, seed=2).to(dtype))
    some = torch.randperm(70, generator=torch.Generator().manual_seed(3))[:listed]
    head = DraftHead.start(d_model, width, told, DEPTHS, some)
    head.out.data.copy_(noise(d_model, width, seed=4))
    head.depth_in.data.copy_(noise(DEPTHS, width, seed=5))
    applied = AppliedHead.of(head, tables, dtype)
    by_torch = replace(applied)
    by_torch.__dict__["joint"] = None
    assert applied.joint is not None
    hidden = list(noise(texts, d_model, seed=7).to(dtype))
    lengths = [3, 0, 1, 2, 3, 3, 0, 1, 3]
    histories = [[n + 1] * (n % 2) + [2 * n, 3 * n, 5 * n] for n in range(texts)]
    race = noise(texts, DEPTHS, listed, seed=8).exp()
    known = Draws(race, [0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 0.7], [0.7] * 8 + [0.5])
    for draws in (None, known):
        found = HeadSampler(applied, hidden, lengths).likeliest(histories, draws)
        truth = HeadSampler(by_torch, hidden, lengths).likeliest(histories, draws)
        assert [len(own) for own in found] == lengths
        for one, other in zip(found, truth, strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
            sure = [chance for _, chance in other]
            assert [chance for _, chance in one] == pytest.approx(sure, rel=1e-4)
        for n in range(texts):
            numbers = (known.temperatures[n : n + 1], known.noise_weights[n : n + 1])
            own = draws and Draws(race[n : n + 1], *numbers)
            sampler = HeadSampler(applied, [hidden[n]], [lengths[n]])
            alone = sampler.likeliest([histories[n]], own)
            assert alone == [found[n]]


@pytest.mark.skipif(not preferred(), reason="no operators of our own here")
def test_of_equal_guesses_the_first_is_taken(head: DraftHead, tables: Embeddings) -> None:
    """Catches a chance above one, or half of one, where logits are far apart or all the same."""
    head.out.data.zero_()
    applied = AppliedHead.of(head, tables, torch.float32)
    (((token, sure),),) = HeadSampler(applied, [noise(D, seed=7)], [1]).likeliest([[1, 2]])
    assert token == int(head.listed[0])
    assert sure == pytest.approx(1 / LISTED)
    head.out.data.copy_(1000 * noise(D, WIDTH, seed=4))
    applied = AppliedHead.of(head, tables, torch.float32)
    (((_, sure),),) = HeadSampler(applied, [noise(D, seed=7)], [1]).likeliest([[1, 2]])
    assert sure == 1


def test_guesses_follow_the_noise_that_is_known(head: DraftHead, tables: Embeddings) -> None:
    """Catches noise of another place or token, and a temperature that multiplies: whatever the
    logits, the token whose noise is next to nothing wins the race, and the hotter, the sooner."""
    applied = AppliedHead.of(head, tables, torch.float32)
    sampler = HeadSampler(applied, list(noise(2, D, seed=7)), [DEPTHS, DEPTHS])
    winners = torch.tensor([[3, 17, 8], [29, 0, 11]])
    race = torch.ones(2, DEPTHS, LISTED)
    race.scatter_(2, winners[..., None], 1e-30)
    found = sampler.likeliest([[1, 2], [3, 4]], Draws(race, [20.0, 40.0], [0.7, 0.7]))
    assert [[token for token, _ in own] for own in found] == head.listed[winners].tolist()
    assert all(sure > 0.5 for own in found for _, sure in own)
    without = sampler.likeliest([[1, 2], [3, 4]])
    cold = sampler.likeliest([[1, 2], [3, 4]], Draws(race, [1e-6, 1e-6], [1.0, 1.0]))
    for own, other in zip(cold, without, strict=True):
        assert own == [(token, pytest.approx(sure, abs=1e-3)) for token, sure in other]


@pytest.mark.skipif(not preferred(), reason="no operators of our own here")
@pytest.mark.parametrize("shape", [(1, DEPTHS, LISTED), (2, 1, LISTED), (2, DEPTHS, 9)])
def test_too_little_noise_is_refused(
    head: DraftHead, tables: Embeddings, shape: tuple[int, int, int]
) -> None:
    """Catches memory read that is none of ours."""
    applied = AppliedHead.of(head, tables, torch.float32)
    sampler = HeadSampler(applied, list(noise(2, D, seed=7)), [DEPTHS, DEPTHS])
    with pytest.raises(RuntimeError, match="not as much noise"):
        sampler.likeliest([[1, 2], [3, 4]], Draws(torch.ones(shape), *([[1.0] * shape[0]] * 2)))


@pytest.mark.parametrize(("top_k", "better"), [(0, 2.0), (12, 1.4)])
def test_a_head_that_knows_the_model_knows_its_draws(
    llama: Target, top_k: int, better: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches guesses made with the noise of another position: a head whose logits are the model's
    own meets the token that the noise settles much more often than the likeliest token is it."""
    rows = tiny.random_look_ahead(llama, 3, head_width=8).rows(llama)
    assert rows.head is not None
    rows.head.__dict__["joint"] = None
    listed = rows.head.listed
    truth = torch.zeros(1, llama.vocabulary)

    class Knowing(HeadSampler):
        def _logits(self, *_: Any) -> Tensor:
            return truth[:, listed]

    monkeypatch.setattr("passlm.drafts.draft_head.HeadSampler", Knowing)
    met = dict.fromkeys(get_args(Draft), 0)
    for draft, seed in product(met, range(3)):
        sampling = SamplingParams(temperature=1.3, top_k=top_k, seed=seed, draft=draft)
        decoder = Decoder(llama, rows)
        row = decoder.join(Request.of([1, 2, 3], sampling, 60, ByHead(1)))
        while decoder.rows:
            truth.copy_(llama.logits(hidden_states(llama, torch.tensor([row.tokens])))[0, -1])
            ((_, step),) = decoder.step()
            met[draft] += step.accepted
    assert met["sampled"] > better * met["greedy"], met


def test_noise_is_made_once_and_let_go(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the noise of a place made by the head and again by the judge, or kept for ever."""
    made: list[tuple[int, Purpose]] = []
    exponential = Noise.exponential

    def watched(own: Noise, position: int, purpose: Purpose, size: int) -> Tensor:
        made.append((position, purpose))
        return exponential(own, position, purpose, size)

    monkeypatch.setattr(Noise, "exponential", watched)
    decoder = Decoder(llama, tiny.random_look_ahead(llama, 3, head_width=8).rows(llama))
    sampling = SamplingParams(temperature=1.0, seed=3)
    row = decoder.join(Request.of([1, 2, 3], sampling, 40, ByHead(3)))
    while decoder.rows:
        decoder.step()
        assert all(len(row.tokens) <= place < len(row.tokens) + 3 for place in row._settling.kept)
    assert len(made) == len(set(made)) >= 40


@pytest.mark.skipif(not preferred(), reason="no operators of our own here")
@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_that_there_is_not_is_refused(
    head: DraftHead, tables: Embeddings, token: int
) -> None:
    """Catches memory read that is none of ours."""
    applied = AppliedHead.of(head, tables, torch.float32)
    with pytest.raises(RuntimeError, match="no such token"):
        HeadSampler(applied, [noise(D, seed=7)], [1]).likeliest([[1, token]])


# Files


def test_files_keep_it(llama: Target, tmp_path: Path) -> None:
    """Catches a part left out of the folder, ids rounded, and a card without its figures."""
    rows = tiny.random_look_ahead(llama, 3, rank=2, sampler_width=4, head_width=8)
    assert rows.head is not None
    rows.card.head.update(by_position=[0.5, 0.2, 0.15])  # type: ignore[union-attr]
    rows.save(tmp_path)
    again = trained.load(tmp_path)
    assert again.head is not None
    assert torch.equal(again.head.listed, rows.head.listed)
    torch.testing.assert_close(again.head.out, rows.head.out, rtol=0.01, atol=0.01)
    assert again.card.head_prior == pytest.approx((0.5, 0.4, 0.75))
    assert again.card.head == {"width": 8, "tokens": 2, "depths": 3, "listed": 48} | {
        "by_position": [0.5, 0.2, 0.15]
    }


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("head.out", torch.zeros(4, 4), "does not match its shape"),
        ("head.listed", torch.full((48,), 64, dtype=torch.int32), "outside the model's vocabulary"),
        ("head.listed", torch.full((48,), -1, dtype=torch.int32), "outside the model's vocabulary"),
        ("head.more", torch.zeros(2), "unexpected tensors"),
        ("head.out", None, "head.out"),
    ],
)
def test_damaged_files_are_refused(
    llama: Target, tmp_path: Path, name: str, changed: Tensor | None, said: str
) -> None:
    """Catches an index error in the middle of a text."""
    tiny.random_look_ahead(llama, 3, head_width=8).save(tmp_path)
    path = tmp_path / trained.TENSORS_FILE
    tensors = {k: v for k, v in load_file(path).items() if k != name}
    save_file(tensors if changed is None else {**tensors, name: changed}, path)
    with pytest.raises(LookAheadError, match=said):
        trained.load(tmp_path)


def test_without_figures_a_card_guesses(llama: Target) -> None:
    """Catches a head that is never tried since nobody measured it."""
    card = tiny.random_look_ahead(llama, 3, head_width=8).card
    assert len(card.head_prior) == 3
    assert all(0 < chance < 1 for chance in card.head_prior)
    assert LookAhead.mean(llama, 3, "tiny").card.head_prior == ()


# In a decoder

CHEAP = CostCurve((1, 41), (1.0, 1.2), (1, 6), (0.1, 0.1), 0.0, (0.01, 0.02, 0.03))


def test_it_drafts_behind_the_row_that_was_accepted_last(llama: Target) -> None:
    """Catches the hidden state of another row or text of the pass, or of the pass before: texts
    accept unlike numbers of candidates, so that their last rows lie at unlike places."""
    rows = tiny.random_look_ahead(llama, 3, head_width=8).rows(llama)
    assert rows.head is not None
    prompts = [tiny.prompt(length) for length in (9, 5, 12)]
    plain = tiny.run(llama, tiny.requests_for(prompts, new=40)).texts
    asked = [Request.of(prompt, SamplingParams(), 40, ByHead(3)) for prompt in prompts]
    decoder = tiny.RiggedDecoder(llama, rows, tiny.Rig(prompts, plain))
    drafter = tiny.drafter(decoder, "head")
    texts = [decoder.join(request) for request in asked]
    decoder.step()
    unlike = 0
    for _ in range(8):
        before = [(list(row.tokens), drafter.hidden(row)) for row in texts]
        with torch.inference_mode():
            chains = drafter.propose(texts)
        for chain, (text, hidden) in zip(chains, before, strict=True):
            # The state of the row that the root was drawn from: the last but one token's.
            truth = hidden_states(llama, torch.tensor([text]))[0, -2]
            assert hidden is not None
            torch.testing.assert_close(hidden, truth, rtol=1e-4, atol=1e-4)
            sampler = HeadSampler(rows.head, [truth], [1])
            ((first,), logits) = sampler.shortlists(0, [0], [text])
            assert chain is not None
            assert chain.source == "head"
            assert chain.tokens[0] == int(first.tokens[0])
            sure = float(logits.detach().softmax(-1)[0, 0])
            assert chain.sureness[0] == pytest.approx(sure, rel=1e-3)
        accepted = {step.accepted for _, step in decoder.step()}
        unlike += len(accepted) > 1
    assert unlike >= 3


def test_rejection_gives_one_text_alone_and_in_a_batch(llama: Target) -> None:
    """Catches `q`, hidden states or noise of another text of the batch."""
    rows = tiny.random_look_ahead(llama, 3, head_width=8).rows(llama)
    sampling = SamplingParams(temperature=0.8, top_k=10, judge="rejection", seed=4)
    asked = [Request.of(tiny.prompt(n), sampling, 20, ByHead(3)) for n in (3, 9, 6)]
    together = tiny.run(llama, asked, rows)
    assert [tiny.run(llama, [request], rows).texts[0] for request in asked] == together.texts


def test_guesses_that_are_forbidden_end_no_text(llama: Target) -> None:
    """Catches an index error where processors forbid all that is listed."""
    look_ahead = tiny.random_look_ahead(llama, 3, head_width=8)
    assert look_ahead.head is not None
    listed = set(look_ahead.head.listed.tolist())
    bias = dict.fromkeys(listed, -1e12)
    rows = look_ahead.rows(llama)
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature=temperature, seed=1, logit_bias=bias)
        texts = [
            tiny.run(llama, [Request.of([1, 2, 3], sampling, 9, plan)], rows).texts
            for plan in (autoregressive, ByHead(3))
        ]
        assert texts[0] == texts[1]
        assert not listed.intersection(texts[0][0])


def test_copies_are_copies(head: DraftHead, tables: Embeddings, monkeypatch: Any) -> None:
    """Catches later training that reaches a decoder where products are torch's."""
    monkeypatch.setattr("passlm.drafts.draft_head.preferred", lambda: False)
    applied = AppliedHead.of(head, tables, torch.float32)
    before = applied.out(torch.ones(1, WIDTH))
    head.out.data.zero_()
    assert torch.equal(applied.out(torch.ones(1, WIDTH)), before)


def test_it_is_asked_only_where_it_pays(llama: Target) -> None:
    """Catches guesses that nobody verifies, beside sure copies or where rows are dear."""
    sure, weak = Chain((1,) * 12, "lookup", 16), Chain((1,) * 12, "lookup", 1)
    chooser = AutoPlan(CHEAP, lookup=True, head=(0.6, 0.5, 0.4)).begin()
    assert chooser.draft_length("head", [], 9) == 3
    assert chooser.draft_length("head", [], 2) == 2
    assert chooser.draft_length("head", [weak], 9) == 3
    assert chooser.draft_length("head", [sure], 9) == 0
    dear = CostCurve((1, 11), (1.0, 11.0), head_seconds=(0.1, 0.2, 0.3))
    assert AutoPlan(dear, head=(0.6, 0.5, 0.4)).begin().draft_length("head", [], 9) == 0
    unmeasured = CostCurve((1, 41), (1.0, 1.2))
    assert AutoPlan(unmeasured, head=(0.6, 0.5, 0.4)).begin().draft_length("head", [], 9) == 0


def test_sure_guesses_are_verified_and_others_are_not() -> None:
    """Catches guesses that are all trusted alike, and probabilities of another token."""
    curve = CostCurve((1, 11), (1.0, 3.0), head_seconds=(0.01, 0.02, 0.03))
    chooser = AutoPlan(curve, lookup=False, head=(0.5, 0.5, 0.5)).begin()

    def verified(*sureness: float) -> int:
        chain = Chain((1,) * len(sureness), "head", sureness=sureness)
        return chooser.choose([chain], Limits(1000)).plan.candidates

    assert verified(0.05, 0.9, 0.9) == 0
    assert verified(0.9, 0.9, 0.05) == 2
    assert verified(0.95) == 1
    for _ in range(60):  # what is said to be sure and fails is sure no more
        chain = Chain((1,), "head", sureness=(0.95,))
        chooser.learn(chooser.choose([chain], Limits(1000)), [99])
    assert verified(0.95) == 0


def test_what_it_took_and_what_came_of_it_count(llama: Target) -> None:
    """Catches guessing that is free to the chooser, and a head trusted for ever."""
    curve = CostCurve((1, 11), (1.0, 3.0), head_seconds=(0.1, 0.2, 0.3))
    chooser = AutoPlan(curve, lookup=False, head=(0.9, 0.9, 0.9)).begin()
    rates, guessed = [chooser.rate], []
    for _ in range(400):
        guessed.append(chooser.draft_length("head", [], 9))
        count = guessed[-1]
        chain = Chain((1,) * count, "head", sureness=(0.9,) * count) if count else None
        choice = chooser.choose([chain] if chain else [], Limits(1000))
        chooser.learn(choice, [99])
        rates.append(chooser.rate)
    assert guessed[0] == 3
    assert rates[20] < rates[0]
    assert sum(count > 0 for count in guessed[-100:]) < 20
