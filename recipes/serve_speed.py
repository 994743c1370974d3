"""Measure the server's throughput by number of concurrent streams, `auto` against plain decoding.

    python recipes/serve_speed.py --out docs/results/serve/speed -- --compile

The methods run in random order in each round. A round is measured until the first stream finds no
prompt left: after that, fewer streams are busy, and the slowest request would dominate.

Flags after `--` configure model and engine of `passlm serve`. With one stream, the same decoding is
also measured inside this process, as `passlm generate` runs it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from served import HOST, RefusedError, Served, split, streaming

from passlm.bench.suites.tasks import SUITES, Task, load_suite
from passlm.cli import Parser
from passlm.cli.common import add_decoding_arguments, add_model_arguments, loaded
from passlm.errors import InputError
from passlm.generate import Generator, Options
from passlm.outputs import Stats
from passlm.params import SamplingParams, StopParams
from passlm.provenance import provenance, write_atomically

METHODS = ("ar", "auto")
ANSWER_SECONDS = 600.0  # timeout for the next part of a response
INSIDE = "inside"  # decoding in this process, without a server


@dataclass
class Run:
    """Counts of one way to run the prompts, over all rounds.

    Attributes:
        tokens: New tokens.
        passes: Passes of the target model.
        seconds: Duration.
        rounds: Throughput of each round, in new tokens per second.
    """

    tokens: float = 0.0
    passes: float = 0.0
    seconds: float = 0.0
    rounds: list[float] = field(default_factory=list)

    def add(self, tokens: float, passes: float, seconds: float) -> None:
        """Add the counts of one round."""
        self.tokens += tokens
        self.passes += passes
        self.seconds += seconds
        self.rounds.append(round(tokens / seconds, 2))

    @property
    def rate(self) -> float:
        """Throughput of all streams together, prefill included, in new tokens per second."""
        return self.tokens / self.seconds


class UniquePrompts:
    """Make each use of a prompt unique, so that the server finds none of it in its prefix cache."""

    def __init__(self) -> None:
        self._used = 0

    def __call__(self, task: Task) -> dict[str, Any]:
        """Return the part of a request body that holds the prompt, with a new number in it."""
        self._used += 1
        if task.prompt is not None:
            return {"prompt": f"# {self._used}\n{task.prompt}"}
        head = {"role": "system", "content": f"Conversation {self._used}."}
        return {"messages": [head, *(task.messages or ())]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement, print and write the report, and return the exit code."""
    own, engine = split(sys.argv[1:] if arguments is None else arguments)
    try:
        report = run(parser().parse(own), engine)
    except InputError as error:
        print(f"serve_speed.py: {error}", file=sys.stderr)
        return 2
    print(markdown(report))
    return 0


def parser() -> Parser:
    """Return the argument parser."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--suite", nargs="+", choices=SUITES, default=["humaneval", "chat", "text"])
    made.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8], metavar="N")
    made.add_argument("--prompts", type=int, default=16, help="per suite and round")
    made.add_argument("--rounds", type=int, default=3, help="each runs all prompts by each method")
    made.add_argument("--max-new-tokens", type=int, default=128)
    made.add_argument("--seed", type=int, default=0, help="seed of the order")
    made.add_argument("--out", type=Path, metavar="FILE", help="writes FILE.json and FILE.md")
    return made


def run(arguments: argparse.Namespace, engine: Sequence[str]) -> dict[str, Any]:
    """Measure all rows, write the report after each, and return it.

    Raises:
        InputError: There are too few prompts to keep all streams busy, or the engine's flags are
            wrong.
    """
    most = max(arguments.streams)
    if arguments.prompts < most:
        raise InputError(f"--prompts is {arguments.prompts}: {most} streams need at least {most}")
    flags = Parser(prog="after --", allow_abbrev=False)
    add_model_arguments(flags)
    add_decoding_arguments(flags, compiled=True)  # as passlm serve
    lm = loaded(flags.parse(engine))
    order, unique, rows = random.Random(arguments.seed), UniquePrompts(), []
    with Served([*engine, "--max-batch", str(most)]) as server:
        for suite in arguments.suite:
            tasks = load_suite(suite, lm.encode, lm.decode, arguments.prompts)
            for streams in arguments.streams:
                ways = [*METHODS, *(f"{INSIDE} {m}" for m in METHODS if streams == 1)]
                runs = {way: Run() for way in ways}
                warm_up(server, lm, tasks[0], ways, streams, unique)
                for _ in range(arguments.rounds):
                    # With and without a server, a method gets the same requests; each method its
                    # own, as the server would find those of the other in its prefix cache.
                    bodies = {
                        m: [request_body(unique(t), m, arguments) for t in tasks] for m in METHODS
                    }
                    for way in order.sample(ways, len(ways)):
                        measure(server, lm, way, bodies[way.split()[-1]], streams, runs[way])
                rows.append(row(suite, streams, runs))
                report = written(arguments, lm, engine, rows)
    return report


def request_body(
    prompt: dict[str, Any], method: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the body of a greedy request."""
    return prompt | {
        "temperature": 0,
        "max_tokens": arguments.max_new_tokens,
        "lookahead": {"method": method},
    }


