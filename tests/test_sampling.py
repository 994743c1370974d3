"""From logits to probabilities with transformers' own processors, and the noise of a position.

Where a test draws, its seed is fixed; the odds given are those that a good generator would have
failed with another seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_llama import counting_llama, small_llama
from tiny import drafted
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from passlm.decoding.decoder import Decoder
from passlm.decoding.distribution import TokenDistribution
from passlm.decoding.judge import draw
from passlm.decoding.noise import Noise, Purpose
from passlm.decoding.processors import processors
from passlm.decoding.request import Request
from passlm.decoding.strategies import OnePass, Strategy, TwoPass
from passlm.model.pass_records import LookAheadRows
from passlm.params import Judge, SamplingParams

V = 50
EOS = (7, 11)
PROMPT = 3


class Recorder(LogitsProcessor):
    """Notes the tokens and the scores' type that it is called with."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.types: set[torch.dtype] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0] == 1
        self.calls.append(input_ids[0].tolist())
        self.types.add(scores.dtype)
        return scores


class Damp(LogitsProcessor):
    """A user's own processor: what it gives depends on where in the order it stands."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.clamp(max=1.5)


def test_noise_counts_for_less_where_less_is_left_to_draw() -> None:
    """Catches guesses at draws that are none: the best token alone, or a nucleus of one."""

    def weight(**asked: Any) -> float:
        chain = processors(SamplingParams(**{"temperature": 0.8, **asked}), PROMPT, EOS)
        return TokenDistribution(chain, greedy=asked.get("temperature") == 0).noise_weight

    assert weight(temperature=0) == weight(top_k=1) == weight(temperature=0, top_p=0.9) == 0
    assert weight() == weight(temperature=1.5) == 0.7
    assert weight(top_k=10) == weight(top_p=0.9) == weight(min_p=0.05) == 0.5
    assert weight(min_p=1.0) == 0
    assert weight(top_p=0.01) == weight(top_p=0.01, top_k=9) == pytest.approx(0.01)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("spread", [0.3, 2.0, 9.0])
def test_quick_processors_cut_off_what_transformers_does(spread: float, rows: int) -> None:
    """Catches a token too many or too few, and rows that want the slow way."""
    scores = spread * torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1))
    unread = torch.empty(rows, 0, dtype=torch.long)
    cuts: list[LogitsProcessor] = [TopKLogitsWarper(k) for k in (1, 2, 3, 50, 5000)]
    cuts += [TopPLogitsWarper(p) for p in (0.01, 0.3, 0.5, 0.9, 0.999)]
    cuts += [TopPLogitsWarper(0.2, -50.0, 9), TopKLogitsWarper(4, -50.0, 20)]
    for cut in cuts:
        own = TokenDistribution(LogitsProcessorList([cut]), greedy=False).processors
        assert torch.equal(own(unread, scores), cut(unread, scores)), vars(cut)
    scores[:, 7] = scores[:, 9] = scores.amax() + 1
    for k in (1, 2, 3):
        own = TokenDistribution(LogitsProcessorList([TopKLogitsWarper(k)]), greedy=False).processors
        assert (own(unread, scores)[0] > -math.inf).sum() == max(2, k)  # both of two equal ones
    both = LogitsProcessorList([TopKLogitsWarper(20), TopPLogitsWarper(0.9)])
    own = TokenDistribution(both, greedy=False).processors
    assert torch.equal(own(unread, scores), both(unread, scores))


# Transformers' own order

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bias": ({"logit_bias": {3: 2.5, 9: -4.0}}, {"sequence_bias": {(3,): 2.5, (9,): -4.0}}),
    "repetition": ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "bad-words": ({"bad_words": ((4,), (5, 6))}, {"bad_words_ids": [[4], [5, 6]]}),
    "min-new": ({"min_new_tokens": 3}, {"min_new_tokens": 3}),
    "own": ({"processors": (Damp(),)}, {}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "hot": ({"temperature": 2}, {"temperature": 2.0}),
    "top-k": ({"top_k": 10}, {"top_k": 10}),
    "top-p": ({"top_p": 0.8}, {"top_p": 0.8}),
    "min-p": ({"min_p": 0.05}, {"min_p": 0.05}),
}
EVERYTHING = [name for name in OPTIONS if name != "hot"]


def both(names: Sequence[str], **extra: Any) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """Our processors and transformers' for the same options."""
    ours: dict[str, Any] = {"temperature": 1.0, **extra}
    theirs: dict[str, Any] = {"do_sample": ours["temperature"] > 0, "top_k": 0}
    for name in names:
        ours |= {**OPTIONS[name][0], **extra}
        theirs |= OPTIONS[name][1]
    model = small_llama(V)
    config = GenerationConfig(eos_token_id=list(EOS), pad_token_id=0, **theirs)
    model._prepare_special_tokens(config, device="cpu")
    own = LogitsProcessorList(ours.get("processors", ()))
    expected = model._get_logits_processor(
        config, input_ids_seq_length=PROMPT, logits_processor=own, device="cpu"
    )
    return processors(SamplingParams(**ours), PROMPT, EOS), expected


