"""The command line: output, exit codes, and errors of one line that name the cure."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_generator, save_folders

import passlm.generate
from passlm.cli import DONE, INTERRUPTED, USAGE, main
from passlm.generate import Generator

PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_folders(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def base(folders: tuple[Path, Path]) -> list[str]:
    model, rows = folders
    return ["--model", str(model), "--lookahead", str(rows), "--dtype", "float32"]


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of a refused command."""
    assert main(arguments) == USAGE
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize("method", ["ar", "two-pass", "one-pass"])
def test_generate_streams_text_and_gives_json_last(
    capsys: pytest.CaptureFixture[str], base: list[str], method: str
) -> None:
    """Catches text, JSON and figures that mix, and a method that changes the text."""
    wanted = ["--max-new-tokens", "20", "--json", "--stats", "--stop", "\x01\x02"]
    if method == "ar":
        base = [*base, "--lookahead", "none"]
    code = main(["generate", PROMPT, *base, "--method", method, *wanted])
    captured = capsys.readouterr()
    *text, last = captured.out.split("\n")[:-1]
    result = json.loads(last)
    expected = byte_generator().generate(PROMPT, method="ar", max_new_tokens=20)[0]
    assert code == DONE
    assert result["tokens"] == list(expected.tokens)
    assert "\n".join(text) == expected.text == result["text"]
    assert result["stats"]["tokens"] == len(expected.tokens)
    assert "tokens per pass" in captured.err


def test_json_holds_the_text_that_was_shown(
    capsys: pytest.CaptureFixture[str], base: list[str]
) -> None:
    """Catches a stop string, or what lies behind it, in the JSON of a text that ended before it."""
    free = byte_generator().generate(PROMPT, max_new_tokens=30)[0].text
    stop = free[9:11]
    assert main(["generate", PROMPT, *base, "--json", "--stop", stop]) == DONE
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["text"] == free[: free.index(stop)]
    assert result["finish_reason"] == "stop"


