"""Test that PaSS samples from the distribution of plain decoding, and measure the tests' power.

At each temperature, sequences of plain decoding are compared with sequences of every judge and
method. No two sequences share a seed. As a control, deliberately wrong judges replace the right one
to show that the tests detect them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from passlm.bench.measuring.distribution import (
    CHANCE,
    LEVEL,
    Question,
    Sampler,
    Texts,
    holm,
    noticed,
    p_values,
    questions,
)
from passlm.bench.measuring.judged import JudgedTokens
from passlm.bench.suites.tasks import load_prompts
from passlm.cli import Parser
from passlm.cli.common import (
    add_decoding_arguments,
    add_json_argument,
    add_model_arguments,
    loaded,
    print_json,
)
from passlm.decoding import judge
from passlm.decoding.strategies import Adaptive, Strategy, autoregressive, strategy
from passlm.errors import InputError
from passlm.generate import Generator, Prompt
from passlm.params import METHODS, Judge, SamplingParams
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import CostCurve
from passlm.provenance import provenance, write_together

PROMPTS: tuple[Prompt, ...] = (
    "def is_prime(n):\n",
    [{"role": "user", "content": "Is 7 a prime number? Answer yes or no."}],
    "The city lies on a river",
    [{"role": "user", "content": "Name an animal in one word."}],
)
# Costs in milliseconds from docs/performance.md, so that auto's plans do not depend on a clock.
CURVE = CostCurve(
    (1, 2, 3, 5, 9, 13),
    (23.5, 25.6, 26.9, 28.6, 38.8, 48.9),
    (1, 2, 4, 6),
    (4.7, 4.7, 5.5, 7.0),
    head_seconds=(0.6, 0.6, 1.1),
)
RESULTS, REPORT = "tests.json", "report.md"
NONE = "\N{EN DASH}"
JUDGED = "judged tokens"  # the test of `JudgedTokens`


def main() -> int:
    """Run the tests, print and write the report, and return the exit code (1 on a rejection)."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL; default: four built-in")
    made.add_argument("--limit", type=int, metavar="N", help="number of prompts; default all")
    made.add_argument("--temperature", type=float, nargs="+", default=[0.5, 0.8, 1.0, 1.2])
    made.add_argument("--judge", nargs="+", choices=get_args(Judge), default=get_args(Judge))
    drafting = [method for method in METHODS if method != "ar"]
    made.add_argument("--method", nargs="+", choices=drafting, default=drafting)
    made.add_argument("--lookahead-tokens", type=int, default=2, metavar="N", help="default 2")
    made.add_argument("--samples", type=int, default=250, help="sequences per side and prompt")
    made.add_argument("--max-new-tokens", type=int, default=8, help="per sequence; default 8")
    made.add_argument("--positions", type=int, default=4, help="positions tested singly; default 4")
    made.add_argument("--control-temperature", type=float, nargs="*", default=[1.0])
    made.add_argument("--at-once", type=int, default=32, help="batch size; default 32")
    made.add_argument("--seed", type=int, default=0, help="first seed; default 0")
    made.add_argument("--out", type=Path, metavar="DIR", help=f"write {RESULTS} and {REPORT}")
    add_model_arguments(made, dtype="float32")
    add_decoding_arguments(made)
    add_json_argument(made)
    try:
        return run(made.parse(sys.argv[1:]))
    except InputError as error:
        print(f"same_distribution.py: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    """Run all tests, write the report, and return the exit code.

    Raises:
        InputError: An argument is wrong, or there are no look-ahead files.
    """
    check(arguments)
    given = prompts_of(arguments)
    lm = loaded(arguments)
    if lm.look_ahead is None:
        raise InputError("no look-ahead files are loaded: name some with --lookahead")
    comparison = Comparison(arguments, lm, [tuple(lm.encode(prompt)) for prompt in given])
    for temperature in arguments.temperature:
        comparison.at(temperature)
    results = comparison.results()
    report = markdown(results)
    if arguments.out is not None:
        content = json.dumps(results, indent=1) + "\n"
        write_together({arguments.out / REPORT: report, arguments.out / RESULTS: content})
    sys.stdout.write(report)
    if arguments.json:
        print_json(results)
    return 0 if results["refused"] == 0 else 1


def check(arguments: argparse.Namespace) -> None:
    """Validate the arguments that can be checked before the model is loaded.

    Raises:
        InputError: An argument is out of range.
    """
    for name in ("samples", "max_new_tokens", "at_once", "lookahead_tokens"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(arguments, name)}: it must be 1 or more")
    if not 0 <= arguments.positions <= arguments.max_new_tokens:
        raise InputError(
            f"--positions is {arguments.positions}: it must be between 0 and --max-new-tokens, "
            f"{arguments.max_new_tokens}"
        )
    for temperature in arguments.temperature:
        if SamplingParams(temperature=temperature).temperature == 0:
            raise InputError("--temperature 0 draws nothing at random: give positive temperatures")
    unknown = set(arguments.control_temperature) - set(arguments.temperature)
    if unknown:
        raise InputError(f"--control-temperature {min(unknown)} is not among --temperature")


def prompts_of(arguments: argparse.Namespace) -> list[Prompt]:
    """Return the prompts to continue."""
    if arguments.prompts is None:
        return list(PROMPTS[: arguments.limit])
    tasks = load_prompts(arguments.prompts, arguments.limit)
    return [task.prompt or list(task.messages or ()) for task in tasks]


@dataclass
class WrongJudge:
    """Wrong judge that the tests have to reject; replaces `judge.rejection`.

    Attributes:
        name: Description of the error.
        factor: Candidates are accepted with probability `min(1, factor p / q)`.
        residual_from_p: After a rejection, draw the token from `p` instead of the residual.
        off: Exact total variation distance of each judged token's distribution from `p`.
    """

    name: str
    factor: float = 1.0
    residual_from_p: bool = False
    off: list[float] = field(default_factory=list)

    def __call__(
        self,
        p: judge.Rows,
        q: judge.Rows | None,
        candidates: Sequence[int],
        uniform: Tensor,
        exponential: judge.Rows | None,
    ) -> judge.Verdict:
        """See `judge.rejection`."""
        for at, token in enumerate(candidates):
            assert q is not None, "candidates come with what they were drawn from"
            here, drafted = p[at], q[at]
            passed = torch.minimum(drafted, self.factor * here)  # q(x) times its acceptance rate
            refused = here if self.residual_from_p else judge.residual(here, drafted)
            settled = passed + (1 - passed.sum()) * refused
            self.off.append(float((settled - here).abs().sum() / 2))
            if uniform[at] >= passed[token] / drafted[token]:
                return judge.Verdict(at, drawn(refused, exponential, at))
        last = len(candidates)
        return judge.Verdict(last, drawn(p[last], exponential, last))


def drawn(chances: Tensor, exponential: judge.Rows | None, at: int) -> int:
    """Draw a token with the noise of row `at`."""
    return int(judge.draw(chances, None if exponential is None else exponential[at]))


def wrong_judges() -> list[WrongJudge]:
    """Return the wrong judges, from the smallest error to the largest."""
    return [
        WrongJudge("accepts with min(1, 1.2 p/q)", factor=1.2),
        WrongJudge("draws from p after a refusal", residual_from_p=True),
        WrongJudge("accepts with min(1, 3 p/q)", factor=3.0),
        WrongJudge("accepts every draft", factor=math.inf),
    ]


@contextlib.contextmanager
def in_place(wrong: WrongJudge) -> Iterator[None]:
    """Replace `judge.rejection` with a wrong judge inside the `with` block."""
    right = judge.rejection
    judge.rejection = wrong  # type: ignore[assignment]
    try:
        yield
    finally:
        judge.rejection = right


class Comparison:
    """All tests of a run, with the results so far."""

    def __init__(
        self, arguments: argparse.Namespace, lm: Generator, prompts: list[tuple[int, ...]]
    ) -> None:
        self.arguments = arguments
        self.lm = lm
        self.prompts = prompts
        self.asked: list[Question] = questions(arguments.positions)
        settings = len(arguments.temperature) * len(arguments.judge) * len(arguments.method)
        tests = settings * (len(self.asked) + 1) + len(arguments.judge)
        self.bar = LEVEL / tests  # at or below this, the smallest p-value rejects
        self.shuffles = math.ceil(5 / self.bar)
        self.seeds = count(arguments.seed)  # no two texts share one
        self.judged = {name: JudgedTokens() for name in arguments.judge}
        self.tests: list[dict[str, Any]] = []
        self.controls: list[dict[str, Any]] = []
        self.power: list[dict[str, Any]] = []

    def at(self, temperature: float) -> None:
        """Test every judge and method at one temperature, then compute the tests' power."""
        print_progress(f"temperature {temperature}: plain")
        plain = self.draw("ar", SamplingParams(temperature=temperature), self.arguments.samples)
        for name in self.arguments.judge:
            for method in self.arguments.method:
                print_progress(f"temperature {temperature}: {name}, {method}")
                sampling = SamplingParams(temperature=temperature, judge=name)
                chances, judged = self.compared(plain, method, sampling)
                self.judged[name].add(judged)
                setting = {"temperature": temperature, "judge": name, "method": method}
                self.tests += [
                    {**setting, "test": question.name, "p": chance}
                    for question, chance in zip(self.asked, chances, strict=True)
                ]
                self.tests.append({**setting, **self.of_judged(judged)})
        if temperature in self.arguments.control_temperature:
            for wrong in wrong_judges():
                print_progress(f"temperature {temperature}: a judge that {wrong.name}")
                self.control(plain, temperature, wrong)
        print_progress(f"temperature {temperature}: power of the tests")
        greedy = self.draw("ar", SamplingParams(), 1)
        found = noticed(plain, greedy, self.asked, self.bar, self.arguments.seed)
        self.power += [
            {"temperature": temperature, "test": question.name, **asdict(shift)}
            for question, shift in zip(self.asked, found, strict=True)
        ]

    def control(self, plain: list[Texts], temperature: float, wrong: WrongJudge) -> None:
        """Test a wrong judge in the same way as the right ones."""
        sampling = SamplingParams(temperature=temperature, judge="rejection")
        with in_place(wrong):
            chances, judged = self.compared(plain, "two-pass", sampling)
        names = [*(question.name for question in self.asked), JUDGED]
        chances.append(judged.p_value)
        least = min(range(len(chances)), key=chances.__getitem__)
        self.controls.append(
            {
                "judge": wrong.name,
                "temperature": temperature,
                "method": "two-pass",
                "total_variation": sum(wrong.off) / len(wrong.off),
                "judged": judged.count,
                "excess": judged.excess / judged.count,
                "p": dict(zip(names, chances, strict=True)),
                "least_p": chances[least],
                "test": names[least],
                "refused": chances[least] <= self.bar,
            }
        )

    def compared(
        self, plain: list[Texts], method: str, sampling: SamplingParams
    ) -> tuple[list[float], JudgedTokens]:
        """Return the p-values of a method against plain decoding, and its judged tokens."""
        judged = JudgedTokens()
        texts = self.draw(method, sampling, self.arguments.samples, judged)
        sides = list(zip(plain, texts, strict=True))
        return p_values(sides, self.asked, self.shuffles, self.arguments.seed), judged

    def of_judged(self, judged: JudgedTokens) -> dict[str, Any]:
        """Return the result of the test of judged tokens, with the smallest detectable shift."""
        return {
            "test": JUDGED,
            "p": judged.p_value,
            "judged": judged.count,
            "notices": judged.least_shift(self.bar, CHANCE),
        }

    def draw(
        self,
        method: str,
        sampling: SamplingParams,
        texts: int,
        judged: JudgedTokens | None = None,
    ) -> list[Texts]:
        """Draw sequences for every prompt, each with a different seed."""
        sampler = Sampler(
            self.lm.target,
            None if method == "ar" else self.lm.rows,
            sampling,
            self.plans(method),
            self.lm.eos,
            self.arguments.max_new_tokens,
            self.arguments.at_once,
            judged,
        )
        return [sampler.draw(prompt, list(islice(self.seeds, texts))) for prompt in self.prompts]

    def plans(self, method: str) -> Strategy | Adaptive:
        """Return the strategy of a method."""
        files = self.lm.look_ahead
        assert files is not None, "run() raises without look-ahead files"
        if method == "ar":
            return autoregressive
        if method == "auto":
            return AutoPlan(CURVE, files.card.prior, head=files.card.head_prior)
        return strategy(method, files.group_length(self.arguments.lookahead_tokens, method))

    def results(self) -> dict[str, Any]:
        """Return all results as JSON-serializable data, corrected for multiple tests (Holm)."""
        self.tests += [
            {"temperature": None, "judge": name, "method": None, **self.of_judged(judged)}
            for name, judged in self.judged.items()
        ]
        corrected = holm([test["p"] for test in self.tests])
        for test, chance in zip(self.tests, corrected, strict=True):
            test["holm"] = chance
        names = (
            *("model", "dtype", "lookahead", "temperature", "judge", "method"),
            *("lookahead_tokens", "samples", "max_new_tokens", "positions", "seed"),
        )
        return {
            "provenance": provenance(),
            "settings": {name: getattr(self.arguments, name) for name in names}
            | {
                "prompts": [self.lm.tokenizer.decode(list(prompt)) for prompt in self.prompts],
                "shuffles": self.shuffles,
                "level": LEVEL,
                "bar": self.bar,
            },
            "refused": sum(chance <= LEVEL for chance in corrected),
            "tests": self.tests,
            "controls": self.controls,
            "noticed": self.power,
        }


def print_progress(message: str) -> None:
    """Print a progress message to standard error."""
    print(message, file=sys.stderr, flush=True)


# The report


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    settings, tests = results["settings"], results["tests"]
    least = min(tests, key=lambda test: test["p"])
    parts = [
        "# Same distribution",
        f"For each of {len(settings['prompts'])} prompts, {settings['samples']} sequences of up to "
        f"{settings['max_new_tokens']} tokens from PaSS and from plain decoding. Of {len(tests)} "
        f"tests, {results['refused']} reject that both have the same distribution "
        f"({settings['level']:.0%} family-wise error rate, Holm). The smallest p-value is "
        f"{least['p']:.2g}; with equal distributions, the median of the smallest p-value would be "
        f"{1 - 0.5 ** (1 / len(tests)):.2g}.",
        "The table gives the smallest p-value of each setting, and the same corrected over all "
        "tests (Holm); the number of judged tokens; and the smallest mean shift of a judged token "
        "(total variation, for a judge that accepts too often) that the test of judged tokens "
        f"detects with probability {CHANCE:.0%}. The last rows combine all settings of a judge.",
        table(
            (
                *("temperature", "judge", "method", "smallest p", "test", "corrected"),
                *("judged tokens", "detectable shift"),
            ),
            setting_rows(tests),
        ),
        "## Wrong judges",
        "As a control, wrong judges replace the right one in two-pass decoding. A wrong judge is "
        f"rejected at p up to {settings['bar']:.2g}, the first threshold of the tests above. "
        "'Exact error' is the total variation distance of a judged token's distribution, "
        "computed exactly; 'estimated error' is what the test of judged tokens finds.",
        table(
            (
                *("judge", "temperature", "exact error", "estimated error", "smallest p", "test"),
                *("smallest p of sequence tests", "rejected"),
            ),
            [control_row(control) for control in results["controls"]],
        ),
        "## Power of each test",
        "If a share of the sequences were replaced by the greedy one: the smallest share that the "
        f"test detects with probability {CHANCE:.0%} at that p-value, and the resulting change of "
        "the tested quantity, in total variation.",
        table(("temperature", "test", "share", "total variation"), power_rows(results["noticed"])),
        source(results),
    ]
    return "\n\n".join(parts) + "\n"


def setting_rows(tests: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a table row per setting: its smallest p-value and its judged tokens."""
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for test in tests:
        key = (test["temperature"], test["judge"], test["method"])
        settings.setdefault(key, []).append(test)
    found = []
    for own in settings.values():
        least = min(own, key=lambda test: test["p"])
        judged = next(test for test in own if test["test"] == JUDGED)
        found.append(
            (
                "all" if least["temperature"] is None else f"{least['temperature']:g}",
                least["judge"],
                least["method"] or "all",
                f"{least['p']:.2g}",
                least["test"],
                f"{least['holm']:.2g}",
                f"{judged['judged']:,}",
                NONE if judged["notices"] is None else f"{judged['notices']:.3f}",
            )
        )
    return found


def control_row(control: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the table row of a wrong judge."""
    of_texts = min(chance for name, chance in control["p"].items() if name != JUDGED)
    return (
        control["judge"],
        f"{control['temperature']:g}",
        f"{control['total_variation']:.3f}",
        f"{control['excess']:.3f}",
        f"{control['least_p']:.2g}",
        control["test"],
        f"{of_texts:.2g}",
        "yes" if control["refused"] else "no",
    )


def power_rows(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a table row per test with the smallest detectable shift; a dash if there is none."""
    return [
        (
            f"{shift['temperature']:g}",
            shift["test"],
            NONE if shift["share"] is None else f"{shift['share']:.3f}",
            NONE if shift["share"] is None else f"{shift['total_variation']:.3f}",
        )
        for shift in found
    ]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def source(results: Mapping[str, Any]) -> str:
    """Describe the versions and the command that produced the results."""
    stamp, settings = results["provenance"], results["settings"]
    command = shlex.join(["python", "recipes/same_distribution.py", *stamp["arguments"]])
    packages = stamp["packages"]
    return (
        f"{settings['model']}, {settings['dtype']}; passlm {stamp['passlm']}, commit "
        f"{stamp['commit'] or 'unknown'}, torch {packages['torch']}, transformers "
        f"{packages['transformers']}; {stamp['time']}. `{command}`"
    )


if __name__ == "__main__":
    sys.exit(main())
