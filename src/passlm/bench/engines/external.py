"""Other engines among the methods: llama.cpp and vLLM, each in a process of its own.

They are other programs, with another precision or other kernels, so what they write is not held to
plain decoding. What runs in such a process is `process.py`; here it is started with the
engine's own Python, asked, and ended. Between its prompts it is stopped with all that it has
started (SIGSTOP), since some engines wait for work in a loop, which would slow what runs beside
them. Where the system knows no such signal, the processor time that it takes meanwhile tells.
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

BUSY_CORES = 0.05  # that an idle engine may take before the log warns of it
_LAST_BYTES = 1 << 16  # of what it printed, to look for its last words
_GRACE_SECONDS = 5.0
# What every engine is told of drawing; our judges and drafts mean nothing to it.
_TOLD = ("temperature", "top_k", "top_p", "min_p", "seed")
_MEANINGLESS = ("judge", "draft")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """One engine before it is started.

    Attributes:
        distribution: what pip installs.
        title: its name; the version goes into the braces.
        start_seconds: until its model must be loaded.
    """

    distribution: str
    title: str
    start_seconds: float


ENGINES = {
    "llama-cpp": Kind("llama-cpp-python", "llama.cpp (llama-cpp-python {})", 300),
    "vllm": Kind("vllm", "vLLM {}", 1200),
}


class EngineError(MethodError):
    """An engine that does not start, or ended; one line with its last words."""


class MissingEngineError(EngineError):
    """An engine that is not installed; names what installs it."""


def interpreters(names: Collection[str], given: Sequence[str]) -> dict[str, str]:
    """The Python that runs each engine among the methods.

    Args:
        names: of methods.
        given: `NAME=PYTHON` for engines that do not run with the current one.

    Raises:
        MethodError: an engine that does not exist or is not asked for, or no Python.
    """
    chosen = {name: sys.executable for name in ENGINES if name in names}
    for text in given:
        name, equals, python = text.partition("=")
        if not equals or name not in ENGINES:
            raise MethodError(
                f"--engine-python is {text!r}: expected NAME=PYTHON with a name of "
                f"{', '.join(ENGINES)}"
            )
        if name not in chosen:
            raise MethodError(f"--engine-python {text} is for method {name}: name it in --methods")
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise MethodError(f"--engine-python {text}: there is no such program, give its path")
        chosen[name] = os.path.abspath(found)
    return chosen


def check_sampling(names: Collection[str], sampling: SamplingParams) -> None:
    """Make sure that the engines among the methods know every setting that is asked for.

    Raises:
        MethodError: they do not know one.
    """
    asked = [name for name in ENGINES if name in names]
    plain = SamplingParams()
    for field in fields(SamplingParams):
        told = field.name in (*_TOLD, *_MEANINGLESS)
        if asked and not told and getattr(sampling, field.name) != getattr(plain, field.name):
            raise MethodError(
                f"{', '.join(asked)} can be told temperature, top-k, top-p and min-p, and not "
                f"{field.name.replace('_', '-')}: leave it or the method out"
            )


def start_engines(
    pythons: Mapping[str, str], lm: Generator, model: str
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Start engines with the model, and say why those that are not installed do not run.

    Args:
        pythons: what `interpreters` gave.
        lm: the model as our methods have it.
        model: its name.

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
    """End engines, and warn of those that took processor time from what ran beside them."""
    for engine in engines:
        busy = engine.idle_cores or 0.0
        if busy > BUSY_CORES:
            _log.warning(
                "%s kept %.2f cores busy while other methods ran: leave it out to measure them",
                *(engine.name, busy),
            )
        engine.close()


def _settings(name: str, lm: Generator, source: ModelSource) -> dict[str, Any]:
    """What an engine is told of the model, the same files that ours was loaded from."""
    gguf, gpu = source.gguf_file, lm.target.device.type != "cpu"
    if name == "llama-cpp":
        if gguf is None:
            raise MethodError(
                f"method llama-cpp reads GGUF files and {source.name} is none: give a .gguf file "
                "as --model, or leave the method out"
            )
        return {"model": str(gguf), "threads": torch.get_num_threads(), "gpu": gpu}
    copy = None if gguf is None else whole_copy(gguf)  # made when the model was loaded
    dtype = str(lm.target.dtype).removeprefix("torch.")
    context = lm.target.context
    return {"model": str(copy or source.path), "dtype": dtype, "context": context, "gpu": gpu}


class Engine:
    """An engine at work in a process of its own, which ends with this one.

    Args:
        name: one of `ENGINES`.
        python: the interpreter that has its package.
        settings: the model.

    Attributes:
        title: what it is, with version and precision.
        load_seconds: from the start of its process until the model was loaded.

    Raises:
        MissingEngineError: the package is not installed there.
        EngineError: it does not start.
    """

    def __init__(self, name: str, python: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self._kind = ENGINES[name]
        begun = time.perf_counter()
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [python, process.__file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=_environment(settings),
            # Stopped and gone on with as a group, which the system ends should we be killed. And
            # an interrupt at the terminal is for us alone.
            process_group=0,
        )
        self._end = weakref.finalize(self, _ended, self._process, self._said)
        self._idle_seconds = self._idle_processor = 0.0
        facts = self._start(settings)
        if facts.get("missing"):
            self.close()
            raise MissingEngineError(_missing(name, python))
        self.title = f"{self._kind.title.format(facts['version'])}, {_precision(facts, settings)}"
        self.load_seconds = time.perf_counter() - begun
        self._since = self._rest()

    def decode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What it makes of a prompt; see `process.py`.

        Raises:
            EngineError: it ended.
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
        """Cores that it kept busy on average while others ran; None before the first prompt."""
        return self._idle_processor / self._idle_seconds if self._idle_seconds else None

    def close(self) -> None:
        """End the process."""
        self._end()

    def _rest(self) -> tuple[float, float]:
        """Stop it; since when that is, and the processor seconds it had taken by then."""
        _signal(self._process, "SIGSTOP")
        return time.perf_counter(), self._processor_seconds()

    def _processor_seconds(self) -> float:
        """Of the process and all that it has started."""
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, which an answer tells
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
                f"method {self.name} did not start within {limit:g} s, the last it said: "
                f"{self._last_words()}; leave it out"
            ) from error
        finally:
            late.cancel()

    def _ask(self, content: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the answer is empty
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(
                f"method {self.name} ended with code {self._process.wait()}, the last it said: "
                f"{self._last_words()}; mend that, or leave the method out"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        """The last line on its standard error."""
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - _LAST_BYTES))
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """With the same threads, no GPU beside a model on the CPU, and vLLM all in one process."""
    chosen = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if not settings["gpu"]:
        chosen["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **chosen}


def _signal(process: subprocess.Popen[str], name: str) -> None:
    """Send a signal to the process and all that it has started, where there are such signals."""
    if process.poll() is None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, getattr(signal, name))
    elif name == "SIGKILL":
        process.kill()


def _ended(process: subprocess.Popen[str], said: IO[bytes]) -> None:
    """Close its standard input, which ends it; by force where that takes long."""
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
    said.close()


def _missing(name: str, python: str) -> str:
    pip = f"pip install {ENGINES[name].distribution}"
    if python == sys.executable:
        return (
            f"method {name} left out, its package is not installed: {pip}, or name a Python that "
            f"has it with --engine-python {name}=PYTHON"
        )
    return f"method {name} left out, {python} has no such package: {python} -m {pip}"


def _precision(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Of the weights it computes with."""
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
    """Decoding by another engine; seconds are those of its own clock."""

    engine: Engine
    eos: frozenset[int]
    ignore_eos: bool

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_new_tokens: int
    ) -> Record:
        """See `Decode`."""
        request = {
            "ids": list(prompt),
            "max_new_tokens": max_new_tokens,
            "eos": [] if self.ignore_eos else sorted(self.eos),
            **{name: getattr(sampling, name) for name in _TOLD},
            "seed": sampling.seed or 0,
        }
        answer = self.engine.decode(request)
        return Record(
            tuple(answer["tokens"]),
            answer["seconds"],
            first_token_seconds=answer["first_token_seconds"],
        )
