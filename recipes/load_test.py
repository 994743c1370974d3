"""Load-test the server with many concurrent clients, some of which disconnect early.

    python recipes/load_test.py --out docs/results/serve/load -- --dtype float32 --max-batch 8

Afterwards, each completed request is sent again on its own to compare the outputs. Flags after `--`
go to `passlm serve`. The exit code is 1 if a request fails, an output differs from that of the same
request sent alone, batch rows remain in use, or memory grows by more than 3 %.
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
    """Counts and samples of a run.

    Attributes:
        sent: Number of requests.
        hung_up: Number of requests whose client disconnected early.
        refused: Number of requests rejected with status 429.
        failures: Description of each failure.
        kept: Completed requests with their replies.
        samples: Seconds since the start, resident bytes and server metrics, once a second.
    """

    sent: int = 0
    hung_up: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    kept: list[tuple[dict[str, Any], Reply]] = field(default_factory=list)
    samples: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load test, print and write the report, and return the exit code."""
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
    """Return the argument parser."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--minutes", type=float, default=5.0)
    made.add_argument(
        "--warm-up",
        type=float,
        default=1.0,
        metavar="MINUTES",
        help="duration of the same load before the test, after which memory use should not grow; "
        "default 1",
    )
    made.add_argument("--hang-up", type=float, default=1 / 3, help="share of requests; default 1/3")
    made.add_argument("--sampled", type=float, default=0.25, help="share sampled with a seed")
    made.add_argument("--longest", type=int, default=3000, help="maximum prompt characters")
    made.add_argument("--max-new-tokens", type=int, default=256)
    made.add_argument("--alone", type=int, metavar="N", help="requests to repeat; default all")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, metavar="FILE", help="writes FILE.json and FILE.md")
    return made


def run(arguments: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Run the whole test and return the report."""
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
    """Run all clients until the time is over; requests in progress are then read to the end."""
    until = time.monotonic() + 60 * (arguments.warm_up + arguments.minutes)
    async with server.client(arguments.clients) as client:
        watch = asyncio.create_task(sample(server, tally))
        await asyncio.gather(
            *(
                send_requests(
                    client, random.Random(f"{arguments.seed} {number}"), arguments, until, tally
                )
                for number in range(arguments.clients)
            )
        )
        watch.cancel()


async def send_requests(
    client: Client,
    rng: random.Random,
    arguments: argparse.Namespace,
    until: float,
    tally: Tally,
) -> None:
    """Act as one client: send one request after another until the time `until`."""
    while time.monotonic() < until:
        body = request(rng, arguments)
        events = seconds = None
        if rng.random() < arguments.hang_up:
            events = rng.randint(1, 1 + body["max_tokens"] // 4)  # a pass may return several tokens
            seconds = rng.uniform(0.1, 20.0)  # also ends requests still in the queue
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
    """Return the body of a random completion or chat request about the package's own code."""
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
    """Draw an integer from `least` to `most` whose logarithm is uniformly distributed."""
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


async def sample(server: Served, tally: Tally) -> None:
    """Record memory and metrics once a second."""
    process, begun = psutil.Process(server.pid), time.monotonic()
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        tally.samples.append((time.monotonic() - begun, process.memory_info().rss, metrics))
        await asyncio.sleep(1.0)


def rows_left(server: Served) -> int:
    """Return the number of sequences still running or waiting after all clients have left.

    Waits up to `SETTLE_SECONDS` for the number to reach zero.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        metrics = server.metrics()
        left = int(sum(metrics[name] for name in ROWS))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


async def alone(server: Served, kept: Sequence[tuple[dict[str, Any], Reply]], tally: Tally) -> int:
    """Send the completed requests again, one at a time, and return how many outputs are equal."""
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
    """Return the report as JSON-serializable data."""
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
    """Return the relative growth of memory from the first minute after the warm-up to the last.

    Compares the means of the two minutes. None if the test lasts less than three minutes after the
    warm-up.

    Args:
        samples: Seconds since the start, resident bytes, metrics.
        warm: Seconds of the warm-up.
        seconds: Total seconds.
    """
    if seconds < warm + 180:
        return None
    first = [rss for at, rss, _ in samples if warm <= at < warm + 60]
    last = [rss for at, rss, _ in samples if at >= seconds - 60]
    return statistics.mean(last) / statistics.mean(first) - 1


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the 50th, 90th and 99th percentiles; empty for fewer than two values."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"50 %": round(cuts[49], 3), "90 %": round(cuts[89], 3), "99 %": round(cuts[98], 3)}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    growth = report["memory_growth"]
    memory = "too short" if growth is None else f"{growth:+.1%}"
    firsts = report["seconds_to_first_event"]
    rows = {
        "clients": report["clients"],
        "seconds": report["seconds"],
        "of which warm-up": report["warm_up_seconds"],
        "requests sent": report["sent"],
        "completed": report["finished"],
        "disconnected early": report["hung_up"],
        "rejected because the queue was full (429)": report["refused"],
        "failed": report["failed"],
        "equal to the same request alone": f"{report['equal_alone']} of {report['compared_alone']}",
        "rows left": report["rows_left"],
        "memory, last minute over first after warm-up": memory,
        "new tokens of completed requests": report["tokens"],
        "seconds to the first event, " + ", ".join(firsts): ", ".join(map(str, firsts.values())),
    }
    head = f"# Load test\n\n`passlm serve {' '.join(report['server'])}`\n\n| | |\n| --- | ---: |\n"
    body = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return head + body


if __name__ == "__main__":
    sys.exit(main())
