"""How predictable tokens are that drafting hits, misses, or leaves to the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, Rig, RiggedDecoder, generate, look_ahead_rows, requests_for
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from passlm.bench.engines.methods import Asked, Method, build
from passlm.bench.measuring import predictability as module
from passlm.bench.measuring.predictability import Watch, predictability
from passlm.bench.reports.markdown import markdown
from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import Choice, OnePass
from passlm.generate import Generator
from passlm.lookahead.trained import LookAhead
from passlm.model.target import Target
from passlm.params import SamplingParams, StopParams
from passlm.plan import SOURCES, Chain, Plan

PROMPTS = ([5, 6, 7], [9, 9, 10, 11, 12], [40, 3])
NEW_TOKENS = 16
Look = Callable[..., dict[str, Any]]


@pytest.fixture
def seen(llama: Target) -> Look:
    """Gives what a watch makes of one pass, of which nothing is computed."""

    def look(
        candidates: list[int],
        settled: list[int],
        logits: Tensor,
        sampling: SamplingParams | None = None,
        source: str = "look-ahead",
        eos: Sequence[int] = (),
    ) -> dict[str, Any]:
        request = Request.of([1, 2], sampling or SamplingParams(), NEW_TOKENS, eos=eos)
        row = Decoder(llama).join(request)
        if candidates:
            chain = Chain(tuple(candidates), source)
            row.choice = Choice(chain, Plan(len(candidates), (0,) * (1 + len(candidates))))
        watch = Watch()
        watch(row, logits, settled)
        return watch.means()

    return look


def rows(*best: int) -> Tensor:
    """Logits `[len(best), V]` of rows that give these tokens a half and all others the rest."""
    logits = torch.zeros(len(best), VOCABULARY)
    for row, token in enumerate(best):
        logits[row, token] = math.log(VOCABULARY - 1)
    return logits


HALF = math.log(0.5)
REST = math.log(0.5 / (VOCABULARY - 1))
ENTROPY = -(0.5 * HALF + 0.5 * REST)


def test_each_token_is_looked_up_where_it_was_judged(seen: Look) -> None:
    """Catches rows off by one, a refused token counted as accepted, and the wrong sign or base."""
    found = seen([7, 8, 30, 31], [7, 8, 9], rows(7, 8, 9, 10, 11))
    expected = {"excluded": 0, "entropy": pytest.approx(ENTROPY, abs=1e-5)}
    assert found["accepted"] == {"count": 2, "logprob": pytest.approx(HALF), **expected}
    assert found["drawn"] == {"count": 1, "logprob": pytest.approx(HALF), **expected}
    assert found["refused"] == {"count": 1, "logprob": pytest.approx(REST), **expected}
    assert list(found["by_source"]) == ["look-ahead"]
    assert found["by_source"]["look-ahead"] == {k: found[k] for k in ("accepted", "refused")}


@pytest.mark.parametrize("source", SOURCES)
def test_candidates_are_told_apart_by_source(seen: Look, source: str) -> None:
    """Catches copied candidates counted as drafted ones, and a source that is not known."""
    found = seen([7, 8], [7, 8, 9], rows(7, 8, 9), source=source)
    assert list(found["by_source"]) == [source]
    assert found["by_source"][source]["accepted"]["count"] == 2
    assert found["by_source"][source]["refused"] == {
        **{"count": 0, "excluded": 0, "logprob": None, "entropy": None}
    }


def test_a_pass_without_candidates_draws_and_no_more(seen: Look) -> None:
    """Catches a drafting pass whose draw is called accepted."""
    found = seen([], [4], rows(4))
    assert [found[kind]["count"] for kind in module.KINDS] == [0, 0, 1]
    assert found["by_source"] == {}


def test_at_a_temperature_the_distribution_is_the_one_that_judged(seen: Look) -> None:
    """Catches the model's raw distribution in place of the one after temperature and top-k."""
    drawn = SamplingParams(temperature=0.5, top_k=2)
    logits = rows(7, 8)
    logits[0, 3] = logits[0, 7] - 1
    found = seen([50, 8], [3], logits, drawn)
    p = 1 / (1 + math.exp(2))  # a difference of 1 counts twice at temperature 0.5
    assert found["drawn"]["logprob"] == pytest.approx(math.log(p), abs=1e-5)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert found["drawn"]["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert found["refused"] == {
        **{"count": 1, "excluded": 1, "logprob": None},
        "entropy": pytest.approx(entropy, abs=1e-5),
    }


def test_greedy_distributions_are_not_one_hot_but_penalized(seen: Look) -> None:
    """Catches logarithms of 0 and 1, and a penalty that chose the token left out."""
    raw = seen([7], [7, 8], rows(7, 8))
    assert raw["accepted"]["logprob"] == pytest.approx(HALF)
    written = rows(7, 8)
    written[0, 1] = 5.0  # a token of the prompt
    penalized = seen([7], [7, 8], written, SamplingParams(repetition_penalty=1.5))
    total = VOCABULARY - 2 + (VOCABULARY - 1) + math.exp(5 / 1.5)
    expected = math.log((VOCABULARY - 1) / total)
    assert penalized["accepted"]["logprob"] == pytest.approx(expected, abs=1e-5)


def test_nothing_behind_the_end_is_looked_at(seen: Look) -> None:
    """Catches tokens counted that were never written, and candidates judged behind an end."""
    end = seen([7, 8, 30], [7, 8, 9], rows(7, 8, 9, 10), eos=(7,))
    assert [end[kind]["count"] for kind in module.KINDS] == [1, 0, 0]
    last = seen([7, 8, 30], [7, 8, 9], rows(7, 8, 9, 10), eos=(9,))
    assert [last[kind]["count"] for kind in module.KINDS] == [2, 1, 1]


