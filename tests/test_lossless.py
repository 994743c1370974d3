"""Every way of decoding gives plain decoding's text, token for token, and plain decoding is
transformers' own.

False alarms: the models and seeds are fixed, so a test that passes once passes again. On another
machine a text can only flip where two of its best logits lie within float32's rounding, about
1e-6; `test_plain_decoding_is_generate` makes sure that they lie further apart than 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import pytest
import tiny
from tiny import (
    ARCHITECTURES,
    GREEDY,
    MORE_ARCHITECTURES,
    NEW_TOKENS,
    PROMPT_LENGTHS,
    Rig,
    Run,
    requests_for,
    run,
)

from passlm.decoding.decoder import Decoder, PromptError
from passlm.decoding.request import Request
from passlm.decoding.strategies import OnePass, Strategy, TwoPass, strategy
from passlm.decoding.text import Row
from passlm.model.pass_records import LookAheadRows, PassRow
from passlm.model.target import Target
from passlm.params import Draft, Judge, SamplingParams
from passlm.plan import Plan
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve

LONGEST = 6
DRAFTING = ("two-pass", "one-pass")
LOOK_AHEADS = (1, 3, LONGEST)
DRAFTS: tuple[Draft, ...] = ("greedy", "sampled")
TEMPERED = SamplingParams(temperature=0.8, top_k=10, seed=17)
PENALISED = SamplingParams(temperature=0.9, top_k=12, repetition_penalty=1.3, seed=23)
SAMPLED_TOKENS = 24
GENERATED_TOKENS = 28


@dataclass(frozen=True)
class Case:
    """A target with four prompts of different lengths and what plain decoding makes of them.

    Attributes:
        parts: whether its look-ahead rows have a LoRA and a sampler head, both random.
        head: whether there is a draft head, random as well.
    """

    target: Target
    parts: bool = False
    head: bool = False

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [tiny.prompt(length) for length in PROMPT_LENGTHS]

    @cached_property
    def look_ahead(self) -> LookAheadRows:
        if self.parts:
            with_parts = tiny.random_look_ahead(
                self.target, LONGEST, rank=3, sampler_width=8, head_width=8 * self.head
            )
            return with_parts.rows(self.target)
        return tiny.look_ahead_rows(self.target, LONGEST)

    @cached_property
    def greedy(self) -> list[list[int]]:
        return self.plain(GREEDY)

    @cached_property
    def generated(self) -> list[list[int]]:
        """What transformers' own greedy decoding makes of them, a shorter text."""
        return [tiny.generate(self.target.model, t, GENERATED_TOKENS)[0] for t in self.prompts]

    @cached_property
    def tempered(self) -> list[list[int]]:
        return self.plain(TEMPERED, SAMPLED_TOKENS)

    def plain(self, sampling: SamplingParams, new: int = NEW_TOKENS) -> list[list[int]]:
        """Each prompt continued, one token a pass."""
        return self.run(requests_for(self.prompts, sampling=sampling, new=new)).texts

    def run(self, asked: Sequence[Request], rig: Rig | None = None) -> Run:
        """Decode in one batch."""
        return run(self.target, asked, self.look_ahead, rig)

    def check(
        self,
        plan: Strategy,
        sampling: SamplingParams,
        truth: list[list[int]],
        rigged: bool,
        alone: Sequence[int] = (),
    ) -> set[int]:
        """Decode some prompts alone and all in a batch; give the accepted lengths that occurred."""
        rig = Rig(self.prompts, truth) if rigged else None
        asked = requests_for(self.prompts, plan, sampling, len(truth[0]))
        judged = max(plan(0, NEW_TOKENS).groups)
        occurred: set[int] = set()
        for index in alone:
            single = self.run([asked[index]], rig)
            assert single.texts[0] == truth[index], f"prompt {index} alone, rigged: {rigged}"
            occurred |= single.accepted(judged)
        batch = self.run(asked, rig)
        assert batch.texts == truth, f"in a batch, rigged: {rigged}"
        return occurred | batch.accepted(judged)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tiny_target: Callable[[str], Target]) -> Case:
    return Case(tiny_target(request.param))


@pytest.fixture(scope="module", params=MORE_ARCHITECTURES)
def further_case(request: pytest.FixtureRequest, tiny_target: Callable[[str], Target]) -> Case:
    return Case(tiny_target(request.param))


