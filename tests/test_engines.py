"""Other engines in processes of their own, with stand-ins in place of their packages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from byte_model import byte_generator, save_folders

from passlm.bench.engines import external
from passlm.bench.engines.external import (
    Engine,
    EngineDecoding,
    EngineError,
    MissingEngineError,
    check_sampling,
    end_engines,
    interpreters,
    start_engines,
)
from passlm.bench.engines.methods import Asked, MethodError, Others, build
from passlm.cli import main
from passlm.generate import Generator
from passlm.loading.models import DEFAULT_MODEL, resolve
from passlm.params import SamplingParams, StopParams

NOTES, SPIN = "ENGINE_TEST_NOTES", "ENGINE_TEST_SPIN"  # variables that the stand-ins read
GREEDY = SamplingParams(seed=3)
SETTINGS = {"model": "some.gguf", "threads": 3, "gpu": False}
VOCABULARY = 50

NOTE = f"""
import json, os, subprocess, sys, threading, time

def note(**what):
    if os.environ.get("{NOTES}"):
        with open(os.environ["{NOTES}"], "a") as file:
            file.write(json.dumps(what) + "\\n")

def loop():
    while os.getppid() == parent:
        pass

parent = os.getppid()

def spin():
    how = os.environ.get("{SPIN}")
    if how == "thread":
        threading.Thread(target=loop, daemon=True).start()
    if how == "process":
        code = f"import os\\nwhile os.getppid() == {{os.getpid()}}: pass"
        subprocess.Popen([sys.executable, "-c", code])
"""
# The next token follows from all that was evaluated since the last reset, and from its order.
LLAMA = (
    NOTE
    + """
import html
assert html.escape("<") == "&lt;", "a file of ours in place of the library's"
os.write(1, b"what an engine prints\\n")
print("and its Python")
__version__ = "0.9"

class Llama:
    def __init__(self, model_path, **options):
        if "broken" in model_path:
            print("Traceback of many lines", file=sys.stderr)
            raise ValueError("Failed to load model from file: " + model_path)
        if "slow" in model_path:
            time.sleep(60)
        note(opened=model_path, omp=os.environ["OMP_NUM_THREADS"], **options)
        self.size, self.seen, self.ctx = options["n_ctx"], [], self
        self.metadata = {"general.file_type": "3"}
        note(modules=sorted({name.split(".")[0] for name in sys.modules}))
    def n_ctx(self):
        return self.size
    def reset(self):
        self.seen = []
    def close(self):
        note(closed=True)
    def eval(self, tokens):
        self.seen += tokens
        assert len(self.seen) <= self.size, "no room"
        if 49 in tokens:
            print("Traceback of many lines", file=sys.stderr)
            raise RuntimeError("llama_decode returned -1")
        if 48 in tokens:
            time.sleep(60)

def llama_sampler_chain_default_params():
    return "defaults"
def llama_sampler_chain_init(parameters):
    assert parameters == "defaults"
    return []
def llama_sampler_chain_add(chain, link):
    chain.append(link)
def llama_sampler_free(chain):
    note(chain=chain)
    spin()
def llama_sampler_sample(chain, ctx, at):
    assert at == -1
    value = 7
    for token in ctx.seen:
        value = (value * 31 + token) % 47
    return value
"""
    + "\n".join(
        f'def llama_sampler_init_{name}(*values):\n    return ["{name}", *values]'
        for name in ("greedy", "temp", "top_k", "top_p", "min_p", "dist")
    )
)
VLLM = (
    NOTE
    + """
from types import SimpleNamespace
__version__ = "0.99"
print("INFO: starting")

