"""The sampler head: what it adds to which token, one row after the other, and what `q` is then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import VOCABULARY, requests_for
from torch import Tensor
from torch.nn.functional import silu

from passlm.decoding import judge as judges
from passlm.decoding.decoder import Decoder
from passlm.decoding.noise import Noise, Purpose
from passlm.decoding.request import Request
from passlm.decoding.strategies import OnePass, TwoPass
from passlm.decoding.text import Row
from passlm.drafts.drawing import draw_together
from passlm.drafts.protocol import DraftBuilder
from passlm.drafts.sampler_head import (
    OUT_OF_REACH,
    Draws,
    Embeddings,
    GroupSampler,
    SamplerHead,
    Shortlist,
    weighed,
)
from passlm.kernels.linear import preferred
from passlm.model.supported import UnsupportedModelError
from passlm.model.target import Target
from passlm.outputs import Step
from passlm.params import Draft, Judge, SamplingParams
from passlm.train.loss import Part

D, WIDTH, WORDS, SHORT, ROWS = 8, 5, 40, 6, 3


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def head(request: pytest.FixtureRequest) -> SamplerHead:
    """A head that weighs six tokens, told as many tokens as is asked for."""
    told = getattr(request, "param", 2)
    token_in = noise(WIDTH, told * D, seed=1)
    return SamplerHead(noise(WIDTH, D), token_in, noise(D, WIDTH, seed=2), SHORT)


@pytest.fixture
def tables() -> Embeddings:
    """Two tables that differ: a head that mixes them up gives other numbers."""
    return Embeddings(3 * noise(WORDS, D, seed=3), noise(WORDS, D, seed=4))


def group() -> tuple[Tensor, Tensor]:
    """Logits and hidden states of a group."""
    return noise(ROWS, WORDS, seed=5), 7 * noise(ROWS, D, seed=6)


def naive(head: SamplerHead, tables: Embeddings, row: int, history: list[int]) -> dict[int, float]:
    """The logit of each token that the head may give, by the formula of its description."""
    logits, hidden = group()

    def normed(vector: Tensor) -> Tensor:
        return vector / vector.square().mean().sqrt()

    inner = head.hidden_in @ normed(hidden[row])
    for back in range(head.tokens):  # the last token first, each with a block of its own
        token = history[-1 - back] if back < len(history) else history[0]
        block = head.token_in[:, back * D : (back + 1) * D]
        inner = inner + block @ normed(tables.inputs[token])
    correction = head.out @ silu(inner)
    best = logits[row].argsort(descending=True)[: head.shortlist].tolist()
    return {t: float(logits[row, t] + tables.outputs[t] @ correction.detach()) for t in best}


def behind(
    head: SamplerHead, tables: Embeddings, row: int, history: list[int], scale: float = 1.0
) -> Tensor:
    """The row's logits of all tokens behind a text, `[1, V]`."""
    logits, hidden = group()
    sampler = GroupSampler(head, tables, [logits], [scale * hidden])
    (among,), own = sampler.shortlists(row, [0], [history])
    return among.of_all(own)


