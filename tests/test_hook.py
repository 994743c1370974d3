"""PaSS behind transformers' `generate`: the same ids, criteria calls, streams and outputs.

Every comparison is with `generate` itself on the same tiny model. `true_drafts` makes candidates
right most of the time, so that stops fall inside accepted blocks, which random look-ahead rows of
a random model would hardly ever bring about.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, CONTEXT, VOCABULARY
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from passlm import custom_generate
from passlm.decoding.decoder import Decoder, PromptError
from passlm.decoding.text import Row
from passlm.drafts.protocol import DraftBuilder
from passlm.errors import InputError
from passlm.integrations.custom_generate import CustomGenerate, GenerateError
from passlm.lookahead import trained
from passlm.lookahead.card import LookAheadError
from passlm.lookahead.trained import LookAhead
from passlm.model.compat import cache_name
from passlm.model.supported import UnsupportedModelError
from passlm.model.target import Target

PAD = 0
NEW = 24
CACHE = str(cache_name(LlamaForCausalLM.forward))  # as transformers names it
PROMPT = torch.tensor([[5, 9, 33, 12, 7, 41]])
PROMPTS = {  # left-padded, three lengths
    "input_ids": torch.tensor(
        [[PAD, PAD, 21, 8, 30, 11], [5, 9, 33, 12, 7, 41], [PAD, PAD, PAD, PAD, PAD, 17]]
    ),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0] * 5 + [1]]),
}


def hook_for(method: str, rows: LookAhead, seed: int | None = None) -> CustomGenerate:
    """The callable of a method; plain decoding takes no rows."""
    return custom_generate(lookahead=None if method == "ar" else rows, method=method, seed=seed)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: ARCHITECTURES[name].build() for name in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def llama(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models["llama"]


@pytest.fixture(scope="module")
def rows(llama: PreTrainedModel) -> LookAhead:
    return LookAhead.mean(Target(llama), 4, "tiny")


@dataclass
class Passes:
    """How many passes the decoder made."""

    count: int = 0


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    counted = Passes()
    step = Decoder.step

    def counting(decoder: Decoder) -> Any:
        counted.count += 1
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", counting)
    return counted


@pytest.fixture
def true_drafts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], None]:
    """Candidates are read off `generate`'s own result, every seventh one spoilt."""

    def use(padded: Tensor) -> None:
        def draw(row: Row, draft: DraftBuilder, group: Tensor) -> None:
            prompt = list(row.request.prompt)
            texts = [t[PROMPT.shape[1] - len(prompt) :] for t in padded.tolist()]
            text = next(text for text in texts if text[: len(prompt)] == prompt)
            first = len(row.tokens)
            truth = (text + [1] * len(group))[first : first + len(group)]
            draft.tokens += [
                (token + (place % 7 == 0)) % VOCABULARY for place, token in enumerate(truth, first)
            ]

        monkeypatch.setattr(Row, "draw", draw)

    return use


@pytest.fixture
def same(
    llama: PreTrainedModel, rows: LookAhead, true_drafts: Callable[[Tensor], None], passes: Passes
) -> Callable[..., Tensor]:
    """Runs `generate` with and without PaSS and makes sure that the ids are the same."""

    def compare(inputs: dict[str, Tensor], method: str = "one-pass", **options: Any) -> Tensor:
        shared = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options}
        expected = llama.generate(**inputs, **copy.deepcopy(shared))
        true_drafts(expected)
        passes.count = 0
        hook = hook_for(method, rows)
        got = llama.generate(**inputs, custom_generate=hook, **shared)
        assert got.tolist() == expected.tolist()
        assert got.dtype == expected.dtype
        new = expected.shape[1] - PROMPT.shape[1]
        assert passes.count < new, "no block was accepted: the test would show nothing"
        return expected

    return compare