def EngineArgs(**options):
    note(engine=options, multi=os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"],
         gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    return options

def SamplingParams(**options):
    note(sampling=options)
    return SimpleNamespace(**options)

class LLMEngine:
    def __init__(self):
        self.running, self.names = None, set()
    @classmethod
    def from_engine_args(cls, arguments):
        return cls()
    def add_request(self, name, prompt, sampling):
        assert name not in self.names and self.running is None
        self.names.add(name)
        self.running = list(prompt["prompt_token_ids"]), sampling, []
    def has_unfinished_requests(self):
        return self.running is not None
    def step(self):
        ids, sampling, written = self.running
        if not written and not getattr(sampling, "waited", False):
            sampling.waited = True
            return []
        for _ in range(2):  # it may tell several at once
            written.append((sum(ids) + sum(written)) % 47)
            if written[-1] in sampling.stop_token_ids or len(written) == sampling.max_tokens:
                self.running = None
                break
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(written))])]
"""
)


def following(ids: list[int], count: int) -> tuple[int, ...]:
    """What the stand-in of llama.cpp writes."""
    seen = list(ids)
    for _ in range(count):
        value = 7
        for token in seen:
            value = (value * 31 + token) % 47
        seen.append(value)
    return tuple(seen[len(ids) :])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the engines' Python finds packages in; it has none yet."""
    place = tmp_path / "packages"
    place.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(place))
    return place


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """What the stand-ins were told, by what it is about."""
    file = tmp_path / "notes"
    monkeypatch.setenv(NOTES, str(file))

    def read(about: str) -> list[Any]:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line for line in lines if about in line]

    return read


@pytest.fixture
def llama(packages: Path) -> Iterator[EngineDecoding]:
    (packages / "llama_cpp.py").write_text(LLAMA)
    engine = Engine("llama-cpp", sys.executable, SETTINGS)
    yield EngineDecoding(engine, frozenset({46}), ignore_eos=True)
    engine.close()


@pytest.fixture(scope="module")
def lm() -> Generator:
    return byte_generator()


def running(process: int) -> bool:
    """Whether there is such a process and it is no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(process: int) -> bool:
    for _ in range(200):
        if not running(process):
            return True
        time.sleep(0.05)
    return False


# llama.cpp


def test_ids_to_ids_and_nothing_left_of_the_prompt_before(llama: EngineDecoding) -> None:
    """Catches a cache that is not reset, ids that are lost, and prints among the answers."""
    for ids in ([5, 6, 7], [5, 6, 7], [8]):
        record = llama(ids, GREEDY, 9)
        assert record.tokens == following(ids, 9)
        assert record.first_token_seconds is not None
        assert 0 < record.first_token_seconds <= record.seconds
        assert (record.stats, record.rows) == (None, None)


def test_texts_end_where_the_others_do(llama: EngineDecoding) -> None:
    """Catches an end that is not written, or heeded where ends are ignored."""
    text = following([5, 6], 12)
    heeding = replace(llama, eos=frozenset({text[4]}), ignore_eos=False)
    assert heeding([5, 6], GREEDY, 12).tokens == text[: text.index(text[4]) + 1]
    assert replace(heeding, ignore_eos=True)([5, 6], GREEDY, 12).tokens == text
    assert llama([5, 6], GREEDY, 1).tokens == text[:1]


def test_drawing_is_in_transformers_order(
    notes: Callable[[str], list[Any]], llama: EngineDecoding
) -> None:
    """Catches temperature taken last, as the library's own sampler does, and lost settings."""
    llama([5], GREEDY, 2)
    drawn = SamplingParams(temperature=0.5, top_k=9, top_p=0.75, min_p=0.25, seed=2**32 + 4)
    llama([5], drawn, 2)
    llama([5], SamplingParams(temperature=2.0), 2)
    assert [note["chain"] for note in notes("chain")] == [
        [["greedy"]],
        [["temp", 0.5], ["top_k", 9], ["top_p", 0.75, 1], ["min_p", 0.25, 1], ["dist", 4]],
        [["temp", 2.0], ["dist", 0]],
    ]


def test_opened_with_our_threads_and_without_our_packages(
    notes: Callable[[str], list[Any]], llama: EngineDecoding
) -> None:
    """Catches an engine with other threads than ours, and a process that loads torch beside it."""
    (opened,) = notes("opened")
    assert (opened["opened"], opened["n_gpu_layers"]) == ("some.gguf", 0)
    assert (opened["n_threads"], opened["n_threads_batch"]) == (3, 3)
    assert opened["omp"] == str(torch.get_num_threads())
    (modules,) = notes("modules")
    assert not {"passlm", "torch", "numpy"} & set(modules["modules"])


