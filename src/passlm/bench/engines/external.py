"""Run other engines as methods: llama.cpp and vLLM, each in a process of its own.

These engines have another precision or other kernels, so their tokens are not compared with plain
decoding's. This module starts each process with the engine's own Python, sends it requests and ends
it; the code that runs in the process is in `process.py`.

Some engines wait for work in a busy loop, which would slow the other methods. The process and its
children are therefore stopped (SIGSTOP) between prompts. On systems without that signal, the
processor time that an idle engine takes is measured and reported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import IO, Any

import psutil
import torch

from passlm.bench.engines import process
from passlm.bench.engines.decoding import MethodError, Record
from passlm.generate import Generator
from passlm.loading.gguf import whole_copy
from passlm.loading.models import ModelSource, resolve
from passlm.params import SamplingParams

BUSY_CORES = 0.05  # number of cores that an idle engine may keep busy without a warning
_LAST_BYTES = 1 << 16  # how much of the end of its standard error is searched for the last line
_GRACE_SECONDS = 5.0  # time to end after its standard input is closed
# The sampling parameters that every engine supports, and those that do not concern engines.
_SUPPORTED = ("temperature", "top_k", "top_p", "min_p", "seed")
_MEANINGLESS = ("judge", "draft")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """Description of an engine.

    Attributes:
        distribution: name of the distribution that pip installs.
        title: the engine's name, with braces in place of its version.
        start_seconds: timeout for starting the engine and loading the model.
    """

    distribution: str
    title: str
    start_seconds: float


ENGINES = {
    "llama-cpp": Kind("llama-cpp-python", "llama.cpp (llama-cpp-python {})", 300),
    "vllm": Kind("vllm", "vLLM {}", 1200),
}


class EngineError(MethodError):
    """An engine did not start or has ended; the one-line message quotes its last line of output."""


class MissingEngineError(EngineError):
    """An engine is not installed; the message says how to install it."""


def interpreters(names: Collection[str], given: Sequence[str]) -> dict[str, str]:
    """Return the Python interpreter for each engine among the methods.

    Args:
        names: names of the methods.
        given: `NAME=PYTHON` for each engine that needs another interpreter than the current one.

    Raises:
        MethodError: an entry of `given` is malformed, names an unknown engine or one that is not
            among the methods, or its interpreter does not exist.
    """
    chosen = {name: sys.executable for name in ENGINES if name in names}
    for text in given:
        name, equals, python = text.partition("=")
        if not equals or name not in ENGINES:
            raise MethodError(
                f"--engine-python is {text!r}: expected NAME=PYTHON, where NAME is one of "
                f"{', '.join(ENGINES)}"
            )
        if name not in chosen:
            raise MethodError(
                f"--engine-python {text} is only for method {name}: add it to --methods"
            )
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise MethodError(f"--engine-python {text}: no such program; give its path")
        chosen[name] = os.path.abspath(found)
    return chosen


def check_sampling(names: Collection[str], sampling: SamplingParams) -> None:
    """Check that the engines among the methods support all the given sampling parameters.

    Raises:
        MethodError: they do not support a parameter that differs from its default.
    """
    asked = [name for name in ENGINES if name in names]
    plain = SamplingParams()
    for field in fields(SamplingParams):
        known = field.name in (*_SUPPORTED, *_MEANINGLESS)
        if asked and not known and getattr(sampling, field.name) != getattr(plain, field.name):
            raise MethodError(
                f"{', '.join(asked)} can use temperature, top-k, top-p and min-p, but not "
                f"{field.name.replace('_', '-')}: leave out the setting or the method"
            )


def start_engines(
    pythons: Mapping[str, str], lm: Generator, model: str
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Start engines and load the model in each of them.

    Args:
        pythons: the interpreter of each engine, as returned by `interpreters`.
        lm: the model as loaded for passlm's own methods.
        model: the model's name.

    Returns:
        The running engines by name; and for each engine that is not installed, a message that says
        how to install it.

    Raises:
        MethodError: an engine cannot read this kind of model, or does not start.
    """
    source = resolve(model)
    settings = {name: _settings(name, lm, source) for name in pythons}
    running: dict[str, Engine] = {}
    missing: dict[str, str] = {}
    for name, python in pythons.items():
        try:
            running[name] = Engine(name, python, settings[name])
        except MissingEngineError as error:
            missing[name] = str(error)
            _log.warning("%s", error)
    return running, missing


def end_engines(engines: Iterable[Engine]) -> None:
    """End engines, with a warning for each one that kept cores busy while it was idle."""
    for engine in engines:
        busy = engine.idle_cores or 0.0
        if busy > BUSY_CORES:
            _log.warning(
                "%s kept %.2f cores busy while other methods ran, which slowed them: "
                "leave it out to measure them",
                *(engine.name, busy),
            )
        engine.close()


def _settings(name: str, lm: Generator, source: ModelSource) -> dict[str, Any]:
    """Return an engine's settings, with the same model files that passlm has loaded."""
    gguf, gpu = source.gguf_file, lm.target.device.type != "cpu"
    if name == "llama-cpp":
        if gguf is None:
            raise MethodError(
                f"method llama-cpp needs a GGUF file and {source.name} is not one: "
                "give a .gguf file as --model, or leave the method out"
            )
        return {"model": str(gguf), "threads": torch.get_num_threads(), "gpu": gpu}
    copy = None if gguf is None else whole_copy(gguf)  # created when the model was loaded
    dtype = str(lm.target.dtype).removeprefix("torch.")
    context = lm.target.context
    return {"model": str(copy or source.path), "dtype": dtype, "context": context, "gpu": gpu}


