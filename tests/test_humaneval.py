"""HumanEval's programs are judged rightly, and what they do stays in their process."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from passlm.bench.suites import sandbox
from passlm.bench.suites.humaneval import (
    HumanEvalError,
    Limits,
    Problem,
    SandboxError,
    Verdict,
    check_sandbox,
    completion_body,
    load_problems,
    mean_pass_at_k,
    pass_at_k,
    pass_at_k_interval,
    run_program,
    score,
)
from passlm.bench.suites.tasks import TaskError, load_suite

SHORT = Limits(seconds=1)  # for what must time out; all else gets more, for slow machines
SMALL = Limits(seconds=20, memory_bytes=2**28)
ANSWER = Problem(
    task_id="own/answer",
    prompt='def answer():\n    """Say 42."""\n',
    entry_point="answer",
    test="def check(candidate):\n    assert candidate() == 42\n",
)
RIGHT, WRONG = "    return 42\n", "    return 41\n"

confined = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in sandbox.MACHINES,
    reason="programs are run on Linux on x86-64 and ARM64 alone",
)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """HumanEval itself."""
    try:
        return load_problems()
    except TaskError as error:
        pytest.skip(str(error))


def ended(*lines: str, limits: Limits = SMALL) -> Verdict:
    """The verdict on a body that does these things and then answers rightly."""
    body = "".join(f"    {line}\n" for line in lines)
    return run_program(ANSWER, body + RIGHT, limits)


def altered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = "") -> Path:
    """Run another copy of the inside, told by its path or with something changed."""
    source = Path(sandbox.__file__).read_text()
    assert source.count(old) >= 1
    place = tmp_path / "inside.py"
    place.write_text(source.replace(old, new, 1))
    monkeypatch.setattr(sandbox, "__file__", str(place))
    return place


def running(place: Path) -> list[int]:
    """Processes with this path on their command line."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [p.info["pid"] for p in found if str(place) in (p.info["cmdline"] or ())]


def ended_process(process: psutil.Process) -> bool:
    """Whether it runs no more, even if nobody has asked how it ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# Problems and completions


def test_problems_are_the_suites(problems: list[Problem]) -> None:
    """Catches problems scored in another order, or with other prompts, than were completed."""
    tasks = load_suite("humaneval", lambda text: [], lambda ids: "")
    assert [(p.task_id, p.prompt) for p in problems] == [(t.name, t.prompt) for t in tasks]
    assert all(f"def {p.entry_point}(" in p.prompt for p in problems)
    assert all("def check(candidate)" in p.test for p in problems)


@pytest.mark.parametrize(
    "behind",
    [
        "def other():\n    return 1\n",
        "class Other:\n    pass\n",
        "# Test\nassert answer() == 42\n",
        "@cache\ndef other():\n    pass\n",
        "if __name__ == '__main__':\n    answer()\n",
        "print(answer())\n",
        "assert answer() == 42",
        "```\nThis doesn't do more (yet.",
        "    ```\nprose",
        "The function's answer is 42.",
        "\x0cdef other():\n    pass\n",
        '"""A string."""\n',
    ],
)
def test_a_completion_ends_with_its_function(behind: str) -> None:
    """Catches text behind the function being run, which fails right answers."""
    for gap in ("", "\n\n", "  \n\t\n"):
        assert completion_body(ANSWER.prompt, RIGHT + gap + behind) == RIGHT + gap


@pytest.mark.parametrize(
    "body",
    [
        "    words = [\n'a',\n\n'b', # (\n]\n    return 42\n",
        '    text = """\ndef no():\n# "\n\\""" still\n"""\n    return 42',
        "    text = '''a\n\"\"\"\nb'''\n    return 42\n",
        "    return 40 + \\\n2\n",
        "    text = 'it\\'s (' + \"\\\\\"\n    return 42\n",
        "    text = 'a\\\nb'\n    return 42\n",
        "    # it's fine (\n    return 42\n",
        "\n   \n\n    return 42\n\n",
        "\treturn 42\r\n\r\n\treturn 43\r\n",
        "    return f'{1:{2}}'  # }",
        "",
    ],
)
def test_what_belongs_to_the_function_is_kept(body: str) -> None:
    """Catches a cut within brackets, strings or continued lines, which fails right answers."""
    assert completion_body(ANSWER.prompt, body) == body
    ends = body if body.endswith("\n") else body + "\n"
    assert completion_body(ANSWER.prompt, ends + "def other(): pass") == ends


