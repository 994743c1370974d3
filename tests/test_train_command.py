"""The command `passlm train`: what it refuses, what it writes, and what a mishap leaves behind."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import save_folders
from safetensors.torch import load_file
from train_runs import environment, steps_kept, texts, train

import passlm.loading.models
from passlm.cli import DONE, INTERRUPTED, USAGE, main
from passlm.cli.common import stop_flag
from passlm.lookahead.trained import CARD_FILE, TENSORS_FILE, LookAheadError, load
from passlm.train import memory
from passlm.train.data import read_documents
from passlm.train.loop import CHECKPOINT, HISTORY, Progress, Trainer, read_history

LONG = "A sentence that is long enough to be worth reading. " * 8
Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folders(tmp_path_factory.mktemp("train"))[0]


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """Arguments of a short run on texts of its own, into the folder `out`."""
    data = texts(tmp_path / "text")

    def arguments(*more: str, steps: int = 2, on: Path | None = None) -> list[str]:
        return [*train(model, on or data, tmp_path / "out", steps), *more]

    return arguments


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is to be refused before anybody waits for the model."""

    def loaded(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(passlm.loading.models, "load_model", loaded)


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of a run that is refused before it starts."""
    capsys.readouterr()
    assert main(arguments) == USAGE
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a run that had begun ended with; the bar stands before it."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


# Data


def records(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_broken_line_is_named_or_counted(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    run: Run,
    tmp_path: Path,
    out: Path,
) -> None:
    """Catches training on the half of a file that could be read, and a flag that stays silent."""
    sound = [json.dumps({"text": f"{number} {LONG}"}) for number in range(6)]
    file = records(tmp_path / "data.jsonl", *sound, "{broken", '{"title": "x"}')
    said = complaint(capsys, run(on=file))
    assert f"{file}:7: not JSON" in said
    assert "--skip-bad" in said
    assert not out.exists()
    caplog.set_level("INFO", logger="passlm")
    assert main(run("--skip-bad", on=file)) == DONE
    assert "skipped 2 broken lines in all" in caplog.text
    assert f"{file}:8" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"), [("picture.png", b"\x89PNG"), ("tiny.txt", b"tiny"), ("bad.txt", b"\xff")]
)
def test_folder_without_text_is_refused(
    capsys: pytest.CaptureFixture[str], run: Run, tmp_path: Path, name: str, content: bytes
) -> None:
    """Catches training on nothing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / name).write_bytes(content)
    assert f"no text to train on in {folder}" in complaint(capsys, run(on=folder))


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("flag", ["--data-weights", "--data-licences"])
def test_lists_of_another_length_than_the_paths_are_refused(
    capsys: pytest.CaptureFixture[str], run: Run, flag: str
) -> None:
    """Catches a weight or licence that goes to the wrong text."""
    assert f"{flag} has 2 values for 1 paths" in complaint(capsys, run(flag, "1", "2"))


def test_answers_of_distill_data_are_trained_on_as_text(
    capsys: pytest.CaptureFixture[str], run: Run, model: Path, tmp_path: Path, out: Path
) -> None:
    """Catches answers that are read without what was asked, or with a template of their own."""
    prompts = [json.dumps({"id": str(n), "prompt": f"{n} {LONG[:50]}"}) for n in range(6)]
    prompts += [json.dumps({"messages": [{"role": "user", "content": LONG[:40]}]})]
    asked, answers = records(tmp_path / "prompts.jsonl", *prompts), tmp_path / "answers.jsonl"
    given = ["--model", str(model), "--prompts", str(asked), "--out", str(answers)]
    assert main(["distill-data", *given, "--max-new-tokens", "60", "--dtype", "float32"]) == DONE
    answered = [json.loads(line) for line in answers.read_text().splitlines()]
    read = read_documents([answers], lambda _: None)
    assert sorted(d.text for d in read) == sorted(record["text"] for record in answered)
    assert len(read) == 7
    assert main(run(on=answers)) == DONE
    assert load(out).card.training["data"] == {"answers.jsonl": "licence not stated"}


# Settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora-rank", "0"], "lora-rank is 0: it must be 1 or more"),
        (["--lora-rank", "17"], "k_proj of 32 inputs and 16 outputs takes 1 to 16"),
        (["--lora-layers", "q_prj"], "'q_prj' matches no linear layer: the nearest are q_proj"),
        (["--lora-layers", "lm_head"], "'lm_head' matches no linear layer"),
        (["--kind", "lorra"], "lorra"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--start-from", "/nowhere"], "/nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], run: Run, out: Path, flags: list[str], said: str
) -> None:
    """Catches a traceback, and a pattern that updates nothing without a word."""
    assert said in complaint(capsys, run(*flags))
    assert not out.exists()


@pytest.mark.usefixtures("never_loaded")
def test_target_too_large_for_memory_is_refused_before_it_is_loaded(
    capsys: pytest.CaptureFixture[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an hour of loading that ends in the operating system's killing the process."""
    monkeypatch.setattr(memory, "available", lambda _: 2**26)
    said = complaint(capsys, run())
    assert re.search(r"takes about \d\.\d GiB and 0\.1 GiB are free on cpu", said), said
    assert "--dtype bfloat16" in said


def test_start_from_files_of_other_parts_is_refused(
    capsys: pytest.CaptureFixture[str], run: Run, tmp_path: Path
) -> None:
    """Catches flags that are ignored: a LoRA of the files' rank, or one that is dropped."""
    start = ["--start-from", str(tmp_path / "first")]
    assert main([*run("--lora-layers", "mlp.*"), "--out", str(tmp_path / "first")]) == DONE
    for flags, said in (
        (["--lora-rank", "3"], "has lora-rank 4 and --lora-rank is 3"),
        (["--sampler-width", "8"], "has sampler-width 16 and --sampler-width is 8"),
        (["--sampler-tokens", "1"], "has sampler-tokens 2 and --sampler-tokens is 1"),
        (["--kind", "lora"], "has kind sampler and --kind is lora"),
        (["--lookahead-tokens", "2"], "has 3 rows and --lookahead-tokens is 2"),
    ):
        assert said in complaint(capsys, run(*start, "--lora-layers", "mlp.*", *flags))
    assert "--lora-layers is all" in complaint(capsys, run(*start))
    assert main(run(*start, "--lora-layers", "mlp.*", "--sampler-tokens", "3")) == DONE


# What is written


def test_a_draft_head_is_added_to_files(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    run: Run,
    tmp_path: Path,
    out: Path,
) -> None:
    """Catches files that are changed beside their head, a card that loses how they were made, and
    a head of another shape than asked for."""
    first = tmp_path / "first"
    small = ["--head-width", "8", "--head-depths", "2", "--head-vocabulary", "20"]
    asked = ["--kind", "head", "--start-from", str(first), *small]
    assert "--start-from" in complaint(capsys, run("--kind", "head"))
    assert main([*run(), "--out", str(first)]) == DONE
    before = load(first)
    assert main(run(*asked)) == DONE
    after = load(out)
    assert after.head is not None
    assert after.head.description() == {"width": 8, "tokens": 2, "depths": 2, "listed": 20}
    named = before.tensors()
    assert all(torch.equal(after.tensors()[name], named[name]) for name in named)
    assert after.card.training == before.card.training
    assert after.card.accepted_length == before.card.accepted_length
    assert after.card.head is not None
    assert len(after.card.head["by_position"]) == 2
    assert after.card.head["training"]["kind"] == "head"
    assert "draft head of width 8" in (out / "README.md").read_text()
    assert main(["info", str(out), "--json"]) == DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["head"]["listed"] == 20
    again = run(*asked, "--head-width", "9", "--overwrite")
    again[again.index(str(first))] = str(out)
    second = ["--out", str(tmp_path / "second")]
    assert "has head-width 8 and --head-width is 9" in complaint(capsys, [*again, *second])
    again = run(*asked, "--head-vocabulary", "19", "--overwrite")
    again[again.index(str(first))] = str(out)
    assert "has head-vocabulary 20" in complaint(capsys, [*again, *second])
    assert "gradient-checkpointing" in complaint(
        capsys, [*run(*asked, "--gradient-checkpointing"), *second]
    )
    caplog.set_level("INFO", logger="passlm")
    assert main([*run("--start-from", str(out)), *second]) == DONE  # rows go on without the head
    assert "the draft head of --start-from is left out" in caplog.text
    assert load(tmp_path / "second").head is None


@pytest.mark.parametrize("kind", ["embeddings", "lora", "sampler"])
def test_every_kind_writes_a_folder_that_is_read(
    capsys: pytest.CaptureFixture[str], run: Run, out: Path, kind: str
) -> None:
    """Catches a part that is trained and not kept, and a card that hides what it was made of."""
    stated = ["--data-licences", "CC-BY-4.0", "--data-weights", "1", "--licence", "mit"]
    assert main(run("--kind", kind, *stated, "--json")) == DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    rows = load(out)
    assert (rows.lora is not None, rows.sampler is not None) == (
        kind != "embeddings",
        kind == "sampler",
    )
    assert rows.card.training["data"] == {"text": "weight 1.0, licence CC-BY-4.0"}
    assert rows.card.training["kind"] == kind
    assert rows.card.licence == "mit"
    assert "licence CC-BY-4.0" in (out / "README.md").read_text()
    assert main(["info", str(out), "--json"]) == DONE
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["sampler"] is not None, said["kind"]) == (kind == "sampler", "look-ahead files")
    assert said["training"]["data"] == rows.card.training["data"]


def test_paths_of_one_name_keep_their_licences(run: Run, tmp_path: Path, out: Path) -> None:
    """Catches a licence that is lost because two folders are called the same."""
    (tmp_path / "other").mkdir()
    both = [tmp_path / "text", texts(tmp_path / "other" / "text")]
    flags = ["--data", *map(str, both), "--data-licences", "mit", "bsd"]
    assert main(run(*flags, "--kind", "embeddings")) == DONE
    said = load(out).card.training["data"]
    assert said == {str(both[0]): "licence mit", str(both[1]): "licence bsd"}


def test_tensorboard_gets_what_the_history_has(run: Run, out: Path) -> None:
    """Catches event files that are empty or of other steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(run("--tensorboard", "--kind", "embeddings", steps=3)) == DONE
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(p.step, pytest.approx(p.loss)) for p in read_history(out)]
    assert len(events.Scalars("accepted_to_row/3")) == 2


@pytest.mark.usefixtures("never_loaded")
def test_tensorboard_without_its_package_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback after the model has been loaded."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in complaint(capsys, run("--tensorboard"))
    assert not out.exists()


# Used folders


def test_used_folder_is_left_alone(
    capsys: pytest.CaptureFixture[str], run: Run, out: Path, never_loaded: None
) -> None:
    """Catches files of somebody that are written over."""
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    said = complaint(capsys, run())
    assert "--resume" in said
    assert "--overwrite" in said
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_resume_with_other_settings_names_them(
    capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    """Catches a run that goes on as a mixture of two, and a message that leaves one to search."""
    assert main(run()) == DONE
    other = run("--resume", "--seed", "1", "--keep", "0.7", "--data-weights", "2", steps=4)
    said = complaint(capsys, other)
    for change in ("steps was 2, is 4", "keep was 0.5, is 0.7", "seed was 0, is 1"):
        assert change in said
    assert "the text or its weights differ" in said
    assert "sampler_width" not in said


# Mishaps


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Something happens while a step is taken."""
    taken = Trainer.gradients

    def gradients(trainer: Trainer, number: int) -> float:
        loss = taken(trainer, number)
        instead = act() if number + 1 == step else None
        return loss if instead is None else float(instead)

    monkeypatch.setattr(Trainer, "gradients", gradients)


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_loss_that_is_no_number_keeps_the_last_checkpoint(
    capsys: pytest.CaptureFixture[str],
    run: Run,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
) -> None:
    """Catches a checkpoint of numbers that are none, and files made of them."""
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: loss)
        assert main(run("--checkpoint-every", "3", steps=6)) == USAGE
    said = last_line(capsys)
    assert f"the loss is {loss} at step 4" in said
    assert "--learning-rate" in said
    assert steps_kept(out) == 3
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(out / CHECKPOINT).values())
    assert not (out / CARD_FILE).exists()
    assert main(run("--checkpoint-every", "3", "--resume", steps=6)) == DONE
    assert [p.step for p in read_history(out)] == list(range(1, 7))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on_to_the_same_files(
    capsys: pytest.CaptureFixture[str],
    run: Run,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """Catches a step that is torn, lost or done twice, and a wrong exit code."""
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        assert main(run(steps=5)) == INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err
    assert steps_kept(out) == 3
    assert not (out / CARD_FILE).exists()
    assert main(run("--resume", steps=5)) == DONE
    assert main([*run(steps=5), "--out", str(tmp_path / "unbroken")]) == DONE
    files = [(folder / TENSORS_FILE).read_bytes() for folder in (out, tmp_path / "unbroken")]
    assert files[0] == files[1]


class Killed(BaseException):
    """The process is gone: nothing catches it, and nothing is tidied up."""


def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> list[int]:
    """A function of `os` fails when it is called for that time; gives the calls so far."""
    calls: list[int] = []
    works = getattr(os, name)

    def function(*arguments: Any, **options: Any) -> Any:
        calls.append(at)
        if len(calls) == at:
            raise error
        if len(calls) > at and isinstance(error, Killed):
            raise error
        return works(*arguments, **options)

    monkeypatch.setattr(os, name, function)
    return calls


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITES = 7  # two checkpoints, the history between, tensors, card, curves, README


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, WRITES + 1))
@pytest.mark.parametrize(
    ("name", "error"), [("fsync", FULL), ("replace", FULL), ("replace", Killed())], ids=str
)
def test_run_cut_off_at_any_write_leaves_no_folder_that_loads_wrongly(
    capsys: pytest.CaptureFixture[str],
    run: Run,
    out: Path,
    at: int,
    name: str,
    error: BaseException,
) -> None:
    """Catches an old card beside new tensors of the same shape, and half a checkpoint: a full
    disk, or a kill between two files, in a run that overwrites the files of another."""
    brief = ["--kind", "embeddings", "--overwrite", "--evaluate-texts", "1"]
    assert main(run(*brief, "--seed", "1")) == DONE
    before = load(out)
    with pytest.MonkeyPatch.context() as patch:
        calls = failing(patch, name, at, error)
        if isinstance(error, Killed):
            with pytest.raises(Killed):
                main(run(*brief))
        else:
            assert main(run(*brief)) == USAGE
            said = last_line(capsys)
            assert f"cannot write to --out {out}: No space left on device" in said
    assert len(calls) >= at, "the run does not write so often"
    if (out / CHECKPOINT).exists():
        assert steps_kept(out) == (2 if at > 3 else 0)
    if (out / CARD_FILE).exists():
        left = load(out)
        old = bool((left.embeddings == before.embeddings).all())
        assert old == (left.card.training["seed"] == 1)
    else:
        assert name == "replace", "what is not written yet replaces nothing"
        with pytest.raises(LookAheadError, match=CARD_FILE):
            load(out)


