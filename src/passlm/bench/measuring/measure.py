"""Methods side by side: which runs when, and the figures that are made of it.

Methods are interleaved prompt by prompt, so that whatever slows the machine for a while slows all
of them. How a method decodes is left to `bench/engines/methods.py`, keeping what it gave to
`journal.py`, tables to `bench/reports/markdown.py`.

No run is dropped, however slow. Speeds are sums of tokens over sums of seconds, and a first token's
time is a median; runs at less than half of a method's median speed are counted, as `slow_runs`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from passlm.bench.engines.decoding import Record
from passlm.bench.engines.methods import BASELINE, Method
from passlm.bench.measuring.intervals import interval
from passlm.model.pass_records import PassRow
from passlm.model.target import Target
from passlm.outputs import Stats
from passlm.plan import Plan

WARM_UP_TOKENS = 8
SLOW = 2  # a run is slow where the method's median is more than so many times as fast


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
        category: the kind of question, where its source says one.
        cut: to how many tokens its text was cut; None where it is whole.
    """

    suite: str
    name: str
    ids: tuple[int, ...]
    further: Further | None = None
    category: str | None = None
    cut: int | None = None


@dataclass(frozen=True)
class Sample:
    """What one method did with the prompt of that number, the first time or again."""

    prompt: int
    method: Method
    record: Record
    repeat: int = 0


@dataclass(frozen=True)
class FirstRun:
    """What a method's first run took, all that only a first one has to do included.

    Attributes:
        seconds: until its last token.
        first_token_seconds: until its first one; None where that cannot be told.
    """

    seconds: float
    first_token_seconds: float | None


