"""Generate a completion of one prompt and print it as it is generated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from passlm.cli.common import (
    add_decoding_arguments,
    add_fields,
    add_json_argument,
    add_model_arguments,
    loaded,
    print_json,
    settings_from,
)
from passlm.errors import InputError
from passlm.outputs import Chunk, Stats
from passlm.params import METHODS, SamplingParams, StopParams

if TYPE_CHECKING:
    from passlm.generate import Generator

PYTHON_ONLY = ("logit_bias", "bad_words", "processors")  # take token ids or objects: no flags
_ACCEPTED, _RESET = "\x1b[32m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("prompt", nargs="?", help="text to continue, or '-' for standard input")
    parser.add_argument("--prompt-file", metavar="F", help="read the prompt from this file")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="send the prompt as a chat message, using the model's chat template",
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="auto chooses the fastest plan for each pass, by costs measured once per machine; ar "
        "is plain decoding without drafts; two-pass and one-pass always draft (default: auto)",
    )
    parser.add_argument(
        "--lookahead-tokens",
        type=int,
        metavar="N",
        help="number of look-ahead tokens, a maximum for auto (default: all for auto, 4 for "
        "two-pass if the files have a sampler head, otherwise 1)",
    )
    add_fields(parser, SamplingParams, PYTHON_ONLY)
    add_fields(parser, StopParams)
    parser.add_argument(
        "--stats", action="store_true", help="print token counts and speed to standard error"
    )
    parser.add_argument(
        "--show-accepted", action="store_true", help="print accepted draft tokens in green"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Generate and print the completion.

    Raises:
        InputError: the prompt, a parameter, the model or the look-ahead files cannot be used.
    """
    prompt = read_prompt(arguments.prompt, arguments.prompt_file)
    sampling = settings_from(SamplingParams, arguments, PYTHON_ONLY)
    stopping = settings_from(StopParams, arguments)
    if arguments.method == "ar" and arguments.lookahead not in (None, "none"):
        raise InputError("--method ar does not draft: leave --lookahead out")
    from passlm.generate import Options  # slow to import, so after the quick checks

    lm = loaded(arguments, lookahead="none" if arguments.method == "ar" else arguments.lookahead)
    given = {k: getattr(arguments, k) for k in ("method", "lookahead_tokens")}
    options = Options.checked(
        lm.look_ahead, sampling, stopping, **{k: v for k, v in given.items() if v is not None}
    )
    stats = Stats()
    chunks = lm.stream_ids(_ids(lm, prompt, arguments.chat), options, stats)
    text, tokens, reason = write(chunks, sys.stdout, arguments.show_accepted)
    if arguments.stats:
        print(describe(stats), file=sys.stderr)
    if arguments.json:
        print_json(
            {
                "model": arguments.model,
                "method": options.method,
                "lookahead_tokens": options.lookahead_tokens,
                "text": text,
                "tokens": tokens,
                "finish_reason": reason,
                "stats": summary(stats),
            }
        )


def read_prompt(given: str | None, file: str | None) -> str:
    """Return the prompt from the argument, a file or standard input.

    Raises:
        InputError: neither or both were given, the file cannot be read, or the prompt is empty or
            not UTF-8.
    """
    if (given is None) == (file is None):
        raise InputError(
            "give one prompt: as an argument, with --prompt-file F, or '-' for standard input"
        )
    try:
        if given == "-":
            text = sys.stdin.buffer.read().decode()
        elif file is not None:
            text = Path(file).read_text(encoding="utf-8")
        else:
            text = given or ""
    except OSError as error:
        raise InputError(f"cannot read prompt file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt in {file or 'standard input'} is not UTF-8 text") from error
    if not text:
        raise InputError("the prompt is empty: give at least one character")
    return text


def _ids(lm: Generator, prompt: str, chat: bool) -> list[int]:
    return lm.encode([{"role": "user", "content": prompt}] if chat else prompt)


def write(
    chunks: Iterator[Chunk], out: TextIO, show_accepted: bool
) -> tuple[str, list[int], str | None]:
    """Print chunks as they arrive; return the text, the token ids and the finish reason."""
    texts: list[str] = []
    tokens: list[int] = []
    reason: str | None = None
    try:
        for chunk in chunks:
            out.write(_coloured(chunk) if show_accepted else chunk.text)
            out.flush()
            texts.append(chunk.text)
            tokens += chunk.tokens
            reason = chunk.finish_reason
    finally:  # also ends the line after an interrupt; a rejected prompt prints nothing
        if tokens:
            out.write("\n")
            out.flush()
    return "".join(texts), tokens, reason


def _coloured(chunk: Chunk) -> str:
    drafted = "".join(chunk.texts[: chunk.accepted])
    drawn = "".join(chunk.texts[chunk.accepted :])
    return f"{_ACCEPTED}{drafted}{_RESET}{drawn}" if drafted else drawn


def summary(stats: Stats) -> dict[str, Any]:
    """Return the counts and the figures derived from them, JSON-ready."""
    return {
        **asdict(stats),
        "tokens_per_pass": stats.tokens_per_pass,
        "tokens_per_second": stats.tokens_per_second,
        "accepted_length": stats.accepted_length,
    }


def describe(stats: Stats) -> str:
    """Return the statistics as a few readable lines."""
    shares = [
        f"{accepted / judged:.2f}"
        for accepted, judged in zip(
            stats.accepted_by_position, stats.judged_by_position, strict=True
        )
        if judged
    ]
    lines = [
        f"{stats.tokens} tokens in {stats.passes} passes: "
        f"{stats.tokens_per_pass:.2f} tokens per pass",
        f"{stats.tokens_per_second:.1f} tokens per second; "
        f"prompt of {stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s",
    ]
    if shares:
        lines.append(
            f"accepted length {stats.accepted_length:.2f}; acceptance rate by position: "
            f"{', '.join(shares)}"
        )
    return "\n".join(lines)
