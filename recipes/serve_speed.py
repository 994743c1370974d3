"""The server's throughput by the number of streams, `auto` against plain decoding, in turn.

    python recipes/serve_speed.py --out docs/results/serve/speed -- --compile

A round counts until a stream finds no prompt left to ask: what follows would measure the slowest
text and not so many streams.

What stands behind `--` are flags of the model and the engine, for `passlm serve` and, at one
stream, for the same decoding inside this process, as `passlm generate` does it.
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
ANSWER_SECONDS = 600.0  # for the next part of an answer
INSIDE = "inside"  # this process, without a server


@dataclass
class Run:
    """Tokens and seconds of one way to run the prompts, over all rounds."""

    tokens: float = 0.0
    passes: float = 0.0
    seconds: float = 0.0
    rounds: list[float] = field(default_factory=list)

    def add(self, tokens: float, passes: float, seconds: float) -> None:
        """Count one round."""
        self.tokens += tokens
        self.passes += passes
        self.seconds += seconds
        self.rounds.append(round(tokens / seconds, 2))

    @property
    def rate(self) -> float:
        """New tokens a second of all streams together, prompts included in the time."""
        return self.tokens / self.seconds


class Salt:
    """Makes each use of a prompt a new one, so that the server remembers none of it."""

    def __init__(self) -> None:
        self._used = 0

    def __call__(self, task: Task) -> dict[str, Any]:
        """What the next use of a prompt sends."""
        self._used += 1
        if task.prompt is not None:
            return {"prompt": f"# {self._used}\n{task.prompt}"}
        head = {"role": "system", "content": f"Conversation {self._used}."}
        return {"messages": [head, *(task.messages or ())]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; gives the exit code."""
    own, engine = split(sys.argv[1:] if arguments is None else arguments)
    try:
        report = run(parser().parse(own), engine)
    except InputError as error:
        print(f"serve_speed.py: {error}", file=sys.stderr)
        return 2
    print(markdown(report))
    return 0


def parser() -> Parser:
    """The flags."""
    made = Parser(description=__doc__, allow_abbrev=False)
    made.add_argument("--suite", nargs="+", choices=SUITES, default=["humaneval", "chat", "text"])
    made.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8], metavar="N")
    made.add_argument("--prompts", type=int, default=16, help="of each suite, in each round")
    made.add_argument("--rounds", type=int, default=3, help="of all prompts by each method")
    made.add_argument("--max-new-tokens", type=int, default=128)
    made.add_argument("--seed", type=int, default=0, help="of the order")
    made.add_argument("--out", type=Path, metavar="FILE", help="writes FILE.json and FILE.md")
    return made


def run(arguments: argparse.Namespace, engine: Sequence[str]) -> dict[str, Any]:
    """All rows, written as they come.

    Raises:
        InputError: there are not enough prompts to keep all streams busy, or the engine's flags are
            wrong.
    """
    most = max(arguments.streams)
    if arguments.prompts < most:
        raise InputError(f"prompts is {arguments.prompts}: {most} streams take as many at least")
    flags = Parser(prog="behind --", allow_abbrev=False)
    add_model_arguments(flags)
    add_decoding_arguments(flags, compiled=True)  # as passlm serve
    lm = loaded(flags.parse(engine))
    order, salt, rows = random.Random(arguments.seed), Salt(), []
    with Served([*engine, "--max-batch", str(most)]) as server:
        for suite in arguments.suite:
            tasks = load_suite(suite, lm.encode, lm.decode, arguments.prompts)
            for streams in arguments.streams:
                ways = [*METHODS, *(f"{INSIDE} {m}" for m in METHODS if streams == 1)]
                runs = {way: Run() for way in ways}
                warm_up(server, lm, tasks[0], ways, streams, salt)
                for _ in range(arguments.rounds):
                    # Both ways of a method get the same texts; each method its own.
                    asked = {m: [bodied(salt(t), m, arguments) for t in tasks] for m in METHODS}
                    for way in order.sample(ways, len(ways)):
                        measure(server, lm, way, asked[way.split()[-1]], streams, runs[way])
                rows.append(row(suite, streams, runs))
                report = written(arguments, lm, engine, rows)
    return report