@pytest.fixture(scope="module", params=["mistral", "gpt2"])
def some_case(request: pytest.FixtureRequest, tiny_target: Callable[[str], Target]) -> Case:
    return Case(tiny_target(request.param))


@pytest.fixture(scope="module")
def llama_case(llama: Target) -> Case:
    return Case(llama)


def check_plain(case: Case) -> None:
    """Plain decoding is `generate`, of a text that would show a difference."""
    expected = [tiny.generate(case.target.model, tokens, NEW_TOKENS) for tokens in case.prompts]
    texts = [text for text, _ in expected]
    assert case.greedy == texts
    assert case.run(requests_for(case.prompts[3:])).texts == texts[3:]
    assert min(len(set(text)) for text in texts) >= 12
    assert len(set(map(tuple, texts))) == len(texts)
    assert min(margin for _, margin in expected) > 1e-4


# The whole matrix of architectures


def test_plain_decoding_is_generate(case: Case) -> None:
    """Catches a wrong mask, window, position or cache slot that all our own ways share, and a
    comparison that means nothing: constant text, or logits so close that rounding decides."""
    check_plain(case)


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
@pytest.mark.parametrize("method", DRAFTING)
def test_accepted_drafts_change_nothing(case: Case, method: str, look_ahead: int) -> None:
    """Catches candidates judged by the wrong row, refused ones left in the cache, accepted ones
    lost from it, and rows of a batch written to each other's slots: all accepted lengths occur."""
    alone = {1: (), 3: (3,), LONGEST: (2,)}[look_ahead]
    plan = strategy(method, look_ahead)
    occurred = case.check(plan, GREEDY, case.greedy, rigged=True, alone=alone)
    assert occurred == set(range(look_ahead + 1))


def test_random_drafts_change_nothing(case: Case) -> None:
    """Catches real rows that see look-ahead rows, and look-ahead rows left in the cache: with
    random embeddings nearly every candidate is refused. All in one batch, some also alone."""
    asked, truth = [], []
    for index, (method, rows) in enumerate(product(DRAFTING, LOOK_AHEADS)):
        plan, prompt = strategy(method, rows), index % 4
        asked.append(Request.of(case.prompts[prompt], GREEDY, NEW_TOKENS, plan))
        truth.append(case.greedy[prompt])
    for prompt, (method, draft) in enumerate(product(DRAFTING, DRAFTS)):
        sampling, plan = replace(TEMPERED, draft=draft), strategy(method, 3)
        asked.append(Request.of(case.prompts[prompt], sampling, SAMPLED_TOKENS, plan))
        truth.append(case.tempered[prompt])
    assert case.run(asked).texts == truth
    assert case.run(asked[-1:]).texts == truth[-1:]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("method", DRAFTING)
def test_coupled_sampling_is_plain_sampling(case: Case, method: str, draft: Draft) -> None:
    """Catches noise that depends on the pass, the plan or the batch instead of the position."""
    plan, sampling = strategy(method, 3), replace(TEMPERED, draft=draft)
    occurred = case.check(plan, sampling, case.tempered, rigged=True, alone=(DRAFTS.index(draft),))
    assert occurred == {0, 1, 2, 3}


def test_further_architectures(further_case: Case) -> None:
    """Catches what is particular to an architecture that goes through the same code as those of
    the matrix: eager attention, parallel residuals, partial rotation, scaled logits, a window in
    some layers."""
    check_plain(further_case)
    for method in DRAFTING:
        plan = strategy(method, 3)
        occurred = further_case.check(plan, GREEDY, further_case.greedy, rigged=True, alone=(2,))
        assert occurred == {0, 1, 2, 3}
    further_case.check(OnePass(2), TEMPERED, further_case.tempered, rigged=True)


# With a gated LoRA and a sampler head


@pytest.fixture(scope="module", params=ARCHITECTURES | MORE_ARCHITECTURES)
def parts_case(request: pytest.FixtureRequest, tiny_target: Callable[[str], Target]) -> Case:
    return Case(tiny_target(request.param), parts=True)


