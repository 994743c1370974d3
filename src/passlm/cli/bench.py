"""Run methods side by side."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from passlm.bench.compare import RESULTS, compare, load_results
from passlm.bench.tasks import SUITES, Task, TaskError, load_prompts, load_suite
from passlm.cli.common import (
    add_decoding_arguments,
    add_fields,
    add_json_argument,
    add_model_arguments,
    loaded,
    print_json,
    progress_bar,
    taken,
)
from passlm.detokenize import Detokenizer
from passlm.errors import InputError
from passlm.params import SamplingParams, StopParams

if TYPE_CHECKING:
    from passlm.bench.measure import Further, Prompt, Sample
    from passlm.bench.methods import Asked, Method
    from passlm.generate import Generator

REPORT, PAGE, PROMPTS = "report.md", "report.html", "prompts.jsonl"
DEFAULT_METHODS = "ar,fixed-token,two-pass,one-pass,auto,lookup,hf,hf-prompt-lookup"
NEED_LOOKAHEAD = ("auto", "two-pass", "one-pass")
# Given as lists, with each prompt, or as token ids and objects.
SAMPLING_ELSEWHERE = (
    *("temperature", "seed", "logit_bias", "bad_words", "processors"),
    *("presence_penalty", "frequency_penalty"),  # transformers' methods know none
)
STOPPING_ELSEWHERE = ("stop",)  # no text is decoded

_log = logging.getLogger("passlm.bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--suite", type=_listed(str), default=(), help=f"any of {','.join(SUITES)}")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSONL with a prompt, messages or turns on each line",
    )
    parser.add_argument(
        "--methods",
        type=_listed(str),
        default=_listed(str)(DEFAULT_METHODS),
        help=f"default {DEFAULT_METHODS}",
    )
    parser.add_argument(
        "--temperature", type=_listed(float), default=(0.0,), help="list; default 0, greedy"
    )
    parser.add_argument(
        "--lookahead-tokens",
        type=_listed(int),
        default=(4,),
        metavar="N",
        help="list of look-ahead steps; default 4",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="prompts of each suite; default all")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="runs of each prompt; default 1"
    )
    parser.add_argument(
        "--run-generated-code",
        action="store_true",
        help="run what is written for humaneval, confined, and report pass@1, with 10 or more "
        "sampled --repeats pass@10",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order and of all draws; default 0"
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    add_fields(parser, SamplingParams, SAMPLING_ELSEWHERE)
    add_fields(parser, StopParams, STOPPING_ELSEWHERE)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write {RESULTS}, {REPORT}, {PAGE} and {PROMPTS} there",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results in DIR")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="run nothing: say what changed beyond noise between two folders of results",
    )
    add_json_argument(parser)


def _listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of values separated by commas; repeated ones count once."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"expected values separated by commas, each {kind.__name__}, not {text!r}"
            ) from error

    return parse


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the report and write the folder.

    Raises:
        InputError: a suite, method, parameter, the model or the folder cannot be used, or no
            prompt is left.
    """
    if arguments.compare is not None:
        for name in ("suite", "prompts", "out", "json"):
            if getattr(arguments, name):
                raise InputError(f"--compare runs nothing and prints Markdown: leave --{name} out")
        sys.stdout.write(_compared(*arguments.compare))
        return
    _check(arguments)
    given = [] if arguments.prompts is None else load_prompts(arguments.prompts, arguments.limit)
    asked = _asked(arguments)
    from passlm.bench.methods import build
    from passlm.generate import compiled_folder

    drafts = any(name in NEED_LOOKAHEAD for name in asked.names)
    if not drafts and arguments.lookahead not in (None, "none"):
        _log.warning("--lookahead is not used: none of the methods drafts with such files")
    lm = loaded(
        arguments,
        lookahead=arguments.lookahead if drafts else "none",
        pack=False,  # the methods' own target packs, compiles and rounds: one copy is enough
        compile=False,
        quantize=None,
    )
    compiled = compiled_folder() if arguments.compile else None
    methods = build(lm, asked, arguments.model, arguments.pack, compiled, arguments.quantize)
    bench = _Bench(arguments, lm, methods)
    suites = bench.suites(given)
    with _opened(arguments) as out:
        bench.measure(suites, out)
    sys.stdout.write(bench.report())
    if arguments.json:
        print_json(bench.results)


