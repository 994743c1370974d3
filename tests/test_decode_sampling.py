"""Whole decoding: the target's distribution, and plain decoding's text, under every plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise, product
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llama import (
    BLANKS,
    VOCABULARY,
    counting_llama,
    counting_look_ahead,
    counting_look_ahead_with_parts,
    decode,
    randomised,
    small_llama,
)

from passlm.decoding import judge as judges
from passlm.decoding.decoder import Decoder
from passlm.decoding.noise import Noise, Purpose
from passlm.decoding.request import Request
from passlm.decoding.strategies import Adaptive, OnePass, Strategy, TwoPass, autoregressive
from passlm.decoding.text import Row
from passlm.drafts.draft_head import DraftHead
from passlm.drafts.protocol import DraftBuilder
from passlm.drafts.sampler_head import SamplerHead, Shortlist
from passlm.layers.lora import GatedLora, groups_of
from passlm.lookahead.trained import LookAhead
from passlm.model.target import Target
from passlm.outputs import Stats, Step
from passlm.params import Draft, Judge, SamplingParams
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve

# The distribution

FEW = 5  # tokens of the vocabulary
TOKENS = 3
TEXTS = 1000
CHOSEN = AutoPlan(CostCurve((1, 21), (1.0, 1.1), (1, 2), (0.01, 0.01)), (0.4, 0.4))
MODES = {
    "plain": (SamplingParams(temperature=0.9), autoregressive),
    "coupled": (SamplingParams(temperature=0.9, judge="coupled"), OnePass(2)),
    "rejection, sampled draft": (
        SamplingParams(temperature=0.9, judge="rejection", draft="sampled"),
        OnePass(2),
    ),
    "rejection, greedy draft": (
        SamplingParams(temperature=0.9, judge="rejection", draft="greedy"),
        OnePass(2),
    ),
    # Rows are cheap and copies are taken for good, so that both sources are used.
    "chosen plans, coupled": (SamplingParams(temperature=0.9, judge="coupled"), CHOSEN),
    "chosen plans, rejection": (
        SamplingParams(temperature=0.9, judge="rejection", draft="sampled"),
        CHOSEN,
    ),
}
BY_HEAD = AutoPlan(
    CostCurve((1, 21), (1.0, 1.1), head_seconds=(0.01, 0.02)), lookup=False, head=(0.4, 0.4)
)
HEAD_MODES = {
    f"draft head, {judge}, {draft} draft": (
        SamplingParams(temperature=0.9, judge=judge, draft=draft),
        BY_HEAD,
    )
    for judge, draft in product(get_args(Judge), get_args(Draft))
}


def exact_joint(target: Target, prompt: list[int], temperature: float) -> dict[tuple, float]:
    """The probability of each continuation of `TOKENS` tokens, from the model's own forward."""
    continuations = list(product(range(FEW), repeat=TOKENS))
    texts = torch.tensor([[*prompt, *continuation] for continuation in continuations])
    logits = target.model(texts).logits[:, len(prompt) - 1 : -1].double()
    each = (logits / temperature).softmax(-1).gather(2, texts[:, len(prompt) :, None])
    return dict(zip(continuations, each.squeeze(2).prod(1).tolist(), strict=True))


def frequencies(
    target: Target, look_ahead: LookAhead, sampling: SamplingParams, strategy: Strategy | Adaptive
) -> tuple[Counter[tuple], Stats]:
    """How often each continuation was drawn, a text for each seed."""
    decoder = Decoder(target, look_ahead.rows(target))
    for seed in range(TEXTS):
        # A token more than is looked at, so that no candidate for these is cut off.
        decoder.join(Request.of([0], replace(sampling, seed=seed), TOKENS + 1, strategy))
    stats, drawn = Stats(), Counter[tuple]()
    while decoder.rows:
        done = []
        for row, step in decoder.step():
            stats.count(step)
            if len(row.tokens) > TOKENS:
                drawn[tuple(row.tokens[1 : 1 + TOKENS])] += 1
                done.append(row)
        decoder.leave(done)
    return drawn, stats


def chance_of_worse(drawn: Counter[tuple], expected: dict[tuple, float]) -> float:
    """The chance that counts of these probabilities deviate more: chi-square, rare ones pooled."""
    cells = [(drawn[text], TEXTS * chance) for text, chance in expected.items()]
    often = [cell for cell in cells if cell[1] >= 5]
    rest = [cell for cell in cells if cell[1] < 5]
    often.append((sum(n for n, _ in rest), sum(wanted for _, wanted in rest)))
    statistic = sum((n - wanted) ** 2 / wanted for n, wanted in often if wanted > 0)
    freedom = torch.tensor((len(often) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double()))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True], ids=["embeddings", "lora and sampler"])
