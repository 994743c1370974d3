"""Train look-ahead files for a model."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from passlm.cli.common import (
    add_fields,
    add_json_argument,
    add_model_arguments,
    print_json,
    progress_bar,
    settings_from,
    stop_flag,
)
from passlm.errors import InputError
from passlm.train.config import Kind, TrainConfig
from passlm.train.tensorboard import board_writer, written_to

if TYPE_CHECKING:
    from passlm.loading.models import LoadedModel
    from passlm.lookahead.card import Card
    from passlm.lookahead.trained import LookAhead
    from passlm.model.target import Target
    from passlm.train.data import Document, TokenWindows
    from passlm.train.loop import Trainer
    from passlm.train.processes import AcceleratedProcesses

_log = logging.getLogger("passlm.train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    add_model_arguments(parser, dtype="float32")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="training data: text, code or JSONL files, or folders of them",
    )
    parser.add_argument(
        "--data-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="share of the training data from each PATH (default: proportional to its length)",
    )
    parser.add_argument(
        "--data-licences",
        nargs="+",
        metavar="L",
        help="licence of each PATH, stated in the model card",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip and count invalid JSONL lines instead of stopping",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write the look-ahead files to",
    )
    parser.add_argument(
        "--start-from",
        metavar="NAME",
        help="look-ahead files to start from (default: the mean of the model's input embeddings)",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in DIR")
    parser.add_argument("--overwrite", action="store_true", help="start over if DIR is not empty")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write event files to DIR/tensorboard"
    )
    parser.add_argument(
        "--licence",
        help="licence of the files (default: apache-2.0; with --kind head, that of --start-from)",
    )
    add_fields(parser, TrainConfig)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, then write the folder.

    Raises:
        InputError: the data, a setting, the model or the folder cannot be used.
        KeyboardInterrupt: it was interrupted; a checkpoint was saved.
    """
    config = settings_from(TrainConfig, arguments)
    _check_lists(arguments)
    if config.kind == "head" and arguments.start_from is None:
        raise InputError("--kind head adds a draft head to look-ahead files: give --start-from")
    board = board_writer() if arguments.tensorboard else None
    processes = _processes(arguments)
    with contextlib.nullcontext() if processes is None else processes.ending_together():
        if processes is None or processes.place[0] == 0:
            _check_folder(arguments)
        else:
            logging.getLogger("passlm").setLevel(logging.WARNING)  # the first process logs
        _train(arguments, config, board, processes)


def _train(
    arguments: argparse.Namespace,
    config: TrainConfig,
    board: Callable[[str], Any] | None,
    processes: AcceleratedProcesses | None,
) -> None:
    from passlm.generate import set_threads

    set_threads(arguments.threads)
    loaded, target = _target(arguments, config, processes)
    windows, held_out = _texts(arguments, config, loaded)
    try:
        trainer = _trainer(arguments, config, target, windows, held_out, processes)
        # With several processes, the launcher forwards a signal that a process may have received
        # already.
        with stop_flag(patient=processes is not None) as stopping:
            _train_with_bar(trainer, stopping, board)
        if trainer.steps_done < config.steps:
            _log.info("stopped after step %d: continue with --resume", trainer.steps_done)
            raise KeyboardInterrupt
        card = _finish(arguments, trainer)
    except OSError as error:
        raise InputError(
            f"cannot write to --out {arguments.out}: {error.strerror}; the last checkpoint is "
            "intact"
        ) from error
    if arguments.json and trainer.writes:
        print_json({"folder": str(arguments.out), **card})


def _check_lists(arguments: argparse.Namespace) -> None:
    for flag in ("data_weights", "data_licences"):
        given = getattr(arguments, flag)
        if given is not None and len(given) != len(arguments.data):
            name = flag.replace("_", "-")
            raise InputError(
                f"--{name} has {len(given)} values for {len(arguments.data)} paths of --data: give "
                "one for each path"
            )


def _processes(arguments: argparse.Namespace) -> AcceleratedProcesses | None:
    """Return the processes of `accelerate launch`; None if this process runs alone."""
    from passlm.train.processes import AcceleratedProcesses, launched

    if not launched():
        return None
    processes = AcceleratedProcesses(arguments.device)
    arguments.device = processes.device
    return processes


def _target(
    arguments: argparse.Namespace, config: TrainConfig, processes: AcceleratedProcesses | None
) -> tuple[LoadedModel, Target]:
    import torch

    from passlm.loading.models import load_config, load_model
    from passlm.model.target import Target
    from passlm.train.loop import group_lengths
    from passlm.train.memory import Place, check

    dtype, device = getattr(torch, arguments.dtype), arguments.device
    place = Place(device)
    if processes is not None:
        shards = processes.place[1] if processes.sharded else 1
        place = Place(device, shards, processes.neighbours)
        device = "cpu" if processes.sharded else device  # the model may not fit on one device
    rows = sum(group_lengths(config))
    check(load_config(arguments.model), dtype, place, config, rows)
    loaded = load_model(arguments.model, dtype=arguments.dtype, device=device)
    if processes is not None:
        processes.shard(loaded)
    target = Target(loaded.model)
    _check_length(config, target)
    return loaded, target