@pytest.mark.parametrize(
    ("prompt", "text", "kept"),
    [
        (ANSWER.prompt, "\ndef other(): pass", "\n"),
        (ANSWER.prompt, "def answer():\n    return 42\nprint()", "def answer():\n    return 42\n"),
        ("def f(a,\n", "b):\n    return 42\nf(1, 2)", "b):\n    return 42\n"),
        ("def f():\n    return 4", "2\nf()", "2\n"),
        (ANSWER.prompt, "    return ')'\n)\n", "    return ')'\n"),
    ],
)
def test_a_completion_goes_on_from_its_prompt(prompt: str, text: str, kept: str) -> None:
    """Catches a cut at the start, or one that knows nothing of a bracket left open before."""
    assert completion_body(prompt, text) == kept


def test_canonical_solutions_are_not_cut(problems: list[Problem]) -> None:
    """Catches a cut into any of the 164 solutions that are known to be right."""
    for problem in problems:
        text = problem.canonical_solution
        assert completion_body(problem.prompt, text) == text
        cut = completion_body(problem.prompt, text + problem.test)
        assert cut.rstrip() == text.rstrip()


# Verdicts


@confined
def test_right_solutions_pass_and_others_fail(problems: list[Problem]) -> None:
    """Catches a check that is never run, and a sandbox that refuses what solutions need."""
    chosen = problems[::13]
    assert len(chosen) >= 12
    for problem in [*chosen, problems[162]]:  # that one needs hashlib, and so a system's library
        assert run_program(problem, problem.canonical_solution).passed, problem.task_id
        assert not run_program(problem, "    return None\n").passed, problem.task_id


@confined
@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (RIGHT, "passed", ""),
        (WRONG, "failed", "AssertionError"),
        ("    def f(x: int): ...\n    return 42 * (f.__annotations__['x'] is int)\n", "passed", ""),
        ("    return (\n", "failed", "SyntaxError"),
        ("    return '\x00'\n", "failed", "null bytes"),
        ("    return '\ud800'\n", "failed", "UnicodeEncodeError"),
        ("    import no_such_module\n", "failed", "ModuleNotFoundError"),
        ("    return input()\n", "failed", "EOFError"),
        ("    return answer()\n", "failed", "RecursionError"),
        ("    import sys; sys.exit(0)\n", "failed", "SystemExit"),
        ("    import os; os._exit(0)\n", "failed", "before the check"),
        ("    import ctypes; ctypes.string_at(0)\n", "failed", "SIGSEGV"),
        ("    raise KeyboardInterrupt\n", "failed", "KeyboardInterrupt"),
        ("    raise Exception('a\\nb' + '\\x1b' * 10 ** 6)\n", "failed", "Exception: a b"),
        ("    raise type('E', (Exception,), {'__str__': 1})\n", "failed", "cannot be printed"),
    ],
)
def test_verdicts(body: str, kind: str, reason: str) -> None:
    """Catches a wrong answer that passes, above all by ending before the check does."""
    verdict = run_program(ANSWER, body, SMALL)
    assert verdict.kind == kind
    assert reason in verdict.reason
    assert len(verdict.reason) <= sandbox.LONGEST_REASON
    assert verdict.reason.isprintable()
    assert verdict.passed == (kind == "passed")


@confined
def test_what_a_pass_looks_like_is_not_told() -> None:
    """Catches a pass that a program can claim by printing it wherever it can."""
    lines = ("for end in range(64):", "  try: os.write(end, b'passed\\n')", "  except OSError: 0")
    for first in ("0", "os.write(1, b'contained\\n')"):
        assert not ended("import os", first, *lines, "os._exit(0)").passed