def test_decoding_draws_from_the_target(parts: bool) -> None:
    """Catches noise used twice, `q` of another row, a draft after another history: whatever the
    judge alone cannot show. With a sampler head: `q` that is not the head's, or is another token's.

    The joint of the first three tokens over 1,000 seeds against the model's own probabilities.
    Seeds are fixed, so it never fails by chance; with others it would once in 590 (seventeen
    chi-square tests at 1 in 10,000, those of a draft head below among them).
    """
    target = Target(small_llama(FEW, seed=4, scale=0.35))
    look_ahead = LookAhead.fixed_token(target, 2, 2, "few")
    if parts:
        larger = Target(small_llama())  # the same layers, and tokens enough to probe with
        lora = GatedLora.start(target.model, groups_of(larger.model, larger.probe), 3)
        sampler = SamplerHead.start(target.d_model, 8)
        whole = LookAhead(look_ahead.embeddings, look_ahead.card, lora, sampler)
        look_ahead = randomised(whole, 0.3, shortlist=3)
    check_modes(target, look_ahead, MODES)


@pytest.mark.slow
def test_a_draft_head_draws_from_the_target() -> None:
    """The same of drafts from a head that lists a part of the vocabulary: catches `q` over the
    list's places, or of tokens that are not on it."""
    target = Target(small_llama(FEW, seed=4, scale=0.35))
    look_ahead = LookAhead.fixed_token(target, 2, 2, "few")
    head = DraftHead.start(target.d_model, 8, 2, 2, torch.tensor([4, 0, 3, 1]))
    head.out.data.normal_(0, 1.0, generator=torch.Generator().manual_seed(5))
    check_modes(target, LookAhead(look_ahead.embeddings, look_ahead.card, head=head), HEAD_MODES)


def check_modes(
    target: Target,
    look_ahead: LookAhead,
    modes: Mapping[str, tuple[SamplingParams, Strategy | Adaptive]],
) -> None:
    """Assert the joint distribution for every way of decoding."""
    with torch.no_grad():
        expected = exact_joint(target, [0], 0.9)
    assert sum(expected.values()) == pytest.approx(1)
    for name, (sampling, strategy) in modes.items():
        drawn, stats = frequencies(target, look_ahead, sampling, strategy)
        assert drawn.total() == TEXTS
        assert chance_of_worse(drawn, expected) > 1e-4, name
        if name != "plain":  # both branches are taken often
            assert 0.1 < stats.accepted / sum(stats.judged_by_position) < 0.9, name


@pytest.mark.slow
def test_a_draw_is_not_picked_over() -> None:
    """Catches plans that look at how likely a drawn guess is: what is verified of them would be no
    draw from `q` any more, and the rejection judge, which takes it for one, would settle the likely
    token in 96 of 100 cases instead of 80. Greedy drafts and the coupled judge do not mind.

    3,000 first tokens; seeds are fixed, so it never fails by chance.
    """
    chances = torch.tensor([0.0005, 0.80, 0.15, 0.0495])
    plan = AutoPlan(CostCurve((1, 3), (1.0, 1.8), head_seconds=(0.01,)), lookup=False, head=(0.6,))
    for judge, draft in product(get_args(Judge), get_args(Draft)):
        sampling = SamplingParams(temperature=1.0, judge=judge, draft=draft)
        first, verified = Counter[int](), 0
        for seed in range(3000):
            request = Request.of([0], replace(sampling, seed=seed), 9, plan)
            row = Row(request, 9, "length", Noise(seed), [0])
            drafted = DraftBuilder("head", sure=True)
            row.draw(drafted, chances.log()[None], Shortlist(torch.arange(4), 4))
            row.proposed = [drafted.chain]
            row.choose_plan()
            verified += len(row.candidates)
            first[row.judge(chances.log().expand(1 + len(row.candidates), -1))[0]] += 1
        assert verified > 1000
        for token, chance in enumerate(chances.tolist()):
            deviation = (chance * (1 - chance) / 3000) ** 0.5
            assert abs(first[token] / 3000 - chance) < 4 * deviation, (judge, draft, token)