class Engine:
    """An engine that runs in a process of its own, which ends when this process ends.

    Args:
        name: one of `ENGINES`.
        python: the interpreter that has the engine's package.
        settings: the model files and options; see `process.py`.

    Attributes:
        title: the engine's name, version and precision.
        load_seconds: time from the start of the process until the model was loaded.

    Raises:
        MissingEngineError: the interpreter does not have the engine's package.
        EngineError: the engine does not start.
    """

    def __init__(self, name: str, python: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self._kind = ENGINES[name]
        begun = time.perf_counter()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # open while it runs
        self._process = subprocess.Popen(
            [python, process.__file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=_environment(settings),
            # Signals stop and continue the group as a whole. A stopped group is ended by the system
            # if this process is killed, and Ctrl-C at the terminal does not reach it.
            process_group=0,
        )
        self._end = weakref.finalize(self, _terminate, self._process, self._stderr)
        self._idle_seconds = self._idle_processor = 0.0
        facts = self._start(settings)
        if facts.get("missing"):
            self.close()
            raise MissingEngineError(_missing_message(name, python))
        self.title = f"{self._kind.title.format(facts['version'])}, {_precision(facts, settings)}"
        self.load_seconds = time.perf_counter() - begun
        self._since = self._rest()

    def decode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decode one prompt; `process.py` defines the request and the answer.

        Raises:
            EngineError: the engine has ended.
        """
        begun, processor = self._since
        self._idle_seconds += time.perf_counter() - begun
        self._idle_processor += max(0.0, self._processor_seconds() - processor)
        _signal(self._process, "SIGCONT")
        answer = self._ask(request)
        self._since = self._rest()
        return answer

    @property
    def idle_cores(self) -> float | None:
        """Average number of cores it kept busy while idle; None before the first prompt."""
        return self._idle_processor / self._idle_seconds if self._idle_seconds else None

    def close(self) -> None:
        """End the process."""
        self._end()

    def _rest(self) -> tuple[float, float]:
        """Stop the process; return the current time and the processor seconds used so far."""
        _signal(self._process, "SIGSTOP")
        return time.perf_counter(), self._processor_seconds()

    def _processor_seconds(self) -> float:
        """Return the processor time of the process and its children, in seconds."""
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended; `_ask` raises an error
            first = psutil.Process(self._process.pid)
            for process in (first, *first.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def _start(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        limit, begun = self._kind.start_seconds, time.perf_counter()
        late = threading.Timer(limit, _signal, (self._process, "SIGKILL"))
        late.start()
        try:
            return self._ask(settings)
        except EngineError as error:
            if time.perf_counter() - begun < limit:
                raise
            raise EngineError(
                f"method {self.name} did not start within {limit:g} s, last output: "
                f"{self._last_line()}; leave the method out"
            ) from error
        finally:
            late.cancel()

    def _ask(self, content: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the answer below is empty
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(
                f"method {self.name} ended with code {self._process.wait()}, last output: "
                f"{self._last_line()}; fix that, or leave the method out"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_line(self) -> str:
        """Return the last line that is not empty on the engine's standard error."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _LAST_BYTES))
        lines = self._stderr.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of an engine's process.

    It has the same number of threads as this process, no GPU if the model is on the CPU, and keeps
    vLLM in a single process.
    """
    chosen = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if not settings["gpu"]:
        chosen["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **chosen}


def _signal(process: subprocess.Popen[str], name: str) -> None:
    """Send a signal to the process group.

    Where the system has no process groups, only SIGKILL is sent, and only to the process itself.
    """
    if process.poll() is None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, getattr(signal, name))
    elif name == "SIGKILL":
        process.kill()


def _terminate(process: subprocess.Popen[str], stderr: IO[bytes]) -> None:
    """End the process by closing its standard input, and kill it if it does not end in time."""
    _signal(process, "SIGCONT")
    with contextlib.suppress(BrokenPipeError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, "SIGKILL")
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    stderr.close()


def _missing_message(name: str, python: str) -> str:
    pip = f"pip install {ENGINES[name].distribution}"
    if python == sys.executable:
        return (
            f"method {name} is left out, its package is not installed: run {pip}, or give a Python "
            f"that has it with --engine-python {name}=PYTHON"
        )
    return f"method {name} is left out, {python} does not have its package: run {python} -m {pip}"


def _precision(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the data type of the weights that the engine computes with."""
    if "dtype" in settings:
        return str(settings["dtype"])
    from gguf import LlamaFileType

    try:
        name = LlamaFileType(int(facts["file_type"])).name
    except (TypeError, ValueError):
        return "weights of unnamed type"
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


@dataclass(frozen=True)
class EngineDecoding:
    """Decoding with another engine.

    Times are measured in the engine's process.

    Attributes:
        engine: the running engine.
        eos: token ids that end a sequence.
        ignore_eos: whether to continue after these ids.
    """

    engine: Engine
    eos: frozenset[int]
    ignore_eos: bool

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_new_tokens: int
    ) -> Record:
        """Decode one prompt; see `Decode`."""
        request = {
            "ids": list(prompt),
            "max_new_tokens": max_new_tokens,
            "eos": [] if self.ignore_eos else sorted(self.eos),
            **{name: getattr(sampling, name) for name in _SUPPORTED},
            "seed": sampling.seed or 0,
        }
        answer = self.engine.decode(request)
        return Record(
            tuple(answer["tokens"]),
            answer["seconds"],
            first_token_seconds=answer["first_token_seconds"],
        )