@confined
def test_programs_are_the_same_each_time() -> None:
    """Catches a verdict that depends on a salted hash: sets of strings have another order."""
    body = "    global seen\n    seen = list({'a', 'b', 'c', 'd', 'e'})\n    return 42\n"
    problem = Problem("own/order", ANSWER.prompt, "answer", ANSWER.test + "    assert 0, seen\n")
    assert len({run_program(problem, body).reason for _ in range(4)}) == 1


# Containment. Every program here does little harm where it is not contained.


@pytest.mark.slow
@confined
@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("timed out", ("while True: pass",)),
        ("timed out", ("import time", "time.sleep(60)")),
        ("timed out", ("while True:", "  try:", "    while True: 1 / 0", "  except: pass")),
        ("timed out", ("import os", "os.closerange(0, 64)", "while True: pass")),
        ("timed out", ("return 10 ** 10 ** 9",)),
        ("out of memory", ("return bytes(2**30)",)),
        ("out of memory", ("a = []", "for n in range(100): a.append(b'x' * 10**7)")),
        ("printed too much", ("while True: print('x' * 10 ** 6)",)),
        ("printed too much", ("import sys", "while True: sys.stderr.write('x' * 10 ** 5)")),
        ("printed too much", ("import os", "while True: os.write(3, b'x' * 4096)")),
        ("forbidden", ("import threading", "threading.Thread(target=print).start()")),
        ("forbidden", ("import os", "os.system('true')")),
        ("forbidden", ("import os", "os.execv('/bin/true', ['true'])")),
        ("forbidden", ("open('/dev/null', 'w')",)),
        ("failed", ("import os", "os.kill(os.getppid(), 0)")),
    ],
)
def test_hostile_programs_are_stopped(kind: str, lines: tuple[str, ...]) -> None:
    """Catches a program that takes the machine's time, memory or disk, or ends its processes."""
    started = time.monotonic()
    assert ended(*lines, limits=SHORT if kind == "timed out" else SMALL).kind == kind
    assert time.monotonic() - started < 10