def test_sums_over_a_text_agree_with_its_steps(llama: Target) -> None:
    """Catches passes that are not seen, in a batch of texts at different places."""
    prompts = [list(ids) for ids in PROMPTS]
    truths = [generate(llama.model, ids, NEW_TOKENS)[0] for ids in prompts]
    rig, watch = Rig(prompts, truths), Watch()
    decoder = RiggedDecoder(llama, look_ahead_rows(llama, 3), rig, watch)
    for request in requests_for(prompts, OnePass(3), new=NEW_TOKENS):
        decoder.join(request)
    steps = []
    while decoder.rows:
        steps += [step for _, step in decoder.step()]
    found = watch.means()
    accepted = sum(step.accepted for step in steps)
    assert accepted > 0
    assert found["accepted"]["count"] == accepted
    assert found["drawn"]["count"] == sum(len(step.tokens) for step in steps) - accepted
    assert found["refused"]["count"] == sum(step.accepted < step.judged for step in steps)
    assert found["accepted"]["logprob"] > found["refused"]["logprob"]


# Among the methods


@pytest.fixture
def lm(llama: Target) -> Generator:
    words = {"<unk>": 0, **{f"w{n}": n for n in range(1, VOCABULARY)}}
    level = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, unk_token="<unk>")
    return Generator(llama, tokenizer, LookAhead.mean(llama, 3, "tiny"))


def methods(lm: Generator, *names: str, **sampling: Any) -> list[Method]:
    temperature = sampling.pop("temperature", 0.0)
    asked = Asked(names, (temperature,), (2,), SamplingParams(**sampling), StopParams(NEW_TOKENS))
    return build(lm, asked, "tiny")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_of_the_timed_runs(lm: Generator, temperature: float) -> None:
    """Catches other seeds, settings or ends than what was measured; theirs have no such figures."""
    names = ("ar", "fixed-token", "two-pass", "one-pass", "auto", "lookup")
    seeds = [4, 9, 2]
    for method in methods(lm, *names, temperature=temperature):
        found = predictability(method, PROMPTS, seeds, NEW_TOKENS)
        assert found is not None
        pairs = zip(PROMPTS, seeds, strict=True)
        records = [method(prompt, seed, NEW_TOKENS) for prompt, seed in pairs]
        totals = [record.stats for record in records if record.stats is not None]
        assert found["prompts"] == len(PROMPTS)
        assert found["accepted"]["count"] == sum(stats.accepted for stats in totals), method.name
        written = sum(stats.tokens for stats in totals)
        assert found["drawn"]["count"] + found["accepted"]["count"] == written
    (theirs,) = methods(lm, "hf")
    assert predictability(theirs, PROMPTS, seeds, NEW_TOKENS) is None


def test_at_most_so_many_prompts_and_batches_as_they_come(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches work without bound, and a batch that is watched text by text."""
    monkeypatch.setattr(module, "PROMPTS", 5)
    (method,) = methods(lm, "two-pass")
    given = [[5 + n, 6, 7] for n in range(9)]
    alone = predictability(method, given, range(9), NEW_TOKENS)
    batched = predictability(replace(method, batch_size=2), given, range(9), NEW_TOKENS)
    assert alone is not None
    assert batched is not None
    assert alone["prompts"] == batched["prompts"] == 5
    for kind in module.KINDS:
        assert alone[kind] == pytest.approx(batched[kind], rel=1e-5)


def test_the_report_shows_what_was_seen() -> None:
    """Catches a table without its counts, and one where nobody looked."""
    mean = {"count": 12, "excluded": 2, "logprob": -1.234, "entropy": 0.567}
    none = {"count": 0, "excluded": 0, "logprob": None, "entropy": None}
    figures = {"accepted": mean, "refused": mean, "drawn": none}
    both = {"look-ahead": {"accepted": mean, "refused": none}}
    run = {
        **{"suite": "own", "method": "auto", "lookahead_tokens": 0, "temperature": 0.0},
        **{"tokens_per_second": 1.0, "speedup_vs_ar": 1.0, "speedup_interval": None},
        **{"tokens_per_pass": 1.0, "accepted_length": 1.0, "accepted_by_position": [0.5]},
        **{"identical_to_ar": 1.0, "prompts": 3, "tokens": 48, "judge": "coupled"},
        **{"draft": "sampled", "differences": [], "quality": None, "batch_size": 1},
        "predictability": {"prompts": 3, **figures, "by_source": {**both, "lookup": figures}},
    }
    text = _report([run])
    assert text.count("-1.23, 0.57, 10 + 2") == 2 + 1 + 2
    assert "| auto: lookup |" in text
    assert "on 3 prompts" in text
    assert "How predictable" not in _report([{**run, "predictability": None}])


def _report(runs: list[dict[str, Any]]) -> str:
    machine = {"gpu": None, "processor": "one", "cores": 1, "threads": 1, "system": "some"}
    stamp = {
        **{"passlm": "0", "commit": None, "time": "now", "python": "3", "arguments": []},
        **{"machine": machine, "packages": {"torch": "2", "transformers": "5"}},
    }
    settings = {
        **{"model": "tiny", "dtype": "float32", "device": "cpu", "lookahead": None},
        **{"packed_weights": False, "compiled": False, "quantize": None},
    }
    return markdown(
        {
            **{"provenance": stamp, "settings": settings, "runs": runs, "complete": True},
            **{"peak_memory_bytes": None, "skipped": [], "missing_suites": {}},
        }
    )