@pytest.mark.parametrize("judge", ["coupled", "rejection"])
def test_a_draft_is_drawn_with_the_noise_its_judge_needs(judge: Judge) -> None:
    """Catches a rejection draft that shares the noise of the token drawn after its refusal, whose
    bias is too small to be seen in frequencies; and a coupled one that does not share it."""
    sampling = SamplingParams(temperature=1.0, judge=judge, draft="sampled", seed=3)
    tokens = [1, 2, 3]
    row = Row(Request.of(tokens, sampling, 9), 9, "length", Noise(3), list(tokens))
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    drafted = DraftBuilder("look-ahead")
    row.draw(drafted, logits)
    purpose = Purpose.SETTLE if judge == "coupled" else Purpose.DRAFT
    noise = Noise(3).exponentials(len(tokens), 4, purpose, 50)
    q = logits.softmax(-1)
    guessed = (q.log() - 0.7 * noise.log()).argmax(-1)
    assert drafted.tokens == (guessed if judge == "coupled" else judges.draw(q, noise)).tolist()
    if judge == "rejection":
        assert drafted.q is not None
        assert torch.equal(drafted.q, logits.softmax(-1))


# Equality with plain decoding


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """A ragged batch, all drafting, each text with settings of its own."""
    ids = st.integers(0, VOCABULARY - 1)
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        sampling = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.0, 0.8])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.2])),
            judge=draw(st.sampled_from(["coupled", "rejection"])),
            draft=draw(st.sampled_from(["greedy", "sampled"])),
            seed=draw(st.integers(0, 5)),
        )
        batch.append(
            Request.of(
                draw(st.lists(ids, min_size=1, max_size=9)),
                sampling,
                draw(st.integers(1, 20)),
                draw(st.sampled_from([OnePass, TwoPass]))(draw(st.integers(1, BLANKS))),
                draw(st.sets(ids, max_size=4)),
            )
        )
    return batch


@given(requests(), st.sampled_from([counting_look_ahead, counting_look_ahead_with_parts]))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_drafting_gives_the_text_of_plain_decoding(
    batch: list[Request], trained: Callable[[], LookAhead]
) -> None:
    """Catches whatever changes the text: a stale cache, a wrong position or mask, a row of another
    text, a stop that is missed or comes early.

    Greedy texts and coupled samples equal plain decoding token for token; samples judged by
    rejection have its distribution only, so of them no more than the shape is compared.
    """
    target = counting_llama()
    drafted = decode(target, batch, trained().rows(target))
    for request, (tokens, steps) in zip(batch, drafted, strict=True):
        check_shape(request, tokens, steps)
        if request.distribution.greedy or request.judge == "coupled":
            plain = replace(request, strategy=autoregressive)
            assert tokens == decode(target, [plain])[0][0]


def check_shape(request: Request, tokens: list[int], steps: list[Step]) -> None:
    """Assert what holds of any text and its steps."""
    assert tokens == [token for step in steps for token in step.tokens]
    assert 1 <= len(tokens) <= request.max_new_tokens
    ended = tokens[-1] in request.eos
    assert not request.eos.intersection(tokens[:-1])
    assert ended or len(tokens) == request.max_new_tokens
    assert steps[-1].finish_reason == ("eos" if ended else "length")
    assert all(step.finish_reason is None for step in steps[:-1])
    assert all(len(step.tokens) == step.accepted + 1 for step in steps[:-1])
    assert all(step.accepted <= min(step.judged, len(step.tokens)) for step in steps)
    stats = Stats()
    for step in steps:
        stats.count(step)
    assert stats.tokens == len(tokens)
    assert stats.accepted == sum(step.accepted for step in steps)
    pairs = list(zip(stats.judged_by_position, stats.accepted_by_position, strict=True))
    assert all(accepted <= judged for judged, accepted in pairs)
    assert all(after[0] <= before[1] for before, after in pairwise(pairs))


def test_the_texts_above_do_accept_candidates() -> None:
    """Catches a comparison of plain decoding with itself: drafts must be right now and then."""
    target = counting_llama()
    greedy = Request.of([1, 2, 3, 4, 5], SamplingParams(), 40, OnePass(BLANKS))
    (_, steps), *_ = decode(target, [greedy], counting_look_ahead().rows(target))
    assert 5 < sum(step.accepted for step in steps) < 35


@pytest.mark.parametrize("draft", ["greedy", "sampled"])
def test_a_seed_gives_one_text_alone_and_in_a_batch(
    draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches noise that depends on the batch or on the number of passes; rejection too."""
    target, rows = counting_llama(), counting_look_ahead().rows(counting_llama())
    sampling = SamplingParams(temperature=0.8, judge="rejection", draft=draft, seed=4)
    request = Request.of([1, 2, 3], sampling, 15, OnePass(3))
    others = [Request.of([9] * n, replace(sampling, seed=n), 8, TwoPass(2)) for n in (1, 7)]
    alone = decode(target, [request], rows)[0]
    assert decode(target, [others[0], request, others[1]], rows)[1] == alone
    monkeypatch.setattr(judges, "coupled", None)  # and it is the judge asked for that judges
    assert decode(target, [request], rows)[0] == alone