@pytest.mark.parametrize("method", DRAFTING)
def test_lora_and_sampler_change_no_greedy_text(parts_case: Case, method: str) -> None:
    """Catches updates that reach real rows, or stay in the layers or the cache behind a pass; with
    drafts right, so that settled rows come from passes with updates, and as the head drew them.
    The text is that of `generate`, alone and in a ragged batch."""
    truth, plan = parts_case.generated, strategy(method, 3)
    occurred = parts_case.check(plan, GREEDY, truth, rigged=True)
    assert occurred == {0, 1, 2, 3}
    parts_case.check(plan, GREEDY, truth, rigged=False, alone=(DRAFTING.index(method),))


@pytest.mark.parametrize("draft", DRAFTS)
def test_coupled_sampling_with_lora_and_sampler_is_plain_sampling(
    some_parts_case: Case, draft: Draft
) -> None:
    """Catches noise or a history that a sampler head shifts: its rows draft one by one."""
    for base in (TEMPERED, PENALISED):
        truth, sampling = some_parts_case.plain(base, SAMPLED_TOKENS), replace(base, draft=draft)
        for plan in (TwoPass(3), mixed):
            some_parts_case.check(plan, sampling, truth, rigged=False)
        occurred = some_parts_case.check(OnePass(3), sampling, truth, rigged=True)
        assert occurred == {0, 1, 2, 3}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def some_parts_case(request: pytest.FixtureRequest, tiny_target: Callable[[str], Target]) -> Case:
    return Case(tiny_target(request.param), parts=True)


@pytest.mark.parametrize("draft", DRAFTS)
def test_rejection_with_lora_and_sampler_is_the_same_alone_and_in_a_batch(
    some_parts_case: Case, draft: Draft
) -> None:
    """Catches `q` or hidden states of another text of the batch; the distribution is shown in
    `test_decode_sampling.py`."""
    sampling = replace(TEMPERED, judge="rejection", draft=draft)
    asked = requests_for(some_parts_case.prompts, OnePass(3), sampling, SAMPLED_TOKENS)
    batch = some_parts_case.run(asked)
    for request, text in zip(asked, batch.texts, strict=True):
        assert some_parts_case.run([request]).texts == [text]


# With a draft head


CHEAP_HEAD = CostCurve((1, 41), (1.0, 1.2), (1, 6), (0.1, 0.1), 0.0, (0.01, 0.02, 0.03))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def head_case(request: pytest.FixtureRequest, tiny_target: Callable[[str], Target]) -> Case:
    return Case(tiny_target(request.param), parts=True, head=True)


@pytest.mark.slow
@pytest.mark.parametrize("prior", [(), (0.6, 0.5)], ids=["head alone", "groups too"])
@pytest.mark.parametrize("rigged", [False, True])
def test_a_draft_head_changes_no_text(
    head_case: Case, prior: tuple[float, ...], rigged: bool
) -> None:
    """Catches hidden states of another row or text, drafts that outlive their pass, and noise that
    a draft head shifts: greedy and coupled texts are plain decoding's, alone and in a batch."""
    plan = AutoPlan(CHEAP_HEAD, prior, lookup=False, head=(0.6, 0.5, 0.4))
    for sampling, truth in ((GREEDY, head_case.greedy), (TEMPERED, head_case.tempered)):
        rig = Rig(head_case.prompts, truth) if rigged else None
        asked = requests_for(head_case.prompts, plan, sampling, len(truth[0]))
        batch = head_case.run(asked, rig)
        assert batch.texts == truth
        assert head_case.run(asked[:1], rig).texts == truth[:1]
        steps = [step for row in batch.steps for step in row]
        assert max(step.judged for step in steps) >= 2
        assert not rigged or max(step.accepted for step in steps) >= 2


# What one or a few architectures show


@pytest.mark.parametrize("method", DRAFTING)
def test_every_prompt_alone(llama_case: Case, method: str) -> None:
    """Catches what the matrix leaves out: each prompt alone, with drafts right and random."""
    for look_ahead, rigged in ((1, True), (3, True), (LONGEST, True), (3, False)):
        plan, everyone = strategy(method, look_ahead), range(len(PROMPT_LENGTHS))
        llama_case.check(plan, GREEDY, llama_case.greedy, rigged, alone=everyone)


