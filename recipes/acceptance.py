"""Measure the accepted length of look-ahead rows or of the draft head on the benchmark suites.

Candidates of look-ahead rows are verified in a separate pass (two-pass decoding), candidates of the
draft head in every pass.

The JSON file is written after every result row, and a Markdown table beside it at the end. The
batch stays full: when a sequence finishes, the next prompt takes its place. Acceptance depends on
neither the batch size nor the speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from passlm.bench.engines.methods import check_head
from passlm.bench.suites.tasks import SUITES, Task, TaskError, load_suite
from passlm.cli import Parser
from passlm.cli.common import add_model_arguments
from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import ByHead, strategy
from passlm.decoding.text import Row
from passlm.errors import InputError
from passlm.generate import Generator, load, set_threads
from passlm.lookahead.trained import CARD_FILE, LookAhead
from passlm.lookahead.trained import load as load_rows
from passlm.outputs import Stats
from passlm.params import Draft, Judge, SamplingParams, StopParams
from passlm.provenance import provenance, write_atomically
from passlm.train.report import model_card

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "acceptance"
FIXED_TOKEN = "fixed-token"
DEFAULT_SUITES = "humaneval,code,text,chat"
KEY = ("suite", "temperature", "judge", "draft")


@dataclass(frozen=True)
class Suite:
    """Prompts of a suite that leave room in the context for the new tokens.

    Attributes:
        name: the suite's name.
        prompts: token ids of each prompt.
        skipped: number of prompts that are too long.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    skipped: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    try:
        run(parser().parse(sys.argv[1:] if arguments is None else arguments))
    except (InputError, OSError) as error:
        print(f"acceptance.py: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> Parser:
    """Return the argument parser."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--lookahead", required=True, help=f"packaged name, folder or {FIXED_TOKEN}")
    made.add_argument("--suite", default=DEFAULT_SUITES, help=f"default {DEFAULT_SUITES}")
    made.add_argument("--limit", type=int, metavar="N", help="prompts per suite; default all")
    made.add_argument("--max-new-tokens", type=int, default=128)
    made.add_argument("--lookahead-tokens", type=int, default=4)
    made.add_argument("--drafts", choices=("rows", "head"), default="rows", help="draft source")
    made.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    made.add_argument("--judge", nargs="+", choices=get_args(Judge), default=get_args(Judge))
    made.add_argument("--draft", nargs="+", choices=get_args(Draft), default=get_args(Draft))
    made.add_argument("--top-k", type=int, default=10)
    made.add_argument("--seed", type=int, default=0, help="seed of the first prompt; default 0")
    made.add_argument("--batch", type=int, default=16, help="batch size; default 16")
    made.add_argument("--compile", action="store_true", help="run passes compiled")
    made.add_argument(
        "--out", type=Path, metavar="FILE", help="default: in docs/results/acceptance"
    )
    made.add_argument("--card", type=Path, metavar="DIR", help="add greedy results to its card")
    made.add_argument("--resume", action="store_true", help="keep the result rows in FILE")
    add_model_arguments(made)
    return made


def run(arguments: argparse.Namespace) -> None:
    """Measure every result row that is missing, and write the JSON file after each.

    Raises:
        InputError: An argument cannot be used. Raised before the first measurement.
    """
    check(arguments)
    set_threads(arguments.threads)
    lm = loaded(arguments)
    assert lm.look_ahead is not None, "loaded() raises without look-ahead files"
    asked = settings(arguments, lm.look_ahead)
    if arguments.card:
        check_card(arguments.card, lm.look_ahead)
    out = arguments.out or RESULTS / f"{asked['lookahead']}.json"
    content = begun(out, asked, arguments.resume)
    suites = [fitting(lm, name, arguments) for name in listed(arguments.suite)]
    for suite in suites:
        for key in keys(suite.name, arguments):
            if not any(key.items() <= row.items() for row in content["rows"]):
                row = {**key, **measure(lm, suite, arguments, key)}
                content["rows"].append(row)
                write_atomically(out, json.dumps(content, indent=1) + "\n")
                print(line(row), file=sys.stderr, flush=True)
    write_atomically(out.with_suffix(".md"), table(content))
    if arguments.card:
        note(arguments.card, content)


def check(arguments: argparse.Namespace) -> None:
    """Validate the arguments that can be checked before the model is loaded.

    Raises:
        InputError: An argument is out of range, or `--card` is given without temperature 0.
        TaskError: A suite is unknown.
    """
    for name in listed(arguments.suite):
        if name not in SUITES:
            raise TaskError(f"no suite {name!r}: choose from {','.join(SUITES)}")
    for name in ("batch", "limit", "lookahead_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be 1 or more")
    StopParams(arguments.max_new_tokens)
    for key in keys("", arguments):
        sampling(arguments, key, arguments.seed)
    if arguments.card and 0 not in arguments.temperature:
        raise InputError("--card records greedy results: give temperature 0 as well")


def listed(text: str) -> list[str]:
    """Split a comma-separated list and drop duplicates."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def loaded(arguments: argparse.Namespace) -> Generator:
    """Return the model with the chosen look-ahead rows.

    Raises:
        InputError: There are no look-ahead rows, the tokenizer has no token for `fixed-token`, or
            `--lookahead-tokens` does not fit the rows or the draft head.
    """
    fixed = arguments.lookahead == FIXED_TOKEN
    name = "none" if fixed else arguments.lookahead
    lm = load(
        arguments.model,
        lookahead=name,
        dtype=arguments.dtype,
        device=arguments.device,
        compile=arguments.compile,
    )
    if fixed:
        token: Any = lm.tokenizer.unk_token_id
        token = lm.tokenizer.eos_token_id if token is None else token
        if token is None:
            raise InputError("the tokenizer has no unknown or end token, which fixed-token needs")
        count = arguments.lookahead_tokens
        rows = LookAhead.fixed_token(lm.target, int(token), count, arguments.model)
        lm = Generator(lm.target, lm.tokenizer, rows)
    if lm.look_ahead is None:
        raise InputError(f"--lookahead {name} has no look-ahead rows: there is nothing to measure")
    if arguments.drafts == "head":
        check_head(lm.look_ahead, arguments.lookahead_tokens)
    else:
        lm.look_ahead.group_length(arguments.lookahead_tokens)
    return lm


def decoder_for(lm: Generator) -> Decoder:
    """Return a decoder with an empty batch and the model's look-ahead rows."""
    assert lm.look_ahead is not None, "loaded() raises without look-ahead files"
    return Decoder(lm.target, lm.look_ahead.rows(lm.target))


# Settings, and resuming a file with the same settings


def settings(arguments: argparse.Namespace, rows: LookAhead) -> dict[str, Any]:
    """Return the settings that all result rows of a file share."""
    names = ("model", "dtype", "limit", "max_new_tokens", "lookahead_tokens", "top_k", "seed")
    by_head = arguments.drafts == "head"
    return {
        "lookahead": Path(arguments.lookahead).resolve().name,
        "lookahead_sha256": rows.digest(by_head),
        "drafts": arguments.drafts,
        **{name: getattr(arguments, name) for name in names},
        **({"compile": True} if arguments.compile else {}),  # older files lack this key
    }


def begun(out: Path, asked: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """Return the content of `out` to resume from, or new content if it does not exist.

    Raises:
        InputError: The file exists and `resume` is False, or it was written with other settings.
    """
    if not out.exists():
        return {"provenance": [provenance()], "settings": dict(asked), "rows": []}
    if not resume:
        raise InputError(f"{out} exists: choose another file with --out, or add --resume")
    try:
        content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        found = content["settings"]
        other = [name for name in {**asked, **found} if asked.get(name) != found.get(name)]
        content["provenance"] = [*content["provenance"], provenance()]
        complete = all(name in row for row in content["rows"] for name in KEY)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{out} does not hold results of this recipe: choose another file with --out"
        ) from error
    if other or not complete:
        name = other[0] if other else "rows"
        told = f"{found.get(name)!r}, not {asked.get(name)!r}" if other else "incomplete"
        raise InputError(
            f"{out} cannot be resumed, its {name} is {told}: choose another file with --out"
        )
    return content


def keys(suite: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the key of each result row of a suite.

    Temperature 0 has a single row, since judges and kinds of draft agree in greedy decoding.
    """
    for temperature in dict.fromkeys(arguments.temperature):
        pairs = [(judge, draft) for judge in arguments.judge for draft in arguments.draft]
        for judge, draft in [("coupled", "greedy")] if temperature == 0 else dict.fromkeys(pairs):
            yield dict(zip(KEY, (suite, temperature, judge, draft), strict=True))


# Measuring


def fitting(lm: Generator, name: str, arguments: argparse.Namespace) -> Suite:
    """Return a suite's prompts as token ids, without those that are too long.

    Raises:
        InputError: The suite's package is missing, the model has no chat template, or no prompt
            fits the context.
    """
    tokenizer: Any = lm.tokenizer

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def ids(task: Task) -> tuple[int, ...]:
        return tuple(lm.encode(task.prompt if task.prompt else list(task.messages or ())))

    tasks = load_suite(name, encode, tokenizer.decode, arguments.limit)
    every = [ids(task) for task in tasks]
    context = lm.target.context
    fit = [p for p in every if context is None or len(p) + arguments.max_new_tokens <= context]
    if not fit:
        raise InputError(
            f"no prompt of suite {name!r} leaves room for {arguments.max_new_tokens} tokens in "
            f"the context of {context}: lower --max-new-tokens or leave the suite out"
        )
    return Suite(name, tuple(fit), len(every) - len(fit))


def measure(
    lm: Generator, suite: Suite, arguments: argparse.Namespace, key: Mapping[str, Any]
) -> dict[str, Any]:
    """Decode a suite with one setting and return the counts of its result row."""
    tokens = arguments.lookahead_tokens
    plan = strategy("two-pass", tokens) if arguments.drafts == "rows" else ByHead(tokens)
    requests = [
        Request.of(
            prompt,
            sampling(arguments, key, arguments.seed + number),
            arguments.max_new_tokens,
            plan,
            lm.eos,
        )
        for number, prompt in enumerate(suite.prompts)
    ]
    started = time.perf_counter()
    total = Stats.total(decode(decoder_for(lm), requests, arguments.batch))
    seconds = time.perf_counter() - started
    accepted, reached = total.accepted_by_position, total.judged_by_position
    return {
        "prompts": len(suite.prompts),
        "skipped": suite.skipped,
        "tokens": total.tokens,
        "judging_passes": total.judging_passes,
        "accepted_length": total.accepted_length,
        "accepted_by_position": [count / total.judging_passes for count in accepted],
        "accepted_of_reached": [
            part / whole if whole else None for part, whole in zip(accepted, reached, strict=True)
        ],
        "seconds": round(seconds, 1),
    }


def sampling(arguments: argparse.Namespace, key: Mapping[str, Any], seed: int) -> SamplingParams:
    """Return the sampling parameters of one prompt."""
    return SamplingParams(
        temperature=key["temperature"],
        top_k=arguments.top_k,
        judge=key["judge"],
        draft=key["draft"],
        seed=seed,
    )


def decode(decoder: Decoder, requests: Sequence[Request], batch: int) -> list[Stats]:
    """Decode all requests, at most `batch` at a time, and return the counts of each."""
    stats = [Stats(prompt_tokens=len(request.prompt)) for request in requests]
    waiting = iter(zip(requests, stats, strict=True))
    under_way: dict[Row, Stats] = {}
    while True:
        while len(decoder.rows) < batch and (following := next(waiting, None)):
            request, counts = following
            under_way[decoder.join(request)] = counts
        if not decoder.rows:
            return stats
        for row, step in decoder.step():
            under_way[row].count(step)
            if step.finish_reason:
                del under_way[row]


# Output


def line(row: Mapping[str, Any]) -> str:
    """Return a progress line for one result row."""
    key = " ".join(str(row[name]) for name in KEY)
    speed = row["tokens"] / max(row["seconds"], 0.1)
    length, tokens = row["accepted_length"], row["tokens"]
    return f"{key}: accepted length {length:.3f}, {tokens} tokens, {speed:.1f} tokens/s"


def table(content: Mapping[str, Any]) -> str:
    """Return a Markdown table of accepted lengths: one line per suite, one column per setting."""
    rows, asked = content["rows"], content["settings"]
    found = {tuple(row[name] for name in KEY): row for row in rows}
    columns = list(dict.fromkeys(key[1:] for key in found))
    head = [column(*drawn) for drawn in columns]
    lines = [f"| suite | prompts | {' | '.join(head)} |", "| --- |" + " ---: |" * (1 + len(head))]
    for suite in dict.fromkeys(key[0] for key in found):
        of_suite = [found.get((suite, *drawn)) for drawn in columns]
        prompts = next(row["prompts"] for row in of_suite if row)
        cells = ["" if row is None else f"{row['accepted_length']:.3f}" for row in of_suite]
        lines.append(f"| {suite} | {prompts} | {' | '.join(cells)} |")
    source = (
        f"Mean accepted length of {asked['lookahead']} on {asked['model']}: {_drafting(asked)}, "
        f"{asked['max_new_tokens']} new tokens, "
        f"top-k {asked['top_k']}, {asked['dtype']}."
    )
    return "\n".join([source, "", *lines, ""])


def column(temperature: float, judge: str, draft: str) -> str:
    """Return the heading of a column."""
    return "greedy" if temperature == 0 else f"T = {temperature:g}, {judge}, {draft} drafts"


def _drafting(asked: Mapping[str, Any]) -> str:
    """Describe the draft source."""
    tokens = asked["lookahead_tokens"]
    by_head = asked["drafts"] == "head"
    return f"draft head, {tokens} tokens" if by_head else f"two-pass, L = {tokens}"


def check_card(folder: Path, rows: LookAhead) -> None:
    """Check that the folder whose card is updated holds the look-ahead files being measured.

    Raises:
        InputError: It holds other look-ahead files.
    """
    kept = load_rows(folder)
    if kept.digest() != rows.digest():
        raise InputError(f"--card {folder} holds other look-ahead files than those measured")


def note(folder: Path, content: Mapping[str, Any]) -> None:
    """Add the greedy results of each suite to a folder's card and rewrite its README."""
    asked = content["settings"]
    figures = {
        f"{row['suite']}, greedy, {asked['max_new_tokens']} tokens, "
        f"L={asked['lookahead_tokens']}": {
            "accepted_length": round(row["accepted_length"], 3),
            "by_position": [round(share, 3) for share in row["accepted_by_position"]],
            "prompts": row["prompts"],
        }
        for row in content["rows"]
        if row["temperature"] == 0
    }
    card = load_rows(folder).card
    if asked["drafts"] == "head":
        head = dict(card.head or {})
        measured = {**head.get("accepted_length", {}), **figures}
        card = replace(card, head={**head, "accepted_length": measured})
    else:
        card = replace(card, accepted_length={**card.accepted_length, **figures})
    write_atomically(folder / CARD_FILE, card.to_json())
    write_atomically(folder / "README.md", model_card(card))


if __name__ == "__main__":
    sys.exit(main())
