"""Methods side by side: which runs when, and the figures that are made of it.

Methods are interleaved prompt by prompt, so that whatever slows the machine for a while slows all
of them. How a method decodes is left to `methods.py`, tables to `report.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from passlm.bench.decoding import Record
from passlm.bench.methods import BASELINE, Method
from passlm.outputs import Stats
from passlm.passes import PassRow
from passlm.plan import Plan
from passlm.target import Target

RESAMPLES = 2000
COVERAGE = 0.95
WARM_UP_TOKENS = 8


Further = Callable[[Sequence[Sequence[int]]], tuple[int, ...] | None]
"""Given the answers so far, the ids that ask the next turn of a chat; None when it is over."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as every method meets it.

    Attributes:
        suite: where it comes from.
        name: what tells it apart there.
        ids: what is decoded first.
        further: turns of a chat behind it; None without.
    """

    suite: str
    name: str
    ids: tuple[int, ...]
    further: Further | None = None


@dataclass(frozen=True)
class Sample:
    """What one method did with the prompt of that number, the first time or again."""

    prompt: int
    method: Method
    record: Record
    repeat: int = 0


def warm_up(prompt: Prompt, methods: Sequence[Method], max_new_tokens: int) -> None:
    """Run every method once, not counted: first passes pay for things later ones find done."""
    for method in methods:
        method(prompt.ids, 0, min(WARM_UP_TOKENS, max_new_tokens))


def interleave(
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    max_new_tokens: int,
    seed: int,
    repeats: int = 1,
) -> Iterator[Sample]:
    """Every method on the first prompt, in random order, that again, then on the next.

    Args:
        prompts: of one suite.
        methods: what to run on each.
        max_new_tokens: of each run.
        seed: of the order; of the draws as well, with the prompt's number added, so that methods
            share the noise of a prompt and prompts do not.
        repeats: how often each prompt is run; sampled texts differ then.
    """
    order = random.Random(seed)
    for number, prompt in enumerate(prompts):
        for repeat in range(repeats):
            own_seed = seed + number + repeat * len(prompts)
            for method in order.sample(list(methods), len(methods)):
                record = converse(prompt, method, own_seed, max_new_tokens)
                yield Sample(number, method, record, repeat)


def converse(prompt: Prompt, method: Method, seed: int, max_new_tokens: int) -> Record:
    """What a method makes of a prompt, of each turn where it is a chat of several."""
    record = method(prompt.ids, seed % 2**64, max_new_tokens)
    while prompt.further is not None and (asked := prompt.further(record.answers)) is not None:
        record = record.then(asked, method(asked, seed % 2**64, max_new_tokens))
    return record


def prompt_record(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    """One line of `prompts.jsonl`."""
    stats = sample.record.stats
    return {
        "suite": prompt.suite,
        "name": prompt.name,
        "repeat": sample.repeat,
        "prompt_tokens": len(prompt.ids),
        **_identity(sample.method),
        "tokens": len(sample.record.tokens),
        "passes": stats and stats.passes,
        "seconds": sample.record.seconds,
        "prefill_seconds": stats and stats.prefill_seconds,
        "decode_seconds": stats and stats.decode_seconds,
        "first_token_seconds": sample.record.first_token_seconds,
        "rows": sample.record.rows,
        "accepted": stats and stats.accepted,
    }


def summarize(
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    methods: Sequence[Method],
    target: Target,
    seed: int,
) -> list[dict[str, Any]]:
    """The entries of `results.json` for one suite, one for each method, in order.

    Runs the target again at first differences from plain decoding, so nothing may be timed beside.

    Args:
        prompts: of one suite, all of them run by every method, equally often.
        samples: what `interleave` gave.
        methods: among them plain decoding at every temperature.
        target: the model.
        seed: of the bootstrap.
    """
    records: dict[int, list[Record]] = {id(method): [] for method in methods}
    for sample in sorted(samples, key=lambda sample: (sample.prompt, sample.repeat)):
        records[id(sample.method)].append(sample.record)
    plain = {m.sampling.temperature: records[id(m)] for m in methods if m.name == BASELINE}
    runs = []
    for method in methods:
        own, expected = records[id(method)], plain[method.sampling.temperature]
        repeats = len(own) // len(prompts)
        asked = [prompt for prompt in prompts for _ in range(repeats)]
        compared = zip(asked, own, expected, strict=True) if method.repeats_plain else None
        runs.append(
            {
                "suite": prompts[0].suite,
                **_identity(method),
                **_counts(own, repeats),
                **_speed(own, expected, repeats, seed),
                **_agreement(compared, target),
            }
        )
    return runs


def _identity(method: Method) -> dict[str, Any]:
    ours = method.plan is not None
    return {
        "method": method.name,
        "plan": method.plan,
        "lookahead_tokens": method.lookahead_tokens,
        "temperature": method.sampling.temperature,
        "judge": method.sampling.judge if ours else None,
        "draft": method.sampling.draft if ours else None,
    }


def _counts(records: Sequence[Record], repeats: int) -> dict[str, Any]:
    """Sums over the prompts; what only our methods count is null for others."""
    seconds = sum(record.seconds for record in records)
    tokens = sum(len(record.tokens) for record in records)
    parts = [record.stats for record in records if record.stats is not None]
    stats = Stats.total(parts) if parts else None
    return {
        "prompts": len(records) // repeats,
        "repeats": repeats,
        "tokens": tokens,
        "passes": stats and stats.passes,
        "seconds": seconds,
        "prefill_seconds": stats and stats.prefill_seconds,
        "decode_seconds": stats and stats.decode_seconds,
        "tokens_per_second": tokens / seconds,
        "speed_spread": _spread(records, repeats),
        "first_token_seconds": _median([record.first_token_seconds for record in records]),
        "rows_per_token": _rows_per_token(records),
        "tokens_per_pass": stats and stats.tokens_per_pass,
        "accepted_length": stats and stats.accepted_length,
        **_by_position(stats),
        "seconds_outside_forward_share": _outside_forward(records, stats),
    }


def _spread(records: Sequence[Record], repeats: int) -> dict[str, float | None]:
    """Coefficients of variation of the speed between prompts, and between repeats of one (mean)."""
    rates = np.array([len(r.tokens) / r.seconds for r in records]).reshape(-1, repeats)
    between = within = None
    if len(rates) > 1:
        between = float(rates.mean(1).std(ddof=1) / rates.mean())
    if repeats > 1:
        within = float((rates.std(1, ddof=1) / rates.mean(1)).mean())
    return {"prompts": between, "repeats": within}


def _median(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return median(known) if known else None


def _rows_per_token(records: Sequence[Record]) -> float | None:
    """What speed is paid with: rows computed for each new token."""
    rows = [record.rows for record in records if record.rows is not None]
    tokens = sum(len(record.tokens) for record in records)
    return sum(rows) / tokens if tokens and len(rows) == len(records) else None


def _by_position(stats: Stats | None) -> dict[str, Any]:
    """Acceptance by position: of all passes with candidates, and of those that got so far."""
    if stats is None:
        names = ("accepted_by_position", "judged_by_position", "accepted_of_judged_by_position")
        return dict.fromkeys(names)
    accepted, judged = stats.accepted_by_position, stats.judged_by_position
    return {
        "accepted_by_position": [count / stats.judging_passes for count in accepted],
        "judged_by_position": judged,
        "accepted_of_judged_by_position": [
            part / whole if whole else None for part, whole in zip(accepted, judged, strict=True)
        ],
    }


def _outside_forward(records: Sequence[Record], stats: Stats | None) -> float | None:
    """Share of the decoding time, prefill not counted, spent outside the target's forward."""
    forward = [record.forward_seconds for record in records if record.forward_seconds is not None]
    if stats is None or len(forward) < len(records) or not stats.decode_seconds:
        return None
    return 1 - sum(forward) / stats.decode_seconds


