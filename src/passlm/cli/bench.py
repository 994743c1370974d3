"""Compare the speed of decoding methods on suites of prompts or on your own prompts."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passlm.bench.measuring.folder import PAGE, PROMPTS, REPORT, RESULTS, check_unused
from passlm.bench.reports.compare import compare, load_results
from passlm.bench.suites.tasks import SUITES, load_prompts
from passlm.cli.common import (
    add_decoding_arguments,
    add_fields,
    add_json_argument,
    add_model_arguments,
    loaded,
    print_json,
    progress_bar,
    settings_from,
    terminated_as_interrupted,
)
from passlm.errors import InputError
from passlm.params import SamplingParams, StopParams

if TYPE_CHECKING:
    from passlm.bench.engines.methods import Asked
    from passlm.bench.session import Session
    from passlm.bench.suites.prompts import Found
    from passlm.generate import Generator

DEFAULT_METHODS = "ar,fixed-token,two-pass,one-pass,auto,lookup,hf,hf-prompt-lookup"
NEED_LOOKAHEAD = ("auto", "two-pass", "one-pass", "draft-head")
# Fields that get no flag from `SamplingParams`: those with a flag of their own, those that take
# token ids or objects, and those that transformers' methods do not support.
SAMPLING_ELSEWHERE = (
    *("temperature", "seed", "logit_bias", "bad_words", "processors"),
    *("presence_penalty", "frequency_penalty"),
)
STOPPING_ELSEWHERE = ("stop",)  # ids are not converted to text here

# Arguments that may change when a run is resumed.
NOT_OF_THE_RUN = ("out", "resume", "overwrite", "json", "compare", "engine_python")

_log = logging.getLogger("passlm.bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument(
        "--suite",
        type=_listed(str),
        default=(),
        metavar="NAME,...",
        help=f"suites of prompts to run, any of {','.join(SUITES)}",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSONL file with a prompt, messages or turns on each line",
    )
    parser.add_argument(
        "--methods",
        type=_listed(str),
        default=_listed(str)(DEFAULT_METHODS),
        metavar="NAME,...",
        help="methods to compare; draft-head, hf-assistant, llama-cpp and vllm are also available "
        f"(default: {DEFAULT_METHODS})",
    )
    _add_others(parser)
    _add_lists(parser)
    _add_run_flags(parser)
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    add_fields(parser, SamplingParams, SAMPLING_ELSEWHERE)
    add_fields(parser, StopParams, STOPPING_ELSEWHERE)
    _add_output(parser)
    add_json_argument(parser)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for which prompts run, how often, and what is reported of them."""
    parser.add_argument(
        "--limit", type=int, metavar="N", help="number of prompts from each suite (default: all)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="number of runs of each prompt (default: 1)",
    )
    parser.add_argument(
        "--strip-prompts",
        action="store_true",
        help="remove white space at the end of plain-text prompts, as other HumanEval harnesses "
        "do; with it, a model may stop at once",
    )
    parser.add_argument(
        "--run-generated-code",
        action="store_true",
        help="run the code generated for humaneval in a sandbox and report pass@1, and pass@10 if "
        "--repeats is 10 or more and the output is sampled",
    )
    parser.add_argument(
        "--predictability",
        action="store_true",
        help="run passlm's methods once more, untimed, and report the model's probability of the "
        "tokens that were accepted, rejected and drawn",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed for the order of the runs and for sampling (default: 0)",
    )


def _add_others(parser: argparse.ArgumentParser) -> None:
    """Add the flags for methods of other libraries."""
    parser.add_argument(
        "--assistant",
        metavar="NAME",
        help="draft model for the method hf-assistant: a hub id, folder or .gguf file with the "
        "same vocabulary",
    )
    parser.add_argument(
        "--engine-python",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="Python interpreter that has the package of the method llama-cpp or vllm; can be "
        "given once for each (default: this interpreter)",
    )


def _add_lists(parser: argparse.ArgumentParser) -> None:
    """Add the flags that take several values; methods run with each value."""
    parser.add_argument(
        "--temperature",
        type=_listed(float),
        default=(0.0,),
        metavar="T,...",
        help="sampling temperatures to run; 0 is greedy (default: 0)",
    )
    parser.add_argument(
        "--lookahead-tokens",
        type=_listed(int),
        default=(4,),
        metavar="N,...",
        help="numbers of look-ahead tokens to run (default: 4)",
    )
    parser.add_argument(
        "--batch-size",
        type=_listed(int),
        default=(1,),
        metavar="N,...",
        help="batch sizes to run with passlm's methods; other methods run at 1 only (default: 1)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=_listed(int),
        default=(),
        metavar="N,...",
        help="prompt lengths to run: each prompt is cut to its last N tokens, and shorter prompts "
        "are skipped (default: whole prompts)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write {RESULTS}, {REPORT} and {PAGE} to this folder, and during the run {PROMPTS} "
        "with one line per completion",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted run in DIR; needs the same arguments as before",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="run nothing; print the significant differences between two result folders",
    )


