"""Measure whether PaSS speeds up your prompts on this machine, why, and with which flags."""

from __future__ import annotations

import argparse
import logging
import random
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from passlm.bench.suites.tasks import Task, load_prompts
from passlm.cli.common import (
    add_decoding_arguments,
    add_fields,
    add_json_argument,
    add_model_arguments,
    loaded,
    print_json,
    progress_bar,
    settings_from,
    stop_flag,
)
from passlm.errors import InputError
from passlm.params import SamplingParams, StopParams

if TYPE_CHECKING:
    from passlm.bench.advise import Advice, Pilot
    from passlm.bench.engines.methods import Method
    from passlm.bench.measuring.measure import Prompt, Sample
    from passlm.generate import Generator
    from passlm.planning.cost_curve import CostCurve
    from passlm.planning.kept_costs import Costs

# Fields without a flag of their own: `--seed` covers more than sampling, and the others take token
# ids or objects.
SAMPLING_ELSEWHERE = ("seed", "logit_bias", "bad_words", "processors")
STOPPING_ELSEWHERE = ("stop",)  # ids are not converted to text here
WIDTH = 100
_FOR_PEOPLE = {"yes": "yes", "no": "no", "undecided": "too close to call"}

_log = logging.getLogger("passlm.advise")

_now = time.monotonic