def test_number_of_writes_is_as_stated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a test above that stops before the last write."""
    calls = failing(monkeypatch, "fsync", 1000, FULL)
    assert main(run("--kind", "embeddings", "--evaluate-texts", "1")) == DONE
    assert len(calls) == WRITES


def test_history_on_a_full_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, and a line cut in two that stops a later --resume."""
    record = Trainer._record

    def full(trainer: Trainer, progress: Progress) -> None:
        if progress.step < 4:
            return record(trainer, progress)
        with (trainer.folder / HISTORY).open("a") as file:
            file.write('{"step": 4, "lo')
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", full)
        assert main(run("--kind", "embeddings", steps=5)) == USAGE
    assert "No space left on device" in last_line(capsys)
    assert steps_kept(out) == 2
    assert main(run("--kind", "embeddings", "--resume", steps=5)) == DONE
    assert [p.step for p in read_history(out)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_second_signal_ends_a_step_that_hangs(run: Run, tmp_path: Path, out: Path) -> None:
    """Catches Ctrl-C that has no effect for as long as a step of a large model takes."""
    code = (
        "import os, signal, sys, time\n"
        "from passlm.cli import main\n"
        "from passlm.train.loop import Trainer\n"
        "def gradients(*_):\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.1)\n"
        "    time.sleep(600)\n"
        "Trainer.gradients = gradients\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [sys.executable, "-c", code, *run()]
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, timeout=120, check=False
    )
    assert done.returncode == INTERRUPTED, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert steps_kept(out) == 0


def test_signals_that_come_twice_to_launched_processes_are_one() -> None:
    """Catches a checkpoint torn by the launcher: it passes on a signal that the terminal has sent
    to everybody, and sends another as soon as the first process has ended."""
    with stop_flag(patient=True) as received:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert received == [signal.SIGINT, signal.SIGTERM]
    with stop_flag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