def _listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return a parser of comma-separated values; repeated values count once."""

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
        InputError: a suite, method, parameter, the model or the folder cannot be used, or no prompt
            is left.
        KeyboardInterrupt: it was interrupted; finished runs are kept if there is an output folder.
    """
    if arguments.compare is not None:
        for name in ("suite", "prompts", "out", "resume", "json"):
            if getattr(arguments, name):
                raise InputError(f"--compare only compares existing results: leave --{name} out")
        sys.stdout.write(_compared(*arguments.compare))
        return
    _check(arguments)
    results = _finished(arguments) if arguments.resume else None
    if results is None:
        results = _measured(arguments)
    from passlm.bench.reports.markdown import markdown

    sys.stdout.write(markdown(results))
    if arguments.json:
        print_json(results)


def _finished(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the results of the run in the folder, or None if it is not complete."""
    from passlm.bench.measuring.journal import check_same, read_run

    out: Path = arguments.out
    check_same(out, read_run(out)["about"], _run_arguments(arguments))
    if not (out / RESULTS).exists():
        return None
    results = load_results(out)
    if not results["complete"]:
        return None
    _log.info("the run in %s is complete", out)
    return results


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the models, run the methods and return the results."""
    given = [] if arguments.prompts is None else load_prompts(arguments.prompts, arguments.limit)
    asked = _asked(arguments)
    from passlm.bench.engines.external import end_engines, interpreters, start_engines
    from passlm.bench.engines.hugging_face import load_assistant
    from passlm.bench.engines.methods import Others, build
    from passlm.bench.session import Course, Session
    from passlm.bench.suites.prompts import Collector
    from passlm.generate import compiled_folder

    pythons = interpreters(asked.names, arguments.engine_python)
    drafts = any(name in NEED_LOOKAHEAD for name in asked.names)
    if not drafts and arguments.lookahead not in (None, "none"):
        _log.warning("--lookahead is not used: none of the methods uses look-ahead files")
    begun = time.perf_counter()
    lm = loaded(
        arguments,
        lookahead=arguments.lookahead if drafts else "none",
        pack=False,  # the methods pack, compile and round a target of their own
        compile=False,
        quantize=None,
    )
    loading = {"load_seconds": time.perf_counter() - begun, "start_seconds": _seconds_since_start()}
    assistant = None if arguments.assistant is None else load_assistant(arguments.assistant, lm)
    engines, missing = start_engines(pythons, lm, arguments.model)
    asked = replace(asked, names=tuple(name for name in asked.names if name not in missing))
    compiled = compiled_folder() if arguments.compile else None
    weights = (arguments.model, arguments.pack, compiled, arguments.quantize)
    methods = build(lm, asked, *weights, others=Others(assistant, engines))
    cuts, length = arguments.prompt_tokens, arguments.max_new_tokens
    whole_chats = not cuts and arguments.batch_size == (1,)
    collector = Collector(lm, length, cuts, whole_chats, arguments.strip_prompts)
    found = collector.collect(arguments.suite, given, arguments.limit)
    extras = (arguments.run_generated_code, arguments.predictability)
    course = Course(length, arguments.seed, arguments.repeats, *extras)
    facts = {"settings": _settings(arguments, lm), "missing_methods": missing, **loading}
    session = Session(lm, methods, found, course, facts)
    titles = {name: engine.title for name, engine in engines.items()}
    _run_session(
        arguments,
        session,
        {**_run_arguments(arguments), **_loaded_facts(lm, found), "engines": titles},
    )
    end_engines(engines.values())
    return session.results


def _run_session(arguments: argparse.Namespace, session: Session, about: dict[str, Any]) -> None:
    """Run the session with a progress bar; log what is saved if it is interrupted."""
    from passlm.bench.measuring.journal import Journal

    try:
        with (
            terminated_as_interrupted(),
            Journal.opened(arguments.out, about, arguments.resume) as journal,
            progress_bar() as bar,
        ):
            if arguments.resume:
                _log.info("resuming: %d of %d runs are done", journal.kept, session.total)
            shown = bar.add_task("warm-up", total=session.total)
            session.measure(
                journal, lambda count, what: bar.update(shown, advance=count, description=what)
            )
    except KeyboardInterrupt:
        hint = "finished runs are lost without --out DIR"
        if arguments.out is not None:
            instead = " instead of --overwrite" if arguments.overwrite else ""
            hint = f"finished runs are saved, continue with --resume{instead}"
        _log.info("interrupted: %s", hint)
        raise


def _run_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that must be the same when a run is resumed."""
    from passlm import __version__

    given = {name: value for name, value in vars(arguments).items() if name not in NOT_OF_THE_RUN}
    if arguments.prompts is not None:
        given["prompts"] = arguments.prompts.name  # the folder may differ: contents are compared
    return {"passlm": __version__, "arguments": given}


def _loaded_facts(lm: Generator, found: Found) -> dict[str, Any]:
    """Return the facts about model and prompts that must be the same when a run is resumed."""
    from passlm.provenance import environment

    return {
        "environment": environment(),
        "model": asdict(lm.target.fingerprint),
        "look-ahead files": None if lm.look_ahead is None else lm.look_ahead.digest(),
        "prompts": found.digests,
    }


def _seconds_since_start() -> float:
    """Return the seconds since this process started."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def _compared(a: Path, b: Path) -> str:
    """Return a comparison of two results as Markdown."""
    return compare(load_results(a), load_results(b), (str(a), str(b)))


def _check(arguments: argparse.Namespace) -> None:
    """Check the arguments that can be checked before anything is loaded."""
    if not arguments.suite and arguments.prompts is None:
        raise InputError(
            f"no prompts given: use --suite with any of {', '.join(SUITES)}, or --prompts FILE"
        )
    for name in arguments.suite:
        if name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, 1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(SUITES)}"
            raise InputError(f"there is no suite {name!r}: {hint}")
    if arguments.prompts is not None and arguments.prompts.stem in arguments.suite:
        raise InputError(
            f"--prompts {arguments.prompts} has the same name as the suite "
            f"{arguments.prompts.stem!r}: rename the file"
        )
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit is {arguments.limit}: it must be 1 or more")
    if arguments.repeats < 1:
        raise InputError(f"--repeats is {arguments.repeats}: it must be 1 or more")
    if arguments.run_generated_code:
        if "humaneval" not in arguments.suite:
            raise InputError("--run-generated-code needs the suite humaneval: add it to --suite")
        if arguments.prompt_tokens:
            raise InputError("--run-generated-code needs whole prompts: leave --prompt-tokens out")
        from passlm.bench.suites.humaneval import check_sandbox

        check_sandbox()  # before anything is measured
    if not 0 <= arguments.seed < 2**64:
        raise InputError(f"--seed is {arguments.seed}: it must lie between 0 and 2**64 - 1")
    if any(tokens < 1 for tokens in arguments.prompt_tokens):
        least = min(arguments.prompt_tokens)
        raise InputError(f"--prompt-tokens contains {least}: each must be 1 or more")
    check_unused(arguments.out, arguments.resume, arguments.overwrite)


