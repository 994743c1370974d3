"""Run methods side by side in an interleaved order, and compute statistics of their runs.

Methods are interleaved prompt by prompt, so that a temporary slowdown of the machine affects all of
them. `bench/engines/methods.py` provides the methods, `journal.py` stores their results, and
`bench/reports/markdown.py` makes tables of them.

No run is dropped, however slow. Throughput is the sum of tokens divided by the sum of seconds, and
the time to first token is a median. Runs slower than half of a method's median throughput are
counted as `slow_runs`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from passlm.bench.engines.decoding import Record
from passlm.bench.engines.methods import BASELINE, Method
from passlm.bench.measuring.agreement import agreement
from passlm.bench.measuring.intervals import interval
from passlm.model.target import Target
from passlm.outputs import Stats

WARM_UP_TOKENS = 8
SLOW = 2  # a run is slow if the method's median throughput is more than this many times its own


Further = Callable[[Sequence[Sequence[int]]], tuple[int, ...] | None]
"""Returns the prompt ids of a chat's next turn, given the answers so far; None if it is over."""


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt, the same for every method.

    Attributes:
        suite: name of its suite.
        name: a name that is unique within the suite.
        ids: its token ids; of a chat, those of the first turn.
        further: returns the later turns of a chat; None if there are none.
        category: the kind of question, or None if the source names none.
        cut: number of tokens that the prompt was cut to; None if it is whole.
    """

    suite: str
    name: str
    ids: tuple[int, ...]
    further: Further | None = None
    category: str | None = None
    cut: int | None = None


@dataclass(frozen=True)
class Sample:
    """The record of one method on one prompt.

    Attributes:
        prompt: index of the prompt in its suite.
        method: the method.
        record: the result.
        repeat: index of the repeat, from 0.
    """

    prompt: int
    method: Method
    record: Record
    repeat: int = 0


@dataclass(frozen=True)
class FirstRun:
    """Times of a method's first run, including all one-time work.

    Attributes:
        seconds: time to the last token.
        first_token_seconds: time to first token; None if unknown.
    """

    seconds: float
    first_token_seconds: float | None


def warm_up(
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    max_new_tokens: int,
    all_prompts: Sequence[Prompt] | None = None,
) -> list[FirstRun]:
    """Run every method once before the timed runs, so that these do not include one-time work.

    One-time work, such as compiling passes or measuring costs, is shared: it counts for the first
    method that needs it, and not for later ones.

    Args:
        prompts: the prompts, of which as many are run as each method's batch needs.
        methods: all methods.
        max_new_tokens: maximum number of new tokens per sequence in the timed runs.
        all_prompts: all prompts of the timed runs, if `prompts` are only some of them; their
            lengths are those that costs are measured for.

    Returns:
        The times of each method, in order.
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
    """One batch of prompts for one method.

    Attributes:
        numbers: indices of the prompts in their suite; as many as the method's batch size.
        method: the method.
        repeat: index of the repeat, from 0.
        seeds: the seed of each prompt.
    """

    numbers: tuple[int, ...]
    method: Method
    repeat: int
    seeds: tuple[int, ...]

    def run(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Sample]:
        """Decode the prompts of this batch.

        A prompt on its own is run with all the turns of its chat. In a larger batch, only first
        turns are run.

        Args:
            prompts: all prompts of the suite.
            max_new_tokens: maximum number of new tokens per sequence and turn.
        """
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
    """Yield the turns of all methods on all prompts, interleaved.

    All methods run on the first prompt, in random order, once for each repeat; then on the next
    prompt. A method with a larger batch size runs when the last prompt of its batch is reached.
    Batches are made of consecutive prompts that are cut to the same length. Prompts that do not
    fill the last batch are left out.

    Args:
        prompts: the prompts of one suite.
        methods: the methods to run on each prompt.
        seed: seed of the order. The seed of a prompt is this seed plus the prompt's index, so all
            methods share the noise of a prompt, and different prompts have different noise.
        repeats: number of times that each prompt is run; each repeat has a seed of its own.
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
    """Decode a prompt with a method, including all later turns if it is a chat."""
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
    """Return the entries of `results.json` for one suite, one for each method, in order.

    This runs the target again wherever a method's tokens first differ from plain decoding's, so
    nothing may be timed at the same time.

    Args:
        prompts: prompts of one suite that are cut to the same length. Every method has run each of
            them equally often, except those that do not fill a batch.
        samples: the results of the turns of `interleave`.
        methods: the methods, including plain decoding at every temperature and batch size. A
            method for which there are too few prompts to make a batch has no entry.
        target: the target model.
        seed: seed of the bootstrap.
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
                **agreement(compared, target),
            }
        )
    return runs