def _check_length(config: TrainConfig, target: Target) -> None:
    if target.context is not None and config.sequence_tokens > target.context:
        raise InputError(
            f"--sequence-tokens is {config.sequence_tokens}, but the model's context is "
            f"{target.context} tokens: choose at most that"
        )


def _check_folder(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.overwrite:
        raise InputError("--resume continues and --overwrite starts over: give one of them")
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: choose a folder")
    used = out.is_dir() and any(out.iterdir())
    if used and not (arguments.resume or arguments.overwrite):
        raise InputError(f"--out {out} is not empty: use --resume to continue, or --overwrite")
    standing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise InputError(f"cannot write to --out {out}: {standing} is not a writable folder")


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
                raise DataError(f"the model's chat template rejects it: {error}") from error

    documents = read_documents(arguments.data, _log.info, chat, arguments.skip_bad)
    weights = arguments.data_weights
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, which is needed between documents: train "
            "with a model whose tokenizer has one"
        )

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
        raise DataError(f"in the held-out data, {error}; or raise --held-out") from error
    texts = windows(train)
    _log.info("%d tokens to train on, %d held out", texts.tokens, held_out.tokens)
    return texts, held_out


def _trainer(
    arguments: argparse.Namespace,
    config: TrainConfig,
    target: Target,
    windows: TokenWindows,
    held_out: TokenWindows,
    processes: AcceleratedProcesses | None,
) -> Trainer:
    from passlm.loading.models import DEFAULT_HUB_ID, DEFAULT_MODEL
    from passlm.lookahead.trained import LookAhead
    from passlm.train.head import HeadTrainer
    from passlm.train.loop import CHECKPOINT, HISTORY, Trainer

    named = DEFAULT_HUB_ID if arguments.model == DEFAULT_MODEL else arguments.model
    head = config.kind == "head"
    rows = LookAhead.mean(target, config.lookahead_tokens, named)
    if arguments.start_from is not None:
        rows = _started_from(arguments.start_from, target, config)
    start = "" if arguments.start_from is None else rows.digest()[:12]
    rows = _with_head(rows, windows, config) if head else _with_parts(rows, target, config)
    kind = HeadTrainer if head else Trainer
    trainer = kind(target, rows, windows, held_out, config, arguments.out, processes, start)
    if arguments.resume:
        trainer.resume()
    elif arguments.overwrite and trainer.writes:
        for name in (CHECKPOINT, HISTORY):
            (arguments.out / name).unlink(missing_ok=True)
    return trainer


def _started_from(name: str, target: Target, config: TrainConfig) -> LookAhead:
    from passlm.lookahead.card import LookAheadError
    from passlm.lookahead.trained import load, locate

    rows = load(locate(name, target))
    rows.check(target)
    if rows.tokens != config.lookahead_tokens and config.kind != "head":
        raise LookAheadError(
            f"--start-from {name} has {rows.tokens} rows and --lookahead-tokens is "
            f"{config.lookahead_tokens}: make them equal"
        )
    return rows


def _with_parts(rows: LookAhead, target: Target, config: TrainConfig) -> LookAhead:
    """Return the rows with the parts that `--kind` trains; parts that exist are trained further."""
    from passlm.lookahead.trained import LookAhead

    if rows.head is not None:
        _log.warning(
            "the draft head of --start-from is left out: train a new one afterwards with --kind "
            "head"
        )
    rank = 0 if config.kind == "embeddings" else config.lora_rank
    width = config.sampler_width if config.kind == "sampler" else 0
    told = config.sampler_tokens
    new = rows.extended(target, rank, config.lora_layers, width, config.seed, told)
    _check_parts(rows, new, config)
    kept = rows.sampler and rows.sampler.extended_to(told)
    return LookAhead(
        rows.embeddings,
        rows.card,
        new.lora and (rows.lora or new.lora),
        new.sampler and (kept or new.sampler),
    )


def _with_head(rows: LookAhead, windows: TokenWindows, config: TrainConfig) -> LookAhead:
    """Return the rows with a draft head; one that exists is trained further.

    Raises:
        LookAheadError: the existing draft head differs from what the flags describe.
    """
    from passlm.drafts.draft_head import DraftHead
    from passlm.lookahead.card import LookAheadError
    from passlm.lookahead.trained import LookAhead

    kept = rows.head
    if kept is None:
        shape = config.head_width, config.head_tokens, config.head_depths
        listed = windows.frequent(config.head_vocabulary)
        d_model = int(rows.embeddings.shape[1])
        new = DraftHead.start(d_model, *shape, listed, config.seed)
        return LookAhead(rows.embeddings, rows.card, rows.lora, rows.sampler, new)
    parts = [("width", kept.width), ("tokens", kept.tokens), ("depths", kept.depths)]
    for name, has in (*parts, ("vocabulary", len(kept.listed))):
        wanted = getattr(config, f"head_{name}")
        if has != wanted:
            raise LookAheadError(
                f"--start-from has head-{name} {has} and --head-{name} is {wanted}: make them equal"
            )
    return rows


