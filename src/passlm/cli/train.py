"""Train look-ahead files for a model."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passlm.cli.common import (
    add_fields,
    add_json_argument,
    add_model_arguments,
    print_json,
    taken,
)
from passlm.errors import InputError
from passlm.train.config import TrainConfig

if TYPE_CHECKING:
    from passlm.lookahead import LookAhead
    from passlm.models import LoadedModel
    from passlm.target import Target
    from passlm.train.data import Document, TokenWindows
    from passlm.train.loop import Trainer

_log = logging.getLogger("passlm.train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_model_arguments(parser, dtype="float32")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="files and folders of text, code or JSONL",
    )
    parser.add_argument(
        "--data-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="how much of the texts comes from each PATH; default by length",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--start-from", metavar="NAME", help="look-ahead files to begin with; default the mean"
    )
    parser.add_argument("--resume", action="store_true", help="go on from DIR's checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a used DIR")
    parser.add_argument("--licence", default="apache-2.0", help="of the files; default apache-2.0")
    add_fields(parser, TrainConfig)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, then write the folder.

    Raises:
        InputError: the data, a setting, the model or the folder cannot be used.
        KeyboardInterrupt: it was interrupted; a checkpoint was kept.
    """
    config = taken(TrainConfig, arguments)
    _check_folder(arguments)
    from passlm.generate import set_threads
    from passlm.models import load_model
    from passlm.target import Target

    set_threads(arguments.threads)
    loaded = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    target = Target(loaded.model)
    _check_length(config, target)
    windows, held_out = _texts(arguments, config, loaded)
    try:
        trainer = _trainer(arguments, config, target, windows, held_out)
        with _stop_flag() as stopping:
            _train_with_bar(trainer, stopping)
        if stopping:
            _log.info("stopped after step %d: go on with --resume", trainer.steps_done)
            raise KeyboardInterrupt
        card = _finish(arguments, trainer)
    except OSError as error:
        raise InputError(
            f"cannot write to --out {arguments.out}: {error.strerror}; the last checkpoint there "
            "is whole"
        ) from error
    if arguments.json:
        print_json({"folder": str(arguments.out), **card})


def _check_length(config: TrainConfig, target: Target) -> None:
    if target.context is not None and config.sequence_tokens > target.context:
        raise InputError(
            f"--sequence-tokens is {config.sequence_tokens} and the model's context is "
            f"{target.context}: give at most that"
        )


def _check_folder(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.overwrite:
        raise InputError("--resume goes on and --overwrite starts anew: give one of them")
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    used = out.is_dir() and any(out.iterdir())
    if used and not (arguments.resume or arguments.overwrite):
        raise InputError(f"--out {out} is not empty: go on with --resume, or use --overwrite")
    standing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise InputError(f"cannot write to --out {out}: {standing} is no folder to write in")


def _texts(
    arguments: argparse.Namespace, config: TrainConfig, loaded: LoadedModel
) -> tuple[TokenWindows, TokenWindows]:
    from jinja2 import TemplateError

    from passlm.train.data import DataError, TokenWindows, read_documents, split_held_out

    tokenizer: Any = loaded.tokenizer
    chat = None
    if tokenizer.chat_template:

        def chat(messages: list[dict[str, str]]) -> str:
            try:
                return str(tokenizer.apply_chat_template(messages, tokenize=False))
            except TemplateError as error:
                raise DataError(f"the chat template refuses it: {error}") from error

    documents = read_documents(arguments.data, _log.info, chat)
    weights = arguments.data_weights
    if weights is not None and len(weights) != len(arguments.data):
        raise DataError(f"{len(weights)} --data-weights for {len(arguments.data)} paths")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token to put between documents")

    def tokenize(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def windows(part: Sequence[Document]) -> TokenWindows:
        end, length = tokenizer.eos_token_id, config.sequence_tokens
        return TokenWindows(part, tokenize, end, length, config.seed, weights)

    train, kept = split_held_out(documents, config.held_out, config.seed)
    try:
        held_out = windows(kept)
    except DataError as error:
        raise DataError(f"of what is held out, {error}; or hold out more: --held-out") from error
    texts = windows(train)
    _log.info("%d tokens to train on, %d held out", texts.tokens, held_out.tokens)
    return texts, held_out


def _trainer(
    arguments: argparse.Namespace,
    config: TrainConfig,
    target: Target,
    windows: TokenWindows,
    held_out: TokenWindows,
) -> Trainer:
    from passlm.lookahead import LookAhead
    from passlm.models import DEFAULT_HUB_ID, DEFAULT_MODEL
    from passlm.train.loop import CHECKPOINT, HISTORY, Trainer

    named = DEFAULT_HUB_ID if arguments.model == DEFAULT_MODEL else arguments.model
    rows = LookAhead.mean(target, config.lookahead_tokens, named)
    if arguments.start_from is not None:
        rows = _started_from(arguments.start_from, target, config.lookahead_tokens)
    trainer = Trainer(target, rows, windows, held_out, config, arguments.out)
    if arguments.resume:
        trainer.resume()
    elif arguments.overwrite:
        for name in (CHECKPOINT, HISTORY):
            (arguments.out / name).unlink(missing_ok=True)
    return trainer


def _started_from(name: str, target: Target, tokens: int) -> LookAhead:
    from passlm.lookahead import LookAheadError, load, locate

    rows = load(locate(name, target))
    rows.check(target)
    if rows.tokens != tokens:
        raise LookAheadError(
            f"--start-from {name} has {rows.tokens} rows and --lookahead-tokens is {tokens}: "
            "make them equal"
        )
    return rows


@contextlib.contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, so that a step is never torn; a second one ends at once."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_with_bar(trainer: Trainer, stopping: list[int]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    length = "?"
    with Bar(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=trainer.config.steps, completed=trainer.steps_done)
        for done in trainer.run(lambda: bool(stopping)):
            if done.accepted_length is not None:
                length = f"{done.accepted_length:.3f}"
                _log.info("step %d: held-out accepted length %s", done.step, length)
            described = f"loss {done.loss:.3f}, accepted length {length}"
            bar.update(task, completed=done.step, description=described)


def _finish(arguments: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    from passlm.lookahead import CARD_FILE
    from passlm.provenance import provenance, write_atomically
    from passlm.train.loop import read_history
    from passlm.train.report import curves, model_card

    history = read_history(trainer.folder)
    length = history[-1].accepted_length if history else None
    if length is None:
        length = sum(trainer.evaluate())
    rows = trainer.look_ahead
    rows.card = replace(
        rows.card,
        licence=arguments.licence,
        training={
            "started_from": rows.card.training if arguments.start_from else "mean embedding",
            "data": [path.name for path in arguments.data],
            "data_weights": arguments.data_weights,
            **asdict(trainer.config),
            "groups_seen": trainer.groups_seen,
            "seconds": round(trainer.seconds),
            "dtype": arguments.dtype,
            "provenance": provenance([]),
        },
        accepted_length={"held-out text, teacher-forced": length},
    )
    rows.save(trainer.folder)
    write_atomically(trainer.folder / "curves.png", curves(history))
    write_atomically(trainer.folder / "README.md", model_card(rows.card))
    _log.info("wrote %s", trainer.folder / CARD_FILE)
    return {"accepted_length": length, "steps": trainer.steps_done}