def test_room_grows_with_the_prompt(
    notes: Callable[[str], list[Any]], llama: EngineDecoding
) -> None:
    """Catches long prompts that the engine refuses, and an engine opened anew for each."""
    long = [1] * 1020
    assert llama(long, GREEDY, 9).tokens == following(long, 9)
    assert llama([5], GREEDY, 9).tokens == following([5], 9)
    assert [note["n_ctx"] for note in notes("opened")] == [1024, 2048]
    assert len(notes("closed")) == 1


def test_named_with_version_and_precision(llama: EngineDecoding) -> None:
    """Catches a report that leaves unsaid what was measured."""
    assert llama.engine.title == "llama.cpp (llama-cpp-python 0.9), Q4_1"


# vLLM


def test_vllm_is_told_everything(packages: Path, notes: Callable[[str], list[Any]]) -> None:
    """Catches kept prefixes, the model's own ends, and settings that do not reach it."""
    (packages / "vllm.py").write_text(VLLM)
    settings = {"model": "folder", "dtype": "bfloat16", "context": 192, "gpu": False}
    engine = Engine("vllm", sys.executable, settings)
    assert engine.title == "vLLM 0.99, bfloat16"
    decode = EngineDecoding(engine, frozenset({46}), ignore_eos=False)
    for _ in range(2):
        record = decode([3, 4], GREEDY, 5)
        assert record.tokens == (7, 14, 28, 9, 18)
        assert record.first_token_seconds is not None
        assert 0 < record.first_token_seconds < record.seconds
    drawn = SamplingParams(temperature=0.5, top_k=9, top_p=0.75, min_p=0.25, seed=6)
    assert replace(decode, eos=frozenset({14}))([3, 4], drawn, 5).tokens == (7, 14)
    (asked,) = notes("engine")
    assert (asked["multi"], asked["gpus"]) == ("0", "")
    expected = {"model": "folder", "dtype": "bfloat16", "max_model_len": 192, "max_num_seqs": 1}
    assert {**asked["engine"], **expected} == asked["engine"]
    assert asked["engine"]["enable_prefix_caching"] is False
    told = [note["sampling"] for note in notes("sampling")]
    assert [(one["temperature"], one["top_k"], one["stop_token_ids"]) for one in told] == [
        (0, -1, [46]),
        (0, -1, [46]),
        (0.5, 9, [14]),
    ]
    assert [told[2][name] for name in ("top_p", "min_p", "seed")] == [0.75, 0.25, 6]
    assert all(one["ignore_eos"] and one["max_tokens"] == 5 for one in told)
    engine.close()


# Processes