@pytest.mark.parametrize("head", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("history", [[0], [5, 17], [2, 9, 0, WORDS - 1]])
@pytest.mark.parametrize("row", range(ROWS))
def test_a_rows_shortlist_is_weighed_by_the_formula(
    head: SamplerHead, tables: Embeddings, row: int, history: list[int]
) -> None:
    """Catches another row's hidden state, the table of outputs where inputs are due, a shortlist
    of the worst, tokens told in another order, and a token off the shortlist that could still be
    drawn."""
    given = behind(head, tables, row, history)
    expected = naive(head, tables, row, history)
    assert given.shape == (1, WORDS)
    assert given.dtype == torch.float32
    assert len(expected) == SHORT
    for token, logit in enumerate(given[0].tolist()):
        assert logit == pytest.approx(expected.get(token, OUT_OF_REACH), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("head", [1, 2, 3], indirect=True)
def test_training_weighs_as_decoding_does(head: SamplerHead, tables: Embeddings) -> None:
    """Catches a head that is trained on other numbers than it drafts with."""
    logits, hidden = group()
    text = torch.tensor([[8, 3, 0, 21]])
    at = torch.zeros(ROWS, dtype=torch.long), torch.tensor([0, 2, 3])
    part = Part(hidden, torch.ones(ROWS), text, at, logits)
    tokens, given = weighed(head, tables, logits, hidden, part.before(head.tokens))
    assert tokens.shape == given.shape == (ROWS, SHORT)
    for row, position in enumerate(at[1].tolist()):
        expected = behind(head, tables, row, text[0, : position + 1].tolist())[0, tokens[row]]
        torch.testing.assert_close(given[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_head_changes_nothing_on_the_shortlist(
    tables: Embeddings, dtype: torch.dtype
) -> None:
    """Catches a start of training that is worse than none."""
    fresh = SamplerHead.start(D, WIDTH, SHORT).copied(torch.device("cpu"), dtype)
    logits, hidden = (tensor.to(dtype) for tensor in group())
    tokens, given = weighed(fresh, tables, logits, hidden, torch.tensor([[1], [2], [3]]))
    assert torch.equal(given.detach().float(), logits.float().gather(1, tokens))
    sampler = GroupSampler(fresh, tables, [logits], [hidden])
    for row in range(ROWS):
        (among,), own = sampler.shortlists(row, [0], [[5]])
        now = among.of_all(own)[0]
        assert int((now > OUT_OF_REACH).sum()) == SHORT
        assert torch.equal(now[tokens[row]], logits[row, tokens[row]].float())
    assert bool(fresh.hidden_in.any())
    assert bool(fresh.token_in.any())


def test_a_shortlist_longer_than_the_vocabulary_is_all_of_it(
    head: SamplerHead, tables: Embeddings
) -> None:
    """Catches an error for models of few tokens."""
    head.shortlist = WORDS + 1
    assert bool((behind(head, tables, 0, [1]) > OUT_OF_REACH).all())
    tokens, _ = weighed(head, tables, *group(), torch.tensor([[1, 2], [2, 3], [3, 4]]))
    assert tokens.shape == (ROWS, WORDS)


def test_the_size_of_hidden_states_does_not_matter(head: SamplerHead, tables: Embeddings) -> None:
    """Catches a head whose first layer one model drowns and another starves, and zeros that make
    NaN."""
    bigger = behind(head, tables, 1, [2], scale=100.0)
    assert torch.allclose(behind(head, tables, 1, [2]), bigger, 1e-3)
    nothing = behind(head, Embeddings(0 * tables.inputs, tables.outputs), 1, [2], scale=0.0)
    assert bool(nothing.isfinite().all())


def test_a_head_told_more_begins_as_it_was(head: SamplerHead, tables: Embeddings) -> None:
    """Catches training that goes on from other numbers where heads are told more than before."""
    more = head.extended_to(3)
    assert (head.tokens, more.tokens) == (2, 3)
    history = [4, 9, 12, 30]
    for row in range(ROWS):
        mine, theirs = (behind(one, tables, row, history) for one in (head, more))
        torch.testing.assert_close(mine, theirs)
    assert all(p.requires_grad for p in more.parameters())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_copy_for_decoding_is_the_same_head(
    dtype: torch.dtype, close: float, head: SamplerHead, tables: Embeddings
) -> None:
    """Catches matrices swapped or rounded too far in the copy, later training that reaches it, and
    numbers of a row that depend on the rows beside it."""
    copy = head.copied(torch.device("cpu"), dtype)
    expected = [behind(head, tables, row, [4, 9]) for row in range(ROWS)]
    head.out.data.zero_()
    for row in range(ROWS):
        torch.testing.assert_close(
            behind(copy, tables, row, [4, 9]), expected[row], rtol=close, atol=close
        )
    if not preferred():
        return
    hidden = noise(9, D, seed=40)
    together = copy.from_hidden(hidden)
    assert all(
        torch.equal(copy.from_hidden(row[None])[0], own)
        for row, own in zip(hidden, together, strict=True)
    )


# In decoding

EVERYTHING = {
    "greedy": SamplingParams(),
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.1),
    "hot": SamplingParams(temperature=50.0),
    "top-k": SamplingParams(temperature=0.8, top_k=3),
    "top-k-beyond": SamplingParams(temperature=0.8, top_k=20),
    "top-p": SamplingParams(temperature=0.8, top_p=0.7),
    "min-p": SamplingParams(temperature=0.8, min_p=0.1),
    "penalty": SamplingParams(temperature=0.8, repetition_penalty=1.5),
    "small-penalty": SamplingParams(temperature=0.8, repetition_penalty=0.05),
    "greedy-penalty": SamplingParams(repetition_penalty=1.5),
    "bias": SamplingParams(temperature=0.8, logit_bias={1: 20.0, 2: -20.0}),
}


def drafted(
    sampling: SamplingParams, head: SamplerHead, tables: Embeddings
) -> tuple[DraftBuilder, Request, list[int]]:
    """What a row drafts from a group."""
    history = [3, 7, 1, 12]
    request = Request.of(history, replace(sampling, seed=3), 9)
    row = Row(request, 9, "length", Noise(3), list(history))
    logits, hidden = group()
    (made,) = draw_together([row], GroupSampler(head, tables, [logits], [hidden]), "look-ahead")
    return made, request, history


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("told", [1, 2, 3])
@pytest.mark.parametrize("words", [23, 300, 6000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_tokens_are_those_of_the_shortlists(
    ours: bool, told: int, words: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a shortlist of blocks that lacks a token, another group's row or text, tokens told in
    another order, and rows that depend on the groups beside; no size is a multiple of anything."""
    if ours and not preferred():
        pytest.skip("no operators of our own here")
    monkeypatch.setattr("passlm.drafts.sampler_head.preferred", lambda: ours)
    d_model, width, lengths = 20, 13, [3, 1, 4, 2, 2]
    head = SamplerHead(
        noise(width, d_model),
        noise(width, told * d_model, seed=1),
        noise(d_model, width, seed=2),
        17,
    )
    head = head.copied(torch.device("cpu"), dtype)
    assert (head.packed is not None) == ours
    inputs, outputs = (noise(words, d_model, seed=seed).to(dtype) for seed in (3, 4))
    tables = Embeddings(3 * inputs, outputs)
    groups = [noise(n, words, seed=n).to(dtype) for n in lengths]
    for rows in groups:  # of equal logits at the end of the list any may be left out
        places = noise(len(rows), words, seed=9).topk(20).indices
        rows.scatter_(1, places, 5 + torch.arange(20).to(rows).expand_as(places))
    hidden = [noise(n, d_model, seed=20 + n).to(dtype) for n in lengths]
    texts = [[at + 1] * (at % 3) + [2 * at] for at in range(len(lengths))]
    found = GroupSampler(head, tables, groups, hidden).likeliest(texts)
    assert [len(own) for own in found] == lengths
    changed = 0
    for at, (own, text) in enumerate(zip(found, texts, strict=True)):
        sampler = GroupSampler(head, tables, groups[at : at + 1], hidden[at : at + 1])
        assert sampler.likeliest([text]) == [own]
        for depth, token in enumerate(own):
            (among,), logits = sampler.shortlists(depth, [0], [[*text, *own[:depth]]])
            chosen = float(logits.detach()[0, among.tokens == token])
            assert chosen == pytest.approx(float(logits.detach().max()), abs=1e-4)
            changed += token != int(groups[at][depth].argmax())
    assert changed > 3
    race = noise(len(lengths), max(lengths), words, seed=5).abs()
    weights = [0.7, 0.7, 0.5, 1.0, 0.7]
    draws = Draws(race, [0.5, 80.0, 200.0, 900.0, 1000.0], weights)
    known = GroupSampler(head, tables, groups, hidden).likeliest(texts, draws)
    for at, (own, text) in enumerate(zip(known, texts, strict=True)):
        sampler = GroupSampler(head, tables, groups[at : at + 1], hidden[at : at + 1])
        for depth, token in enumerate(own):
            (among,), logits = sampler.shortlists(depth, [0], [[*text, *own[:depth]]])
            lost = draws.temperatures[at] * weights[at] * race[at, depth].log()
            raced = logits.detach()[0] - lost[among.tokens]
            chosen = float(raced[among.tokens == token])
            assert chosen == pytest.approx(float(raced.max()), rel=1e-5, abs=1e-3)
    assert known != found
    with pytest.raises((RuntimeError, IndexError)):
        GroupSampler(head, tables, groups, hidden).likeliest(
            texts, replace(draws, noise=race[:, :2])
        )


@pytest.mark.skipif(not preferred(), reason="no operators of our own here")
def test_a_token_or_group_that_there_is_not_is_refused(
    head: SamplerHead, tables: Embeddings
) -> None:
    """Catches memory read that is none of ours."""
    logits, hidden = group()
    copied = head.copied(torch.device("cpu"), torch.float32)
    for token in (-1, WORDS):
        with pytest.raises(RuntimeError, match="no such token"):
            GroupSampler(copied, tables, [logits], [hidden]).likeliest([[1, token]])
    with pytest.raises(RuntimeError, match="not as many texts"):
        GroupSampler(copied, tables, [logits], [hidden]).likeliest([[1], [2]])
    nothing = torch.full_like(logits, float("nan"))
    (tokens,) = GroupSampler(copied, tables, [nothing], [hidden]).likeliest([[1, 2]])
    assert all(0 <= token < WORDS for token in tokens)


@pytest.mark.parametrize("draft", ["greedy", "sampled"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_q_is_what_the_draft_was_drawn_from(
    name: str, draft: Draft, head: SamplerHead, tables: Embeddings
) -> None:
    """Catches `q` of the row's own logits where the head's were drawn from, of another token
    before, and NaN or a sum other than 1 where a processor meets the logits of no reach."""
    sampling = replace(EVERYTHING[name], judge="rejection", draft=draft)
    made, request, history = drafted(sampling, head, tables)
    assert len(made.tokens) == ROWS
    if draft == "greedy" or request.distribution.greedy:
        assert made.q is None  # it is one-hot
    else:
        assert made.q is not None
        assert made.q.shape == (ROWS, WORDS)
        assert bool(made.q.isfinite().all())
        assert made.q.sum(1).tolist() == pytest.approx([1.0] * ROWS, abs=1e-5)
    for place, token in enumerate(made.tokens):
        known = [*history, *made.tokens[:place]]
        expected = request.distribution(behind(head, tables, place, known), known)
        if made.q is None:
            assert token == int(expected.argmax())
            continue
        torch.testing.assert_close(made.q[place : place + 1], expected)
        assert torch.equal(made.q[place : place + 1] > 0, expected > 0)
        own = Noise(3).exponentials(len(known), 1, Purpose.DRAFT, WORDS)
        assert token == int(judges.draw(expected, own))
        if "penalty" not in name and name not in ("hot", "bias"):
            reachable = naive(head, tables, place, known)
            assert {t for t, q in enumerate(made.q[place].tolist()) if q} <= set(reachable)


def test_the_token_before_changes_the_guess(head: SamplerHead, tables: Embeddings) -> None:
    """Catches a head that is asked once for the whole group: rows would not know what the one
    before drew."""
    seen: list[tuple[int, list[int]]] = []

    class Watched(GroupSampler):
        def shortlists(
            self, depth: int, groups: Sequence[int], histories: Sequence[Sequence[int]]
        ) -> tuple[list[Shortlist], Tensor]:
            seen.append((depth, list(histories[0])))
            return super().shortlists(depth, groups, histories)

    history = [3, 7, 1, 12]
    row = Row(Request.of(history, SamplingParams(), 9), 9, "length", Noise(3), list(history))
    logits, hidden = group()
    (made,) = draw_together([row], Watched(head, tables, [logits], [hidden]), "look-ahead")
    assert seen == [(place, [*history, *made.tokens[:place]]) for place in range(ROWS)]
    firsts = {int(behind(head, tables, 0, [t]).argmax()) for t in range(20)}
    assert len(firsts) > 1


@pytest.mark.parametrize("sampling", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("judge", ["coupled", "rejection"])
def test_texts_that_draft_together_draft_what_they_would_alone(
    sampling: SamplingParams, judge: Judge, head: SamplerHead, tables: Embeddings
) -> None:
    """Catches rows, tokens before or noise of another text, and groups of unequal length."""
    texts = [[3, 7, 1, 12], [5], [9, 2], [8, 8, 8]]
    groups = [(noise(n, WORDS, seed=20 + n), noise(n, D, seed=30 + n)) for n in (2, 4, 1, 4)]
    sampling = replace(sampling, judge=judge)

    def begun(text: list[int], seed: int) -> Row:
        request = Request.of(text, replace(sampling, seed=seed), 9)
        return Row(request, 9, "length", Noise(seed), list(text))

    rows = [begun(text, seed) for seed, text in enumerate(texts)]
    logits, hidden = ([own[part] for own in groups] for part in (0, 1))
    together = draw_together(rows, GroupSampler(head, tables, logits, hidden), "look-ahead")
    for seed, (text, own) in enumerate(zip(texts, groups, strict=True)):
        sampler = GroupSampler(head, tables, [own[0]], [own[1]])
        (alone,) = draw_together([begun(text, seed)], sampler, "look-ahead")
        assert together[seed].tokens == alone.tokens
        assert len(alone.tokens) == len(own[0])
        if alone.q is None:
            assert together[seed].q is None
        else:
            torch.testing.assert_close(together[seed].q, alone.q)


@pytest.mark.parametrize("temperatures", [(0.7,) * 3, (0.0,) * 3, (0.0, 0.7, 0.0), (0.7, 0.0, 0.7)])
@pytest.mark.parametrize("judge", ["coupled", "rejection"])
@pytest.mark.parametrize("plan", [OnePass(3), TwoPass(3)], ids=["one-pass", "two-pass"])
def test_drafts_of_decoding_are_the_heads(
    plan: Any, judge: Judge, temperatures: tuple[float, ...], llama: Target
) -> None:
    """Catches hidden states of another row or text, from behind the output layer, or of the group
    of a refused candidate: each text's drafts are those of a drafting pass of its own."""
    rows = tiny.random_look_ahead(llama, 3, rank=2, sampler_width=8).rows(llama)
    decoder = Decoder(llama, rows)
    for length, temperature in zip((1, 9, 5), temperatures, strict=True):
        sampling = SamplingParams(temperature=temperature, top_k=10, seed=5, judge=judge)
        (request,) = requests_for([tiny.prompt(length)], plan, sampling, 12)
        decoder.join(request)
    compared = different = 0
    while decoder.rows:
        for row, step in decoder.step():
            length = row.plan.groups[step.accepted] if step.finish_reason is None else 0
            if not length:
                continue
            alone = Decoder(llama, rows)
            request = replace(row.request, prompt=row.tokens[:-1], strategy=TwoPass(length))
            again = alone.join(replace(request, max_new_tokens=length + 2))
            output = llama.run(alone._cache, [again.choose_plan()], rows)
            again.tokens = list(row.tokens)
            alone.settled = [(again, Step((0,), 0, 0))]
            alone._remember(output)
            (own,) = tiny.drafter(decoder, "look-ahead").propose([row])
            (expected,) = tiny.drafter(alone, "look-ahead").propose([again])
            assert own == expected
            if own.q is not None and expected.q is not None:
                torch.testing.assert_close(own.q, expected.q, rtol=1e-3, atol=1e-4)
            drawn = not row.request.distribution.greedy
            assert (own.q is not None) == (judge == "rejection" and drawn)
            bare = DraftBuilder("look-ahead")
            Row(again.request, 9, "length", again.noise, list(row.tokens)).draw(
                bare, output.logits[0, 1 : 1 + length]
            )
            different += bare.chain.tokens != own.tokens
            compared += 1
    assert compared > 10
    assert different > compared // 4


def test_a_model_without_plain_output_weights_is_refused() -> None:
    """Catches a head that reads numbers of a quantised output layer as weights."""
    target = Target(tiny.ARCHITECTURES["llama"].build())
    rows = tiny.random_look_ahead(target, 2, sampler_width=4).rows(target)
    target.model.lm_head = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*sampler"):
        Decoder(target, rows)


@pytest.mark.parametrize("tied", [False, True])
def test_the_tables_are_the_models_own(tied: bool) -> None:
    """Catches the input table in the place of the outputs."""
    target = Target(tiny.ARCHITECTURES["llama"].build(tie_word_embeddings=tied))
    tables = target.embeddings
    assert tables.inputs is target.model.model.embed_tokens.weight
    assert tables.outputs is target.model.lm_head.weight
    assert (tables.inputs is tables.outputs) == tied
    assert tables.outputs.shape == (VOCABULARY, target.d_model)
