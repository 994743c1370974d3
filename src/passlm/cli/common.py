"""Arguments that several subcommands share; flags of dataclasses are made from their fields."""

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
    """`--model`, `--dtype`, `--device`, `--threads`."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"hub id, folder, .gguf file or {DEFAULT_MODEL} (the default)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"default {dtype}")
    parser.add_argument("--device", default="cpu", help="as torch names it; default cpu")
    parser.add_argument("--threads", type=int, help="of torch; default its own choice")


def add_decoding_arguments(parser: argparse.ArgumentParser, compiled: bool = False) -> None:
    """`--lookahead`, `--no-pack`, `--compile` with `--no-compile`, `--quantize`.

    Args:
        parser: gets them.
        compiled: what holds if neither of the two is given.
    """
    parser.add_argument(
        "--lookahead",
        metavar="NAME",
        help="folder, hub id, shipped name (embeddings) or none; default what ships for the model",
    )
    parser.add_argument(
        "--no-pack",
        dest="pack",
        action="store_false",
        help="do without the second, faster copy of the weights (on CPUs)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=compiled,
        help="run compiled passes (CPU); made once, which takes minutes, and kept; "
        f"default {'--compile' if compiled else '--no-compile'}",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZED,
        help="round the linear layers: another model, faster on a CPU; best with --compile",
    )


def loaded(arguments: argparse.Namespace, **given: Any) -> Generator:
    """The model and look-ahead files that the flags name.

    Args:
        arguments: with the flags of `add_model_arguments` and `add_decoding_arguments`.
        **given: arguments of `passlm.load` that come first.
    """
    from passlm.generate import load, set_threads  # seconds

    set_threads(arguments.threads)
    names = ("lookahead", "dtype", "device", "pack", "compile", "quantize")
    return load(arguments.model, **{name: getattr(arguments, name) for name in names} | given)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )


def add_fields(
    parser: argparse.ArgumentParser, kind: type, leave_out: Collection[str] = ()
) -> None:
    """One flag for each field of a settings dataclass, with its help and default."""
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
    options: dict[str, Any] = {"default": default, "help": f"{text}; default {default}"}
    if get_origin(hint) is Literal:
        return {**options, "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"action": "append", "default": [], "help": text}
    plain = next((arm for arm in get_args(hint) if arm is not type(None)), hint)
    if default is None:
        options["help"] = text
    return {**options, "type": plain, "metavar": plain.__name__.upper()}


def taken(kind: type[T], arguments: argparse.Namespace, leave_out: Collection[str] = ()) -> T:
    """The settings dataclass that the flags of `add_fields` describe."""
    values = {f.name: getattr(arguments, f.name) for f in fields(kind) if f.name not in leave_out}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def print_json(content: Any) -> None:
    """The last line of standard output."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def progress_bar(quiet: bool = False) -> Progress:
    """A bar on standard error with counts, time left and a description; texts have no markup."""
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
    """SIGTERM ends what is under way as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stop_flag(patient: bool = False) -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, so that a step is never torn.

    A second one ends at once, unless it is to be patient.
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