def test_an_engine_at_rest_takes_no_processor_time(llama: EngineDecoding) -> None:
    """Catches a process that polls for its next prompt."""
    assert llama.engine.idle_cores is None
    for _ in range(2):
        time.sleep(0.3)
        llama([5], GREEDY, 2)
    assert llama.engine.idle_cores is not None
    assert llama.engine.idle_cores < external.BUSY_CORES


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there is no such signal")
@pytest.mark.parametrize("how", ["thread", "process"])
def test_loops_that_wait_for_work_are_stopped(
    packages: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Catches engines that spin while the next method is timed, themselves or their workers."""
    monkeypatch.setenv(SPIN, how)
    (packages / "llama_cpp.py").write_text(LLAMA)
    engine = Engine("llama-cpp", sys.executable, SETTINGS)
    decode = EngineDecoding(engine, frozenset(), ignore_eos=True)
    for _ in range(3):
        decode([5], GREEDY, 2)
        time.sleep(0.5)
    assert engine.idle_cores is not None
    assert engine.idle_cores < external.BUSY_CORES
    workers = psutil.Process(engine._process.pid).children(recursive=True)
    assert len(workers) == (3 if how == "process" else 0)
    engine.close()
    assert all(ends(worker.pid) for worker in workers)


def test_loops_that_are_not_stopped_are_found_out(
    packages: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a busy engine that nobody hears of, where it cannot be stopped."""
    signalled = external._signal
    monkeypatch.setattr(
        external, "_signal", lambda process, name: name == "SIGKILL" and signalled(process, name)
    )
    monkeypatch.setenv(SPIN, "process")
    (packages / "llama_cpp.py").write_text(LLAMA)
    engine = Engine("llama-cpp", sys.executable, SETTINGS)
    decode = EngineDecoding(engine, frozenset(), ignore_eos=True)
    for _ in range(2):
        decode([5], GREEDY, 2)
        time.sleep(0.5)
    assert engine.idle_cores is not None
    assert engine.idle_cores > external.BUSY_CORES
    end_engines([engine])
    assert "cores busy while other methods ran" in caplog.text
    assert not running(engine._process.pid)


def test_a_closed_engine_is_gone(llama: EngineDecoding) -> None:
    """Catches processes that stay behind."""
    process = llama.engine._process.pid
    assert running(process)
    llama.engine.close()
    assert not running(process)


@pytest.mark.slow
@pytest.mark.parametrize("ids", [[5], [48]])
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_process_ends_with_the_one_that_started_it(packages: Path, ids: list[int]) -> None:
    """Catches engines that outlive a killed bench, at rest and in the middle of a text (48)."""
    (packages / "llama_cpp.py").write_text(LLAMA)
    code = (
        "import sys\n"
        f"sys.path[:0] = {[str(Path(external.__file__).parents[3])]!r}\n"
        "from passlm.bench.engines.external import Engine\n"
        f"engine = Engine('llama-cpp', sys.executable, {SETTINGS!r})\n"
        "print(engine._process.pid, flush=True)\n"
        f"print(engine.decode(dict(ids={ids!r}, max_new_tokens=2, temperature=0, eos=[])))\n"
        "print('done', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        time.sleep(0.3)
        assert running(process)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert ends(process)


@pytest.mark.parametrize(
    ("model", "ids", "said"),
    [
        ("broken.gguf", [5], "Failed to load model from file: broken.gguf"),
        ("some.gguf", [49], "llama_decode returned -1"),
    ],
)
def test_an_engine_that_fails_is_one_line(
    packages: Path, model: str, ids: list[int], said: str
) -> None:
    """Catches a bench that waits for ever, a traceback, and reasons that are lost."""
    (packages / "llama_cpp.py").write_text(LLAMA)

    def text() -> None:
        engine = Engine("llama-cpp", sys.executable, {**SETTINGS, "model": model})
        EngineDecoding(engine, frozenset(), ignore_eos=True)(ids, GREEDY, 2)

    with pytest.raises(EngineError, match=said) as error:
        text()
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, MissingEngineError)


def test_an_engine_that_is_killed_is_one_line(llama: EngineDecoding) -> None:
    """Catches a broken pipe as a fault of ours."""
    os.kill(llama.engine._process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="code -9"):
        llama([5], GREEDY, 2)


def test_an_engine_that_does_not_start_in_time(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bench that waits for ever for a model to be loaded."""
    (packages / "llama_cpp.py").write_text(LLAMA)
    kind = replace(external.ENGINES["llama-cpp"], start_seconds=1.5)
    monkeypatch.setitem(external.ENGINES, "llama-cpp", kind)
    with pytest.raises(EngineError, match=r"within 1\.5 s"):
        Engine("llama-cpp", sys.executable, {**SETTINGS, "model": "slow.gguf"})


def test_a_package_that_lacks_another_is_broken_and_not_missing(packages: Path) -> None:
    """Catches the advice to install what is installed."""
    (packages / "llama_cpp.py").write_text("import not_there_at_all")
    with pytest.raises(EngineError, match="not_there_at_all") as error:
        Engine("llama-cpp", sys.executable, SETTINGS)
    assert not isinstance(error.value, MissingEngineError)


# Among the methods


def test_what_is_not_installed_is_named_and_the_rest_runs(
    packages: Path,
    tmp_path: Path,
    lm: Generator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches one missing engine costing the whole run, or being left unsaid."""
    (packages / "vllm.py").write_text(VLLM)
    monkeypatch.setattr(
        external, "_settings", lambda *_: dict(SETTINGS, dtype="bfloat16", context=9)
    )
    found, missing = start_engines(dict.fromkeys(external.ENGINES, sys.executable), lm, "org/model")
    assert list(found) == ["vllm"]
    assert "pip install llama-cpp-python" in missing["llama-cpp"]
    assert "--engine-python llama-cpp=PYTHON" in missing["llama-cpp"]
    assert missing["llama-cpp"] in caplog.text
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    with pytest.raises(MissingEngineError, match=f"{other} -m pip install llama-cpp-python"):
        Engine("llama-cpp", str(other), SETTINGS)


def test_llama_cpp_takes_gguf_files_alone(lm: Generator) -> None:
    """Catches an error from within the engine where the file's kind is known before."""
    with pytest.raises(MethodError, match=r"give a \.gguf file as --model"):
        start_engines({"llama-cpp": sys.executable}, lm, "org/model")


def test_engines_get_the_files_that_ours_was_loaded_from(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches another model under the same name, above all for a GGUF file under vLLM."""
    source = replace(resolve("org/model"), gguf_file=Path("/models/some.gguf"))
    monkeypatch.setattr(external, "whole_copy", lambda gguf: Path("/cache/copy"))
    llama = external._settings("llama-cpp", lm, source)
    assert llama == {
        "model": "/models/some.gguf",
        "threads": torch.get_num_threads(),
        "gpu": False,
    }
    vllm = external._settings("vllm", lm, source)
    assert vllm["model"] == "/cache/copy"
    assert (vllm["dtype"], vllm["context"]) == ("float32", lm.target.context)
    assert external._settings("vllm", lm, resolve("org/model"))["model"] == "org/model"


def test_another_engines_text_is_not_held_to_ours(llama: EngineDecoding, lm: Generator) -> None:
    """Catches differences of another precision reported as faults, and an unmarked entry."""
    asked = Asked(("ar", "llama-cpp"), (0.0, 0.7), (2,), SamplingParams(), StopParams(8))
    made = build(lm, asked, "bytes", others=Others(engines={"llama-cpp": llama.engine}))
    assert [method.name for method in made] == ["ar", "llama-cpp"] * 2
    assert [method.repeats_plain for method in made] == [True, False] * 2
    assert [method.engine for method in made[:2]] == [None, llama.engine.title]
    assert made[1]([5, 6], 0, 4).tokens == following([5, 6], 4)


def test_interpreters_are_named_or_the_current_one(tmp_path: Path) -> None:
    """Catches a flag for an engine nobody asked for, and a wrong path found after loading."""
    assert interpreters(("ar", "hf"), ()) == {}
    assert interpreters(("ar", "vllm"), ()) == {"vllm": sys.executable}
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    found = interpreters(("llama-cpp",), (f"llama-cpp={link}",))
    assert found == {"llama-cpp": str(link)}  # not what it leads to: that has other packages
    for given, said in (
        ("llama-cpp", "NAME=PYTHON"),
        ("lama=/usr/bin/python", "llama-cpp, vllm"),
        ("vllm=/usr/bin/python", "--methods"),
        (f"llama-cpp={tmp_path}/no", "no such program"),
    ):
        with pytest.raises(MethodError, match=said):
            interpreters(("llama-cpp",), (given,))


def test_settings_that_an_engine_does_not_know_are_refused() -> None:
    """Catches a penalty that some methods take and others drop."""
    known = SamplingParams(0.7, top_k=3, top_p=0.5, min_p=0.1, seed=3, judge="rejection")
    check_sampling(("ar", "llama-cpp"), known)
    check_sampling(("ar", "hf"), SamplingParams(repetition_penalty=1.2))
    for unknown in ({"repetition_penalty": 1.2}, {"min_new_tokens": 3}, {"logit_bias": {3: 1.0}}):
        with pytest.raises(MethodError, match=next(iter(unknown)).replace("_", "-")):
            check_sampling(("ar", "vllm"), SamplingParams(**unknown))


# The command


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line for a tiny model, its prompts and look-ahead files."""
    place = tmp_path_factory.mktemp("command")
    model, rows = save_folders(place)
    (place / "own.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "de"}\n')
    return [
        *("bench", "--prompts", str(place / "own.jsonl"), "--model", str(model)),
        *("--lookahead", str(rows), "--dtype", "float32", "--max-new-tokens", "8"),
        *("--lookahead-tokens", "2"),
    ]


def test_entries_of_another_engine_are_marked(
    packages: Path,
    line: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches an engine whose figures read like ours, and a run gone on with another version."""
    (packages / "vllm.py").write_text(VLLM)
    out = tmp_path / "out"
    assert main([*line, "--methods", "two-pass,vllm", "--json", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    results = json.loads(text.splitlines()[-1])
    runs = {run["method"]: run for run in results["runs"]}
    assert {name: run["engine"] for name, run in runs.items()} == {
        **{"ar": None, "two-pass": None, "vllm": "vLLM 0.99, float32"}
    }
    assert runs["vllm"]["identical_to_ar"] is None
    assert runs["vllm"]["tokens"] == 16
    assert runs["vllm"]["first_token_seconds"] > 0
    assert runs["vllm"]["passes"] is None
    assert "predictability" not in runs["two-pass"]
    assert results["missing_methods"] == {}
    (engine,) = results["engines"].values()
    assert engine["idle_cores"] < external.BUSY_CORES
    assert "vllm is vLLM 0.99, float32: another engine" in text
    assert "vllm is another engine" in (out / "report.html").read_text()
    (out / "results.json").unlink()
    (packages / "vllm.py").write_text(VLLM.replace('"0.99"', '"1.00"'))
    again = [*line, "--methods", "two-pass,vllm", "--out", str(out), "--resume"]
    assert main(again) == 2
    assert "was vLLM 0.99, float32, now vLLM 1.00, float32" in capsys.readouterr().err


def test_a_missing_engine_does_not_stop_the_others(
    packages: Path,
    line: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a run lost for an engine that is not there, and tokens that nobody watched."""
    assert main([*line, "--methods", "two-pass,hf,vllm", "--predictability", "--json"]) == 0
    text = capsys.readouterr().out
    results = json.loads(text.splitlines()[-1])
    runs = {run["method"]: run for run in results["runs"]}
    assert list(runs) == ["ar", "two-pass", "hf"]
    assert "pip install vllm" in results["missing_methods"]["vllm"]
    assert "pip install vllm" in caplog.text
    assert text.count("pip install vllm") == 2  # in the report and in the results
    watched = {name: run["predictability"] for name, run in runs.items()}
    assert watched["hf"] is None
    assert watched["ar"]["drawn"]["count"] == runs["ar"]["tokens"]
    drawn, accepted = (watched["two-pass"][kind]["count"] for kind in ("drawn", "accepted"))
    assert drawn + accepted == runs["two-pass"]["tokens"]


def test_a_draft_model_among_the_methods(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a draft model that is named and not loaded, or does not repeat the target's text."""
    model = line[line.index("--model") + 1]
    assert main([*line, "--methods", "hf-assistant", "--assistant", model, "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["settings"]["assistant"] == model
    runs = {run["method"]: run["identical_to_ar"] for run in results["runs"]}
    assert runs == {"ar": 1.0, "hf-assistant": 1.0}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--methods", "hf-assistant"), "--assistant"),
        (("--assistant", "some"), "hf-assistant"),
        (("--methods", "ar,llama-cpp"), "give a .gguf file as --model"),
        (("--methods", "ar,vllm", "--repetition-penalty", "2"), "but not repetition-penalty"),
        (("--engine-python", "vllm=python"), "add it to --methods"),
        (("--methods", "ar,vllm", "--engine-python", "vllm=no/python"), "no such program"),
        (("--methods", "ar,vllm", "--batch-size", "2"), "--batch-size"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    line: list[str], capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    """Catches a traceback, and a flag that is not looked at."""
    assert main([*line, *more]) == 2
    told = [one for one in capsys.readouterr().err.splitlines() if "passlm: " in one]
    assert said in told[-1]


@pytest.mark.model
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_the_real_engine_continues_the_real_model() -> None:
    """Catches an interface of llama.cpp that has moved on."""
    settings = {**SETTINGS, "model": str(resolve(DEFAULT_MODEL).gguf_file), "threads": 1}
    engine = Engine("llama-cpp", sys.executable, settings)
    decode = EngineDecoding(engine, frozenset(), ignore_eos=True)
    greedy = [decode([504, 3575, 282, 4649, 314], GREEDY, 6).tokens for _ in range(2)]
    assert greedy[0] == greedy[1]
    drawn = SamplingParams(temperature=0.8, top_k=1, seed=1)
    assert decode([504, 3575, 282, 4649, 314], drawn, 6).tokens == greedy[0]
    engine.close()