def bodied(question: dict[str, Any], method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The body of a greedy request."""
    return question | {
        "temperature": 0,
        "max_tokens": arguments.max_new_tokens,
        "lookahead": {"method": method},
    }


def warm_up(
    server: Served, lm: Generator, task: Task, ways: Sequence[str], streams: int, salt: Salt
) -> None:
    """Everything that happens once happens here."""
    few = argparse.Namespace(max_new_tokens=8)
    for way in ways:
        bodies = [bodied(salt(task), way.split()[-1], few) for _ in range(streams)]
        measure(server, lm, way, bodies, streams, Run())


def measure(
    server: Served,
    lm: Generator,
    way: str,
    bodies: Sequence[dict[str, Any]],
    streams: int,
    into: Run,
) -> None:
    """One round: all prompts, so many at a time."""
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
    """Tokens and passes of one text, decoded here."""
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
    """What came of one request.

    Attributes:
        tokens: new ones.
        passes: that they took.
        events: when each part of it came.
    """

    tokens: int
    passes: int
    events: list[float]

    def share(self, until: float) -> float:
        """The part of it that had come by then, an event being like another."""
        return sum(event <= until for event in self.events) / max(1, len(self.events))


@dataclass
class Heard:
    """A streamed answer as it came: what was read, and when."""

    times: list[float] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)

    def answer(self) -> Answer:
        """What it says."""
        lines = b"".join(self.parts).decode().splitlines()
        *events, end = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert end == "[DONE]", f"the stream ends with {end!r}"
        usage = json.loads(events[-1])["usage"]
        return Answer(usage["completion_tokens"], usage["passlm"]["passes"], self.times)


def through_server(
    server: Served, bodies: Sequence[dict[str, Any]], streams: int
) -> tuple[list[Answer], float]:
    """What came of each text, and when a stream first found none left.

    So many streams take the next prompt as they are done. Client and server share the machine:
    what is read is looked into once all is over, so that it is the server that is measured.
    """
    left = iter(bodies)
    with ThreadPoolExecutor(streams) as threads:
        taken = list(threads.map(lambda _: stream(server, left), range(streams)))
    return [heard.answer() for part, _ in taken for heard in part], min(e for _, e in taken)


def stream(server: Served, left: Iterator[dict[str, Any]]) -> tuple[list[Heard], float]:
    """One stream, and when it was done."""
    with closing(HTTPConnection(HOST, server.port, timeout=ANSWER_SECONDS)) as connection:
        answers = [hear(connection, server.model, body) for body in left]
    return answers, time.perf_counter()


def hear(connection: HTTPConnection, model: str, body: dict[str, Any]) -> Heard:
    """Send a request and read its stream.

    Raises:
        RefusedError: the server answered with an error.
        OSError: the connection broke.
    """
    path, streamed = streaming(model, body)
    connection.request("POST", path, json.dumps(streamed), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != HTTPStatus.OK:
        raise RefusedError(response.status, response.read().decode())
    heard = Heard()
    while part := response.read1():
        heard.times.append(time.perf_counter())
        heard.parts.append(part)
    return heard


def row(suite: str, streams: int, runs: dict[str, Run]) -> dict[str, Any]:
    """What was measured of a suite with so many streams."""
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
    """The report so far, on disk where it was asked for."""
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
    """The same for people."""
    lines = [
        "# Throughput of the server",
        "",
        f"`passlm serve {' '.join(report['flags'])}`: new tokens a second of all streams together, "
        "reading the prompts included, as long as all of them are busy; "
        f"{report['prompts']} prompts of each suite, rounds: {report['rounds']}, "
        f"{report['max_new_tokens']} new tokens, greedy, the methods in turn. No prompt was met "
        "before by the server.",
        "",
        "| prompts | streams | plain | auto | auto over plain | tokens a pass, auto |",
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
        lines += ["", "One stream of the server against the same decoding without one:", ""]
        lines += ["| prompts | plain | auto |", "| --- | ---: | ---: |"]
    for each in single:
        shares = (f"{100 * each['server_over_inside'][method]:.1f} %" for method in METHODS)
        lines.append(f"| {each['suite']} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