def warm_up(
    server: Served,
    lm: Generator,
    task: Task,
    ways: Sequence[str],
    streams: int,
    unique: UniquePrompts,
) -> None:
    """Trigger one-time work, such as compiling, before the measured rounds."""
    few = argparse.Namespace(max_new_tokens=8)
    for way in ways:
        bodies = [request_body(unique(task), way.split()[-1], few) for _ in range(streams)]
        measure(server, lm, way, bodies, streams, Run())


def measure(
    server: Served,
    lm: Generator,
    way: str,
    bodies: Sequence[dict[str, Any]],
    streams: int,
    into: Run,
) -> None:
    """Run one round of all requests, `streams` at a time, and add its counts to `into`."""
    begun = time.perf_counter()
    if way.startswith(INSIDE):
        counts = [inside(lm, body) for body in bodies]
        seconds = time.perf_counter() - begun
        into.add(sum(tokens for tokens, _ in counts), sum(passes for _, passes in counts), seconds)
    else:
        answers, ended = through_server(server, bodies, streams)
        shares = [(answer, answer.share(ended)) for answer in answers]
        into.add(
            sum(answer.tokens * share for answer, share in shares),
            sum(answer.passes * share for answer, share in shares),
            ended - begun,
        )


def inside(lm: Generator, body: dict[str, Any]) -> tuple[int, int]:
    """Decode one request in this process; return the numbers of new tokens and passes."""
    options = Options.checked(
        lm.look_ahead,
        SamplingParams(),
        StopParams(max_new_tokens=body["max_tokens"]),
        body["lookahead"]["method"],
    )
    stats = Stats()
    prompt = lm.encode(body["prompt"] if "prompt" in body else body["messages"])
    for _ in lm.stream_ids(prompt, options, stats):
        pass
    return stats.tokens, stats.passes


@dataclass
class Answer:
    """Result of one request.

    Attributes:
        tokens: Number of new tokens.
        passes: Number of passes.
        events: Time at which each part of the response arrived, in seconds.
    """

    tokens: int
    passes: int
    events: list[float]

    def share(self, until: float) -> float:
        """Return the share of the response received by the time `until`, each event alike."""
        return sum(event <= until for event in self.events) / max(1, len(self.events))


@dataclass
class RawStream:
    """Unparsed streamed response.

    Attributes:
        times: Time of each read, in seconds.
        parts: Bytes of each read.
    """

    times: list[float] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)

    def answer(self) -> Answer:
        """Parse the response."""
        lines = b"".join(self.parts).decode().splitlines()
        *events, end = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert end == "[DONE]", f"the stream ends with {end!r}"
        usage = json.loads(events[-1])["usage"]
        return Answer(usage["completion_tokens"], usage["passlm"]["passes"], self.times)


