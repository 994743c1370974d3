"""Measure what passes cost on this machine, and say which plan pays."""

from __future__ import annotations

import argparse
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passlm.cli.common import (
    add_decoding_arguments,
    add_json_argument,
    add_model_arguments,
    loaded,
    print_json,
)
from passlm.errors import InputError

if TYPE_CHECKING:
    from passlm.planning.cost_curve import CostCurve

PLOT = "profile.png"
GIGABYTE = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="texts at a time")
    parser.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens before them; default 128"
    )
    parser.add_argument("--kept", action="store_true", help="show the costs kept, where there are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write profile.png there")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, keep the costs for `--method auto`, and print what follows from them.

    Raises:
        InputError: a setting, the model or the look-ahead files cannot be used.
    """
    for name in ("batch", "context"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}: it must be 1 or more")
    from passlm.planning.cost_curve import BATCHES
    from passlm.planning.kept_costs import read_bandwidth, weight_bytes

    if arguments.batch > BATCHES[-1]:
        raise InputError(f"--batch is {arguments.batch}: costs are measured up to {BATCHES[-1]}")
    lm = loaded(arguments)
    weights, bandwidth = weight_bytes(lm.target), read_bandwidth(lm.target.device)
    ceiling = bandwidth / weights
    print(
        f"ceiling: {bandwidth / GIGABYTE:.1f} GB/s of memory over {weights / GIGABYTE:.3f} GB of "
        f"weights: {ceiling:.1f} passes a second"
    )
    batch, context = lm.costs.size(arguments.batch, arguments.context)
    curve = lm.costs.curve(arguments.batch, arguments.context, anew=not arguments.kept)
    card = None if lm.look_ahead is None else lm.look_ahead.card
    prior, head = ((), ()) if card is None else (card.prior, card.head_prior)
    rates = predicted(curve, prior, head[: len(curve.head_seconds)])
    print(f"engine: {lm.target.engine}; batch {batch}, context {context}")
    if (batch, context) != (arguments.batch, arguments.context):
        print(f"(the nearest measured to batch {arguments.batch}, context {arguments.context})")
    print(cost_table(curve))
    print(f"plain decoding reaches {curve.plain() / ceiling:.0%} of the ceiling")
    print(rate_table(rates, batch))
    if arguments.out is not None:
        _write(arguments.out / PLOT, plot(curve, rates, ceiling))
    if arguments.json:
        print_json(
            {
                "engine": lm.target.engine,
                "batch": batch,
                "context": context,
                "bytes_per_second": bandwidth,
                "weight_bytes": weights,
                "passes_per_second_at_most": ceiling,
                "curve": asdict(curve),
                "prior": list(prior),
                "head_prior": list(head),
                "tokens_per_second": rates,
            }
        )


def predicted(
    curve: CostCurve, prior: tuple[float, ...], head: tuple[float, ...] = ()
) -> list[dict[str, Any]]:
    """Tokens a second of each text by METHOD's formulas, plain decoding first.

    Args:
        curve: what passes cost.
        prior: chance of each look-ahead candidate, once those before it are accepted.
        head: likewise of the draft head's.
    """
    from passlm.planning.acceptance import expected_length

    rates = [{"method": "ar", "lookahead_tokens": 0, "tokens_per_second": curve.plain()}]
    for rows in range(1, 1 + len(prior)):
        expected = expected_length(prior[:rows])
        two, one = curve.two_pass(expected, rows), curve.one_pass(expected, rows)
        for method, rate in (("two-pass", two), ("one-pass", one)):
            rates.append({"method": method, "lookahead_tokens": rows, "tokens_per_second": rate})
    for tokens in range(1, 1 + len(head)):
        rate = curve.by_head(expected_length(head[:tokens]), tokens)
        rates.append(
            {"method": "draft-head", "lookahead_tokens": tokens, "tokens_per_second": rate}
        )
    return rates


def cost_table(curve: CostCurve) -> str:
    """What each pass takes, in milliseconds and passes of one row."""
    lines = [f"{'pass':<28}{'ms':>8}{'of one row':>12}"]
    passes = [(f"{rows} real rows", curve.of(rows)) for rows in curve.rows]
    passes += [(f"root and {n} look-ahead rows", curve.of(1, n, n)) for n in curve.groups]
    guesses = range(1, 1 + len(curve.head_seconds))
    passes += [(f"draft head, {n} tokens more", curve.head(n)) for n in guesses]
    lines += [f"{what:<28}{s * 1e3:>8.1f}{s / curve.of(1):>12.2f}" for what, s in passes]
    return "\n".join(lines)


def rate_table(rates: list[dict[str, Any]], batch: int) -> str:
    """Predicted speeds, and the best of them; prompt lookup comes on top."""
    plain = rates[0]["tokens_per_second"]
    lines = [f"{'predicted for a text':<28}{'tokens/s':>9}{'of plain':>11}"]
    for rate in rates:
        name = f"{rate['method']} {rate['lookahead_tokens'] or ''}"
        speed = rate["tokens_per_second"]
        lines.append(f"{name:<28}{speed:>9.1f}{speed / plain:>11.2f}")
    best = max(rates, key=lambda rate: rate["tokens_per_second"])
    tokens = f" with {best['lookahead_tokens']} look-ahead tokens" if best is not rates[0] else ""
    texts = "one text" if batch == 1 else f"{batch} texts"
    lines.append(f"best fixed method for {texts} at a time: {best['method']}{tokens}")
    lines.append("--method auto mixes these pass by pass, with chains found in the text itself")
    return "\n".join(lines)


def plot(curve: CostCurve, rates: list[dict[str, Any]], ceiling: float) -> bytes:
    """Cost by rows and predicted speed by look-ahead tokens, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    costs, speeds = figure.subplots(1, 2)
    costs.plot(curve.rows, [s * 1e3 for s in curve.seconds], "o-", label="real rows")
    if curve.groups:
        rows = [1 + n for n in curve.groups]
        costs.plot(rows, [curve.of(1, n, n) * 1e3 for n in curve.groups], "o-", label="drafting")
    costs.axhline(1e3 / ceiling, color="0.6", linestyle=":", label="reading the weights")
    costs.set(title="cost of a pass", xlabel="rows", ylabel="ms", ylim=(0, None))
    costs.legend()
    speeds.axhline(rates[0]["tokens_per_second"], color="0.4", label="plain")
    for method in dict.fromkeys(r["method"] for r in rates[1:]):
        mine = [r for r in rates if r["method"] == method]
        speeds.plot(
            [r["lookahead_tokens"] for r in mine],
            [r["tokens_per_second"] for r in mine],
            "o-",
            label=method,
        )
    speeds.set(title="predicted", xlabel="look-ahead tokens", ylabel="tokens/s", ylim=(0, None))
    speeds.legend()
    for axes in (costs, speeds):
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)  # type: ignore[no-untyped-call]
    return png.getvalue()


def _write(path: Path, content: bytes) -> None:
    from passlm.provenance import write_atomically

    try:
        write_atomically(path, content)
    except OSError as error:
        raise InputError(f"cannot write to --out {path.parent}: {error.strerror}") from error