def _compared(a: Path, b: Path) -> str:
    """Two results side by side, as Markdown."""
    return compare(load_results(a), load_results(b), (str(a), str(b)))


def _check(arguments: argparse.Namespace) -> None:
    """What can be told wrong before anything is loaded."""
    if not arguments.suite and arguments.prompts is None:
        raise InputError(f"name prompts: --suite with any of {', '.join(SUITES)}, or --prompts F")
    for name in arguments.suite:
        if name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, 1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "give one of them"
            raise InputError(f"there is no suite {name!r} ({', '.join(SUITES)}): {hint}")
    if arguments.prompts is not None and arguments.prompts.stem in arguments.suite:
        raise InputError(
            f"--prompts {arguments.prompts} would be called like the suite "
            f"{arguments.prompts.stem!r}: rename the file"
        )
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"limit is {arguments.limit}: it must be 1 or more")
    if arguments.repeats < 1:
        raise InputError(f"repeats is {arguments.repeats}: it must be 1 or more")
    if arguments.run_generated_code:
        if "humaneval" not in arguments.suite:
            raise InputError("--run-generated-code is for the suite humaneval: name it")
        from passlm.bench.humaneval import check_sandbox

        check_sandbox()  # before anything is measured
    if not 0 <= arguments.seed < 2**64:
        raise InputError(f"seed is {arguments.seed}: it must lie between 0 and 2**64 - 1")
    _check_folder(arguments.out, arguments.overwrite)


def _check_folder(out: Path | None, overwrite: bool) -> None:
    if out is None:
        if overwrite:
            raise InputError("--overwrite replaces the results in a folder: name it with --out")
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    held = [name for name in (RESULTS, PROMPTS) if (out / name).exists()]
    if held and not overwrite:
        raise InputError(
            f"--out {out} holds {held[0]} of another run: name another folder, or use --overwrite"
        )


def _asked(arguments: argparse.Namespace) -> Asked:
    sampling = taken(SamplingParams, arguments, SAMPLING_ELSEWHERE)
    stopping = taken(StopParams, arguments, STOPPING_ELSEWHERE)
    for temperature in arguments.temperature:
        SamplingParams(temperature=temperature)
    from passlm.bench.methods import BASELINE, Asked, check_names

    names = arguments.methods
    check_names(names)
    if BASELINE not in names:
        _log.info("method %s is added: every speed-up is a ratio to it", BASELINE)
        names = (BASELINE, *names)
    return Asked(names, arguments.temperature, arguments.lookahead_tokens, sampling, stopping)


@contextlib.contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[TextIO | None]:
    """The file that takes a line for each prompt and method as it comes; None without a folder."""
    if arguments.out is None:
        yield None
        return
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, REPORT, PAGE):
            (arguments.out / name).unlink(missing_ok=True)
        file = (arguments.out / PROMPTS).open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to --out {arguments.out}: {error.strerror}") from error
    with file:
        yield file


