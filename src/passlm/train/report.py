"""Model card and training curves of a finished run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from passlm.lookahead.card import Card
from passlm.train.loop import Progress


def curves(history: Sequence[Progress]) -> bytes:
    """Plot loss, held-out accepted length and acceptance by row; return the PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [p for p in history if p.accepted_by_position is not None]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, length, rows = figure.subplots(1, 3)
    steps = [p.step for p in history]
    losses = [p.loss for p in history]
    loss.plot(steps, losses, color="0.8", linewidth=0.8)
    loss.plot(steps, _smoothed(losses), color="C0")
    loss.set(title="training loss", xlabel="step", ylabel="nats per row")
    length.plot([p.step for p in measured], [p.accepted_length for p in measured], "o-")
    length.set(title="held-out accepted length", xlabel="step", ylim=(0, None))
    shares = measured[-1].accepted_by_position or () if measured else ()
    rows.bar(range(1, len(shares) + 1), shares)
    rows.set(title="held-out groups accepted up to row j", xlabel="row j", ylim=(0, None))
    for axes in (loss, length, rows):
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)  # type: ignore[no-untyped-call]
    return png.getvalue()


def _smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    smooth: list[float] = []
    mean = 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - math.pow(weight, count)))
    return smooth


def model_card(card: Card) -> str:
    """Return the folder's README, a Hugging Face model card."""
    return "\n".join(
        [
            "---",
            "library_name: passlm",
            f"license: {card.licence}",
            f"base_model: {card.base_model}",
            "tags: [speculative-decoding, parallel-speculative-sampling]",
            "---",
            f"# Look-ahead for {card.base_model}",
            "",
            f"{_parts(card)} for Parallel Speculative Sampling (PaSS). The model uses them to "
            "draft tokens and verifies the drafts itself: its output is the same as without them, "
            "in fewer forward passes.",
            "",
            "```python",
            "import passlm",
            "",
            f'lm = passlm.load("{card.base_model}", lookahead="FOLDER")',
            'print(lm.generate("def fib(n):")[0].text)',
            "```",
            "",
            f"Made for: {card.target.shape}.",
            "",
            "## Accepted length",
            "",
            *_table(("measured on", "mean accepted length"), card.accepted_length),
            "",
            "## Training",
            "",
            *_table(("setting", "value"), card.training),
            "",
            *_draft_head_section(card),
            "![curves](curves.png)",
            "",
        ]
    )


def _draft_head_section(card: Card) -> list[str]:
    """Return the card's section on the draft head: its training and its acceptance."""
    if card.head is None:
        return []
    return ["## Draft head", "", *_table(("setting", "value"), card.head), ""]


def _parts(card: Card) -> str:
    """Return a description of what the folder holds."""
    parts = [
        f"{card.look_ahead_tokens} look-ahead input embeddings of {card.target.d_model} numbers"
    ]
    if card.lora is not None:
        layers = sum(len(group) for group in card.lora["groups"])
        parts.append(
            f"updates of rank {card.lora['rank']} for {layers} linear layers, applied to "
            "look-ahead rows only"
        )
    if card.sampler is not None:
        told = card.sampler.get("tokens", 1)
        parts.append(
            f"a sampler head of width {card.sampler['width']} that takes the {told} preceding "
            f"token{'s' * (told > 1)} of each row as input"
        )
    if card.head is not None:
        parts.append(
            f"a draft head of width {card.head['width']} that proposes {card.head['depths']} "
            f"tokens from a vocabulary of {card.head['listed']}, without look-ahead rows"
        )
    return "; ".join(parts)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    flat = _flat(rows)
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in flat)]


def _flat(rows: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in rows.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            flat += _flat(value, f"{name}: ")
        else:
            flat.append((name, f"{value:.3f}" if isinstance(value, float) else value))
    return flat
