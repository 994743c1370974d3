r"""Estimate the prior acceptance rates that `planning/acceptance.py` starts a sequence with.

    python recipes/make_prompts.py TEXT TRAINED.jsonl
    python recipes/make_prompts.py TEXT PROMPTS.jsonl --seed 1
    python recipes/priors.py PROMPTS.jsonl --without TRAINED.jsonl --out docs/results/priors.json \
        --card src/passlm/shipped/smollm2-135m/best

The model continues the prompts at several temperatures. (The packaged files were trained on answers
to the prompts of seed 0; measured on these, acceptance would be too high.) At every position, the
candidates of each source are compared with the tokens that follow: of the look-ahead rows, of the
draft head, of the draft head given the sampling noise, and of prompt lookup.

The result is the acceptance probability of each level at confidence 1, under the assumption that
its odds are proportional to the sequence's confidence. To check the assumption, the power of the
confidence that fits each source best is estimated as well.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passlm.cli import Parser
from passlm.cli.common import add_decoding_arguments, add_model_arguments, loaded
from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.text import Row
from passlm.drafts.draft_head import AppliedHead, DraftHeadDrafter, HeadSampler
from passlm.drafts.drawing import known_noise
from passlm.drafts.look_ahead import LookAheadDrafter
from passlm.drafts.prompt_lookup import PromptLookup
from passlm.drafts.sampler_head import Draws
from passlm.errors import InputError
from passlm.generate import Generator
from passlm.lookahead.trained import CARD_FILE, load
from passlm.params import SamplingParams
from passlm.plan import Chain, Plan
from passlm.planning.acceptance import Observed, kind_of
from passlm.planning.auto import LONGEST_LOOKUP
from passlm.provenance import provenance, write_atomically

LONGEST_PROMPT = 600  # tokens; longer ones are left out
# "sureness": the draft head, graded by its own probabilities; "knowing": the same given the noise.
SOURCES = ("look-ahead", "head", "sureness", "knowing", "lookup")
_MAX_ROUNDS = 1000  # of Newton's method, which alternates between constants and power
_TOLERANCE = 1e-5  # of the log-odds and the power, below which the method has converged
_MAX_STEP = 1.0  # of the log-odds and the power
_MAX_LOG_ODDS = 6.0  # of a level whose candidates were always accepted


@dataclass
class Guesses:
    """Outcomes of candidates.

    Attributes:
        met: Pairs of the sequence's confidence and whether the candidate was right, by source and
            level.
        texts: Number of sequences measured.
        left_out: Number of sequences left out because their prompts are too long.
    """

    met: dict[tuple[str, int], list[tuple[float, bool]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    texts: int = 0
    left_out: int = 0

    def note(
        self,
        observed: Observed,
        chains: Sequence[Chain],
        text: Sequence[int],
        knowing: Chain | None = None,
    ) -> None:
        """Compare candidates with the tokens that follow their position.

        Args:
            observed: Statistics of the sequence before this position.
            chains: Candidates of each source.
            text: Tokens that follow.
            knowing: Candidates of the draft head given the sampling noise.
        """
        told: list[tuple[str, Chain]] = [(kind_of(chain)[0], chain) for chain in chains]
        told += [("head", Chain(c.tokens, c.source)) for c in chains if c.sureness]
        told += [] if knowing is None else [("knowing", knowing)]
        for source, chain in told:
            levels = kind_of(chain)[1]
            for level, guess, token in zip(levels, chain.tokens, text, strict=False):
                self.met[source, level].append((observed.confidence, guess == token))
                if guess != token:
                    break


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement, write the results, and return the exit code."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl")
    made.add_argument("--without", type=Path, metavar="FILE", help="prompts to leave out")
    made.add_argument("--each", type=int, default=4, help="prompts per kind")
    made.add_argument("--max-new-tokens", type=int, default=96)
    made.add_argument("--temperatures", type=float, nargs="+", default=[0, 0.5, 0.8, 1.0, 1.5])
    made.add_argument("--seed", type=int, default=0, help="seed of choice and sampling")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    made.add_argument("--card", type=Path, metavar="DIR", help="store the priors in its card")
    add_model_arguments(made)
    add_decoding_arguments(made)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        report = run(made.parse(given), given)
    except (InputError, OSError) as error:
        print(f"priors.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: report[name] for name in ("texts", *SOURCES)}, indent=1))
    return 0


def run(arguments: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """Measure, write the requested files, and return the report.

    Raises:
        InputError: There are no look-ahead files, or the prompts are not in the format that
            `make_prompts.py` writes.
    """
    lm = loaded(arguments)
    if lm.rows is None:
        raise InputError("there are no look-ahead files to measure: name some with --lookahead")
    guesses = Guesses()
    prompts = chosen(arguments.prompts, arguments.without, arguments.each, arguments.seed)
    for number, prompt in enumerate(prompts):
        for temperature in arguments.temperatures:
            sampling = SamplingParams(temperature=temperature, seed=arguments.seed + number)
            measure(lm, prompt, sampling, arguments.max_new_tokens, guesses)
        print(f"{number + 1} of {len(prompts)} prompts", file=sys.stderr)
    report: dict[str, Any] = {"texts": guesses.texts, "left_out": guesses.left_out}
    report |= {source: fitted(guesses, source) for source in SOURCES}
    report["provenance"] = provenance(given)
    if arguments.out is not None:
        write_atomically(arguments.out, json.dumps(report, indent=1) + "\n")
    if arguments.card is not None:
        note(arguments.card, report)
    return report


def note(folder: Path, report: Mapping[str, Any]) -> None:
    """Store the acceptance probabilities in a card; `--method auto` uses them as its prior."""
    chances = {
        name: report[source]["chances"]
        for name, source in (("look_ahead", "look-ahead"), ("head", "head"))
    }
    texts = f"{report['texts']} answers to prompts of recipes/make_prompts.py, none trained on"
    card = replace(load(folder).card, chances={**chances, "texts": texts})
    write_atomically(folder / CARD_FILE, card.to_json())


def chosen(path: Path, without: Path | None, each: int, seed: int) -> list[Any]:
    """Choose prompts of each kind at random; a prompt is text or a list of messages.

    Args:
        path: File with all prompts.
        without: File with prompts to leave out.
        each: Maximum number of prompts per kind.
        seed: Seed of the choice.

    Raises:
        InputError: A line is not JSON, or lacks a kind or a prompt.
    """
    left_out = [] if without is None else [prompt for _, prompt in read(without)]
    kinds: dict[str, list[Any]] = defaultdict(list)
    for own, prompt in read(path):
        if prompt not in left_out:
            kinds[own].append(prompt)
    draw = random.Random(seed)
    return [prompt for own in kinds.values() for prompt in draw.sample(own, min(each, len(own)))]


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the kind and the prompt of each line of a file.

    Raises:
        InputError: A line is not JSON, or lacks a kind or a prompt.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            yield content["kind"], content.get("messages") or content["prompt"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{path}, line {number}: not in the format that make_prompts.py writes"
            raise InputError(message) from error


def measure(
    lm: Generator, prompt: Any, sampling: SamplingParams, max_new_tokens: int, guesses: Guesses
) -> None:
    """Decode one sequence, one token per pass, and record the candidates at each position."""
    ids = lm.encode(prompt)
    if len(ids) > LONGEST_PROMPT:
        guesses.left_out += 1
        return
    assert lm.rows is not None, "run() raises without look-ahead rows"
    length = len(lm.rows.inputs)

    def drafting(candidates: int, longest_group: int) -> Plan:
        return Plan(0, (min(length, longest_group),))

    highest: list[float] = []

    def look(row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        p = row.request.distribution(logits[:1], row.tokens)
        highest.append(float(p.max()))

    decoder = Decoder(lm.target, lm.rows, look)
    row = decoder.join(Request.of(ids, sampling, max_new_tokens, drafting, lm.eos))
    places: list[tuple[int, list[Chain], Chain | None]] = []
    while decoder.rows:
        decoder.step()
        if decoder.rows:
            places.append((len(row.tokens), list(drafted(decoder, row)), knowing(decoder, row)))
    guesses.texts += 1
    observed, lookup = Observed((), ()), PromptLookup()
    for (place, chains, best), probability in zip(places, highest, strict=False):
        observed.count([], [], [probability])
        found, evidence = lookup.find(row.tokens[:place], LONGEST_LOOKUP)
        copied = [Chain(tuple(found), "lookup", evidence)] if found else []
        guesses.note(observed, [*chains, *copied], row.tokens[place:], best)


def drafted(decoder: Decoder, row: Row) -> Iterator[Chain]:
    """Yield the candidates of the look-ahead rows and of the draft head for the next pass."""
    for drafter in decoder.drafters:
        if isinstance(drafter, LookAheadDrafter):
            yield from filter(None, drafter.propose([row]))
        elif isinstance(drafter, DraftHeadDrafter):
            hidden = drafter.hidden(row)
            if hidden is not None:
                yield by_head(drafter.head, hidden, row)


def knowing(decoder: Decoder, row: Row) -> Chain | None:
    """Return the draft head's candidates given the sampling noise; None for greedy decoding."""
    drafter = next((own for own in decoder.drafters if isinstance(own, DraftHeadDrafter)), None)
    hidden = None if drafter is None else drafter.hidden(row)
    if drafter is None or hidden is None or row.guessing != "knowing":
        return None
    head = drafter.head
    draws = known_noise([row], [head.depths], len(head.inputs), head.places, sureness=True)
    return by_head(head, hidden, row, draws)


