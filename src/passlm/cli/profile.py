"""Measure the cost of passes on this machine and predict the fastest method."""

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
    """Add the flags of this subcommand."""
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (default: 1)")
    parser.add_argument(
        "--context",
        type=int,
        default=128,
        metavar="N",
        help="context length in tokens (default: 128)",
    )
    parser.add_argument(
        "--kept",
        action="store_true",
        help="show the costs measured earlier instead of measuring again, if there are any",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write profile.png to this folder")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure the costs, save them for `--method auto`, and print what follows from them.

    Raises:
        InputError: a setting, the model or the look-ahead files cannot be used.
    """
    for name in ("batch", "context"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}: it must be 1 or more")
    from passlm.planning.cost_curve import BATCHES
    from passlm.planning.measure import read_bandwidth, weight_bytes

    if arguments.batch > BATCHES[-1]:
        raise InputError(f"--batch is {arguments.batch}: choose a batch size up to {BATCHES[-1]}")
    lm = loaded(arguments)
    weights, bandwidth = weight_bytes(lm.target), read_bandwidth(lm.target.device)
    ceiling = bandwidth / weights
    print(
        f"ceiling: {bandwidth / GIGABYTE:.1f} GB/s of memory bandwidth / {weights / GIGABYTE:.3f} "
        f"GB of weights = {ceiling:.1f} passes per second"
    )
    batch, context = lm.costs.size(arguments.batch, arguments.context)
    curve = lm.costs.curve(arguments.batch, arguments.context, anew=not arguments.kept)
    card = None if lm.look_ahead is None else lm.look_ahead.card
    prior, head = ((), ()) if card is None else (card.prior, card.head_prior)
    rates = predicted(curve, prior, head[: len(curve.head_seconds)])
    print(f"engine: {lm.target.engine}; batch {batch}, context {context}")
    if (batch, context) != (arguments.batch, arguments.context):
        print(f"(nearest measured to batch {arguments.batch}, context {arguments.context})")
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
    """Return the predicted speed of each method, plain decoding first.

    The speed is in tokens per second for each sequence, by the formulas of `CostCurve`.

    Args:
        curve: cost of passes.
        prior: probability that each look-ahead candidate is accepted, given that those before it
            are.
        head: the same for the draft head's candidates.
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
    """Return a table of pass times, in milliseconds and relative to a pass of one row."""
    lines = [f"{'pass':<28}{'ms':>8}{'vs 1 row':>12}"]
    passes = [(f"{rows} real rows", curve.of(rows)) for rows in curve.rows]
    passes += [(f"1 real, {n} look-ahead rows", curve.of(1, n, n)) for n in curve.groups]
    guesses = range(1, 1 + len(curve.head_seconds))
    passes += [(f"draft head, {n} tokens", curve.head(n)) for n in guesses]
    lines += [f"{what:<28}{s * 1e3:>8.1f}{s / curve.of(1):>12.2f}" for what, s in passes]
    return "\n".join(lines)


def rate_table(rates: list[dict[str, Any]], batch: int) -> str:
    """Return a table of predicted speeds and the best method; prompt lookup is not included."""
    plain = rates[0]["tokens_per_second"]
    lines = [f"{'predicted per sequence':<28}{'tokens/s':>9}{'speed-up':>11}"]
    for rate in rates:
        name = f"{rate['method']} {rate['lookahead_tokens'] or ''}"
        speed = rate["tokens_per_second"]
        lines.append(f"{name:<28}{speed:>9.1f}{speed / plain:>11.2f}")
    best = max(rates, key=lambda rate: rate["tokens_per_second"])
    tokens = f" with {best['lookahead_tokens']} look-ahead tokens" if best is not rates[0] else ""
    lines.append(f"best fixed method at batch size {batch}: {best['method']}{tokens}")
    lines.append("--method auto combines these pass by pass, and adds prompt lookup")
    return "\n".join(lines)


def plot(curve: CostCurve, rates: list[dict[str, Any]], ceiling: float) -> bytes:
    """Return a plot of cost by rows and predicted speed by look-ahead tokens, as PNG."""
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