@pytest.mark.parametrize("names", [*[[n] for n in OPTIONS], EVERYTHING], ids="+".join)
def test_processors_are_those_of_transformers_in_its_order(names: list[str]) -> None:
    """Catches a processor left out, set up otherwise, or at another place than in `generate`."""
    ours, theirs = both(names)
    assert all(isinstance(own, type(other)) for own, other in zip(ours, theirs, strict=True))
    generator = torch.Generator().manual_seed(1)
    for length in (PROMPT, PROMPT + 2, PROMPT + 3, 20):  # before and after `min_new_tokens`
        ids = torch.randint(V, (1, length), generator=generator)
        ids[0, -1] = 5  # so that the second bad word is one token short
        scores = 3 * torch.randn(1, V, generator=generator)
        assert torch.equal(ours(ids, scores.clone()), theirs(ids, scores.clone()))


def test_order_matters_for_what_is_compared() -> None:
    """Catches a comparison blind to order: the same processors reversed give other scores."""
    ours, _ = both(EVERYTHING)
    ids, scores = torch.tensor([[1, 2, 5]]), 3 * torch.randn(1, V, generator=_seeded(2))
    assert not torch.equal(ours(ids, scores), LogitsProcessorList(reversed(ours))(ids, scores))


def test_greedy_decoding_has_no_warpers() -> None:
    """Catches a temperature of 0 that is divided by, and top-k where `generate` has none."""
    ours, theirs = both([n for n in EVERYTHING if n != "hot"], temperature=0.0)
    assert all(isinstance(own, type(other)) for own, other in zip(ours, theirs, strict=True))
    assert [type(p) for p in ours][-1] is Damp


def test_ends_are_held_back_where_the_scores_are() -> None:
    """Catches ids left on the CPU while the model computes elsewhere; nothing is computed here."""
    (chain,) = processors(SamplingParams(min_new_tokens=2), PROMPT, EOS)
    ids, scores = (torch.zeros(1, 5, device="meta", dtype=kind) for kind in (int, torch.float32))
    assert chain(ids.long(), scores).device.type == "meta"
    assert chain.eos_token_id.device.type == "meta"


def test_min_new_tokens_counts_from_the_end_of_the_prompt() -> None:
    """Catches a count that starts at the text's beginning, or is off by one."""
    chain = processors(SamplingParams(min_new_tokens=2), PROMPT, EOS)
    distribution = TokenDistribution(chain, greedy=True)
    logits = torch.zeros(4, V)
    logits[:, EOS[0]] = 9.0
    best = distribution(logits, [1] * PROMPT, [1, 1, 1]).argmax(-1)
    assert [int(token) == EOS[0] for token in best] == [False, False, True, True]


# The distribution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("greedy", [True, False])
def test_probabilities_are_float32_whatever_the_logits(dtype: torch.dtype, greedy: bool) -> None:
    """Catches a softmax or a processor in 16 bits, where half the tail is lost."""
    recorder = Recorder()
    logits = (5 * torch.randn(3, V, generator=_seeded(3))).to(dtype)
    chain = LogitsProcessorList([recorder])
    probabilities = TokenDistribution(chain, greedy)(logits, [1], [2, 3])
    assert probabilities.dtype == torch.float32
    assert recorder.types == {torch.float32}
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3), rtol=0, atol=1e-6)
    if not greedy:
        assert torch.equal(probabilities, logits.float().softmax(-1))