@pytest.mark.parametrize(
    "sampling",
    [
        replace(PENALISED, draft="sampled"),
        replace(PENALISED, temperature=0.0),
        replace(PENALISED, repetition_penalty=1.0, presence_penalty=1.5, frequency_penalty=0.5),
    ],
)
@pytest.mark.parametrize("method", DRAFTING)
def test_a_penalty_sees_the_true_history(
    llama_case: Case, method: str, sampling: SamplingParams
) -> None:
    """Catches a processor that reads a history without the candidates before its row, or with
    refused ones; greedy too, since the penalty moves the best token."""
    plan = strategy(method, 3)
    truth = llama_case.plain(sampling, SAMPLED_TOKENS)
    assert truth[3] not in (llama_case.tempered[3], llama_case.greedy[3][:SAMPLED_TOKENS])
    llama_case.check(plan, sampling, truth, rigged=False)
    occurred = llama_case.check(plan, sampling, truth, rigged=True, alone=(2,))
    assert occurred == {0, 1, 2, 3}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("method", DRAFTING)
def test_rejection_is_the_same_alone_and_in_a_batch(
    llama_case: Case, method: str, draft: Draft
) -> None:
    """Catches draws of the rejection judge that depend on the batch. Its text depends on the
    plan, so plain decoding is no measure; that it has the right distribution is shown elsewhere."""
    sampling = replace(TEMPERED, judge="rejection", draft=draft)
    asked = requests_for(llama_case.prompts, strategy(method, 3), sampling, SAMPLED_TOKENS)
    for rig in (None, Rig(llama_case.prompts, llama_case.tempered)):
        batch = llama_case.run(asked, rig)
        for request, text in zip(asked, batch.texts, strict=True):
            assert llama_case.run([request], rig).texts == [text]
    assert {0, 1} <= batch.accepted(3)


def mixed(candidates: int, longest_group: int) -> Plan:
    """Groups of unequal length, none on some rows: the mixed strategy of the method."""
    lengths = [(2 * row) % 5 for row in range(1 + candidates)]
    return Plan(candidates, tuple(min(length, longest_group) for length in lengths[::-1]))


def frugal(candidates: int, longest_group: int) -> Plan:
    """Drafts four and verifies at most two of them."""
    return Plan(min(candidates, 2), (min(4, longest_group),) * (1 + min(candidates, 2)))


@pytest.mark.parametrize("plan", [mixed, frugal])
def test_any_strategy_gives_the_text(some_case: Case, plan: Strategy) -> None:
    """Catches a group taken from the wrong rows where groups have unequal lengths, and a strategy
    that verifies fewer candidates than there are."""
    for rigged in (False, True):
        some_case.check(plan, GREEDY, some_case.greedy, rigged, alone=(0,))
        some_case.check(plan, TEMPERED, some_case.tempered, rigged, alone=(3,))


CHEAP = CostCurve((1, 41), (1.0, 1.2), (1, 6), (0.02, 0.02))
DEAR = CostCurve((1, 11), (1.0, 2.5), (1, 6), (0.2, 0.3), 0.05)


@pytest.mark.parametrize("rigged", [False, True])
@pytest.mark.parametrize("curve", [CHEAP, DEAR], ids=["cheap rows", "dear rows"])
@pytest.mark.parametrize("prior", [(), (0.6, 0.5, 0.4)], ids=["lookup alone", "both sources"])
def test_chosen_plans_give_the_text(
    some_case: Case, curve: CostCurve, prior: tuple[float, ...], rigged: bool
) -> None:
    """Catches candidates of one source judged as the other's, a chain cut at the wrong place,
    and plans that differ between the rows of a batch settled as if they were one."""
    plan, accepted = AutoPlan(curve, prior), 0
    for sampling, truth in ((GREEDY, some_case.greedy), (TEMPERED, some_case.tempered)):
        rig = Rig(some_case.prompts, truth) if rigged and prior else None
        asked = requests_for(some_case.prompts, plan, sampling, len(truth[0]))
        batch = some_case.run(asked, rig)
        assert batch.texts == truth
        accepted += sum(step.accepted for row in batch.steps for step in row)
        alone = some_case.run(asked[:1], rig)
        assert alone.texts == truth[:1]
        accepted += sum(step.accepted for step in alone.steps[0])
    assert accepted > 0


