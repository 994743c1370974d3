"""Many clients at once for minutes, some hanging up; then each kept text once more, alone.

    python recipes/load_test.py --out docs/results/serve/load -- --dtype float32 --max-batch 8

What stands behind `--` goes to `passlm serve`. Ends with code 1 where a request failed, a text
differs from the same request alone, rows are left, or memory grew by more than 3 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from served import Client, RefusedError, Reply, Served, ask, split

from passlm.cli import Parser
from passlm.errors import InputError
from passlm.provenance import provenance, write_atomically

SOURCES = Path(__file__).parents[1] / "src" / "passlm"
SHORTEST = 40  # characters of a prompt
FEWEST = 8  # new tokens
MEMORY_GROWTH = 0.03
SETTLE_SECONDS = 30
ROWS = ("passlm_running_texts", "passlm_waiting_texts")


@dataclass
class Tally:
    """What happened.

    Attributes:
        kept: requests with what came of them, those that were read to their end.
        samples: seconds since the start, resident bytes, and the server's metrics.
    """

    sent: int = 0
    hung_up: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    kept: list[tuple[dict[str, Any], Reply]] = field(default_factory=list)
    samples: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; gives the exit code."""
    own, flags = split(sys.argv[1:] if arguments is None else arguments)
    try:
        chosen = parser().parse(own)
        report = run(chosen, flags)
    except InputError as error:
        print(f"load_test.py: {error}", file=sys.stderr)
        return 2
    text = markdown(report)
    print(text)
    if chosen.out is not None:
        write_atomically(chosen.out.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
        write_atomically(chosen.out.with_suffix(".md"), text)
    return 0 if report["passed"] else 1


def parser() -> Parser:
    """The flags."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--minutes", type=float, default=5.0)
    made.add_argument(
        "--warm-up",
        type=float,
        default=1.0,
        metavar="MINUTES",
        help="of the same load before them, after which memory should stay; default 1",
    )
    made.add_argument("--hang-up", type=float, default=1 / 3, help="share of requests; default 1/3")
    made.add_argument("--sampled", type=float, default=0.25, help="share drawn with a seed")
    made.add_argument("--longest", type=int, default=3000, help="characters of a prompt")
    made.add_argument("--max-new-tokens", type=int, default=256)
    made.add_argument("--alone", type=int, metavar="N", help="texts asked for again; default all")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, metavar="FILE", help="writes FILE.json and FILE.md")
    return made


def run(arguments: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """The whole test; gives what is reported."""
    tally = Tally()
    with Served(flags) as server:
        begun = time.monotonic()
        asyncio.run(load(server, arguments, tally))
        seconds = time.monotonic() - begun
        left = rows_left(server)
        again = tally.kept[: arguments.alone]
        equal = asyncio.run(alone(server, again, tally))
    return summary(arguments, flags, tally, seconds, left, equal, len(again))


async def load(server: Served, arguments: argparse.Namespace, tally: Tally) -> None:
    """All clients until the time is over; texts under way then are read to their ends."""
    until = time.monotonic() + 60 * (arguments.warm_up + arguments.minutes)
    async with server.client(arguments.clients) as client:
        watch = asyncio.create_task(sample(server, tally))
        await asyncio.gather(
            *(
                visits(client, random.Random(f"{arguments.seed} {number}"), arguments, until, tally)
                for number in range(arguments.clients)
            )
        )
        watch.cancel()


async def visits(
    client: Client,
    rng: random.Random,
    arguments: argparse.Namespace,
    until: float,
    tally: Tally,
) -> None:
    """One client: a request after another."""
    while time.monotonic() < until:
        body = request(rng, arguments)
        events = seconds = None
        if rng.random() < arguments.hang_up:
            events = rng.randint(1, 1 + body["max_tokens"] // 4)  # a pass may give several tokens
            seconds = rng.uniform(0.1, 20.0)  # in which a request that waits has met no event
        tally.sent += 1
        try:
            async with asyncio.timeout(seconds):
                reply = await ask(client, body, events)
        except TimeoutError:
            tally.hung_up += 1
        except RefusedError as error:
            if error.status == httpx.codes.TOO_MANY_REQUESTS:
                tally.refused += 1
                await asyncio.sleep(min(error.retry_after, 5.0))
            else:
                tally.failures.append(str(error))
        except httpx.HTTPError as error:
            tally.failures.append(f"{type(error).__name__}: {error}")
        else:
            if reply.usage is None:
                tally.hung_up += 1
            else:
                tally.kept.append((body, reply))


def request(rng: random.Random, arguments: argparse.Namespace) -> dict[str, Any]:
    """Something to go on from, or to answer: a cut of the package's own code."""
    file = rng.choice(sorted(SOURCES.rglob("*.py")))
    source = file.read_text(encoding="utf-8") or "import os\n"
    start = rng.randrange(len(source))
    text = source[start : start + spread(rng, SHORTEST, arguments.longest)]
    new_tokens = spread(rng, FEWEST, arguments.max_new_tokens)
    body: dict[str, Any] = {"max_tokens": new_tokens, "temperature": 0}
    if rng.random() < arguments.sampled:
        body |= {"temperature": 0.8, "seed": rng.randrange(2**31)}
    if rng.random() < 0.5:
        return body | {"prompt": text}
    return body | {"messages": [{"role": "user", "content": f"What does this do?\n\n{text}"}]}


def spread(rng: random.Random, least: int, most: int) -> int:
    """Whole numbers whose logarithms are spread evenly."""
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


async def sample(server: Served, tally: Tally) -> None:
    """Note memory and metrics once a second."""
    process, begun = psutil.Process(server.pid), time.monotonic()
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        tally.samples.append((time.monotonic() - begun, process.memory_info().rss, metrics))
        await asyncio.sleep(1.0)


def rows_left(server: Served) -> int:
    """Texts that the server still runs or keeps waiting once all clients are gone."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        metrics = server.metrics()
        left = int(sum(metrics[name] for name in ROWS))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


async def alone(server: Served, kept: Sequence[tuple[dict[str, Any], Reply]], tally: Tally) -> int:
    """How many texts come out the same, one request at a time."""
    equal = 0
    async with server.client(1) as client:
        for body, before in kept:
            reply = await ask(client, body)
            same = reply.text == before.text and reply.tokens == before.tokens
            equal += same
            if not same:
                tally.failures.append(f"differs alone: {json.dumps(body)[:200]}")
    return equal


def summary(
    arguments: argparse.Namespace,
    flags: Sequence[str],
    tally: Tally,
    seconds: float,
    left: int,
    equal: int,
    compared: int,
) -> dict[str, Any]:
    """Everything that was found, JSON-ready."""
    growth = memory_growth(tally.samples, 60 * arguments.warm_up, seconds)
    firsts = [reply.chunks[0] for _, reply in tally.kept]
    passed = not tally.failures and not left and equal == compared
    return {
        "provenance": provenance(sys.argv[1:]),
        "server": list(flags),
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "warm_up_seconds": round(60 * arguments.warm_up, 1),
        "sent": tally.sent,
        "finished": len(tally.kept),
        "hung_up": tally.hung_up,
        "refused": tally.refused,
        "failed": len(tally.failures),
        "failures": tally.failures[:20],
        "tokens": sum(reply.tokens for _, reply in tally.kept),
        "seconds_to_first_event": quantiles(firsts),
        "compared_alone": compared,
        "equal_alone": equal,
        "rows_left": left,
        "memory_growth": growth,
        "memory": [[round(at), rss >> 20] for at, rss, _ in tally.samples[::5]],
        "metrics": tally.samples[-1][2] if tally.samples else {},
        "passed": passed and (growth is None or growth <= MEMORY_GROWTH),
    }


def memory_growth(
    samples: Sequence[tuple[float, int, dict[str, float]]], warm: float, seconds: float
) -> float | None:
    """How much the mean of the last minute lies above the first one's behind the warm-up.

    None where there are not three minutes behind it.

    Args:
        samples: seconds since the start, resident bytes, metrics.
        warm: seconds of warming up.
        seconds: of everything.
    """
    if seconds < warm + 180:
        return None
    first = [rss for at, rss, _ in samples if warm <= at < warm + 60]
    last = [rss for at, rss, _ in samples if at >= seconds - 60]
    return statistics.mean(last) / statistics.mean(first) - 1


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the slowest ones."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"50 %": round(cuts[49], 3), "90 %": round(cuts[89], 3), "99 %": round(cuts[98], 3)}


def markdown(report: dict[str, Any]) -> str:
    """The same for people."""
    growth = report["memory_growth"]
    memory = "too short" if growth is None else f"{growth:+.1%}"
    firsts = report["seconds_to_first_event"]
    rows = {
        "clients": report["clients"],
        "seconds": report["seconds"],
        "of these to warm up": report["warm_up_seconds"],
        "requests sent": report["sent"],
        "read to their end": report["finished"],
        "hung up midway": report["hung_up"],
        "refused, the queue being full (429)": report["refused"],
        "failed": report["failed"],
        "equal to the same request alone": f"{report['equal_alone']} of {report['compared_alone']}",
        "rows left": report["rows_left"],
        "memory, last minute over first after warm-up": memory,
        "new tokens of those read to their end": report["tokens"],
        "seconds to the first event, " + ", ".join(firsts): ", ".join(map(str, firsts.values())),
    }
    head = f"# Load test\n\n`passlm serve {' '.join(report['server'])}`\n\n| | |\n| --- | ---: |\n"
    body = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return head + body


if __name__ == "__main__":
    sys.exit(main())
