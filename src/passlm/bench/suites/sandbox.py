"""Confine this process, then run an untrusted program in it.

`humaneval.py` runs this file as a script, so it imports only the standard library. It reads a JSON
object with `source`, `token` and the limits from standard input. After `contain`, the process can
only compute, read the interpreter's own files and print. The parent process enforces the limits of
wall-clock time and output.

Three features of Linux confine the process. None of them needs privileges, and none can be undone,
not even by root:

- Resource limits: processor time, memory, open files; no bytes written to files, no core dump.
- seccomp: the system calls in `ALLOWED`, which programs need, are permitted. A call that starts a
  process or thread, opens a socket or opens a file for writing kills the process. All other calls,
  such as deleting files, sending signals or raising the limits, fail with EPERM. A program
  therefore leaves no child processes behind, cannot fill the disk and has no network.
- Landlock, if the kernel has it: only the files of Python and the system libraries can be read.

This process reports on standard error: the line `CONTAINED` before the program runs, and then how
the program ended. It reports a pass by repeating the token. A program that exits early, or prints
what a pass would look like, does not know the token and has not passed. A program could find the
token by searching the interpreter's frames. That cannot be prevented, because HumanEval runs the
check in the same interpreter as the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import struct
import sys
from types import ModuleType
from typing import Any

CONTAINED = b"contained\n"
OUT_OF_MEMORY = b"out of memory\n"
LONGEST_REASON = 200  # characters

OPEN_FILES = 64
LIBRARIES = ("/usr", "/lib", "/lib64", "/nix/store")
FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom")

# The architecture's constant of linux/audit.h, and its column in the tables below.
MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

# Each system call's name and its numbers on x86-64 and ARM64; "-" where it does not exist.
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, lseek 8 62, close 3 57,
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48,
faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, getdents 78 -,
getdents64 217 61, dup 32 23, dup2 33 -, dup3 292 24, poll 7 -, ppoll 271 73, select 23 -,
pselect6 270 72, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233,
brk 12 214, futex 202 98, rseq 334 293, set_robust_list 273 99, sched_yield 24 124,
sched_getaffinity 204 123, getrandom 318 278, uname 63 160, sysinfo 99 179, times 100 153,
getrusage 98 165, time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114,
nanosleep 35 101, clock_nanosleep 230 115, restart_syscall 219 128, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, getpid 39 172, getppid 110 173,
gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
exit 60 93, exit_group 231 94
"""
FATAL = """
clone 56 220, clone3 435 435, fork 57 -, vfork 58 -, execve 59 221, execveat 322 281,
socket 41 198, socketpair 53 199, creat 85 -
"""
# Actions of linux/seccomp.h.
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_WRITING = 0o3 | 0o100 | 0o1000  # O_ACCMODE, O_CREAT, O_TRUNC
# System call, index of one of its arguments, bit mask, action. The call is allowed if the argument
# has none of the bits of the mask; otherwise the action is taken.
MASKED = (
    ("open 2 -", 1, _WRITING, _KILL),
    ("openat 257 56", 2, _WRITING, _KILL),
    ("fcntl 72 25", 1, ~0b111, _REFUSE),  # allows flags, but not signal owners or pipe sizes
)


def contain(cpu_seconds: int, memory_bytes: int) -> None:
    """Confine this process to computing, reading libraries and using the files that are open.

    Args:
        cpu_seconds: Limit of processor time in seconds.
        memory_bytes: Limit of address space in bytes.

    Raises:
        OSError: The machine is not one of `MACHINES`, or its kernel has no seccomp.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"no table of system calls for {machine}, only for {', '.join(MACHINES)}")
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent process
    _limit(CPU=cpu_seconds, AS=memory_bytes, NOFILE=OPEN_FILES, FSIZE=0, CORE=0)
    _prctl(libc, 38, 1)  # PR_SET_NO_NEW_PRIVS: required by Landlock and seccomp
    hide_files(libc)
    program = b"".join(struct.pack("=HBBI", *line) for line in seccomp_filter(machine))
    _prctl(libc, 22, 2, _SockFprog(len(program) // 8, program))  # PR_SET_SECCOMP, filter


class _SockFprog(ctypes.Structure):
    """The struct `sock_fprog` of linux/filter.h."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _prctl(libc: ctypes.CDLL, option: int, value: int, more: _SockFprog | None = None) -> None:
    pointer = None if more is None else ctypes.byref(more)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, None, None):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


