"""Several processes, as `accelerate launch` starts them, do what one does with all their texts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from byte_model import byte_llama, save_folders
from safetensors.torch import load_file
from small_llama import randomised
from train_runs import environment, steps_kept, texts, train

from passlm.cli import DONE, USAGE, main
from passlm.drafts.sampler_head import SHORTLIST
from passlm.lookahead.trained import LookAhead, load
from passlm.model.target import Target
from passlm.train.loop import CHECKPOINT, HISTORY
from passlm.train.processes import ProcessesError, launched, shard_layers

pytestmark = pytest.mark.slow

PLAIN = ("--multi_gpu",)  # so accelerate calls several processes on the CPUs of one machine, too
SHARDED = ("--use_fsdp", "--fsdp_version", "2")
SETTINGS = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
MOMENTS = 1 + 2 * (4 + 7) + 3  # embeddings; A and B of two layers; the sampler head
Started = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, text, and look-ahead files of which every part has an effect."""
    folder = tmp_path_factory.mktemp("processes")
    save_folders(folder)
    texts(folder / "text")
    start = LookAhead.mean(Target(byte_llama()), 3, "bytes").extended(
        Target(byte_llama()), 4, (), 16
    )
    randomised(start, 0.2, SHORTLIST).save(folder / "start")
    return folder


def arguments(place: Path, out: Path, steps: int, *more: str) -> list[str]:
    """Of a short run; unclipped, so that a gradient of twice the length shows."""
    start = ["--start-from", str(place / "start"), "--clip", "0"]
    return [*train(place / "model", place / "text", out, steps), *start, *more]


def launcher(flags: tuple[str, ...], passlm: list[str]) -> list[str]:
    ours = ["-m", "passlm.cli", *passlm, "--device", "cpu"]
    module = [sys.executable, "-m", "accelerate.commands.launch", *flags, *SETTINGS]
    return [*module, "--dynamo_backend", "no", "--main_process_port", "0", *ours]


def launch(flags: tuple[str, ...], passlm: list[str]) -> str:
    """Run to the end; what it said."""
    done = subprocess.run(
        launcher(flags, passlm), env=environment(), capture_output=True, timeout=300, check=False
    )
    assert done.returncode == DONE, done.stderr.decode()
    return done.stderr.decode()


def same_step(one: Path, other: Path) -> None:
    """The gradients, which Adam's first moment holds, and the losses of two runs are the same.

    In float32: sums of other order differ in the last digits.
    """
    first, second = load_file(one / CHECKPOINT), load_file(other / CHECKPOINT)
    assert first.keys() == second.keys()
    means = [name for name in first if ".exp_avg." in name]
    assert len(means) == MOMENTS
    for name in means:
        size = float(first[name].abs().max())
        assert size > 0, name
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4 * size)
    losses = [[step["loss"] for step in history(run)] for run in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]


@pytest.fixture(scope="module")
def together(place: Path) -> Path:
    """One step of two processes."""
    out = place / "two"
    said = launch(PLAIN, arguments(place, out, 1))
    assert said.count("tokens to train on") == 1, "one process speaks"
    return out


def test_two_processes_train_as_one_with_twice_the_texts(place: Path, together: Path) -> None:
    """Catches texts that both processes take, gradients that are summed or not exchanged."""
    for flags in (["--sequences", "2"], ["--accumulate", "2"]):
        alone = place / flags[0]
        assert main(arguments(place, alone, 1, *flags)) == DONE
        same_step(alone, together)
        kept = load(alone).embeddings, load(together).embeddings
        torch.testing.assert_close(kept[1], kept[0], rtol=1e-3, atol=1e-5)


def test_one_process_writes(place: Path, together: Path) -> None:
    """Catches a history of two lines a step, files that two write at once, and torn ones."""
    assert [step["step"] for step in history(together)] == [1]
    assert sorted(path.name for path in together.iterdir()) == [
        "README.md",
        CHECKPOINT,
        "curves.png",
        HISTORY,
        "lookahead.json",
        "lookahead.safetensors",
    ]
    assert load(together).card.training["groups_seen"] == 2 * 8


