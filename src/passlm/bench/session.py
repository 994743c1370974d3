"""Runs a benchmark: measures all suites turn by turn, and writes results after each suite.

The caller chooses methods and prompts. `measuring/journal.py` keeps the records of single runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from passlm.bench.engines.methods import Method, baseline_target, cost_curve, engine_facts
from passlm.bench.measuring.folder import PAGE, REPORT, RESULTS
from passlm.bench.measuring.journal import Journal
from passlm.bench.measuring.measure import (
    FirstRun,
    Prompt,
    Sample,
    Turn,
    interleave,
    summarize,
    warm_up,
)
from passlm.bench.measuring.predictability import predictability
from passlm.bench.reports.html import page
from passlm.bench.reports.markdown import markdown
from passlm.bench.suites import humaneval
from passlm.bench.suites.prompts import Found
from passlm.errors import InputError
from passlm.generate import Generator
from passlm.loading.detokenize import Detokenizer, text_behind
from passlm.provenance import write_atomically

SCORED = "humaneval"

Progress = Callable[[int, str], None]
"""Called with the number of newly finished runs and a description of the last one."""


@dataclass(frozen=True)
class Course:
    """Settings of a benchmark.

    Attributes:
        new_tokens: maximum number of new tokens per sequence.
        seed: seed of the order of runs and of sampling.
        repeats: number of times that each prompt is run.
        run_generated_code: whether to execute the programs generated for HumanEval.
        predictability: whether to measure the predictability of tokens, for our methods and in
            separate runs; see `measuring/predictability.py`.
    """

    new_tokens: int
    seed: int
    repeats: int = 1
    run_generated_code: bool = False
    predictability: bool = False


class Session:
    """A benchmark of a model: methods, prompts and the results so far.

    Args:
        lm: the model.
        methods: the methods to compare.
        found: the suites of prompts, with those left out.
        course: settings of the benchmark.
        facts: further fields of the results, such as the provenance.

    Attributes:
        results: the content of `results.json`.
        total: total number of runs: prompts times methods times repeats.

    Raises:
        InputError: there are no prompts to run.
    """

    def __init__(
        self,
        lm: Generator,
        methods: Sequence[Method],
        found: Found,
        course: Course,
        facts: Mapping[str, Any],
    ) -> None:
        self.lm = lm
        self.methods = methods
        self.course = course
        self.suites = found.suites
        self.results: dict[str, Any] = {
            **facts,
            "complete": False,
            "peak_memory_bytes": None,
            "missing_suites": found.missing,
            "skipped": found.skipped,
            "too_short": found.too_short,
            "first_turn_only": found.first_turn_only,
            "no_batch": list(self._no_batch()),
            "samples": [],
            "runs": [],
        }
        self.total = sum(len(turn.numbers) for suite in self.suites for turn in self._turns(suite))
        if not self.total:
            raise InputError(
                "no prompts are left to run: install the packages of the suites (chat needs a "
                "model with a chat template), lower --max-new-tokens, --prompt-tokens or "
                "--batch-size, or use other prompts with --prompts"
            )

    def _no_batch(self) -> list[dict[str, Any]]:
        """Return the combinations of suite, length and batch size with too few prompts."""
        sizes = dict.fromkeys(method.batch_size for method in self.methods)
        return [
            {
                "suite": prompts[0].suite,
                "prompt_tokens": cut,
                "prompts": len(numbers),
                "batch_size": size,
            }
            for prompts in self.suites
            for cut, numbers in _cut_alike(prompts).items()
            for size in sizes
            if len(numbers) < size
        ]

    def _turns(self, prompts: Sequence[Prompt]) -> list[Turn]:
        return list(interleave(prompts, self.methods, self.course.seed, self.course.repeats))

    def measure(self, journal: Journal, progress: Progress) -> None:
        """Run what the journal does not hold yet; write results and reports after each suite.

        Raises:
            JournalError: the journal is of another benchmark, or cannot be written to.
        """
        self.results |= journal.origin
        every = [prompt for suite in self.suites for prompt in suite]
        firsts = warm_up(self.suites[0], self.methods, self.course.new_tokens, every)
        for number, prompts in enumerate(self.suites, start=1):
            samples: list[Sample] = []
            for turn in self._turns(prompts):
                found = journal.recall(prompts, turn)
                if not found:
                    found = turn.run(prompts, self.course.new_tokens)
                    journal.write(prompts, found)
                samples += found
                last = prompts[turn.numbers[-1]]
                progress(len(found), f"{last.suite} {last.name}")
            if self.course.predictability:
                progress(0, f"{prompts[0].suite}, predictability")
            for numbers in _cut_alike(prompts).values():
                self._add_runs(prompts, numbers, samples, firsts)
            self._add_shown(prompts, samples)
            self.results["complete"] = number == len(self.suites)
            self._write(journal.folder)

    def _add_runs(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        samples: Sequence[Sample],
        firsts: Sequence[FirstRun],
    ) -> None:
        """Add the entries of each method for prompts of a suite that are cut to one length.

        Args:
            prompts: all prompts of the suite.
            numbers: the indices of the prompts to summarize.
            samples: the records of all runs of the suite.
            firsts: the first run of each method.
        """
        places = {number: place for place, number in enumerate(numbers)}
        own = [prompts[number] for number in numbers]
        records = [replace(s, prompt=places[s.prompt]) for s in samples if s.prompt in places]
        pairs = zip(self.methods, firsts, strict=True)
        ran = [(method, first) for method, first in pairs if method.batch_size <= len(own)]
        methods, target = [method for method, _ in ran], baseline_target(self.methods)
        runs = summarize(own, records, methods, target, self.course.seed)
        for run, (method, first) in zip(runs, ran, strict=True):
            run["first_run_seconds"] = first.seconds
            run["first_run_first_token_seconds"] = first.first_token_seconds
            if self.course.run_generated_code and own[0].suite == SCORED:
                programs = [sample for sample in records if sample.method is method]
                run["quality"] = scored(self.lm, own, programs, self.course.seed)
            if self.course.predictability:
                seeds = [(self.course.seed + number) % 2**64 for number in numbers]
                ids, length = [prompt.ids for prompt in own], self.course.new_tokens
                run["predictability"] = predictability(method, ids, seeds, length)
        self.results["runs"] += runs

    def _add_shown(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> None:
        """Add the cost curve and one sample of the suite to the results."""
        context = len(prompts[0].ids) + self.course.new_tokens // 2
        curve = cost_curve(self.methods, context)
        if curve is not None:
            self.results["cost_curve"] = asdict(curve)
        drafting = [s for s in samples if s.prompt == 0 and any(s.record.positions)]
        drafting.sort(key=lambda sample: sample.method.name != "auto")
        if drafting:
            self.results["samples"].append(shown(self.lm, prompts[0], drafting[0]))

    def _write(self, folder: Path | None) -> None:
        self.results["peak_memory_bytes"] = _peak_memory()
        engine = baseline_target(self.methods).engine  # compiling may have failed meanwhile
        self.results["engines"] = engine_facts(self.methods)
        self.results["settings"]["compiled"] = engine.startswith("compiled")
        if folder is not None:
            write_atomically(folder / RESULTS, json.dumps(self.results, indent=1) + "\n")
            write_atomically(folder / REPORT, markdown(self.results))
            write_atomically(folder / PAGE, page(self.results))


def _cut_alike(prompts: Sequence[Prompt]) -> dict[int | None, list[int]]:
    """Return the indices of a suite's prompts, by the length that they are cut to."""
    found: dict[int | None, list[int]] = {}
    for number, prompt in enumerate(prompts):
        found.setdefault(prompt.cut, []).append(number)
    return found