def _conditions(method: Method) -> tuple[float, int]:
    """Return the temperature and batch size, which a method shares with its baseline."""
    return method.sampling.temperature, method.batch_size


def identity(method: Method) -> dict[str, Any]:
    """Return the fields of `results.json` that identify a method and its settings."""
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
    """Return sums over the prompts; counts that only passlm's own methods have may be None."""
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
"""Shape of a method's runs: batches (-1, to be inferred), prompts per batch, repeats."""


def _totals(
    records: Sequence[Record], grid: Grid
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return new tokens and seconds of each batch and repeat, `[batches, repeats]` each."""
    tokens = np.array([len(record.tokens) for record in records]).reshape(grid).sum(1)
    return tokens, np.array([record.seconds for record in records]).reshape(grid).sum(1)


def _spread(records: Sequence[Record], grid: Grid) -> dict[str, Any]:
    """Return the spread of throughput over single runs, each of which is one batch.

    `speed_spread` holds the coefficient of variation between batches, and the mean of that between
    the repeats of a batch. `slow_runs` is the number of runs far below the median; see `SLOW`.
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
    """Return the number of rows computed per new token, the computational price of the speed."""
    rows = [record.rows for record in records if record.rows is not None]
    tokens = sum(len(record.tokens) for record in records)
    return sum(rows) / tokens if tokens and len(rows) == len(records) else None


def _by_position(stats: Stats | None) -> dict[str, Any]:
    """Return acceptance rates by position.

    `accepted_by_position` is relative to all passes with candidates. The other two give the number
    of passes that judged a candidate at the position, and the rate relative to these.
    """
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
    """Return the share of decoding time, without prefill, spent outside the target's forward."""
    forward = [record.forward_seconds for record in records if record.forward_seconds is not None]
    if stats is None or len(forward) < len(records) or not stats.decode_seconds:
        return None
    return 1 - sum(forward) / stats.decode_seconds


def _speed(
    records: Sequence[Record], baseline: Sequence[Record], grid: Grid, seed: int
) -> dict[str, Any]:
    pairs = zip(_totals(records, grid), _totals(baseline, grid), strict=True)
    # Repeats of a batch are not independent observations, so they are summed before resampling.
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
    """Return statistics by kind of question.

    The list is empty if no prompt has a category. It is None if the batch size is above 1, because
    batches mix categories.

    Args:
        prompts: the prompt of each record; a prompt appears once for each repeat.
        records: the records of the method.
        baseline: the records of plain decoding on the same prompts.
        grid: the shape of the runs.
    """
    if all(prompt.category is None for prompt in prompts):
        return []
    _, batch_size, repeats = grid
    if batch_size > 1:
        return None
    found = []
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        members = [at for at, prompt in enumerate(prompts) if prompt.category == category]
        own, plain = ([run[at] for at in members] for run in (records, baseline))
        rate, base = (
            sum(len(record.tokens) for record in run) / sum(record.seconds for record in run)
            for run in (own, plain)
        )
        parts = [record.stats for record in own if record.stats is not None]
        found.append(
            {
                "category": category,
                "prompts": len(members) // repeats,
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
    """Return a 95 % confidence interval of the speed-up: paired bootstrap over prompts.

    Each resample has the same prompts for the method and for the baseline. See `intervals.py`.

    Args:
        tokens: new tokens of the method and of the baseline on each prompt or batch,
            `[2, prompts]`.
        seconds: the time that these took, `[2, prompts]`.
        seed: seed of the bootstrap.

    Returns:
        Lower and upper end; None with fewer than two prompts, from which no spread can be
        estimated.
    """

    def speedups(drawn: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _ratio(tokens[:, drawn].sum(2), seconds[:, drawn].sum(2))

    ends = interval(tokens.shape[1], speedups, seed)
    return None if ends is None else list(ends)