class _Bench:
    """One call of the command: its model and methods, and what has been measured so far."""

    def __init__(self, arguments: argparse.Namespace, lm: Generator, methods: list[Method]) -> None:
        from passlm.provenance import provenance

        self.arguments = arguments
        self.lm = lm
        self.methods = methods
        self.results: dict[str, Any] = {
            "provenance": provenance(),
            "settings": _settings(arguments, lm),
            "complete": False,
            "peak_memory_bytes": None,
            "missing_suites": {},
            "skipped": [],
            "samples": [],
            "runs": [],
        }

    def suites(self, given: list[Task]) -> list[list[Prompt]]:
        """The prompts of each suite that has some, those too long for the context left out.

        Raises:
            InputError: none is left.
        """
        found = [*map(self._suite, self.arguments.suite), self._fitting(given)]
        left = [prompts for prompts in found if prompts]
        if not left:
            raise InputError(
                "no prompts are left to run: install what the suites need (chat needs a model "
                "with a chat template), take fewer --max-new-tokens, or give others with --prompts"
            )
        return left

    def _suite(self, name: str) -> list[Prompt]:
        """A suite's prompts; none where its package is missing or the model cannot take them."""
        from passlm.decode import PromptError

        tokenizer: Any = self.lm.tokenizer

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        try:
            tasks = load_suite(name, encode, tokenizer.decode, self.arguments.limit)
            return self._fitting(tasks)
        except TaskError as error:
            why = str(error)
        except PromptError as error:
            why = f"suite {name!r} cannot be given to this model: {error}"
        _log.warning("%s", why)
        self.results["missing_suites"][name] = why
        return []

    def _fitting(self, tasks: list[Task]) -> list[Prompt]:
        from passlm.bench.measure import Prompt

        context = self.lm.target.context
        fitting = []
        for task in tasks:
            ids = tuple(self.lm.encode(task.prompt if task.prompt else list(task.messages or ())))
            if context is None or len(ids) + self.arguments.max_new_tokens <= context:
                further = _further(self.lm, task, self.arguments.max_new_tokens)
                fitting.append(Prompt(task.suite, task.name, ids, further))
                continue
            skipped = {"suite": task.suite, "prompt": task.name, "tokens": len(ids)}
            self.results["skipped"].append(skipped)
            _log.warning(
                "skipped %s of %s: its %d tokens and %d new ones exceed the context of %d",
                *(task.name, task.suite, len(ids), self.arguments.max_new_tokens, context),
            )
        return fitting

    def measure(self, suites: list[list[Prompt]], out: TextIO | None) -> None:
        """Run every suite; results and report are written after each."""
        from passlm.bench.measure import interleave, prompt_record, summarize, warm_up
        from passlm.bench.methods import baseline_target

        length, seed = self.arguments.max_new_tokens, self.arguments.seed
        target = baseline_target(self.methods)
        repeats = self.arguments.repeats
        total = sum(map(len, suites)) * len(self.methods) * repeats
        with progress_bar() as bar:
            progress = bar.add_task("warm-up", total=total)
            warm_up(suites[0][0], self.methods, length)
            for number, prompts in enumerate(suites, start=1):
                samples = []
                for sample in interleave(prompts, self.methods, length, seed, repeats):
                    samples.append(sample)
                    prompt = prompts[sample.prompt]
                    if out is not None:
                        out.write(json.dumps(prompt_record(prompt, sample)) + "\n")
                        out.flush()
                    bar.update(progress, advance=1, description=f"{prompt.suite} {prompt.name}")
                runs = summarize(prompts, samples, self.methods, target, seed)
                if self.arguments.run_generated_code and prompts[0].suite == "humaneval":
                    self._score(runs, samples, prompts)
                self._keep_shown(prompts, samples)
                self._keep(runs, complete=number == len(suites))

    def _keep_shown(self, prompts: list[Prompt], samples: list[Sample]) -> None:
        """What the report shows beside figures: costs, and how one text of the suite came."""
        from passlm.bench.methods import cost_curve

        context = len(prompts[0].ids) + self.arguments.max_new_tokens // 2
        curve = cost_curve(self.methods, context)
        if curve is not None:
            self.results["cost_curve"] = asdict(curve)
        drafting = [s for s in samples if s.prompt == 0 and any(s.record.positions)]
        drafting.sort(key=lambda sample: sample.method.name != "auto")
        if drafting:
            self.results["samples"].append(self._shown(prompts[0], drafting[0]))

    def _shown(self, prompt: Prompt, sample: Sample) -> dict[str, Any]:
        """One text by token, each with the place it had among the candidates."""
        tokenizer: Any = self.lm.tokenizer
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

    def _score(
        self, runs: list[dict[str, Any]], samples: list[Sample], prompts: list[Prompt]
    ) -> None:
        """Add to each method's entry how many of its programs do what they should."""
        from passlm.bench.humaneval import completion_body, load_problems, score

        tokenizer: Any = self.lm.tokenizer
        problems = {problem.task_id: problem for problem in load_problems()}
        mine = [problems[prompt.name] for prompt in prompts]
        for run, method in zip(runs, self.methods, strict=True):
            completions: dict[str, list[str]] = {problem.task_id: [] for problem in mine}
            for sample in samples:
                if sample.method is method:
                    problem = mine[sample.prompt]
                    text = tokenizer.decode(sample.record.tokens, skip_special_tokens=True)
                    body = completion_body(problem.prompt, text)
                    completions[problem.task_id].append(body)
            run["quality"] = score(mine, completions, seed=self.arguments.seed)

    def _keep(self, runs: list[dict[str, Any]], complete: bool) -> None:
        from passlm.bench.html import page
        from passlm.bench.methods import baseline_target
        from passlm.provenance import write_atomically

        self.results["runs"] += runs
        self.results["complete"] = complete
        self.results["peak_memory_bytes"] = _peak_memory()
        engine = baseline_target(self.methods).engine  # passes may have turned out not to compile
        self.results["settings"]["compiled"] = engine.startswith("compiled")
        folder: Path | None = self.arguments.out
        if folder is not None:
            write_atomically(folder / RESULTS, json.dumps(self.results, indent=1) + "\n")
            write_atomically(folder / REPORT, self.report())
            write_atomically(folder / PAGE, page(self.results))

    def report(self) -> str:
        """The results as Markdown."""
        from passlm.bench.report import markdown

        return markdown(self.results)