def warm_up(
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    max_new_tokens: int,
    all_prompts: Sequence[Prompt] | None = None,
) -> list[FirstRun]:
    """Run every method once, not counted: first passes pay for things later ones find done.

    What one method had compiled or measured, those behind it find done.

    Args:
        prompts: the first of them are run.
        methods: all of them.
        max_new_tokens: of the runs to come.
        all_prompts: of the runs to come, where there are more.
    """
    longest = min(WARM_UP_TOKENS, max_new_tokens)
    lengths = {len(prompt.ids) for prompt in all_prompts or prompts}
    halfway = sorted(length + max_new_tokens // 2 for length in lengths)
    found = []
    for method in methods:
        ids = [prompts[at % len(prompts)].ids for at in range(method.batch_size)]
        begun = time.perf_counter()
        method.prepare(halfway)
        records = method.batch(ids, range(len(ids)), longest)
        seconds, first = time.perf_counter() - begun, records[0].first_token_seconds
        before = seconds - sum(record.seconds for record in records)
        found.append(FirstRun(seconds, None if first is None else before + first))
    return found


@dataclass(frozen=True)
class Turn:
    """What a method does in one go: as many prompts of a suite, by number, as it decodes at once.

    Attributes:
        numbers: of the prompts.
        method: whose turn it is.
        repeat: which run of these prompts it is.
        seeds: of each prompt's draws.
    """

    numbers: tuple[int, ...]
    method: Method
    repeat: int
    seeds: tuple[int, ...]

    def run(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Sample]:
        """Decode the prompts of that number; chats of several turns by themselves."""
        own = [prompts[number] for number in self.numbers]
        if len(own) == 1:
            records = [converse(own[0], self.method, self.seeds[0], max_new_tokens)]
        else:
            records = self.method.batch([one.ids for one in own], self.seeds, max_new_tokens)
        pairs = zip(self.numbers, records, strict=True)
        return [Sample(number, self.method, record, self.repeat) for number, record in pairs]


def interleave(
    prompts: Sequence[Prompt], methods: Sequence[Method], seed: int, repeats: int = 1
) -> Iterator[Turn]:
    """Every method on the first prompt, in random order, that again, then on the next.

    Methods that decode several prompts at once take their turn at the last of them. Prompts that
    are cut alike make batches in their order; what is left behind the last whole one is left out.

    Args:
        prompts: of one suite.
        methods: what to run on each.
        seed: of the order; of the draws as well, with the prompt's number added, so that methods
            share the noise of a prompt and prompts do not.
        repeats: how often each prompt is run; sampled texts differ then.
    """
    order = random.Random(seed)
    met: dict[int | None, list[int]] = {}
    for number, prompt in enumerate(prompts):
        alike = met.setdefault(prompt.cut, [])
        alike.append(number)
        ready = [method for method in methods if len(alike) % method.batch_size == 0]
        for repeat in range(repeats):
            for method in order.sample(ready, len(ready)):
                numbers = tuple(alike[-method.batch_size :])
                seeds = tuple((seed + n + repeat * len(prompts)) % 2**64 for n in numbers)
                yield Turn(numbers, method, repeat, seeds)


def converse(prompt: Prompt, method: Method, seed: int, max_new_tokens: int) -> Record:
    """What a method makes of a prompt, of each turn where it is a chat of several."""
    record = method(prompt.ids, seed, max_new_tokens)
    while prompt.further is not None and (asked := prompt.further(record.answers)) is not None:
        record = record.then(asked, method(asked, seed, max_new_tokens))
    return record


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
        prompts: of one suite, cut alike; run by every method, equally often, but for those that
            fill no batch.
        samples: what the turns of `interleave` gave.
        methods: among them plain decoding at every temperature and batch size. One that no batch
            could be made for has no entry.
        target: the model.
        seed: of the bootstrap.
    """
    records: dict[int, list[Record]] = {id(method): [] for method in methods}
    for sample in sorted(samples, key=lambda sample: (sample.prompt, sample.repeat)):
        records[id(sample.method)].append(sample.record)
    repeats = 1 + max((sample.repeat for sample in samples), default=0)
    plain = {_conditions(m): records[id(m)] for m in methods if m.name == BASELINE}
    runs = []
    for method in methods:
        own, expected = records[id(method)], plain[_conditions(method)]
        if not own:
            continue
        asked = [prompt for prompt in prompts for _ in range(repeats)][: len(own)]
        compared = zip(asked, own, expected, strict=True) if method.repeats_plain else None
        grid = (-1, method.batch_size, repeats)
        runs.append(
            {
                "suite": prompts[0].suite,
                "prompt_tokens": prompts[0].cut,
                **identity(method),
                **_counts(own, repeats),
                "prompts_left_out": len(prompts) - len(own) // repeats,
                **_spread(own, grid),
                **_speed(own, expected, grid, seed),
                "categories": _categories(asked, own, expected, grid),
                **_agreement(compared, target),
            }
        )
    return runs


def _conditions(method: Method) -> tuple[float, int]:
    """What a method and the plain decoding that it is held against have in common."""
    return method.sampling.temperature, method.batch_size


def identity(method: Method) -> dict[str, Any]:
    """What tells a method's entries from those of others."""
    ours = method.plan is not None
    return {
        "method": method.name,
        "plan": method.plan,
        "lookahead_tokens": method.lookahead_tokens,
        "temperature": method.sampling.temperature,
        "batch_size": method.batch_size,
        "engine": method.engine,
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
        "first_token_seconds": _median([record.first_token_seconds for record in records]),
        "rows_per_token": _rows_per_token(records),
        "tokens_per_pass": stats and stats.tokens_per_pass,
        "accepted_length": stats and stats.accepted_length,
        **_by_position(stats),
        "seconds_outside_forward_share": _outside_forward(records, stats),
    }


Grid = tuple[int, int, int]
"""How a method's runs lie: batches, prompts of each, repeats; the first is left open, as -1."""


def _totals(
    records: Sequence[Record], grid: Grid
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """New tokens and seconds of each batch and repeat, `[batches, repeats]`."""
    tokens = np.array([len(record.tokens) for record in records]).reshape(grid).sum(1)
    return tokens, np.array([record.seconds for record in records]).reshape(grid).sum(1)


def _spread(records: Sequence[Record], grid: Grid) -> dict[str, Any]:
    """How the speeds of single runs lie, each of one batch.

    `speed_spread`: their coefficients of variation between prompts or batches of them, and between
    repeats of one (mean). `slow_runs`: how many are far below their median.
    """
    tokens, seconds = _totals(records, grid)
    rates = tokens / seconds
    between = within = None
    if len(rates) > 1:
        between = float(rates.mean(1).std(ddof=1) / rates.mean())
    if rates.shape[1] > 1:
        within = float((rates.std(1, ddof=1) / rates.mean(1)).mean())
    return {
        "speed_spread": {"prompts": between, "repeats": within},
        "slow_runs": int((SLOW * rates < np.median(rates)).sum()),
    }


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
    records: Sequence[Record], baseline: Sequence[Record], grid: Grid, seed: int
) -> dict[str, Any]:
    pairs = zip(_totals(records, grid), _totals(baseline, grid), strict=True)
    # What the repeats of a batch have in common is no evidence twice.
    tokens, seconds = (np.stack(pair).sum(2) for pair in pairs)
    return {
        "speedup_vs_ar": float(_ratio(tokens.sum(1), seconds.sum(1))),
        "speedup_interval": speedup_interval(tokens, seconds, seed),
    }


def _categories(
    prompts: Sequence[Prompt],
    records: Sequence[Record],
    baseline: Sequence[Record],
    grid: Grid,
) -> list[dict[str, Any]] | None:
    """The figures by kind of question; none without kinds, None where batches mix them.

    Args:
        prompts: of each record, so one that is run again comes again.
        records: of the method.
        baseline: of plain decoding, on the same prompts.
        grid: how they lie.
    """
    if all(prompt.category is None for prompt in prompts):
        return []
    _, batch_size, repeats = grid
    if batch_size > 1:
        return None
    found = []
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        of_it = [at for at, prompt in enumerate(prompts) if prompt.category == category]
        own, plain = ([run[at] for at in of_it] for run in (records, baseline))
        rate, base = (
            sum(len(record.tokens) for record in run) / sum(record.seconds for record in run)
            for run in (own, plain)
        )
        parts = [record.stats for record in own if record.stats is not None]
        found.append(
            {
                "category": category,
                "prompts": len(of_it) // repeats,
                "tokens_per_second": rate,
                "speedup_vs_ar": rate / base,
                "accepted_length": Stats.total(parts).accepted_length if parts else None,
            }
        )
    return found


def _ratio(tokens: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rates = tokens / seconds
    ratio: np.ndarray[Any, Any] = rates[0] / rates[1]
    return ratio


def speedup_interval(
    tokens: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any], seed: int
) -> list[float] | None:
    """Where the speed-up lies with 95 % confidence: paired bootstrap over prompts (`intervals.py`).

    A method and the baseline are always drawn on the same prompts.

    Args:
        tokens: new tokens of the method and of the baseline on each prompt, or batch of them,
            `[2, prompts]`.
        seconds: the time they took, `[2, prompts]`.
        seed: of the draws.

    Returns:
        Low and high end; None with fewer than two prompts, which say nothing of the spread.
    """

    def speedups(drawn: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _ratio(tokens[:, drawn].sum(2), seconds[:, drawn].sum(2))

    ends = interval(tokens.shape[1], speedups, seed)
    return None if ends is None else list(ends)


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