def _speed(
    records: Sequence[Record], baseline: Sequence[Record], repeats: int, seed: int
) -> dict[str, Any]:
    tokens, seconds = (
        np.array([[part(record) for record in run] for run in (records, baseline)])
        .reshape(2, -1, repeats)
        .sum(2)  # what a prompt's repeats have in common is no evidence twice
        for part in (lambda record: len(record.tokens), lambda record: record.seconds)
    )
    return {
        "speedup_vs_ar": float(_ratio(tokens.sum(1), seconds.sum(1))),
        "speedup_interval": speedup_interval(tokens, seconds, seed),
    }


def _ratio(tokens: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rates = tokens / seconds
    ratio: np.ndarray[Any, Any] = rates[0] / rates[1]
    return ratio


def speedup_interval(
    tokens: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any], seed: int
) -> list[float] | None:
    """Where the speed-up lies with 95 % confidence: paired bootstrap over prompts.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), the percentile interval.
    Prompts are drawn with replacement, and a method and the baseline always on the same prompts.

    Args:
        tokens: new tokens of the method and of the baseline on each prompt, `[2, prompts]`.
        seconds: the time they took, `[2, prompts]`.
        seed: of the draws.

    Returns:
        Low and high end; None with fewer than two prompts, which say nothing of the spread.
    """
    prompts = tokens.shape[1]
    if prompts < 2:
        return None
    drawn = np.random.default_rng(seed).integers(prompts, size=(RESAMPLES, prompts))
    ratios = _ratio(tokens[:, drawn].sum(2), seconds[:, drawn].sum(2))
    tail = (1 - COVERAGE) / 2
    return [float(end) for end in np.quantile(ratios, [tail, 1 - tail])]