def test_chosen_plans_repeat_a_rejection_text(llama_case: Case) -> None:
    """Catches plans that follow a clock, or what another text accepted: with the rejection judge
    the text depends on them."""
    sampling = replace(TEMPERED, judge="rejection", seed=3)  # some of which are accepted
    # Believed to be good, or so unsure a model would not be drafted for.
    asked = requests_for(llama_case.prompts, AutoPlan(DEAR, (0.9, 0.9)), sampling, SAMPLED_TOKENS)
    first = llama_case.run(asked)
    assert llama_case.run(asked).texts == first.texts
    assert llama_case.run(asked[1:2]).texts == first.texts[1:2]
    assert sum(step.accepted for row in first.steps for step in row) > 0


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("plan", [TwoPass(3), OnePass(3), mixed])
def test_drafts_come_from_the_last_accepted_row(
    llama_case: Case, plan: Strategy, penalty: float
) -> None:
    """Catches candidates drafted from another row's group, or under a penalty that does not know
    the candidates before them: no text shows it, only the acceptance suffers."""
    target, prompts = llama_case.target, llama_case.prompts
    rig = Rig(prompts, llama_case.greedy)
    decoder = tiny.RiggedDecoder(target, llama_case.look_ahead, rig)
    for request in requests_for(prompts, plan, SamplingParams(repetition_penalty=penalty), 20):
        decoder.join(request)
    while decoder.rows:
        for row, step in decoder.step():
            if step.finish_reason is None:
                length = row.plan.groups[step.accepted]
                drafting = PassRow(row.tokens[-2:-1], Plan(0, (length,)))
                cache = target.prefill(row.tokens[:-2])
                group = target.run(cache, [drafting], llama_case.look_ahead).logits[0, 1:]
                drafts: list[int] = []
                for logits in group:
                    q = row.request.distribution(logits[None], [*row.tokens, *drafts])
                    drafts.append(int(q.argmax()))
                assert tiny.drafted(decoder, row) == drafts


def _mixed_requests(prompts: Sequence[Sequence[int]]) -> list[Request]:
    """Eight texts that differ in all that a request can say."""
    first, second, third, fourth = prompts
    rejection: Judge = "rejection"
    return [
        Request.of(first, GREEDY, 40, OnePass(3)),
        Request.of(second, TEMPERED, 25, TwoPass(6)),
        Request.of(third, GREEDY, 33),
        Request.of(fourth, replace(TEMPERED, judge=rejection), 50, OnePass(2)),
        Request.of(first, PENALISED, 17, OnePass(6)),
        Request.of(second, replace(PENALISED, judge=rejection, draft="sampled"), 60, TwoPass(3)),
        Request.of(third, replace(TEMPERED, draft="sampled", seed=5), 1, OnePass(4)),
        Request.of(fourth, GREEDY, 2, mixed),
    ]


@pytest.mark.parametrize("rigged", [False, True])
def test_unlike_rows_share_a_batch(some_case: Case, rigged: bool) -> None:
    """Catches a plan, a mask, a seed or a length of one row that reaches another one."""
    asked = _mixed_requests(some_case.prompts)
    rig = Rig(some_case.prompts, some_case.greedy) if rigged else None
    batch = some_case.run(asked, rig)
    alone = [some_case.run([one], rig).texts[0] for one in asked]
    assert batch.texts == alone
    assert [len(text) for text in batch.texts] == [one.max_new_tokens for one in asked]


@pytest.mark.parametrize("rigged", [False, True])
def test_rows_join_and_leave_between_steps(some_case: Case, rigged: bool) -> None:
    """Catches a batch row whose cache, length or candidates move to another text when a third
    one joins late, leaves half-way, or ends."""
    asked = _mixed_requests(some_case.prompts)
    rig = Rig(some_case.prompts, some_case.greedy) if rigged else None
    alone = [some_case.run([one], rig).texts[0] for one in asked]
    decoder = tiny.RiggedDecoder(some_case.target, some_case.look_ahead, rig)
    rows: list[Row] = []
    left = {3: 0, 8: 3, 11: 5}  # at this step, this row leaves
    step = 0
    while decoder.rows or len(rows) < len(asked):
        if step % 2 == 0 and len(rows) < len(asked):
            rows.append(decoder.join(asked[len(rows)]))
        if step in left:
            decoder.leave([rows[left[step]]])
        decoder.step()
        step += 1
    for index, (row, text) in enumerate(zip(rows, alone, strict=True)):
        written = row.tokens[len(row.request.prompt) :]
        whole = text[: len(written)] if index in left.values() else text
        assert written == whole, f"row {index}"
    assert 0 < len(rows[0].tokens) - len(asked[0].prompt) < asked[0].max_new_tokens