def free_text(model: PreTrainedModel) -> list[list[int]]:
    """What `generate` writes behind `PROMPTS` with nothing to stop it."""
    ids = model.generate(**PROMPTS, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    new: list[list[int]] = ids[:, PROMPT.shape[1] :].tolist()
    return new


def mid_token(text: list[int], after: int = 5) -> int:
    """A token that a text has first somewhere in its middle."""
    return next(token for place, token in enumerate(text) if after <= place == text.index(token))


def staggered_stops(model: PreTrainedModel) -> list[int]:
    """A token for each row of `PROMPTS`, one row's some way behind the other's."""
    return [mid_token(text, 4 + 4 * row) for row, text in enumerate(free_text(model))]


# Equality


@pytest.mark.parametrize("method", ["ar", "two-pass", "one-pass"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_ids_are_generates(
    models: dict[str, PreTrainedModel], name: str, method: str
) -> None:
    """Catches any wrong position, mask or row in a call with drafts of its own."""
    model = models[name]
    hook = hook_for(method, LookAhead.mean(Target(model), 4, name))
    for inputs in ({"input_ids": PROMPT}, PROMPTS):
        options = {**inputs, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
        assert torch.equal(
            model.generate(**options, custom_generate=hook), model.generate(**options)
        )


@pytest.mark.parametrize("method", ["two-pass", "one-pass"])
def test_blocks_in_a_left_padded_batch(same: Callable[..., Tensor], method: str) -> None:
    """Catches padding taken for text, and rows of unequal pace put in the wrong column."""
    same(PROMPTS, method)


@pytest.mark.parametrize("method", ["two-pass", "one-pass"])
def test_eos_inside_a_block(
    same: Callable[..., Tensor], llama: PreTrainedModel, method: str
) -> None:
    """Catches tokens behind an accepted end of sequence, and padding that is not the pad token."""
    eos = [mid_token(text) for text in free_text(llama)[:2]]
    expected = same(PROMPTS, method, eos_token_id=eos)
    ended = expected[:, PROMPT.shape[1] :] == PAD
    assert ended[0].any() or ended[1].any(), "no row was padded"


def test_min_new_tokens_holds_eos_back(same: Callable[..., Tensor], llama: PreTrainedModel) -> None:
    """Catches lengths counted without the padding, as the length processors count them."""
    eos = mid_token(free_text(llama)[1])
    first = same(PROMPTS, eos_token_id=eos)
    assert same(PROMPTS, eos_token_id=eos, min_new_tokens=20).tolist() != first.tolist()
    same(PROMPTS, eos_token_id=eos, min_length=PROMPT.shape[1] + 15)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 0.4},
        {"encoder_no_repeat_ngram_size": 1},
        {"suppress_tokens": [3, 4, 5]},
        {"begin_suppress_tokens": list(range(20))},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "renormalize_logits": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_processors_of_a_batch(same: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Catches a processor that reads another row's prompt, no padding, or no candidates."""
    same(PROMPTS, **options)


def test_bad_words(same: Callable[..., Tensor], llama: PreTrainedModel) -> None:
    """Catches a forbidden pair whose first half is an unsettled candidate."""
    text = free_text(llama)[1]
    banned = [text[8:10], text[15:16]]
    assert same(PROMPTS, bad_words_ids=banned)[1].tolist()[PROMPT.shape[1] :] != text


class InPlace(LogitsProcessor):
    """Writes into its argument, as users' processors do, by row and by length."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row in range(len(scores)):
            scores[row, (input_ids[row, -1] + row + input_ids.shape[1]) % VOCABULARY] += 5.0
        return scores


def test_custom_processor_knows_its_row(same: Callable[..., Tensor]) -> None:
    """Catches a processor that is shown a batch of one, or whose writes reach another row."""
    same(PROMPTS, logits_processor=LogitsProcessorList([InPlace()]))


def test_prefix_function_is_asked_about_its_own_rows(same: Callable[..., Tensor]) -> None:
    """Catches a constraint of one row that is asked about the text of another."""
    prompts = PROMPTS["input_ids"].tolist()

    def allowed(row: int, ids: Tensor) -> list[int]:
        assert ids.tolist()[: PROMPT.shape[1]] == prompts[row]
        return list(range(row, VOCABULARY, 2))

    same(PROMPTS, prefix_allowed_tokens_fn=allowed)


# Stops


class Watch(StoppingCriteria):
    """Stops row by row at some token and keeps what it was shown."""

    def __init__(self, stops: list[int]) -> None:
        self.stops = torch.tensor(stops)
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1] == self.stops[: len(input_ids)]


@pytest.mark.parametrize("eos", [None, 1])
def test_criteria_see_what_generate_shows_them(
    llama: PreTrainedModel,
    rows: LookAhead,
    true_drafts: Callable[[Tensor], None],
    eos: int | None,
) -> None:
    """Catches criteria called in blocks, by row, out of order, or behind their own stop.

    Without an end of sequence, finished rows go on until the last one ends.
    """
    stops = staggered_stops(llama)
    options = {**PROMPTS, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    plain, ours = Watch(stops), Watch(stops)
    expected = llama.generate(
        **options, eos_token_id=eos, stopping_criteria=StoppingCriteriaList([plain])
    )
    true_drafts(expected)
    got = llama.generate(
        **options,
        eos_token_id=eos,
        stopping_criteria=StoppingCriteriaList([ours]),
        custom_generate=custom_generate(lookahead=rows, method="one-pass"),
    )
    assert got.tolist() == expected.tolist()
    assert ours.seen == plain.seen
    assert len(plain.seen) < NEW, "nothing stopped the text"


@pytest.mark.parametrize(("by_eos", "method"), [(True, "one-pass"), (False, "ar")])
def test_finished_rows_are_not_decoded_on(
    llama: PreTrainedModel,
    rows: LookAhead,
    true_drafts: Callable[[Tensor], None],
    monkeypatch: pytest.MonkeyPatch,
    by_eos: bool,
    method: str,
) -> None:
    """Catches work for rows that will only be padded.

    An end of sequence ends a row that is ahead of the others; what only the criteria see ends it
    once they are asked, which plain decoding does after every pass.
    """
    joined: list[Row] = []
    join = Decoder.join
    monkeypatch.setattr(
        Decoder, "join", lambda *given: (joined.append(join(*given)), joined[-1])[1]
    )
    stops = staggered_stops(llama)
    options = {**PROMPTS, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    true_drafts(llama.generate(**options))
    llama.generate(
        **options,
        eos_token_id=stops[0] if by_eos else 1,
        stopping_criteria=StoppingCriteriaList([] if by_eos else [Watch(stops)]),
        custom_generate=hook_for(method, rows),
    )
    text = joined[0].tokens[len(joined[0].request.prompt) :]
    assert text.index(stops[0]) == len(text) - 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token `i` is the word `<i>`; words are joined without spaces."""
    words = {"abcdef": 0, **{f"<{i}>": i for i in range(1, VOCABULARY)}}
    inner = Tokenizer(WordLevel(words, unk_token="<1>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_stop_strings_cut_at_the_same_token(
    llama: PreTrainedModel,
    rows: LookAhead,
    tokenizer: PreTrainedTokenizerFast,
    true_drafts: Callable[[Tensor], None],
) -> None:
    """Catches a stop string that straddles two tokens of a block and is found too late."""
    text = free_text(llama)[1]
    end = text.index(mid_token(text))
    stop = f"{text[end - 1]}><{text[end]}>"
    options = {"input_ids": PROMPT, "max_new_tokens": NEW, "do_sample": False}
    expected = llama.generate(**options, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.shape[1] == PROMPT.shape[1] + end + 1
    true_drafts(llama.generate(**options))
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    hook = custom_generate(lookahead=rows, method="one-pass")
    got = llama.generate(**options, stopping_criteria=criteria, custom_generate=hook)
    assert got.tolist() == expected.tolist()


def test_max_length_counts_the_prompt(same: Callable[..., Tensor]) -> None:
    """Catches a length that leaves the padded prompt out, or lets a block run over it."""
    ids = same(PROMPTS, max_new_tokens=None, max_length=PROMPT.shape[1] + 9)
    assert ids.shape[1] == PROMPT.shape[1] + 9


@pytest.mark.parametrize("length", [PROMPT.shape[1] + 5, PROMPT.shape[1] + NEW + 7])
def test_a_users_length_criterion_replaces_generates(
    same: Callable[..., Tensor], length: int
) -> None:
    """Catches room taken from the configuration, which `generate` then does not look at."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
    assert same({"input_ids": PROMPT}, stopping_criteria=criteria).shape[1] == length


def test_auto_is_the_default_and_needs_no_files(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a default that fails for models that nothing ships for, or that nobody is told of."""
    plain = llama.generate(PROMPT, do_sample=False, max_new_tokens=40)
    with caplog.at_level(logging.WARNING, logger="passlm.integrations.custom_generate"):
        written = llama.generate(
            PROMPT, do_sample=False, max_new_tokens=40, custom_generate=custom_generate()
        )
    assert torch.equal(written, plain)
    assert "drafting by prompt lookup only" in caplog.text


def test_the_models_context_ends_the_text(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an endless wait for a row that the decoder has ended for want of positions."""
    prompt = torch.arange(CONTEXT - 4)[None] % VOCABULARY
    with caplog.at_level(logging.WARNING, logger="passlm.integrations.custom_generate"):
        ids = llama.generate(
            prompt, max_new_tokens=9, do_sample=False, custom_generate=custom_generate(method="ar")
        )
    assert ids.shape[1] == CONTEXT
    assert "context of 256 tokens" in caplog.text
    with pytest.raises(PromptError, match="shorten the prompt"):
        llama.generate(
            ids, max_new_tokens=9, do_sample=False, custom_generate=custom_generate(method="ar")
        )


# What else `generate` gives


class Log(BaseStreamer):
    """Keeps everything it is handed."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.events.append(value.tolist())

    def end(self) -> None:
        self.events.append("end")


@pytest.mark.parametrize("inputs", [{"input_ids": PROMPT}, PROMPTS], ids=["one", "batch"])
def test_streamer_gets_generates_tokens(
    llama: PreTrainedModel,
    rows: LookAhead,
    true_drafts: Callable[[Tensor], None],
    inputs: dict[str, Tensor],
) -> None:
    """Catches a streamer that is dropped, gets the prompt twice, blocks, or never its end."""
    eos = mid_token(free_text(llama)[1])
    options = {**inputs, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos}
    plain, ours = Log(), Log()
    true_drafts(llama.generate(**options, pad_token_id=PAD, streamer=plain))
    hook = custom_generate(lookahead=rows, method="one-pass")
    llama.generate(**options, pad_token_id=PAD, streamer=ours, custom_generate=hook)
    assert ours.events == plain.events
    assert ours.events[-1] == "end"


def test_a_streamer_handed_over_is_used(llama: PreTrainedModel) -> None:
    """Catches a later transformers that does hand the streamer on."""
    log = Log()
    hook = custom_generate(method="ar")

    def handing_on(model: PreTrainedModel, input_ids: Tensor, **given: Any) -> Any:
        return hook(model, input_ids, streamer=log, **given)

    llama.generate(PROMPT, max_new_tokens=3, do_sample=False, custom_generate=handing_on)
    assert len(log.events) == 4


def test_return_dict_with_scores_and_logits(
    llama: PreTrainedModel, rows: LookAhead, true_drafts: Callable[[Tensor], None]
) -> None:
    """Catches scores of a draft or of a refused candidate in the place of the settled token's."""
    eos = mid_token(free_text(llama)[1])
    options = {
        **PROMPTS,
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": eos,
        "pad_token_id": PAD,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = llama.generate(**options)
    true_drafts(expected.sequences)
    hook = custom_generate(lookahead=rows, method="one-pass")
    got = llama.generate(**options, custom_generate=hook)
    assert type(got) is type(expected)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert getattr(got, CACHE) is None
    assert len(got.scores) == len(got.logits) == len(expected.scores)
    live = torch.ones(len(got.sequences), dtype=torch.bool)
    for step, token in enumerate(got.sequences[:, PROMPT.shape[1] :].T):
        for kind in ("scores", "logits"):
            mine, theirs = getattr(got, kind)[step], getattr(expected, kind)[step]
            torch.testing.assert_close(mine[live], theirs[live], rtol=1e-4, atol=1e-4)
            assert (mine[~live].argmax(-1) == PAD).all()
        live &= token != eos
    assert not live.all(), "no row was padded"


def test_return_dict_without_scores(llama: PreTrainedModel) -> None:
    """Catches scores that nobody asked for, or a bare tensor."""
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    got = llama.generate(PROMPT, **options, custom_generate=custom_generate(method="ar"))
    assert got.scores is got.logits is got.attentions is None
    assert got.sequences.tolist() == llama.generate(PROMPT, **options).sequences.tolist()


def test_criteria_get_the_scores_where_they_are_kept(llama: PreTrainedModel) -> None:
    """Catches criteria that read the scores and get none, or those of another step."""
    lengths: list[int] = []

    class Scores(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            lengths.append(len(scores))
            return scores[-1].argmax(-1) != input_ids[:, -1]

    ids = llama.generate(
        PROMPT,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        stopping_criteria=StoppingCriteriaList([Scores()]),
        custom_generate=custom_generate(method="ar"),
    ).sequences
    assert lengths == [1, 2, 3, 4, 5, 6]
    assert ids.shape[1] == PROMPT.shape[1] + 6


# Sampling


def sampled(model: PreTrainedModel, hook: Any, **options: Any) -> list[list[int]]:
    given = {"max_new_tokens": 12, "do_sample": True, "top_k": 20, "temperature": 0.9, **options}
    ids: list[list[int]] = model.generate(PROMPT, custom_generate=hook, **given).tolist()
    return ids


@pytest.mark.parametrize("judge", ["coupled", "rejection"])
def test_sampling_follows_torchs_seed(llama: PreTrainedModel, rows: LookAhead, judge: Any) -> None:
    """Catches a seed that is fixed, or that `torch.manual_seed` does not reach."""
    hook = custom_generate(lookahead=rows, judge=judge, draft="sampled")
    torch.manual_seed(3)
    first, second = sampled(llama, hook), sampled(llama, hook)
    torch.manual_seed(3)
    assert [sampled(llama, hook), sampled(llama, hook)] == [first, second]
    assert first != second  # the seed is fixed: a pass stays a pass


def test_returned_sequences_differ(llama: PreTrainedModel, rows: LookAhead) -> None:
    """Catches one seed for all rows of a batch; it is fixed, so that a pass stays a pass."""
    texts = sampled(llama, custom_generate(lookahead=rows, seed=1), num_return_sequences=5)
    assert len({tuple(text) for text in texts}) == 5


def test_a_seed_gives_one_text_under_any_method(llama: PreTrainedModel, rows: LookAhead) -> None:
    """Catches noise that depends on the plan, and a seed that the call does not use."""
    hooks = [hook_for(method, rows, seed=7) for method in ("ar", "two-pass", "one-pass")]
    texts = [sampled(llama, hook, num_return_sequences=3) for hook in hooks]
    assert texts[0] == texts[1] == texts[2]


def test_a_given_seed_and_greedy_leave_torchs_generator_alone(llama: PreTrainedModel) -> None:
    """Catches draws that nobody asked for."""
    before = torch.random.get_rng_state()
    sampled(llama, custom_generate(method="ar", seed=7))
    sampled(llama, custom_generate(method="ar"), do_sample=False, top_k=50, temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampled_tokens_follow_the_processed_distribution(
    llama: PreTrainedModel, rows: LookAhead
) -> None:
    """Catches warpers that are left out, by chi-squared: a false alarm with 1 seed in 10,000.

    The seed is fixed, so that a pass stays a pass.
    """
    draws, kept = 200, 4
    hook = custom_generate(lookahead=rows, method="one-pass", seed=0)
    texts = sampled(
        llama, hook, max_new_tokens=1, top_k=kept, temperature=1.7, num_return_sequences=draws
    )
    with torch.no_grad():
        best = (llama(PROMPT).logits[0, -1] / 1.7).topk(kept)
    p = best.values.softmax(-1)
    counts = torch.tensor([sum(text[-1] == token for text in texts) for token in best.indices])
    assert counts.sum() == draws
    chi_squared = ((counts - draws * p) ** 2 / (draws * p)).sum()
    assert chi_squared < 21.1  # 3 degrees of freedom


# Refusals


def refusals() -> Iterator[Any]:
    model = "model"
    yield {"num_beams": 2}, "beam search"
    yield {"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"
    yield {"prompt_lookup_num_tokens": 3}, "assisted generation"
    yield {"assistant_model": model}, "assisted generation"
    yield {"synced_gpus": True}, "synced_gpus"
    yield {"cache_implementation": "static"}, "cache_implementation='static'"
    yield {"use_cache": False}, "use_cache=False"
    yield {CACHE: DynamicCache()}, CACHE
    yield {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"
    yield {"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"
    yield {"prefill_chunk_size": 2}, "prefill_chunk_size"
    yield {"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"
    yield {"position_ids": torch.arange(6)[None] + 1}, "position_ids"
    yield {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "pad on the left"
    yield {"attention_mask": torch.zeros(1, 6, dtype=torch.long)}, "prompt is empty"
    yield {"inputs_embeds": torch.zeros(1, 6, 32)}, "inputs_embeds"


@pytest.mark.parametrize(("options", "named"), list(refusals()), ids=lambda value: str(value)[:30])
def test_what_cannot_be_honoured_is_refused(
    llama: PreTrainedModel, options: dict[str, Any], named: str
) -> None:
    """Catches an option that is dropped in silence, and an error of more than one line."""
    options = {k: llama if isinstance(v, str) and v == "model" else v for k, v in options.items()}
    with pytest.raises(InputError, match=named) as caught:
        llama.generate(
            PROMPT,
            **{"max_new_tokens": 4, "do_sample": False, **options},
            custom_generate=custom_generate(method="ar"),
        )
    assert "\n" not in str(caught.value)


def test_a_filled_cache_is_refused(llama: PreTrainedModel) -> None:
    """Catches a continued cache whose text would be read as the whole prompt."""
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(PROMPT[:, :3], **{CACHE: cache})
    with pytest.raises(GenerateError, match=CACHE):
        llama.generate(
            PROMPT,
            max_new_tokens=4,
            **{CACHE: cache},
            custom_generate=custom_generate(method="ar"),
        )


def test_a_batch_that_needs_padding_and_has_none_is_refused(llama: PreTrainedModel) -> None:
    """Catches a padding token made up where rows end at different lengths."""
    with pytest.raises(GenerateError, match="pad_token_id"):
        llama.generate(
            PROMPT.repeat(2, 1),
            max_new_tokens=4,
            stopping_criteria=StoppingCriteriaList([EosTokenCriteria(3)]),
            custom_generate=custom_generate(method="ar"),
        )


def test_a_wrong_model_kind_is_refused() -> None:
    """Catches an encoder-decoder run as if it were a decoder alone."""
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        model.generate(PROMPT % 32, max_new_tokens=4, custom_generate=custom_generate(method="ar"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "magic"},
        {"judge": "lenient"},
        {"draft": "wild"},
        {"seed": -1},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any]) -> None:
    """Catches a typing error that would only show in the middle of `generate`, or never."""
    with pytest.raises(InputError, match="must"):
        custom_generate(**arguments)


# Look-ahead files and the model


def test_lookahead_tokens_outside_the_files(llama: PreTrainedModel, rows: LookAhead) -> None:
    """Catches rows asked for that were never trained."""
    for tokens in (0, 5):
        hook = custom_generate(lookahead=rows, lookahead_tokens=tokens)
        with pytest.raises(InputError, match="1 to 4"):
            llama.generate(PROMPT, max_new_tokens=4, custom_generate=hook)


@pytest.mark.parametrize(("name", "said"), [(None, "none|no look-ahead"), ("nowhere", "nowhere")])
def test_missing_files_are_refused(llama: PreTrainedModel, name: str | None, said: str) -> None:
    """Catches a fall-back to plain decoding."""
    hook = custom_generate(lookahead=name, method="one-pass")
    with pytest.raises(LookAheadError, match=said):
        llama.generate(PROMPT, max_new_tokens=4, custom_generate=hook)


def test_rows_of_another_model_are_refused(
    models: dict[str, PreTrainedModel], rows: LookAhead
) -> None:
    """Catches rows that are not checked when they come as an object."""
    with pytest.raises(LookAheadError, match="do not fit"):
        models["gpt2"].generate(
            PROMPT, max_new_tokens=4, custom_generate=custom_generate(lookahead=rows)
        )


def test_a_folder_is_read_once_and_the_model_let_go(
    rows: LookAhead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches files read at every call, and a callable that keeps a model alive."""
    rows.save(tmp_path)
    read: list[Path] = []
    load = trained.load
    monkeypatch.setattr(trained, "load", lambda folder: (read.append(folder), load(folder))[1])
    model = ARCHITECTURES["llama"].build()
    hook = custom_generate(lookahead=str(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(PROMPT, **options)
    for _ in range(2):
        assert torch.equal(model.generate(PROMPT, **options, custom_generate=hook), expected)
    assert read == [tmp_path]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_change_of_type_between_calls(rows: LookAhead) -> None:
    """Catches look-ahead rows or a target kept in the type of the first call."""
    model = ARCHITECTURES["llama"].build()
    hook = custom_generate(lookahead=rows)
    options = {"max_new_tokens": 6, "do_sample": False}
    model.generate(PROMPT, **options, custom_generate=hook)
    model.double()
    got = model.generate(PROMPT, **options, custom_generate=hook)
    assert torch.equal(got, model.generate(PROMPT, **options))


def test_the_model_is_left_as_it_was(llama: PreTrainedModel, rows: LookAhead) -> None:
    """Catches a changed weight, configuration, mode or attribute."""

    def state() -> Any:
        return (
            {name: weight.clone() for name, weight in llama.state_dict().items()},
            llama.config.to_dict(),
            llama.generation_config.to_dict(),
            llama.training,
            set(vars(llama)),
            [len(module._forward_hooks) for module in llama.modules()],
        )

    weights, *rest = state()
    hook = custom_generate(lookahead=rows)
    llama.generate(**PROMPTS, max_new_tokens=4, pad_token_id=PAD, custom_generate=hook)
    weights_after, *rest_after = state()
    assert rest_after == rest
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)