def _asked(arguments: argparse.Namespace) -> Asked:
    """Return the methods and sampling settings to run, after checking them."""
    sampling = settings_from(SamplingParams, arguments, SAMPLING_ELSEWHERE)
    stopping = settings_from(StopParams, arguments, STOPPING_ELSEWHERE)
    for temperature in arguments.temperature:
        SamplingParams(temperature=temperature)
    from passlm.bench.engines.external import check_sampling
    from passlm.bench.engines.hugging_face import check_assistant
    from passlm.bench.engines.methods import BASELINE, Asked, check_names

    names = arguments.methods
    check_names(names, arguments.batch_size)
    check_assistant(names, arguments.assistant)
    check_sampling(names, sampling)
    if BASELINE not in names:
        _log.info("method %s is added, since speed-ups are relative to it", BASELINE)
        names = (BASELINE, *names)
    lists = (arguments.temperature, arguments.lookahead_tokens)
    return Asked(names, *lists, sampling, stopping, arguments.batch_size)


def _settings(arguments: argparse.Namespace, lm: Generator) -> dict[str, Any]:
    """Return the settings of the whole session; each run's own settings are in its entry."""
    from passlm.layers.packed import can_pack

    shared = {
        **asdict(settings_from(SamplingParams, arguments, SAMPLING_ELSEWHERE)),
        **asdict(settings_from(StopParams, arguments, STOPPING_ELSEWHERE)),
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
        "compiled": arguments.compile,  # corrected later if passes do not compile here
        "quantize": arguments.quantize,
        "lookahead": lookahead,
        "assistant": arguments.assistant,
        "limit": arguments.limit,
        "repeats": arguments.repeats,
        "batch_sizes": arguments.batch_size,
        "prompt_tokens": arguments.prompt_tokens or None,
        "strip_prompts": arguments.strip_prompts,
        "seed": arguments.seed,
        **{name: value for name, value in shared.items() if name not in own},
    }