@confined
@pytest.mark.parametrize(
    "lines",
    [
        ("for _ in range(3): os.fork()", "time.sleep(60)"),
        ("if os.fork() == 0: (os.setsid(), os.fork(), time.sleep(60))",),
        ("os.posix_spawn('/bin/sleep', ['sleep', '60', PLACE], {})",),
        ("try: os.setsid()", "except OSError: os.fork()", "time.sleep(60)"),
    ],
)
def test_nothing_survives(
    lines: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches processes left behind, those of another session or another program among them."""
    place = altered(tmp_path, monkeypatch)
    lines = tuple(line.replace("PLACE", repr(str(place))) for line in lines)
    assert ended("import os, time", *lines).kind == "forbidden"
    assert running(place) == []


@confined
def test_a_program_ends_with_who_started_it(tmp_path: Path) -> None:
    """Catches programs that run on after the bench was killed."""
    starter = (
        "import json, subprocess, sys, time\n"
        "inside = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE,\n"
        "                          stderr=subprocess.PIPE)\n"
        "asked = {'source': 'import time; time.sleep(60)', 'token': '', 'cpu_seconds': 9}\n"
        "inside.stdin.write(json.dumps(asked | {'memory_bytes': 2**30}).encode())\n"
        "inside.stdin.close()\n"
        "inside.stderr.readline()\n"
        "print(inside.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", starter, sandbox.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        inside = psutil.Process(int(process.stdout.readline()))
        assert inside.is_running()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not ended_process(inside) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended_process(inside)


@confined
@pytest.mark.parametrize(
    "line",
    [
        "for n in range(10**4): open(f'{place}/{n}', 'w').write('x' * 2**20)",
        "for n in range(10**4): os.close(os.open(f'{place}/{n}', os.O_CREAT))",
        "for n in range(10**4): os.mkdir(f'{place}/{n}')",
        "for n in range(10**4): os.symlink('x', f'{place}/{n}')",
        "open(f'{place}/kept', 'a').write('x')",
        "os.open(f'{place}/kept', os.O_TRUNC)",
        "os.truncate(f'{place}/kept', 0)",
        "os.remove(f'{place}/kept')",
        "os.rename(f'{place}/kept', f'{place}/moved')",
        "os.chmod(f'{place}/kept', 0)",
        "shutil.rmtree(place)",
        "tempfile.NamedTemporaryFile(dir=place)",
    ],
)
def test_files_are_left_alone(line: str, tmp_path: Path) -> None:
    """Catches a disk filled by files that are each below a limit, and files changed or deleted."""
    (tmp_path / "kept").write_text("kept")
    verdict = ended("import os, shutil, tempfile", f"place = {str(tmp_path)!r}", line)
    assert verdict.kind in ("forbidden", "failed")
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "kept").stat().st_mode & 0o400


@confined
@pytest.mark.parametrize(
    "line",
    [
        "socket.create_connection(('127.0.0.1', 9), 1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "socket.socket(socket.AF_UNIX)",
        "socket.getaddrinfo('localhost', 80)",
        "ctypes.CDLL(None).syscall({'x86_64': 41, 'aarch64': 198}[os.uname().machine], 2, 1, 0)",
    ],
)
def test_there_is_no_network(line: str) -> None:
    """Catches a guard on Python's own module alone, and families of addresses forgotten."""
    assert ended("import ctypes, os, socket", line).kind == "forbidden"


@confined
def test_secrets_are_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tokens in the environment, the parent's memory or files that a program can read."""
    monkeypatch.setenv("PLANTED", "a secret")
    (tmp_path / "secret").write_text("a secret")
    assert ended("import os", "assert 'PLANTED' not in os.environ").passed
    if not check_sandbox():
        pytest.skip("this kernel has no Landlock: files can be read")
    for path in (f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem", tmp_path / "secret"):
        assert "PermissionError" in ended(f"open({str(path)!r}, 'rb').read(1)").reason


@confined
def test_limits_cannot_be_raised() -> None:
    """Catches limits that bind users but not root."""
    lines = ("import resource as r", "r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)")
    assert ended(*lines).kind == "failed"


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "output_bytes"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_limits_are_checked(name: str, value: float) -> None:
    """Catches a limit that stops every program, or none."""
    with pytest.raises(SandboxError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]


# A machine that cannot


@confined
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("mmap 9 222, ", "", "a correct program does not pass in this sandbox: failed"),
        ("_prctl(libc, 22, 2,", "str(", "not confined"),
        ("22, 2, _Sock", "22, 9, _Sock", "prctl 22: Invalid argument"),
        ('"x86_64": (0xC000003E', '"x86_64": (0xC0000000', "cannot be confined"),
        ("import ctypes\n", "import no_such_module\n", "no_such_module"),
    ],
)
def test_a_sandbox_that_does_not_work_is_refused(
    old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches programs run without protection, and 0 % where it is the machine that fails."""
    if "0xC0" in old and os.uname().machine != "x86_64":
        pytest.skip("changes the table of x86-64")
    altered(tmp_path, monkeypatch, old, new)
    with pytest.raises(SandboxError, match=re.escape(said)) as raised:
        score([ANSWER], {ANSWER.task_id: [RIGHT]}, SMALL)
    assert "\n" not in str(raised.value)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, or an unconfined program, where Linux's means are missing."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SandboxError, match="win32"):
        run_program(ANSWER, RIGHT)


@pytest.mark.parametrize(
    ("machine", "header", "define"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"__NR_"),
        ("aarch64", "/usr/include/asm-generic/unistd.h", r"__NR(?:3264)?_"),
    ],
)
def test_system_calls_have_the_kernels_numbers(machine: str, header: str, define: str) -> None:
    """Catches a slip in a table, which may allow what it should not, on machines not at hand."""
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    given = dict(re.findall(rf"#define {define}(\w+)\s+(\d+)", Path(header).read_text()))
    given["newfstatat"] = given.get("newfstatat", given.get("fstatat"))
    for table in (sandbox.ALLOWED, sandbox.FATAL, *(row[0] for row in sandbox.MASKED)):
        for name, number in sandbox.numbers(table, machine).items():
            assert given[name] == str(number), name


# Figures


def test_pass_at_k_is_the_share_of_subsets() -> None:
    """Catches the biased estimate, and a slip where fewer than k fail: against enumeration."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            picks = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, picks)) / len(picks))


@pytest.mark.parametrize("numbers", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_counts_that_do_not_fit_are_refused(numbers: tuple[int, int, int]) -> None:
    """Catches pass@10 of fewer than 10 samples."""
    with pytest.raises(HumanEvalError):
        pass_at_k(*numbers)


def test_interval_is_that_of_a_share() -> None:
    """Catches a bootstrap over samples, or of one draw: 40 of 164 has a known spread.

    The seed is fixed, so nothing is left to chance.
    """
    counts = [(1, 1)] * 40 + [(1, 0)] * 124
    mean, interval = mean_pass_at_k(counts, 1), pass_at_k_interval(counts, 1, seed=0)
    assert mean == pytest.approx(40 / 164)
    assert interval is not None
    half = 1.96 * math.sqrt(mean * (1 - mean) / 164)
    assert interval == pytest.approx((mean - half, mean + half), abs=0.01)
    assert interval == pass_at_k_interval(counts, 1, seed=0)
    assert pass_at_k_interval([(10, 3)] * 9, 10, 0) == (1 - math.comb(7, 10) / 1,) * 2
    assert pass_at_k_interval([(10, 3)], 1, 0) is None


@confined
def test_score_counts_by_problem() -> None:
    """Catches verdicts given to another problem, and pass@10 of problems with fewer samples."""
    other = Problem("own/other", ANSWER.prompt, "answer", ANSWER.test.replace("42", "41"))
    given = {ANSWER.task_id: [RIGHT] * 3 + [WRONG] * 7, "own/other": [WRONG] + [RIGHT] * 9}
    result = score([ANSWER, other], given, Limits(), workers=2, seed=1)
    assert [(p["task_id"], p["n"], p["c"]) for p in result["by_problem"]] == [
        ("own/answer", 10, 3),
        ("own/other", 10, 1),
    ]
    assert result["pass_at_k"]["1"]["value"] == pytest.approx(0.2)
    assert result["pass_at_k"]["1"]["interval"] == pytest.approx([0.1, 0.3])
    assert result["pass_at_k"]["10"]["value"] == 1
    assert (result["verdicts"]["passed"], result["verdicts"]["failed"]) == (4, 16)
    assert result["samples"] == sum(result["verdicts"].values()) == 20
    assert result["limits"] == {"seconds": 5.0, "memory_bytes": 2**30, "output_bytes": 2**20}
    assert json.loads(json.dumps(result)) == result
    few = score([ANSWER], {ANSWER.task_id: [RIGHT]})
    assert few["pass_at_k"] == {"1": {"value": 1.0, "interval": None}}


@pytest.mark.parametrize(
    ("problems_given", "completions", "said"),
    [
        ([ANSWER], {}, "own/answer"),
        ([ANSWER], {"own/answer": []}, "own/answer"),
        ([ANSWER], {"own/answer": [RIGHT], "own/more": [RIGHT]}, "own/more"),
        ([ANSWER, ANSWER], {"own/answer": [RIGHT]}, "twice"),
        ([], {}, "no problem"),
    ],
)
def test_score_needs_both_halves(
    problems_given: list[Problem], completions: dict[str, list[str]], said: str
) -> None:
    """Catches problems without completions left out of the mean, which raises it."""
    with pytest.raises(HumanEvalError, match=said):
        score(problems_given, completions)
    with pytest.raises(HumanEvalError, match="0 workers"):
        score(problems_given, completions, workers=0)
