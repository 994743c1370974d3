"""Generate a model's own answers to prompts, as training data for its look-ahead files."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passlm.cli.common import (
    add_json_argument,
    add_model_arguments,
    print_json,
    progress_bar,
    stop_flag,
)
from passlm.errors import InputError

if TYPE_CHECKING:
    from passlm.generate import Generator
    from passlm.train.answer_file import AnswerFile
    from passlm.train.answers import Answerer, Prompt, Settings

_log = logging.getLogger("passlm.distill-data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    add_model_arguments(parser)
    parser.add_argument(
        "--no-pack",
        dest="pack",
        action="store_false",
        help="on a CPU, do not keep a second copy of the weights in a faster layout",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="on a CPU, use compiled passes; compiling takes minutes the first time, and the "
        "result is cached",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL files with a prompt or messages on each line",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file to write, for 'passlm train --data'",
    )
    parser.add_argument(
        "--resume", action="store_true", help="answer the prompts that FILE has no answer to"
    )
    parser.add_argument("--overwrite", action="store_true", help="discard the answers in FILE")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip and count invalid JSONL lines instead of stopping",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use only the first N prompts (default: all)"
    )
    _add_settings(parser)
    add_json_argument(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--max-new-tokens",
        **whole,
        default=192,
        help="maximum number of tokens per answer (default: 192)",
    )
    parser.add_argument(
        "--temperature",
        type=_temperatures,
        default=(0.0, 0.0, 0.8),
        metavar="LIST",
        help="sampling temperatures; the prompt's id decides which one is used; 0 is greedy, and a "
        "repeated value is used more often (default: 0,0,0.8)",
    )
    parser.add_argument(
        "--top-k",
        **whole,
        default=50,
        help="sample from the k most likely tokens only (default: 50)",
    )
    parser.add_argument("--seed", **whole, default=0, help="random seed for sampling (default: 0)")
    parser.add_argument("--batch", **whole, default=16, help="batch size (default: 16)")


def _temperatures(text: str) -> tuple[float, ...]:
    """Parse comma-separated numbers; a repeated number counts as often as it is given."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas, such as 0,0,0.8, not {text!r}"
        ) from error


def run(arguments: argparse.Namespace) -> None:
    """Answer the prompts, appending each answer to the file as soon as it is finished.

    Raises:
        InputError: the prompts, a setting, the model or the file cannot be used.
        KeyboardInterrupt: it was interrupted; the answers so far are saved.
    """
    _check(arguments)
    from passlm.generate import load, set_threads  # slow to import, so after the quick checks
    from passlm.train import answer_file, answers

    settings = answers.Settings(
        arguments.temperature, arguments.top_k, arguments.seed, arguments.max_new_tokens
    )
    answer_file.check_unused(arguments.out, arguments.resume, arguments.overwrite)
    skipped = answers.Skipped(arguments.skip_bad)
    questions, fingerprint = answers.read_questions(arguments.prompts, skipped)
    set_threads(arguments.threads)
    lm = load(
        arguments.model,
        lookahead="none",
        dtype=arguments.dtype,
        device=arguments.device,
        pack=arguments.pack,
        compile=arguments.compile,
    )
    prompts = answers.prepare(lm, questions, skipped, arguments.limit)
    about = answer_file.about_settings(settings, arguments.model, arguments.dtype, fingerprint)
    with answer_file.AnswerFile(
        arguments.out, about, arguments.resume, arguments.overwrite
    ) as file:
        left = answers.unanswered(prompts, file.answered)
        if file.answered:
            _log.info("%d prompts are answered, %d remain", len(prompts) - len(left), len(left))
        counts = _answer(arguments, lm, settings, left, file)
    _log.info(
        "%d answers, %d tokens, %.1f tokens per second; skipped %d invalid lines and %d prompts "
        "that are too long",
        *(counts.answers, counts.tokens, counts.tokens_per_second, skipped.bad, skipped.long),
    )
    if arguments.json:
        print_json({**counts.summary(arguments.out), **_skips(skipped.bad, skipped.long)})


def _skips(bad: int, long: int) -> dict[str, int]:
    return {"skipped_bad": bad, "skipped_long": long}


def _check(arguments: argparse.Namespace) -> None:
    """Check the arguments that can be checked before anything is loaded."""
    for name in ("batch", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}: it must be 1 or more")
    out: Path = arguments.out
    for path in arguments.prompts:
        if path.exists() and out.exists() and path.samefile(out):
            raise InputError(f"--out {out} is one of the --prompts files: choose another file")


@dataclass
class _Counts:
    """Counts of this run, without the answers that the file already had."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self, out: Path) -> dict[str, Any]:
        """Return the counts for `--json`."""
        return {
            "out": str(out),
            "answers": self.answers,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def _answer(
    arguments: argparse.Namespace,
    lm: Generator,
    settings: Settings,
    prompts: list[Prompt],
    file: AnswerFile,
) -> _Counts:
    from passlm.train.answers import Answerer

    answerer = Answerer(lm, settings)
    with stop_flag() as stopping:
        counts = _answer_with_bar(answerer, prompts, arguments.batch, file, stopping)
    if stopping:
        _log.info("stopped after %d answers: continue with --resume", counts.answers)
        raise KeyboardInterrupt
    return counts


def _answer_with_bar(
    answerer: Answerer, prompts: list[Prompt], batch: int, file: AnswerFile, stopping: list[int]
) -> _Counts:
    counts = _Counts()
    begun = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("", total=len(prompts))
        for finished in answerer.run(prompts, batch, lambda: bool(stopping)):
            for record in finished:
                file.append(record)
            counts.answers += len(finished)
            counts.tokens = answerer.tokens
            counts.seconds = time.perf_counter() - begun
            described = f"{counts.tokens_per_second:.1f} tokens/s"
            bar.update(task, advance=len(finished), description=described)
    return counts