def shown(lm: Generator, prompt: Prompt, sample: Sample) -> dict[str, Any]:
    """Return one output token by token, with the position of each among the candidates."""
    tokenizer: Any = lm.tokenizer
    detokenizer = Detokenizer(tokenizer.decode, prompt.ids)
    pieces = [{"text": tokenizer.decode(prompt.ids), "kind": "prompt", "position": 0}]
    record = sample.record
    for token, position in zip(record.answers[0], record.positions, strict=False):
        text, kind = detokenizer.push(token), "accepted" if position else "drawn"
        pieces.append({"text": text, "kind": kind, "position": position})
    return {
        "suite": prompt.suite,
        "prompt": prompt.name,
        "method": sample.method.name,
        "pieces": pieces,
    }


def scored(
    lm: Generator, prompts: Sequence[Prompt], samples: Sequence[Sample], seed: int
) -> dict[str, Any]:
    """Return the HumanEval scores of the programs that a method generated."""
    problems = {problem.task_id: problem for problem in humaneval.load_problems()}
    completions: dict[str, list[str]] = {}
    for sample in samples:
        prompt = prompts[sample.prompt]
        problem = problems[prompt.name]
        text = text_behind(lm.decode, prompt.ids, sample.record.tokens)
        body = humaneval.completion_body(problem.prompt, text)
        completions.setdefault(problem.task_id, []).append(body)
    return humaneval.score([problems[name] for name in completions], completions, seed=seed)


def _peak_memory() -> int | None:
    """Return the peak memory of the process in bytes; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
