"""Describe a model or a look-ahead folder."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from passlm.cli.common import add_json_argument, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument(
        "name", help="model (hub id, folder, .gguf file or smollm2-135m) or look-ahead folder"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the description.

    Raises:
        InputError: the name is neither a model nor a look-ahead folder.
    """
    from passlm.lookahead.trained import CARD_FILE

    folder = Path(arguments.name)
    content = _lookahead(folder) if os.path.isfile(folder / CARD_FILE) else _model(arguments.name)
    for key, value in content.items():
        if value not in (None, {}):
            print(f"{key.replace('_', ' ')}: {value}")
    if arguments.json:
        print_json(content)


def _lookahead(folder: Path) -> dict[str, Any]:
    from passlm.lookahead.trained import load

    rows = load(folder)
    card = rows.card
    return {
        "kind": "look-ahead files",
        "base_model": card.base_model,
        "made_for": card.target.shape,
        "look_ahead_tokens": card.look_ahead_tokens,
        "lora": card.lora
        and {
            "rank": card.lora["rank"],
            "layers": sum(len(group) for group in card.lora["groups"]),
        },
        "sampler": card.sampler and dict(card.sampler),
        "head": card.head and dict(card.head),
        "numbers": rows.numbers,
        "licence": card.licence,
        "accepted_length": dict(card.accepted_length),
        "training": dict(card.training),
    }


def _model(name: str) -> dict[str, Any]:
    from passlm.loading.models import load_config, resolve
    from passlm.lookahead.trained import shipped_for_shape

    source = resolve(name)
    config: Any = load_config(name).get_text_config()
    return {
        "kind": "model",
        **{k: str(v) for k, v in asdict(source).items() if v is not None},
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": getattr(config, "max_position_embeddings", None),
        "shipped_lookahead": shipped_for_shape(
            config.model_type, config.hidden_size, config.vocab_size, config.num_hidden_layers
        ),
    }