def _limit(**values: int) -> None:
    import resource  # missing on some systems, which import this file only for its constants

    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, highest = resource.getrlimit(kind)
        free = highest == resource.RLIM_INFINITY
        most = value if free else min(value, highest)
        # A process that ignores the signal at the soft limit is killed one second later.
        end = most + 1 if name == "CPU" and (free or most < highest) else most
        resource.setrlimit(kind, (most, end))


def hide_files(libc: ctypes.CDLL) -> bool:
    """Use Landlock (linux/landlock.h) so that only the files and folders named here can be opened.

    Returns:
        Whether the kernel supports it. Otherwise other files can still be read, but their contents
        cannot leave the process.
    """
    create, add, restrict = 444, 445, 446  # the same numbers on every machine
    every_access, read_file, read_folder = (1 << 13) - 1, 1 << 2, 1 << 3  # of Landlock's version 1
    asked = ctypes.create_string_buffer(struct.pack("=Q", every_access), 8)
    rules = libc.syscall(create, asked, ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    folders = dict.fromkeys((*LIBRARIES, sys.base_prefix, sys.base_exec_prefix))
    for path in (*folders, *FILES):
        with contextlib.suppress(FileNotFoundError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            access = read_file if path in FILES else read_file | read_folder
            rule = ctypes.create_string_buffer(struct.pack("=Qi", access, opened), 12)
            libc.syscall(add, rules, 1, rule, 0)  # no check: a failed rule only allows less
            os.close(opened)
    done: int = libc.syscall(restrict, rules, 0)
    os.close(rules)
    return done == 0


def seccomp_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the seccomp filter as a BPF program (linux/filter.h, linux/seccomp.h).

    Each instruction consists of an operation, the number of instructions to skip if it is true, the
    number to skip if it is false, and a constant.
    """
    load, equal, bits, give = 0x20, 0x15, 0x54, 0x06
    number_at, architecture_at, arguments_at = 0, 4, 16
    architecture, _ = MACHINES[machine]
    lines = [(load, 0, 0, architecture_at), (equal, 1, 0, architecture), (give, 0, 0, _KILL)]
    lines.append((load, 0, 0, number_at))
    for names, action in ((ALLOWED, _ALLOW), (FATAL, _KILL)):
        for number in numbers(names, machine).values():
            lines += [(equal, 0, 1, number), (give, 0, 0, action)]
    for name, argument, mask, otherwise in MASKED:
        for number in numbers(name, machine).values():
            lines += [
                (equal, 0, 5, number),
                # The low half of the argument: both architectures are little-endian.
                (load, 0, 0, arguments_at + 8 * argument),
                (bits, 0, 0, mask & 0xFFFFFFFF),
                (equal, 0, 1, 0),
                (give, 0, 0, _ALLOW),
                (give, 0, 0, otherwise),
            ]
    return [*lines, (give, 0, 0, _REFUSE)]


def numbers(table: str, machine: str) -> dict[str, int]:
    """Return the numbers of a table's system calls by name, without those the machine lacks."""
    _, column = MACHINES[machine]
    rows = [row.split() for row in table.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def run(source: str, passed: bytes) -> bytes:
    """Run a program in a module of its own and return how it ended.

    Args:
        source: The program.
        passed: The value to return if the program raises nothing.

    Returns:
        `passed`, `OUT_OF_MEMORY`, or a line about the exception that was raised.
    """
    module = sys.modules["program"] = ModuleType("program")
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException as error:  # includes SystemExit, which does not count as a pass
        return _reason(error)
    return passed


def _reason(error: BaseException) -> bytes:
    try:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        return reason[:LONGEST_REASON].encode(errors="replace")
    except BaseException:  # an exception class of the program may raise anything from __str__
        return b"an exception that cannot be printed"


def main() -> None:
    """Read the request from standard input, confine this process, run the program and report."""
    # Standard input is read to its end, so it is empty for the program.
    request: dict[str, Any] = json.load(sys.stdin.buffer)
    answer = os.dup(2)
    os.dup2(1, 2)  # standard output and standard error of the program are counted together
    try:
        contain(request["cpu_seconds"], request["memory_bytes"])
    except (OSError, ValueError) as error:
        os.write(answer, str(error).encode())
        os._exit(1)
    os.write(answer, CONTAINED)
    os.write(answer, run(request["source"], request["token"].encode()))
    os._exit(0)  # skips exit handlers that the program registered


if __name__ == "__main__":
    main()