def by_head(head: AppliedHead, hidden: Tensor, row: Row, draws: Draws | None = None) -> Chain:
    """Return the candidates of a draft head, as many as it has depths."""
    (guessed,) = HeadSampler(head, [hidden], [head.depths]).likeliest([row.tokens], draws)
    tokens, sureness = zip(*guessed, strict=True)
    return Chain(tokens, "head", sureness=sureness)


def fitted(guesses: Guesses, source: str) -> dict[str, Any]:
    """Return acceptance probabilities by level, candidate counts, and the best-fitting power.

    Logistic regression by Newton's method, with a constant for each level and the logarithm of the
    confidence as regressor. Its coefficient is 1 for the probabilities, and is fitted for the
    power.
    """
    found = sorted(level for counted, level in guesses.met if counted == source)
    levels = []
    for level in found:
        confidence, right = zip(*guesses.met[source, level], strict=True)
        levels.append((torch.tensor(confidence).double().log(), torch.tensor(right).double()))
    log_odds, _ = newton(levels, 1.0, fixed=True)
    varied = any(bool((confidence != confidence[0]).any()) for confidence, _ in levels)
    power = newton(levels, 1.0, fixed=False)[1] if varied else None
    return {
        "levels": found,
        "chances": [round(1 / (1 + math.exp(-value)), 3) for value in log_odds],
        "guesses": [len(right) for _, right in levels],
        "power": None if power is None else round(power, 2),
    }