def through_server(
    server: Served, bodies: Sequence[dict[str, Any]], streams: int
) -> tuple[list[Answer], float]:
    """Send all requests over `streams` connections.

    Each stream takes the next request when it has finished one. Client and server share the
    machine, so responses are parsed only at the end, when this cannot slow the server.

    Returns:
        The result of each request, and the time at which a stream first found no request left.
    """
    left = iter(bodies)
    with ThreadPoolExecutor(streams) as threads:
        taken = list(threads.map(lambda _: stream(server, left), range(streams)))
    return [raw.answer() for part, _ in taken for raw in part], min(e for _, e in taken)


def stream(server: Served, left: Iterator[dict[str, Any]]) -> tuple[list[RawStream], float]:
    """Send requests over one connection until none is left; return responses and end time."""
    with closing(HTTPConnection(HOST, server.port, timeout=ANSWER_SECONDS)) as connection:
        answers = [read_stream(connection, server.model, body) for body in left]
    return answers, time.perf_counter()


def read_stream(connection: HTTPConnection, model: str, body: dict[str, Any]) -> RawStream:
    """Send a request and read its stream.

    Raises:
        RefusedError: The server answered with an error.
        OSError: The connection broke.
    """
    path, streamed = streaming(model, body)
    connection.request("POST", path, json.dumps(streamed), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != HTTPStatus.OK:
        raise RefusedError(response.status, response.read().decode())
    raw = RawStream()
    while part := response.read1():
        raw.times.append(time.perf_counter())
        raw.parts.append(part)
    return raw


def row(suite: str, streams: int, runs: dict[str, Run]) -> dict[str, Any]:
    """Return the results of a suite at one number of streams."""
    found: dict[str, Any] = {
        "suite": suite,
        "streams": streams,
        "auto_over_ar": runs["auto"].rate / runs["ar"].rate,
    }
    for way, counted in runs.items():
        found[way] = {
            "tokens_per_second": counted.rate,
            "tokens": counted.tokens,
            "passes": counted.passes,
            "seconds": counted.seconds,
            "rounds": counted.rounds,
        }
    if streams == 1:
        found["server_over_inside"] = {
            method: runs[method].rate / runs[f"{INSIDE} {method}"].rate for method in METHODS
        }
    return found


def written(
    arguments: argparse.Namespace, lm: Generator, engine: Sequence[str], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the report so far; write it if `--out` is given."""
    report = {
        "provenance": provenance(sys.argv[1:]),
        "engine": lm.target.engine,
        "flags": list(engine),
        "prompts": arguments.prompts,
        "rounds": arguments.rounds,
        "max_new_tokens": arguments.max_new_tokens,
        "rows": rows,
    }
    if arguments.out is not None:
        write_atomically(arguments.out.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
        write_atomically(arguments.out.with_suffix(".md"), markdown(report))
    return report


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Throughput of the server",
        "",
        f"`passlm serve {' '.join(report['flags'])}`: new tokens per second of all streams "
        "together, prefill included, measured while all streams are busy. "
        f"{report['prompts']} prompts per suite, rounds: {report['rounds']}, "
        f"{report['max_new_tokens']} new tokens, greedy, the methods interleaved. No prompt was in "
        "the server's prefix cache.",
        "",
        "| prompts | streams | plain | auto | auto over plain | tokens per pass, auto |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in report["rows"]:
        rates = [each[method]["tokens_per_second"] for method in METHODS]
        block = each["auto"]["tokens"] / each["auto"]["passes"]
        lines.append(
            f"| {each['suite']} | {each['streams']} | {rates[0]:.1f} | {rates[1]:.1f} | "
            f"{each['auto_over_ar']:.2f} | {block:.2f} |"
        )
    single = [each for each in report["rows"] if "server_over_inside" in each]
    if single:
        lines += ["", "One stream of the server against the same decoding without a server:", ""]
        lines += ["| prompts | plain | auto |", "| --- | ---: | ---: |"]
    for each in single:
        shares = (f"{100 * each['server_over_inside'][method]:.1f} %" for method in METHODS)
        lines.append(f"| {each['suite']} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