def test_another_number_of_processes_does_not_resume(
    place: Path, together: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that silently goes on with half the texts a step."""
    assert main([*arguments(place, together, 1), "--resume"]) == USAGE
    assert "processes was 2, is 1" in capsys.readouterr().err


def test_sharded_target_gives_the_same_gradients(place: Path) -> None:
    """Catches weights that a process lacks, and layers whose weights are gone when gradients are
    computed: FSDP leaves each process a half of every layer between passes."""
    alone, sharded = place / "whole", place / "sharded"
    checkpointing = ("--gradient-checkpointing", "--position-weight", "0.8")
    assert main(arguments(place, alone, 2, *checkpointing, "--sequences", "2")) == DONE
    said = launch(SHARDED, arguments(place, sharded, 2, *checkpointing))
    assert "2 layers are sharded over 2 processes" in said
    same_step(alone, sharded)
    lengths = [step["accepted_by_position"] for step in history(alone) + history(sharded)]
    assert lengths[1] == pytest.approx(lengths[3])


# Being stopped


@pytest.fixture
def started() -> Any:
    """Starts processes, and ends those that a failed test leaves."""
    running: list[subprocess.Popen[bytes]] = []

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment(), **pipe))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def wait_for_step(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / CHECKPOINT).exists() or steps_kept(out) < step:
        assert time.monotonic() < deadline, f"no step {step} in two minutes"
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)


def ended(process: subprocess.Popen[bytes], out: Path) -> int:
    """What it did when it was told to stop; the step that was kept."""
    _, said = process.communicate(timeout=120)
    assert process.returncode != DONE
    assert said.count(b"continue with --resume") == 1, said.decode()
    assert b"another process has ended" not in said, "all stop at the same step, and none waits"
    step = steps_kept(out)
    assert f"stopped after step {step}:".encode() in said
    assert [line["step"] for line in history(out)] == list(range(1, step + 1))
    assert {path.name for path in out.iterdir()} == {CHECKPOINT, HISTORY}
    return step


def test_a_signal_to_one_or_to_the_launcher_stops_all_with_a_checkpoint(
    place: Path, started: Started
) -> None:
    """Catches a process that waits forever for one that is gone, and a run that is lost."""
    out = place / "stopped"
    command = launcher(PLAIN, arguments(place, out, 100_000))
    process = started(command)
    wait_for_step(process, out, 2)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "passlm.cli" in child.cmdline()
    ]
    workers[-1].send_signal(signal.SIGTERM)
    step = ended(process, out)
    process = started([*command, "--resume"])
    wait_for_step(process, out, step + 2)
    process.send_signal(signal.SIGTERM)
    assert ended(process, out) > step


# What is refused


def test_launchers_that_start_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `accelerate launch --cpu --num_processes 2`, which starts one process without a
    word where there is no MPI: half the texts a step that were asked for."""
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert not launched()
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ProcessesError, match="--multi_gpu"):
        launched()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert launched()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "-1"}, "several CPUs or GPUs"),
    ],
)
def test_ways_of_training_that_do_not_fit_are_refused(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    said: str,
) -> None:
    """Catches a first version of FSDP that fails deep inside, and DeepSpeed that is ignored."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    device = ["--device", "cuda"]
    assert main([*arguments(place, place / "never", 1), *device]) == USAGE
    errors = capsys.readouterr().err.strip()
    assert said in errors
    assert "\n" not in errors
    assert not (place / "never").exists()


def test_model_that_hides_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model of which no layer is sharded, so that it does not fit after all."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("passlm.train.processes.init_device_mesh", lambda *_: None)
    model = byte_llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(ProcessesError, match="LlamaModel has no list of decoder layers"):
        shard_layers(model, torch.device("cpu"))