def test_temperature_zero_is_one_hot_on_the_first_of_the_best() -> None:
    """Catches a spread over ties, which plain greedy decoding does not know."""
    distribution = TokenDistribution(LogitsProcessorList(), greedy=True)
    logits = torch.tensor([[1.0, 4.0, 4.0], [0.0, -1.0, -2.0]])
    assert distribution(logits, []).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("params", "reads"),
    [
        (SamplingParams(), False),
        (SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1), False),
        (SamplingParams(repetition_penalty=1.1), True),
        (SamplingParams(presence_penalty=0.5), True),
        (SamplingParams(frequency_penalty=-0.5), True),
        (SamplingParams(bad_words=((1, 2),)), True),
        (SamplingParams(min_new_tokens=2), True),
        (SamplingParams(processors=(Damp(),)), True),
    ],
)
def test_a_processor_that_may_read_the_text_is_given_it(
    params: SamplingParams, reads: bool
) -> None:
    """Catches a processor taken for blind: it would see an empty text."""
    assert TokenDistribution(processors(params, 0, EOS), False).reads_history is reads


def test_written_tokens_are_penalised_by_presence_and_by_count() -> None:
    """Catches a prompt that counts as written, a count taken once, a wrong sign, and scores that
    are changed in place: the next row of the pass would be penalised twice."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    chain = processors(params, 3, EOS)
    scores = torch.zeros(1, 6)
    text = torch.tensor([[4, 4, 5, 1, 2, 1]])  # three of the prompt, three written
    assert chain(text, scores).tolist() == [[0.0, -1.0, -0.75, 0.0, 0.0, 0.0]]
    assert chain(text[:, :3], scores).tolist() == [[0.0] * 6]


def test_rows_at_once_are_rows_one_by_one() -> None:
    """Catches a warper that mixes the rows of a pass: both ways give the same bits."""
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)
    chain = processors(params, PROMPT, EOS)
    blind = TokenDistribution(chain, greedy=False)
    reading = TokenDistribution(LogitsProcessorList([Recorder(), *chain]), greedy=False)
    logits = 3 * torch.randn(9, V, generator=_seeded(4))
    assert not blind.reads_history
    assert reading.reads_history
    at_once = blind(logits, [1, 2], list(range(8)))
    assert torch.equal(at_once, reading(logits, [1, 2], list(range(8))))
    assert torch.equal(at_once, torch.cat([blind(row[None], [1, 2]) for row in logits]))


def test_each_row_follows_the_candidates_before_it() -> None:
    """Catches a row that sees a candidate too many or too few."""
    recorder = Recorder()
    distribution = TokenDistribution(LogitsProcessorList([recorder]), greedy=False)
    distribution(torch.zeros(3, V), [4, 5], [6, 7])
    assert recorder.calls == [[4, 5], [4, 5, 6], [4, 5, 6, 7]]


@pytest.mark.parametrize("judge", ["coupled", "rejection"])
@pytest.mark.parametrize("plan", [OnePass(3), TwoPass(4)], ids=["one-pass", "two-pass"])
def test_processors_see_the_true_history_in_judging_and_in_drafting(
    plan: Strategy, judge: Judge
) -> None:
    """Catches candidates missing from, or left over in, the text that a penalty reads."""
    recorder = Recorder()
    sampling = SamplingParams(temperature=0.9, processors=(recorder,), seed=1, judge=judge)
    target = counting_llama()
    rows = LookAheadRows(target.embed(torch.arange(4)))
    decoder = Decoder(target, rows)
    row = decoder.join(Request.of([3, 4, 5], sampling, 24, plan))
    accepted = count = 0
    while decoder.rows:
        before, candidates = list(row.tokens), drafted(decoder, row)
        recorder.calls.clear()
        (_, step) = decoder.step()[0]
        judged = candidates[: row.plan.candidates]
        expected = [before + judged[:i] for i in range(len(judged) + 1)]
        expected = expected[: 1 + step.accepted]  # none is looked at behind a refusal
        assert row.tokens == before + list(step.tokens)
        if step.finish_reason is None:
            found = drafted(decoder, row)
            expected += [row.tokens + found[:j] for j in range(len(found))]
            count += len(found)
        assert recorder.calls == expected
        accepted += step.accepted
    assert count > 0
    assert accepted > 0 or judge == "rejection"


# Noise


def test_noise_is_a_function_of_seed_position_and_purpose() -> None:
    """Catches state between draws: order, batch and earlier draws must not matter."""
    first, second = Noise(5), Noise(5)
    second.exponential(3, Purpose.SETTLE, 7)
    second.uniform(0, 4, Purpose.ACCEPT)
    many = first.exponentials(2, 3, Purpose.SETTLE, V)
    for offset in (2, 0, 1):
        assert torch.equal(many[offset], second.exponential(2 + offset, Purpose.SETTLE, V))
    assert torch.equal(
        first.uniform(4, 3, Purpose.ACCEPT), second.uniform(2, 5, Purpose.ACCEPT)[2:]
    )
    # The first numbers do not depend on how many are asked for: a padded vocabulary is no matter.
    assert torch.equal(many[0][:10], first.exponential(2, Purpose.SETTLE, 10))


def test_a_seed_gives_the_same_noise_for_ever() -> None:
    """Catches a change of generator or key, after which a seed gives another text."""
    drawn = Noise(2**64 - 1).exponential(9, Purpose.DRAFT, 3)
    assert drawn.tolist() == pytest.approx([0.88093328, 1.90096366, 1.81280172])
    assert Noise(3).uniform(5, 1, Purpose.ACCEPT).tolist() == pytest.approx([0.08750542])


def test_noise_without_a_seed_is_fresh() -> None:
    """Catches a default seed. False alarm: 1 in 2**64."""
    assert Noise(None).seed != Noise(None).seed


def test_seeds_positions_and_purposes_share_nothing() -> None:
    """Catches streams that overlap or run in step.

    The correlation of 20,000 pairs has a standard deviation of 0.007; the bound is six of them,
    so 1 in 10**7 for the 15 pairs together.
    """
    size = 20_000
    streams = [
        Noise(seed).exponential(position, purpose, size)
        for seed, position, purpose in [
            (0, 0, Purpose.SETTLE),
            (0, 0, Purpose.DRAFT),
            (0, 0, Purpose.ACCEPT),
            (0, 1, Purpose.SETTLE),
            (1, 0, Purpose.SETTLE),
            (2**63, 0, Purpose.SETTLE),
        ]
    ]
    off_diagonal = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert float(off_diagonal.abs().max()) < 6 / size**0.5
    # Shifted against each other by a few numbers, as overlapping counters would be.
    for shift in range(1, 9):
        pair = torch.stack([streams[0][shift:], streams[3][:-shift]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 6 / size**0.5


def test_noise_has_the_shape_it_claims() -> None:
    """Catches a normal or a scaled distribution in place of exponential and uniform.

    Twelve shares of 100,000 numbers within five standard deviations: 1 in 10**5.
    """
    size = 100_000
    exponential = Noise(1).exponential(0, Purpose.SETTLE, size)
    uniform = Noise(1).uniform(0, 10_000, Purpose.ACCEPT)
    assert uniform.dtype == torch.float64
    assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1
    for share in (0.001, 0.1, 0.3, 0.5, 0.9, 0.999):
        for drawn, bound in ((exponential, -np.log1p(-share)), (uniform, share)):
            below = float((drawn < bound).double().mean())
            assert abs(below - share) < 5 * (share * (1 - share) / len(drawn)) ** 0.5


def test_plain_draws_have_the_softmax_shares() -> None:
    """Catches a race that draws from another distribution than the one it is given.

    Chi-square of 20,000 draws, each with a position's own noise; the bound has odds of 1 in 10**5.
    """
    count = 20_000
    logits = 2 * torch.randn(1, 8, generator=_seeded(5))
    p = TokenDistribution(LogitsProcessorList(), greedy=False)(logits, [])
    noise = Noise(3).exponentials(0, count, Purpose.SETTLE, 8)
    counts = torch.bincount(draw(p.expand(count, -1), noise), minlength=8)
    expected = p[0].double() * count
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert float(torch.special.gammaincc(torch.tensor(3.5).double(), statistic / 2)) > 1e-5


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