def _check_parts(rows: LookAhead, new: LookAhead, config: TrainConfig) -> None:
    """Check that the parts kept from `--start-from` match the flags.

    Raises:
        LookAheadError: a part differs from what the flags describe.
    """
    from passlm.lookahead.card import LookAheadError

    found: list[tuple[str, object, object]] = []
    if rows.lora is not None and new.lora is not None:
        found.append(("lora-rank", rows.lora.rank, config.lora_rank))
        if rows.lora.rank == config.lora_rank and rows.lora.groups != new.lora.groups:
            found.append(("lora-layers", "other ones", " ".join(config.lora_layers) or "all"))
    if rows.sampler is not None and new.sampler is not None:
        found.append(("sampler-width", rows.sampler.width, config.sampler_width))
        most = max(rows.sampler.tokens, config.sampler_tokens)  # it can be extended, not cut
        found.append(("sampler-tokens", most, config.sampler_tokens))
    kind = _kind(rows)
    if get_args(Kind).index(kind) > get_args(Kind).index(config.kind):
        found.append(("kind", kind, config.kind))
    for flag, kept, wanted in found:
        if kept != wanted:
            raise LookAheadError(
                f"--start-from has {flag} {kept} and --{flag} is {wanted}: make them equal"
            )


def _kind(rows: LookAhead) -> Kind:
    if rows.sampler is not None:
        return "sampler"
    return "embeddings" if rows.lora is None else "lora"


def _train_with_bar(
    trainer: Trainer, stopping: list[int], board: Callable[[str], Any] | None
) -> None:
    length = "?"
    board = board if trainer.writes else None
    with progress_bar(quiet=not trainer.writes) as bar, written_to(board, trainer.folder) as note:
        task = bar.add_task("", total=trainer.config.steps, completed=trainer.steps_done)
        for done in trainer.run(lambda: bool(stopping)):
            note(done)
            if done.accepted_length is not None and trainer.writes:
                length = f"{done.accepted_length:.3f}"
                _log.info("step %d: held-out accepted length %s", done.step, length)
            described = f"loss {done.loss:.3f}, accepted length {length}"
            bar.update(task, completed=done.step, description=described)


def _finish(arguments: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    from passlm.lookahead.trained import CARD_FILE
    from passlm.provenance import write_atomically
    from passlm.train.loop import read_history
    from passlm.train.report import curves, model_card

    history = read_history(trainer.folder) if trainer.writes else []
    shares = history[-1].accepted_by_position if history else None
    unknown = trainer.writes and shares is None
    if unknown if trainer.processes is None else trainer.processes.any(unknown):
        shares = tuple(trainer.evaluate())
    if not trainer.writes:
        return {}
    rows = trainer.look_ahead
    rows.card = _card(arguments, trainer, shares or ())
    rows.save(trainer.folder)
    write_atomically(trainer.folder / "curves.png", curves(history))
    write_atomically(trainer.folder / "README.md", model_card(rows.card))
    _log.info("wrote %s", trainer.folder / CARD_FILE)
    return {"accepted_length": sum(shares or ()), "steps": trainer.steps_done}


def _card(arguments: argparse.Namespace, trainer: Trainer, shares: Sequence[float]) -> Card:
    """Return the files' card after training.

    Args:
        arguments: parsed flags.
        trainer: the finished training.
        shares: for each row, the held-out share of look-ahead groups accepted at least up to it.
    """
    from passlm.lookahead.card import HELD_OUT
    from passlm.provenance import provenance

    card = trainer.look_ahead.card
    training = {
        "data": _described_data(arguments),
        **asdict(trainer.config),
        "groups_seen": trainer.groups_seen,
        "seconds": round(trainer.seconds),
        "dtype": arguments.dtype,
        "provenance": provenance([]),
    }
    by_position = [round(share, 4) for share in shares]
    if trainer.config.kind == "head":  # the other parts of the files are unchanged
        shape = ("width", "tokens", "depths", "listed")  # drops the figures of an earlier head
        card_head = {name: value for name, value in (card.head or {}).items() if name in shape}
        return replace(
            card,
            licence=arguments.licence or card.licence,
            head={**card_head, "by_position": by_position, "training": training},
            chances=card.chances and {k: v for k, v in card.chances.items() if k != "head"},
        )
    started_from = card.training if arguments.start_from else "mean embedding"
    held_out = {"accepted_length": sum(shares), "by_position": by_position}
    return replace(
        card,
        licence=arguments.licence or "apache-2.0",
        training={"started_from": started_from, **training},
        chances=None,
        accepted_length={HELD_OUT: held_out},
    )


def _described_data(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the weight and licence of each data path, for the card."""
    weights = arguments.data_weights or [None] * len(arguments.data)
    licences = arguments.data_licences or ["not stated"] * len(arguments.data)
    names = [path.resolve().name for path in arguments.data]
    described = {}
    for path, name, weight, licence in zip(arguments.data, names, weights, licences, strict=True):
        share = "" if weight is None else f"weight {weight}, "
        described[name if names.count(name) == 1 else str(path)] = f"{share}licence {licence}"
    return described