Stopped = Literal["time limit", "interrupted"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file with a prompt, messages or turns on each line",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=12,
        metavar="N",
        help="number of prompts to measure, chosen at random (default: 12)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="stop measuring after this time; loading and warm-up do not count (default: 120)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="also estimate the speed-up at batch sizes up to N, from the cost of passes "
        "(default: 1)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed for choosing prompts and for sampling (default: 0)",
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    add_fields(parser, SamplingParams, SAMPLING_ELSEWHERE)
    add_fields(parser, StopParams, STOPPING_ELSEWHERE)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure a sample of the prompts and print the verdict.

    Raises:
        InputError: a setting, the file, the model or the look-ahead files cannot be used, or the
            time limit ended before one prompt was done.
        KeyboardInterrupt: it was interrupted; the verdict on what was measured was printed.
    """
    _check(arguments)
    tasks = load_prompts(arguments.prompts)
    in_order = random.Random(arguments.seed).sample(tasks, len(tasks))
    lm = loaded(
        arguments,
        pack=False,  # the methods pack, compile and round a target of their own
        compile=False,
        quantize=None,
    )
    prompts = prompts_of(lm, in_order, arguments.limit, arguments.max_new_tokens)
    trial = _Trial(arguments, lm, prompts)
    trial.measure()
    advised = trial.advised(len(tasks))
    print(screen(advised))
    if arguments.json:
        print_json(_facts(arguments, lm, advised))
    if advised.stopped == "interrupted":
        raise KeyboardInterrupt


def _check(arguments: argparse.Namespace) -> None:
    """Check the settings that can be checked before anything is loaded."""
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more")
    from passlm.planning.cost_curve import BATCHES

    if arguments.batch_size > BATCHES[-1]:
        raise InputError(
            f"--batch-size is {arguments.batch_size}: choose a batch size up to {BATCHES[-1]}"
        )
    if not arguments.time_limit > 0:
        raise InputError(f"--time-limit is {arguments.time_limit:g}: give seconds above 0")
    if not 0 <= arguments.seed < 2**64:
        raise InputError(f"--seed is {arguments.seed}: it must lie between 0 and 2**64 - 1")
    settings_from(SamplingParams, arguments, SAMPLING_ELSEWHERE)
    settings_from(StopParams, arguments, STOPPING_ELSEWHERE)


def prompts_of(lm: Generator, tasks: Sequence[Task], limit: int, new_tokens: int) -> list[Prompt]:
    """Return the first tasks that fit the model's context; log a warning about skipped ones.

    Raises:
        InputError: no task fits.
    """
    from passlm.bench.suites.prompts import Collector

    collector = Collector(lm, new_tokens)
    prompts: list[Prompt] = []
    for start in range(0, len(tasks), limit):  # tokenizes only as much of a large file as needed
        for suite in collector.collect((), tasks[start : start + limit], None).suites:
            prompts += suite
        if len(prompts) >= limit:
            break
    if not prompts:
        raise InputError(
            f"all prompts are too long: with {new_tokens} new tokens they exceed the context of "
            f"{lm.target.context} tokens; use shorter prompts or a smaller --max-new-tokens"
        )
    return prompts[:limit]


@dataclass(frozen=True)
class Advised:
    """The verdict and the figures it is based on.

    Attributes:
        advice: the verdict.
        pilot: the measured figures.
        flags: flags to use with `passlm generate`.
        batches: estimated speed-up by batch size; only 1 unless more were requested.
        of_prompts: number of prompts in the file.
        stopped: why fewer prompts were measured than requested; None if all were measured.
        temperature: sampling temperature.
        runs: figures of each plan.
    """

    advice: Advice
    pilot: Pilot
    flags: str
    batches: dict[int, float]
    of_prompts: int
    stopped: Stopped | None
    temperature: float
    runs: list[dict[str, Any]]


class _Trial:
    """Measures plans side by side on the prompts."""

    def __init__(
        self, arguments: argparse.Namespace, lm: Generator, prompts: Sequence[Prompt]
    ) -> None:
        self.arguments = arguments
        self.lm = lm
        self.prompts = prompts
        self.context = max(len(one.ids) for one in prompts) + arguments.max_new_tokens // 2
        self.methods, self.costs = self._methods()
        self.samples: list[Sample] = []
        self.stopped: Stopped | None = None

    def _methods(self) -> tuple[list[Method], Costs]:
        """Return the methods to measure and the costs.

        The methods are plain decoding, plans chosen for each pass, and the fixed plans that are
        best by the cost curve.
        """
        from passlm.bench.advise import fixed_plans
        from passlm.bench.engines.decoding import PlanDecoding
        from passlm.bench.engines.methods import BASELINE, Asked, build
        from passlm.generate import compiled_folder

        arguments, files = self.arguments, self.lm.look_ahead
        sampling = settings_from(SamplingParams, arguments, SAMPLING_ELSEWHERE)
        stopping = settings_from(StopParams, arguments, STOPPING_ELSEWHERE)
        names = (BASELINE, "lookup") if files is None else (BASELINE, "lookup", "auto")
        asked = Asked(names, (sampling.temperature,), (), sampling, stopping)
        folder = compiled_folder() if arguments.compile else None
        methods = build(self.lm, asked, arguments.model, arguments.pack, folder, arguments.quantize)
        chosen = methods[-1]
        assert isinstance(chosen.decode, PlanDecoding), "the method does not decode by plans"
        assert chosen.decode.costs is not None, "the method does not choose plans by cost"
        costs = chosen.decode.costs
        if files is not None:
            methods += fixed_plans(chosen, costs.curve(1, self.context), files.card.prior)
        return methods, costs

    def measure(self) -> None:
        """Run every plan on every prompt, or as many as the time limit allows.

        Raises:
            InputError: the time limit ended before one prompt was done.
            KeyboardInterrupt: it was interrupted before one prompt was done.
        """
        from passlm.bench.measuring.measure import interleave, warm_up

        arguments = self.arguments
        total = len(self.prompts) * len(self.methods)
        with progress_bar() as bar:
            shown = bar.add_task("warm-up", total=total)
            warm_up(self.prompts, self.methods, arguments.max_new_tokens)
            begun = _now()
            with stop_flag() as stopping:
                for turn in interleave(self.prompts, self.methods, arguments.seed):
                    self.samples += turn.run(self.prompts, arguments.max_new_tokens)
                    bar.update(shown, advance=1, description=turn.method.plan or "")
                    over = _now() - begun > arguments.time_limit
                    if (stopping or over) and len(self.samples) < total:
                        self.stopped = "interrupted" if stopping else "time limit"
                        break
        if not self.whole:
            if self.stopped == "interrupted":
                raise KeyboardInterrupt
            raise InputError(
                f"--time-limit of {arguments.time_limit:g} s ended before one prompt was done by "
                f"all {len(self.methods)} plans: raise it, or lower --max-new-tokens"
            )

    @property
    def whole(self) -> int:
        """Number of prompts that all plans have completed."""
        return len(self.samples) // len(self.methods)

    def advised(self, of_prompts: int) -> Advised:
        """Return the verdict on the measured prompts."""
        from passlm.bench.advise import Pilot, advise, batched
        from passlm.bench.engines.methods import baseline_target
        from passlm.bench.measuring.measure import summarize

        arguments = self.arguments
        runs = summarize(
            self.prompts[: self.whole],
            self.samples[: self.whole * len(self.methods)],
            self.methods,
            baseline_target(self.methods),
            arguments.seed,
        )
        curves = self._curves()
        pilot = Pilot.of(runs, curves[1])
        advice = advise(pilot)
        worse = advice.verdict == "no" or advice.best.speedup <= 1
        return Advised(
            advice,
            pilot,
            "--method ar" if worse else advice.best.flags(arguments.lookahead),
            batched(advice.best, curves),
            of_prompts,
            self.stopped,
            arguments.temperature,
            runs,
        )

    def _curves(self) -> dict[int, CostCurve]:
        """Return the cost curve by batch size, for powers of two up to about the requested size."""
        most = 1 if self.stopped == "interrupted" else self.arguments.batch_size
        asked = [2**power for power in range(most.bit_length()) if 2**power < most] + [1, most]
        sizes = {self.costs.size(size, self.context)[0] for size in asked}
        return {size: self.costs.curve(size, self.context) for size in sorted(sizes)}


# Printed text


def screen(advised: Advised) -> str:
    """Return the printed answer: at most 24 lines of 100 columns.

    The flags are on one line, whatever their length, so that they can be copied.
    """
    advice, pilot = advised.advice, advised.pilot
    stopped = f" ({advised.stopped})" if advised.stopped else ""
    lines = [
        f"measured {pilot.prompts} of {advised.of_prompts} prompts{stopped}, {pilot.tokens:,} new "
        f"tokens with each of {1 + len(pilot.plans)} plans, temperature {advised.temperature:g}",
        "",
        *_filled("Is PaSS faster? ", _verdict(advice)),
        f"flags to use:    {advised.flags}",
        *_filled("based on:       ", _sureness(advised)),
        "",
        *_table(pilot),
        "",
        *_filled("costs: ", _costs(pilot)),
    ]
    for reason in advice.reasons[:2]:
        lines += _filled("why:   ", reason.text)
    if advice.verdict != "no":
        lines += _filled("batch: ", _batches(advised))
    return "\n".join(lines)


def _filled(label: str, text: str) -> list[str]:
    """Return a labelled text, wrapped into lines."""
    indent = " " * len(label)
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=indent, break_on_hyphens=False
    )


def _verdict(advice: Advice) -> str:
    ends, best = advice.interval, advice.best
    spread = f" (95 %: {ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    pays = _FOR_PEOPLE[advice.verdict]
    return f"{pays}: {best.title} at {best.speedup:.2f} times the speed of plain decoding{spread}"


def _sureness(advised: Advised) -> str:
    advice, plans = advised.advice, len(advised.pilot.plans)
    basis = f"{advised.pilot.prompts} prompts"
    if plans > 1:
        basis += f"; interval widened because the best of {plans} plans is reported"
    if advice.verdict != "undecided":
        return basis
    if advice.more_prompts is None:
        return f"{basis}; the speeds are so close that more prompts are unlikely to decide it"
    limit = advised.pilot.prompts + advice.more_prompts
    how = f"use --limit {limit} and raise --time-limit accordingly"
    if limit > advised.of_prompts:
        how = f"the file has {advised.of_prompts}"
    return f"{basis}; about {advice.more_prompts} more similar prompts would decide it: {how}"


def _table(pilot: Pilot) -> list[str]:
    lines = [
        f"{'plan':<22}{'tokens/s':>9}{'speed-up (95 %)':>27}{'tokens/pass':>13}{'pass cost':>12}"
        f"{'accepted':>10}",
        f"{'plain decoding':<22}{_plain_rate(pilot):>9.1f}{'1.00':>10}{'':>17}{1:>13.2f}{1:>12.2f}",
    ]
    for plan in sorted(pilot.plans, key=lambda plan: -plan.speedup):
        ends = plan.interval
        spread = f"({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
        lines.append(
            f"{plan.title:<22}{plan.tokens_per_second:>9.1f}{plan.speedup:>10.2f}{spread:>17}"
            f"{plan.tokens_per_pass:>13.2f}{plan.pass_cost:>12.2f}{plan.accepted_length:>10.2f}"
        )
    return lines


def _plain_rate(pilot: Pilot) -> float:
    plan = pilot.plans[0]
    return plan.tokens_per_second / plan.speedup


def _costs(pilot: Pilot) -> str:
    from passlm.bench.advise import relative_cost

    rows = [count for count in (2, 5, 9) if count <= pilot.curve.rows[-1]]
    costs = ", ".join(f"{relative_cost(pilot.curve, count):.2f}" for count in rows)
    named = ", ".join(map(str, rows))
    return (
        f"a pass of {named} rows takes {costs} times as long as a pass of 1 row; prefill takes "
        f"{pilot.reading:.0%} of the time of plain decoding"
    )


def _batches(advised: Advised) -> str:
    from passlm.bench.advise import pays_up_to

    if len(advised.batches) == 1:
        return "measured at batch size 1; --batch-size N adds estimates for larger batches"
    sizes = sorted(advised.batches)
    figures = ", ".join(f"{advised.batches[size]:.2f}" for size in sizes)
    largest = pays_up_to(advised.batches)
    pays = f"be faster up to batch size {largest}"
    if largest is None or largest == 1:
        pays = "not be faster" if largest is None else "be faster at batch size 1 only"
    counts = ", ".join(map(str, sizes))
    return f"estimated to {pays}; speed-up at batch sizes {counts}: {figures}"


def _facts(arguments: argparse.Namespace, lm: Generator, advised: Advised) -> dict[str, Any]:
    """Return all figures, JSON-ready."""
    from passlm.provenance import provenance

    advice, pilot = advised.advice, advised.pilot
    card = None if lm.look_ahead is None else lm.look_ahead.card
    named = ("model", "dtype", "device", "compile", "quantize", "lookahead", "temperature")
    return {
        "verdict": advice.verdict,
        "method": advice.best.method,
        "lookahead_tokens": advice.best.lookahead_tokens,
        "flags": advised.flags,
        "speedup": advice.best.speedup,
        "interval": advice.interval,
        "prompts": pilot.prompts,
        "tokens": pilot.tokens,
        "more_prompts": advice.more_prompts,
        "reasons": [asdict(reason) for reason in advice.reasons],
        "reading_share": pilot.reading,
        "batches": [
            {"batch_size": size, "speedup": speedup} for size, speedup in advised.batches.items()
        ],
        "stopped": advised.stopped,
        "of_prompts": advised.of_prompts,
        "cost_curve": asdict(pilot.curve),
        "prior": None if card is None else list(card.prior),
        "runs": advised.runs,
        "settings": {name: getattr(arguments, name) for name in named},
        "provenance": provenance(),
    }
