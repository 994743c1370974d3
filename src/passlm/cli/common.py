"""Arguments and helpers that several subcommands share.

Flags for a settings dataclass are derived from its fields.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from passlm.loading.models import DEFAULT_MODEL, DTYPES
from passlm.params import QUANTIZED

if TYPE_CHECKING:
    from rich.progress import Progress

    from passlm.generate import Generator

T = TypeVar("T")


def add_model_arguments(parser: argparse.ArgumentParser, dtype: str = "bfloat16") -> None:
    """Add `--model`, `--dtype`, `--device` and `--threads`.

    Args:
        parser: parser to extend.
        dtype: default of `--dtype`.
    """
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"Hugging Face hub id, folder or .gguf file, or {DEFAULT_MODEL} for "
        f"SmolLM2-135M-Instruct (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype, help=f"data type of the model (default: {dtype})"
    )
    parser.add_argument(
        "--device", default="cpu", help="torch device, such as cpu or cuda (default: cpu)"
    )
    parser.add_argument(
        "--threads", type=int, help="number of CPU threads for torch (default: torch's choice)"
    )


def add_decoding_arguments(parser: argparse.ArgumentParser, compiled: bool = False) -> None:
    """Add `--lookahead`, `--no-pack`, `--compile`, `--no-compile` and `--quantize`.

    Args:
        parser: parser to extend.
        compiled: default of `--compile`.
    """
    parser.add_argument(
        "--lookahead",
        metavar="NAME",
        help="look-ahead files: a folder, a hub id, the name of files shipped for the model (best "
        "or embeddings), or none (default: the best files shipped for the model, if any)",
    )
    parser.add_argument(
        "--no-pack",
        dest="pack",
        action="store_false",
        help="on a CPU, do not keep a second copy of the weights in a faster layout",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=compiled,
        help="on a CPU, use compiled passes; compiling takes minutes the first time, and the "
        f"result is cached (default: {'--compile' if compiled else '--no-compile'})",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZED,
        help="round the weights of linear layers: faster on a CPU, but the output is that of the "
        "rounded model; best with --compile",
    )


def loaded(arguments: argparse.Namespace, **given: Any) -> Generator:
    """Load the model and the look-ahead files that the flags name.

    Args:
        arguments: parsed flags of `add_model_arguments` and `add_decoding_arguments`.
        **given: arguments of `passlm.load` that override the flags.
    """
    from passlm.generate import load, set_threads  # slow to import

    set_threads(arguments.threads)
    names = ("lookahead", "dtype", "device", "pack", "compile", "quantize")
    return load(arguments.model, **{name: getattr(arguments, name) for name in names} | given)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line of standard output",
    )


def add_fields(
    parser: argparse.ArgumentParser, kind: type, leave_out: Collection[str] = ()
) -> None:
    """Add one flag for each field of a settings dataclass, with the field's help and default."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.name not in leave_out:
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, dest=field.name, **_flag(field, hints[field.name]))


def _flag(field: Field[Any], hint: Any) -> dict[str, Any]:
    default = None if field.default is MISSING else field.default
    text = str(field.metadata["help"]).replace("%", "%%")
    if hint is bool:
        return {"action": "store_true", "help": text}
    options: dict[str, Any] = {"default": default, "help": f"{text} (default: {default})"}
    if get_origin(hint) is Literal:
        return {**options, "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"action": "append", "default": [], "help": text}
    plain = next((arm for arm in get_args(hint) if arm is not type(None)), hint)
    if default is None:
        options["help"] = text
    return {**options, "type": plain, "metavar": plain.__name__.upper()}


def settings_from(
    kind: type[T], arguments: argparse.Namespace, leave_out: Collection[str] = ()
) -> T:
    """Return the settings dataclass described by the flags of `add_fields`."""
    values = {f.name: getattr(arguments, f.name) for f in fields(kind) if f.name not in leave_out}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def print_json(content: Any) -> None:
    """Print a JSON object as the last line of standard output."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def progress_bar(quiet: bool = False) -> Progress:
    """Return a progress bar on standard error, with counts, remaining time and a description.

    Descriptions are printed literally, without rich's markup.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    return Progress(*columns, console=Console(file=sys.stderr, quiet=quiet))


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Make SIGTERM interrupt the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stop_flag(patient: bool = False) -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that the caller can stop between two steps.

    Args:
        patient: ignore further signals. Otherwise a second signal raises `KeyboardInterrupt`.

    Yields:
        The numbers of the signals received; empty at first.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received and not patient:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
