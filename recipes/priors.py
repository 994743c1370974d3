r"""What `planning/acceptance.py` believes of candidates before a text has shown anything.

    python recipes/make_prompts.py TEXT TRAINED.jsonl
    python recipes/make_prompts.py TEXT PROMPTS.jsonl --seed 1
    python recipes/priors.py PROMPTS.jsonl --without TRAINED.jsonl --out docs/results/priors.json \
        --card src/passlm/shipped/smollm2-135m/best

The model continues these prompts at several temperatures. (Answers to those of seed 0 are what the
shipped files were trained on: they would be guessed too well.) At every place of each text
all that would have been guessed is compared with what came: by the look-ahead rows, by the draft
head, by the same where it knows the noise, and by prompt lookup. From that come each level's chance
in text of confidence 1, if its odds are proportional to the text's confidence; and, to see whether
they are, the power of the confidence that fits each source best.
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
# "sureness": the draft head by its own probabilities; "knowing": the same given the noise.
SOURCES = ("look-ahead", "head", "sureness", "knowing", "lookup")
_ROUNDS = 1000  # of Newton's method, at most; constants and power take turns
_ENOUGH = 1e-5  # a step of log-odds, or of the power, that is as good as none
_STEP = 1.0  # the longest one
_FURTHEST = 6.0  # log-odds of a level that was always right


@dataclass
class Guesses:
    """What became of guesses: by source and level, the text's confidence and whether it was right.

    Attributes:
        met: all of them.
        texts: how many were looked at.
        left_out: how many were not, since their prompts are too long.
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
        """Compare chains with the text that follows their place.

        Args:
            observed: what the text has shown before.
            chains: what would have been guessed.
            text: what came.
            knowing: what the draft head guesses once it knows the noise.
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
    """Measure and write; gives the exit code."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl")
    made.add_argument("--without", type=Path, metavar="FILE", help="leave out its prompts")
    made.add_argument("--each", type=int, default=4, help="prompts of each kind")
    made.add_argument("--max-new-tokens", type=int, default=96)
    made.add_argument("--temperatures", type=float, nargs="+", default=[0, 0.5, 0.8, 1.0, 1.5])
    made.add_argument("--seed", type=int, default=0, help="of choosing prompts and of all draws")
    made.add_argument("--out", type=Path, metavar="FILE", help="writes this JSON file")
    made.add_argument("--card", type=Path, metavar="DIR", help="note the chances in its card")
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
    """All figures, written where asked.

    Raises:
        InputError: there are no look-ahead files, or the prompts are not what `make_prompts.py`
            writes.
    """
    lm = loaded(arguments)
    if lm.rows is None:
        raise InputError("there are no look-ahead files to measure: name some with --lookahead")
    guesses = Guesses()
    prompts = chosen(arguments.prompts, arguments.without, arguments.each, arguments.seed)
    for number, prompt in enumerate(prompts):
        for temperature in arguments.temperatures:
            sampling = SamplingParams(temperature=temperature, seed=arguments.seed + number)
            listen(lm, prompt, sampling, arguments.max_new_tokens, guesses)
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
    """Put the chances in a card, where `--method auto` begins with them."""
    chances = {
        name: report[source]["chances"]
        for name, source in (("look_ahead", "look-ahead"), ("head", "head"))
    }
    texts = f"{report['texts']} answers to prompts of recipes/make_prompts.py, none trained on"
    card = replace(load(folder).card, chances={**chances, "texts": texts})
    write_atomically(folder / CARD_FILE, card.to_json())


def chosen(path: Path, without: Path | None, each: int, seed: int) -> list[Any]:
    """Some prompts of each kind: text, or messages.

    Args:
        path: of all of them.
        without: those in this file are left out.
        each: how many of a kind, at most.
        seed: of the choice.

    Raises:
        InputError: a line is not JSON, or without a kind or a prompt.
    """
    left_out = [] if without is None else [prompt for _, prompt in read(without)]
    kinds: dict[str, list[Any]] = defaultdict(list)
    for own, prompt in read(path):
        if prompt not in left_out:
            kinds[own].append(prompt)
    draw = random.Random(seed)
    return [prompt for own in kinds.values() for prompt in draw.sample(own, min(each, len(own)))]


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """Kinds and prompts of a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            yield content["kind"], content.get("messages") or content["prompt"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{path}, line {number}: not as make_prompts.py writes them"
            raise InputError(message) from error


def listen(
    lm: Generator, prompt: Any, sampling: SamplingParams, max_new_tokens: int, guesses: Guesses
) -> None:
    """Write one text, a token a pass, and note what would have been guessed at each place."""
    ids = lm.encode(prompt)
    if len(ids) > LONGEST_PROMPT:
        guesses.left_out += 1
        return
    assert lm.rows is not None, "only asked for with look-ahead rows"
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
    """As many guesses of a draft head as it can make."""
    (guessed,) = HeadSampler(head, [hidden], [head.depths]).likeliest([row.tokens], draws)
    tokens, sureness = zip(*guessed, strict=True)
    return Chain(tokens, "head", sureness=sureness)


def fitted(guesses: Guesses, source: str) -> dict[str, Any]:
    """Chances by level, the guesses they rest on, and the power of the confidence that fits best.

    Logistic regression by Newton's method: a constant for each level, and the logarithm of the
    confidence, times 1 for the chances and times what fits best for the power.
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
    """The likeliest log-odds of each level at confidence 1, and the power of the confidence.

    Args:
        levels: logarithms of the confidence, and whether guesses were right, `[N]` each.
        power: to begin with.
        fixed: whether that stays.
    """
    log_odds = [0.0] * len(levels)
    for _ in range(_ROUNDS):
        gradient, curvature, furthest = 0.0, 1e-9, 0.0
        for level, (confidence, right) in enumerate(levels):
            p = (log_odds[level] + power * confidence).sigmoid()
            step = float((right - p).sum() / ((p * (1 - p)).sum() + 1e-9))
            moved = log_odds[level] + max(-_STEP, min(_STEP, step))
            moved = max(-_FURTHEST, min(_FURTHEST, moved))
            furthest, log_odds[level] = max(furthest, abs(moved - log_odds[level])), moved
            p = (moved + power * confidence).sigmoid()
            gradient += float(((right - p) * confidence).sum())
            curvature += float((p * (1 - p) * confidence * confidence).sum())
        if not fixed:
            step = max(-_STEP, min(_STEP, gradient / curvature))
            power += step
            furthest = max(furthest, abs(step))
        if furthest < _ENOUGH:
            return log_odds, power
    raise InputError("too few guesses to tell chances from: take more prompts or temperatures")


if __name__ == "__main__":
    sys.exit(main())