def newton(
    levels: Sequence[tuple[Tensor, Tensor]], power: float, fixed: bool
) -> tuple[list[float], float]:
    """Return the most likely log-odds of each level at confidence 1 and the power of confidence.

    Args:
        levels: Logarithms of the confidence and outcomes of the candidates (1 if right, else 0),
            each `[N]`.
        power: Initial power.
        fixed: Keep the power at its initial value.

    Raises:
        InputError: The method does not converge.
    """
    log_odds = [0.0] * len(levels)
    for _ in range(_MAX_ROUNDS):
        gradient, curvature, furthest = 0.0, 1e-9, 0.0
        for level, (confidence, right) in enumerate(levels):
            p = (log_odds[level] + power * confidence).sigmoid()
            step = float((right - p).sum() / ((p * (1 - p)).sum() + 1e-9))
            moved = log_odds[level] + max(-_MAX_STEP, min(_MAX_STEP, step))
            moved = max(-_MAX_LOG_ODDS, min(_MAX_LOG_ODDS, moved))
            furthest, log_odds[level] = max(furthest, abs(moved - log_odds[level])), moved
            p = (moved + power * confidence).sigmoid()
            gradient += float(((right - p) * confidence).sum())
            curvature += float((p * (1 - p) * confidence * confidence).sum())
        if not fixed:
            step = max(-_MAX_STEP, min(_MAX_STEP, gradient / curvature))
            power += step
            furthest = max(furthest, abs(step))
        if furthest < _TOLERANCE:
            return log_odds, power
    raise InputError(
        "too few candidates to estimate acceptance probabilities: use more prompts or temperatures"
    )


if __name__ == "__main__":
    sys.exit(main())