def _agreement(
    compared: Iterable[tuple[Prompt, Record, Record]] | None, target: Target
) -> dict[str, Any]:
    """How many texts equal plain decoding's; null where another text is no fault.

    Args:
        compared: each prompt, what the method made of it, and what plain decoding did.
        target: the model.
    """
    if compared is None:
        return {"identical_to_ar": None, "differences": None}
    pairs = list(compared)
    differences = [
        _difference(prompt, record, plain, target)
        for prompt, record, plain in pairs
        if record.answers != plain.answers
    ]
    return {"identical_to_ar": 1 - len(differences) / len(pairs), "differences": differences}


def _difference(prompt: Prompt, record: Record, plain: Record, target: Target) -> dict[str, Any]:
    """The first token that differs, in the first turn that does: up to there all is one text."""
    asked = [prompt.ids, *(ids for ids, _ in plain.turns)]
    answers = zip(asked, record.answers, plain.answers, strict=False)
    turn, (ids, tokens, expected) = next(
        (number, parts) for number, parts in enumerate(answers) if parts[1] != parts[2]
    )
    shorter = min(len(tokens), len(expected))
    index = next((i for i in range(shorter) if tokens[i] != expected[i]), shorter)
    return {
        "prompt": prompt.name,
        "turn": turn,
        "index": index,
        "token": tokens[index] if index < len(tokens) else None,
        "ar_token": expected[index] if index < len(expected) else None,
        "margin": margin(target, [*ids, *expected[:index]]),
    }


@torch.inference_mode()
def margin(target: Target, text: Sequence[int]) -> float:
    """How far the best logit of the next token lies above the second.

    Measured with a pass of a single row in the target's own type, before any processor: a margin
    near 0 is a tie that rounding decides, a large one is a fault.
    """
    cache = target.prefill(text[:-1])
    logits = target.run(cache, [PassRow([text[-1]], Plan(0, (0,)))], None).logits
    best, second = logits[0, 0].float().topk(2).values.tolist()
    return float(best - second)