def _further(lm: Generator, task: Task, new_tokens: int) -> Further | None:
    """The turns of a chat behind its first: each asked once those before it are answered."""
    if not task.turns:
        return None
    tokenizer: Any = lm.tokenizer

    def ids(answers: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        if len(answers) > len(task.turns):
            return None
        messages = list(task.messages or ())
        for answer, turn in zip(answers, task.turns, strict=False):
            said = tokenizer.decode(answer, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said})
            messages.append({"role": "user", "content": turn})
        asked, context = tuple(lm.encode(messages)), lm.target.context
        return asked if context is None or len(asked) + new_tokens <= context else None

    return ids


def _settings(arguments: argparse.Namespace, lm: Generator) -> dict[str, Any]:
    """What was asked for and loaded, beyond what each run's entry says."""
    from passlm.packing import can_pack

    shared = {
        **asdict(taken(SamplingParams, arguments, SAMPLING_ELSEWHERE)),
        **asdict(taken(StopParams, arguments, STOPPING_ELSEWHERE)),
    }
    own = (*SAMPLING_ELSEWHERE, *STOPPING_ELSEWHERE, "judge", "draft")
    card = None if lm.look_ahead is None else lm.look_ahead.card
    lookahead = card and {
        "name": arguments.lookahead or "shipped",
        "base_model": card.base_model,
        "look_ahead_tokens": card.look_ahead_tokens,
    }
    return {
        "model": arguments.model,
        "dtype": str(lm.target.dtype).removeprefix("torch."),
        "device": str(lm.target.device),
        "packed_weights": arguments.pack and can_pack(lm.target.model),
        "compiled": arguments.compile,  # until passes turn out not to compile here
        "quantize": arguments.quantize,
        "lookahead": lookahead,
        "limit": arguments.limit,
        "seed": arguments.seed,
        **{name: value for name, value in shared.items() if name not in own},
    }


def _peak_memory() -> int | None:
    """Most bytes of memory the process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