def test_weights_are_packed_unless_told_otherwise(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a flag that does not arrive."""
    given: list[bool] = []

    def load(*names: str, pack: bool, **options: object) -> Generator:
        given.append(pack)
        return byte_generator()

    monkeypatch.setattr(passlm.generate, "load", load)
    for flags in ([], ["--no-pack"]):
        assert main(["generate", PROMPT, *base, *flags, "--max-new-tokens", "2"]) == DONE
    assert given == [True, False]


def test_prompt_from_file_and_standard_input(
    capsys: pytest.CaptureFixture[str],
    base: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a prompt that depends on how it was given."""
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    outputs = []
    for way in ([PROMPT], ["--prompt-file", str(file)], ["-"]):
        assert main(["generate", *way, *base, "--max-new-tokens", "5"]) == DONE
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1


def test_show_accepted_colours_only_accepted_tokens(
    capsys: pytest.CaptureFixture[str], base: list[str]
) -> None:
    """Catches colour codes in plain decoding, where nothing is drafted."""
    plain = [*base, "--lookahead", "none", "--method", "ar"]
    assert main(["generate", PROMPT, *plain, "--show-accepted"]) == DONE
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generat"], "did you mean generate"),
        (["generate"], "give one prompt"),
        (["generate", "x", "--prompt-file", "y"], "give one prompt"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--top-k", "-3"], "top_k is -3"),
        (["generate", "x", "--temperature", "warm"], "--temperature"),
        (["generate", "x", "--temprature", "1"], "did you mean --temperature"),
        (["generate", "x", "--judge", "fair"], "coupled"),
        (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "--prompt-file", "/nowhere/prompt"], "/nowhere/prompt"),
        (["generate", "x", "--model", "/nowhere"], "/nowhere"),
        (["generate", "x", "--threads", "0"], "threads is 0"),
        (["generate", "x", "--method", "ar", "--lookahead", "files"], "leave --lookahead out"),
        (["info", "/nowhere"], "/nowhere"),
        (["train", "--data", "/nowhere"], "--out"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Catches a traceback, a silent default, and an error that names no cure."""
    assert said in complaint(capsys, arguments)


def test_sampling_limits_without_sampling_are_fine(
    capsys: pytest.CaptureFixture[str], base: list[str]
) -> None:
    """Catches `--temperature 0 --top-p 0.5` being refused: greedy with a limit is greedy."""
    limited = ["--temperature", "0", "--top-p", "0.5"]
    assert main(["generate", PROMPT, *base, *limited, "--max-new-tokens", "5"]) == DONE
    first = capsys.readouterr().out
    assert main(["generate", PROMPT, *base, "--max-new-tokens", "5"]) == DONE
    assert capsys.readouterr().out == first


def test_prompt_beyond_the_context_and_files_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], base: list[str], tmp_path: Path
) -> None:
    """Catches errors of deeper layers that leave the command as tracebacks."""
    assert "context is 192" in complaint(capsys, ["generate", "x" * 300, *base])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    named = ["generate", "--prompt-file", str(tmp_path / "bytes"), *base]
    assert "not UTF-8" in complaint(capsys, named)
    drafting = [*base, "--lookahead", "none", "--method", "two-pass"]
    assert "passlm train" in complaint(capsys, ["generate", "x", *drafting])


def test_info_says_what_folders_are(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path]
) -> None:
    """Catches a look-ahead folder taken for a model and the other way round."""
    model, rows = folders
    assert main(["info", str(model), "--json"]) == DONE
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["kind"], said["architecture"], said["layers"]) == ("model", "llama", 2)
    assert main(["info", str(rows), "--json"]) == DONE
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["kind"], said["look_ahead_tokens"]) == ("look-ahead files", 4)


def train_arguments(model: Path, text: Path, out: Path) -> list[str]:
    small = ["--steps", "4", "--sequence-tokens", "40", "--anchors", "8", "--warmup", "1"]
    often = ["--evaluate-every", "2", "--evaluate-texts", "2", "--checkpoint-every", "2"]
    rows = ["--lookahead-tokens", "3", "--held-out", "0.3"]
    given = ["--model", str(model), "--data", str(text), "--out", str(out)]
    return ["train", *given, *small, *often, *rows, "--json"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        lines = [f"line {n} of text {number}: the quick brown fox" for n in range(12)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    (folder / "empty.txt").write_text("")
    return folder


def test_train_writes_a_folder_that_generate_takes(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    """Catches a folder that lacks a part, and one that does not load."""
    model, out = folders[0], tmp_path / "out"
    assert main(train_arguments(model, text, out)) == DONE
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["steps"] == 4
    assert {p.name for p in out.iterdir()} >= {
        "lookahead.json",
        "lookahead.safetensors",
        "README.md",
        "curves.png",
    }
    taken = ["--model", str(model), "--lookahead", str(out), "--dtype", "float32"]
    assert main(["generate", PROMPT, *taken, "--max-new-tokens", "5", "--method", "one-pass"]) == 0
    capsys.readouterr()
    used = complaint(capsys, train_arguments(model, text, out))
    assert "--resume" in used
    assert "--overwrite" in used


def test_train_refuses_text_it_cannot_use(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    """Catches training on nothing, and a folder left half-made."""
    out = tmp_path / "out"
    nowhere = train_arguments(folders[0], tmp_path / "nowhere", out)
    assert "nowhere" in complaint(capsys, nowhere)
    weighted = [*train_arguments(folders[0], text, out), "--data-weights", "1", "2"]
    assert main(weighted) == USAGE
    assert "--data-weights has 2 values for 1 paths" in capsys.readouterr().err
    long = [*train_arguments(folders[0], text, out), "--sequence-tokens", "500"]
    assert "the model's context is 192" in complaint(capsys, long)
    inside = train_arguments(folders[0], text, text / "0.txt" / "out")
    assert "not a writable folder" in complaint(capsys, inside)
    assert not out.exists()


def environment() -> dict[str, str]:
    source = str(Path(__file__).parents[1] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def started(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "passlm.cli", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.slow
def test_interrupted_training_goes_on_to_the_same_end(
    folders: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    """Catches an interrupt that loses the run, and a wrong exit code."""
    out = tmp_path / "out"
    arguments = [*train_arguments(folders[0], text, out), "--steps", "100000"]
    process = started(arguments)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.safetensors").exists():
        assert time.monotonic() < deadline, "no checkpoint in a minute"
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert b"--resume" in errors
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_closed_pipe_is_quiet(base: list[str]) -> None:
    """Catches a BrokenPipeError shown to somebody who piped into `head`."""
    process = started(["generate", PROMPT, *base, "--max-new-tokens", "150", "--ignore-eos"])
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=60) == DONE
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


def test_help_is_quick_and_needs_no_torch() -> None:
    """Catches heavy imports that make every mistyped command slow."""
    code = (
        "from passlm.cli import main; main(['--help']); import sys; 'torch' in sys.modules and 1/0"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == 0


def test_what_may_not_be_read_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback for a path in somebody else's folder."""

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refused)
    assert main(["train", "--model", "m", "--data", "/closed/x", "--out", "y"]) == USAGE
    said = capsys.readouterr().err
    assert "Permission denied: choose another path" in said
    assert said.count("\n") == 1