def test_steps_are_what_settles(llama_case: Case) -> None:
    """Catches a step that reports other tokens than those that settled: the stream would differ
    from the text."""
    case = llama_case
    rig = Rig(case.prompts, case.greedy)
    decoder = tiny.RiggedDecoder(case.target, case.look_ahead, rig)
    row = decoder.join(Request.of(case.prompts[2], GREEDY, 30, OnePass(3)))
    told: list[int] = []
    reasons = []
    while decoder.rows:
        ((_, step),) = decoder.step()
        assert step.accepted <= min(step.judged, len(step.tokens))
        told += step.tokens
        reasons.append(step.finish_reason)
        assert row.tokens == [*case.prompts[2], *told]
    assert told == case.greedy[2][:30]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_prompt_in_chunks_and_capacity_in_blocks(
    name: str, tiny_target: Callable[[str], Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a chunk that does not see the chunks before it, and slots lost or mixed up where
    the capacity grows, alone and with a batch that grows to a newcomer's capacity."""
    target = tiny_target(name)
    prompts = [tiny.prompt(100), tiny.prompt(9)]
    truth = [tiny.generate(target.model, tokens, 40)[0] for tokens in prompts]
    monkeypatch.setattr("passlm.model.target.PREFILL_CHUNK", 7)
    monkeypatch.setattr("passlm.model.cache.BLOCK", 16)
    look_ahead = tiny.look_ahead_rows(target, 3)
    asked = requests_for(prompts, OnePass(3), new=40)
    rig = Rig(prompts, truth)
    assert run(target, requests_for(prompts, new=40)).texts == truth
    assert run(target, asked, look_ahead).texts == truth
    assert run(target, asked[::-1], look_ahead, rig).texts == truth[::-1]
    assert run(target, asked[:1], look_ahead, rig).texts == truth[:1]


def test_text_across_a_block_of_the_real_size(llama: Target) -> None:
    """Catches a capacity that does not grow in time at its true block size."""
    prompts = [tiny.prompt(100)]
    truth = [tiny.generate(llama.model, prompts[0], 60)[0]]
    asked = requests_for(prompts, OnePass(6), new=60)
    rig = Rig(prompts, truth)
    assert run(llama, asked, tiny.look_ahead_rows(llama, 6), rig).texts == truth


@pytest.mark.parametrize("method", ["ar", *DRAFTING])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_decoding_to_the_last_position(name: str, method: str) -> None:
    """Catches look-ahead rows beyond the last learned position, which are an index error, and a
    text that ends before the context does, or without saying why."""
    context = 40
    size = "n_positions" if name == "gpt2" else "max_position_embeddings"
    target = Target(ARCHITECTURES[name].build(**{size: context}))
    prompts = [tiny.prompt(length) for length in (11, 36, context - 1)]
    truth = [tiny.generate(target.model, p, context - len(p))[0] for p in prompts]
    look_ahead = tiny.look_ahead_rows(target, LONGEST)
    asked = requests_for(prompts, strategy(method, LONGEST), new=100)
    for rig in (None, Rig(prompts, truth)):
        batch = run(target, asked, look_ahead, rig)
        assert batch.texts == truth
        assert [row[-1].finish_reason for row in batch.steps] == ["context"] * 3
        alone = run(target, asked[:1], look_ahead, rig)
        assert alone.texts == truth[:1]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "empty"),
        ([1, 64], "64"),
        ([1, -1], "-1"),
        (tiny.prompt(tiny.CONTEXT), "256"),
        (tiny.prompt(tiny.CONTEXT + 1), "257"),
    ],
)
def test_prompts_that_cannot_be_decoded(llama: Target, prompt: list[int], said: str) -> None:
    """Catches an index error or a wrapped-around id where a one-line message is due, and a batch
    that is changed by a prompt it refused."""
    decoder = Decoder(llama)
    with pytest.raises(PromptError, match=said):
        decoder.join(Request.of(prompt, GREEDY, 8))
    assert not decoder.rows
    row = decoder.join(Request.of(tiny.prompt(5), GREEDY, 8))
    while decoder.rows:
        decoder.step()
    assert row.tokens[5:] == tiny.generate(llama.model, tiny.prompt(5), 8)[0]
