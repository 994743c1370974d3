"""Answers of the target as text to train on: the same alone, in a batch and after a break."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_model import CHAT, CONTEXT, END, byte_generator, save_folders

import passlm.generate
from passlm.cli import DONE, INTERRUPTED, USAGE, main
from passlm.generate import Generator
from passlm.train import answers as module
from passlm.train.answer_file import AnswerFile, about_file
from passlm.train.answers import (
    Answerer,
    AnswerError,
    Prompt,
    Question,
    Settings,
    Skipped,
    prepare,
    read_questions,
)

MIXED: list[dict[str, Any]] = [
    {"prompt": "def f(x):", "id": "first"},
    {"messages": [{"role": "user", "content": "hi"}], "name": "chat", "kind": "chat"},
    {"prompt": "hello, world: ", "max_new_tokens": 3, "task_id": 7},
    {"prompt": "a", "temperature": 0.7},
    {"prompt": "bcd efg", "temperature": 0},
    {"prompt": "the quick brown fox", "max_new_tokens": 500},
    {"prompt": "é漢🙂"},
]
LOADED: list[dict[str, Any]] = []  # what models were asked for with
SETTINGS = Settings(temperature=(0.0, 0.9), top_k=20, seed=4, max_new_tokens=12)


@pytest.fixture(scope="module")
def lm() -> Generator:
    return byte_generator()


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of prompts: objects, or lines as they are."""

    def write(*lines: dict[str, Any] | str, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n")
        return path

    return write


@pytest.fixture
def command(
    lm: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Arguments of the command, which gets the byte model without loading it."""
    monkeypatch.setattr(passlm.generate, "load", lambda *_, **named: LOADED.append(named) or lm)

    def arguments(prompts: Path, *more: str) -> list[str]:
        given = ["--model", "bytes", "--prompts", str(prompts), "--out", str(tmp_path / "out")]
        drawn = ["--temperature", "0,0.9", "--top-k", "20", "--seed", "4"]
        return ["distill-data", *given, *drawn, "--max-new-tokens", "12", *more]

    return arguments


def prompts_of(lm: Generator, path: Path) -> list[Prompt]:
    skipped = Skipped()
    return prepare(lm, read_questions([path], skipped)[0], skipped)


def answered(lm: Generator, path: Path, batch: int) -> dict[str, dict[str, Any]]:
    run = Answerer(lm, SETTINGS).run(prompts_of(lm, path), batch, lambda: False)
    return {record["id"]: record for finished in run for record in finished}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of a refused command."""
    assert main(arguments) == USAGE
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


# What is answered


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_those_of_generate_alone(
    lm: Generator, ask: Callable[..., Path], batch: int
) -> None:
    """Catches a draw that depends on the batch, prompts swapped in it, and a wrong limit."""
    found = answered(lm, ask(*MIXED), batch)
    assert len(found) == len(MIXED)
    for given in MIXED:
        [record] = [r for r in found.values() if all(given.get(k) == r.get(k) for k in KEPT)]
        [alone] = lm.generate(
            given.get("prompt") or given["messages"],
            method="ar",
            max_new_tokens=min(12, given.get("max_new_tokens", 12)),
            temperature=record["temperature"],
            top_k=20,
            seed=record["seed"],
        )
        assert record["completion"] == alone.text
        assert record["finish_reason"] == alone.finish_reason
        assert record["new_tokens"] == len(alone.tokens)
        assert record["prompt_tokens"] == alone.stats.prompt_tokens


KEPT = ("prompt", "messages", "kind")


def test_answers_keep_ids_and_what_was_asked(lm: Generator, ask: Callable[..., Path]) -> None:
    """Catches an answer that nobody can match with its prompt, and text the model never saw."""
    found = answered(lm, ask(*MIXED), 3)
    assert set(found) == {"first", "chat", "7", *(f"prompts:{n}" for n in (4, 5, 6, 7))}
    assert found["chat"]["kind"] == "chat"
    assert found["chat"]["text"] == "<user>hi<assistant>" + found["chat"]["completion"]
    assert found["first"]["text"] == "def f(x):" + found["first"]["completion"]
    assert found["7"]["new_tokens"] == 3
    assert found["prompts:6"]["new_tokens"] <= 12
    assert found["prompts:4"]["temperature"] == 0.7
    assert found["prompts:5"]["temperature"] == 0


def test_end_token_is_counted_and_not_written(
    lm: Generator, ask: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an end marker in the text, and answers that go on behind it."""
    [free] = lm.generate("bcd efg", method="ar", max_new_tokens=12)
    end = free.tokens[5]  # an id that the tokenizer does not know as an end
    before = free.tokens[: free.tokens.index(end)]
    monkeypatch.setattr(lm, "eos", frozenset({END, end}))
    record = answered(lm, ask(*MIXED), 4)["prompts:5"]
    assert (record["finish_reason"], record["new_tokens"]) == ("eos", len(before) + 1)
    assert record["completion"] == lm.decode(before)
    assert record["text"] == "bcd efg" + record["completion"]


def test_context_ends_an_answer(lm: Generator, ask: Callable[..., Path]) -> None:
    """Catches running past the model's last position."""
    long = {"prompt": "x" * (CONTEXT - 2), "id": "x", "temperature": 0}
    assert answered(lm, ask(long), 1)["x"]["finish_reason"] == "context"


def test_temperatures_and_seeds_come_from_the_id_alone() -> None:
    """Catches a mixture that moves when prompts are added, and one with the wrong shares."""
    settings = Settings(temperature=(0.0, 0.0, 0.8), seed=1)
    questions = [Question(str(n), "", {"prompt": "x"}) for n in range(900)]
    drawn = [settings.sampling(question) for question in questions]
    assert drawn[::-1] == [settings.sampling(question) for question in questions[::-1]]
    assert 240 < sum(one.temperature == 0.8 for one in drawn) < 360
    assert len({one.seed for one in drawn}) == 900
    other = Settings(temperature=(0.0, 0.0, 0.8), seed=2)
    assert [other.sampling(q).temperature for q in questions] != [d.temperature for d in drawn]


def test_batch_stays_full(
    lm: Generator, ask: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a batch that is only filled again once all of it has finished."""
    sizes: list[int] = []
    step = module.Decoder.step

    def counted(self: Any) -> Any:
        sizes.append(len(self.rows))
        return step(self)

    monkeypatch.setattr(module.Decoder, "step", counted)
    lengths = [2, 9, 3, 4, 2, 6]
    lines = [
        {"prompt": f"{n}: ", "max_new_tokens": length, "temperature": 0}
        for n, length in enumerate(lengths)
    ]
    monkeypatch.setattr(lm, "eos", frozenset())
    answered(lm, ask(*lines), 3)
    assert sizes[:6] == [3] * 6
    assert sum(sizes) == sum(lengths)


# Going on


def test_resumed_run_gives_the_records_of_an_unbroken_one(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches answers lost, doubled or changed by a break, and a torn line that stays."""
    prompts, out = ask(*MIXED), tmp_path / "out"
    assert main(command(prompts, "--batch", "3")) == DONE
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:-20])
    capsys.readouterr()
    assert main(command(prompts, "--batch", "1", "--resume", "--json")) == DONE
    captured = capsys.readouterr()
    assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert json.loads(captured.out)["answers"] == len(lines) - 3
    assert len(json.loads(about_file(out).read_text())["resumed"]) == 1
    assert main(command(prompts, "--resume", "--json")) == DONE
    assert json.loads(capsys.readouterr().out)["answers"] == 0


def test_passes_are_compiled_on_request(
    command: Callable[..., list[str]], ask: Callable[..., Path]
) -> None:
    """Catches a flag that nobody reads."""
    LOADED.clear()
    assert main(command(ask(MIXED[0]))) == DONE
    assert main(command(ask(MIXED[0]), "--compile", "--overwrite")) == DONE
    assert [given["compile"] for given in LOADED] == [False, True]


def test_stopped_run_keeps_what_is_answered(lm: Generator, ask: Callable[..., Path]) -> None:
    """Catches a stop that is not heard while prompts are left."""
    prompts = prompts_of(lm, ask(*MIXED))
    done: list[dict[str, Any]] = []
    for finished in Answerer(lm, SETTINGS).run(prompts, 2, lambda: len(done) >= 2):
        done.extend(finished)
    assert 2 <= len(done) < len(prompts)


@pytest.mark.slow
def test_interrupted_command_goes_on(
    tmp_path: Path, ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an interrupt that loses answers, its missing hint, and a wrong exit code."""
    model, _ = save_folders(tmp_path)
    out = tmp_path / "out.jsonl"
    # Far more than are answered in the time: the interrupt must meet a run at work.
    prompts = ask(*({"prompt": f"line {n}: "} for n in range(20_000)))
    given = ["--model", str(model), "--prompts", str(prompts), "--out", str(out)]
    arguments = ["distill-data", *given, "--dtype", "float32", "--max-new-tokens", "6"]
    source = str(Path(__file__).parents[1] / "src")
    process = subprocess.Popen(
        [sys.executable, "-m", "passlm.cli", *arguments],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size):
        assert time.monotonic() < deadline, "no answer in a minute"
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, errors
    assert b"--resume" in errors
    assert b"Traceback" not in errors
    kept = records(out)
    assert out.read_bytes().endswith(b"\n")
    limit = ["--resume", "--limit", str(len(kept) + 40), "--json"]
    assert main([*arguments, *limit]) == DONE
    ids = [record["id"] for record in records(out)]
    assert len(ids) == len(set(ids))
    assert set(ids) >= {f"prompts:{n}" for n in range(1, len(kept) + 41)}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--seed", "5"], "seed was 4 and is 5"),
        (["--temperature", "0"], "temperature was [0.0, 0.9] and is [0.0]"),
        (["--model", "other"], "model was 'bytes' and is 'other'"),
        (["--dtype", "float32"], "dtype was 'bfloat16' and is 'float32'"),
        (["--max-new-tokens", "13"], "max_new_tokens was 12 and is 13"),
    ],
)
def test_resume_with_other_settings_is_refused(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    changed: list[str],
    said: str,
) -> None:
    """Catches a file with answers of two kinds, and a refusal that does not say which differ."""
    prompts = ask(*MIXED[:2])
    assert main(command(prompts)) == DONE
    before = (tmp_path / "out").read_bytes()
    capsys.readouterr()
    line = complaint(capsys, command(prompts, "--resume", *changed))
    assert said in line
    assert line.count(" and is ") == 1
    assert (tmp_path / "out").read_bytes() == before


def test_resume_with_other_prompts_or_a_damaged_file_is_refused(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Catches answers that no longer match their prompts, and broken lines that are kept."""
    prompts, out = ask(*MIXED[:2]), tmp_path / "out"
    assert main(command(prompts)) == DONE
    ask(*MIXED[:3])
    capsys.readouterr()
    assert "prompts was" in complaint(capsys, command(prompts, "--resume"))
    ask(*MIXED[:2])
    whole = out.read_bytes()
    out.write_bytes(b"{}\n" + whole)
    assert f"{out}, line 1: not an answer" in complaint(capsys, command(prompts, "--resume"))
    out.write_bytes(whole)
    about_file(out).write_text("[]")
    assert "missing or damaged" in complaint(capsys, command(prompts, "--resume"))
    assert out.read_bytes() == whole


# What is refused


def test_answers_that_exist_are_not_lost(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Catches answers, or the prompts themselves, written over without being asked to."""
    prompts, out = ask(*MIXED[:2]), tmp_path / "out"
    out.write_text("mine\n")
    line = complaint(capsys, command(prompts))
    assert "--resume" in line
    assert "--overwrite" in line
    assert "give one of them" in complaint(capsys, command(prompts, "--resume", "--overwrite"))
    over = command(prompts, "--overwrite", "--out", str(prompts))
    assert "is one of the --prompts files" in complaint(capsys, over)
    assert "is not a file" in complaint(capsys, command(prompts, "--out", str(tmp_path)))
    assert out.read_text() == "mine\n"
    assert main(command(prompts, "--overwrite")) == DONE
    assert len(records(out)) == 2


BROKEN = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"text": "x"}', "either 'prompt' or 'messages'"),
    ('{"prompt": "x", "messages": []}', "either 'prompt' or 'messages'"),
    ('{"prompt": ""}', "'prompt' is not a non-empty string"),
    ('{"prompt": 3}', "'prompt' is not a non-empty string"),
    ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ('{"messages": []}', "'messages' is not a non-empty list"),
    ('{"messages": [{"role": "user"}]}', "string 'role' and 'content'"),
    ('{"prompt": "x", "id": [1]}', "its id is [1]"),
    ('{"prompt": "x", "temperature": "hot"}', "temperature is 'hot'"),
    ('{"prompt": "x", "temperature": -1}', "temperature is -1"),
    ('{"prompt": "x", "temperature": true}', "True is not a number"),
    ('{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens is 0"),
    ('{"prompt": "x", "max_new_tokens": 1.5}', "max_new_tokens is 1.5"),
]


@pytest.mark.parametrize(("line", "said"), BROKEN)
def test_broken_line_is_named(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    line: str,
    said: str,
) -> None:
    """Catches a broken line that is skipped in silence, or that nobody can find."""
    prompts = ask(MIXED[0], "", line)
    found = complaint(capsys, command(prompts))
    assert f"{prompts}, line 3: " in found
    assert said in found
    assert "--skip-bad" in found
    assert not (tmp_path / "out").exists()


def test_broken_and_long_prompts_are_counted(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Catches prompts that vanish without a word."""
    long = {"prompt": "x" * CONTEXT}
    prompts = ask(*(line for line, _ in BROKEN), MIXED[0], long, MIXED[1], MIXED[2])
    assert main(command(prompts, "--skip-bad", "--limit", "2", "--json")) == DONE
    said = json.loads(capsys.readouterr().out)
    assert (said["skipped_bad"], said["skipped_long"]) == (len(BROKEN), 1)
    assert said["answers"] == 2
    assert set(said) >= {"out", "tokens", "seconds", "tokens_per_second"}
    assert {record["id"] for record in records(tmp_path / "out")} == {"first", "chat"}
    assert f"context is {CONTEXT}" in caplog.text


def test_two_prompts_with_one_id_are_refused(
    command: Callable[..., list[str]], ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a prompt that is never answered because another one had its id, within or across."""
    prompts = ask({"prompt": "x", "id": 7}, {"prompt": "y"}, {"prompt": "z", "name": "7"})
    found = complaint(capsys, command(prompts, "--skip-bad"))
    assert f"{prompts}, line 1 and {prompts}, line 3 have the same id, '7'" in found
    twice = ask({"prompt": "x"})
    found = complaint(capsys, [*command(twice), "--prompts", str(twice), str(twice)])
    assert "have the same id, 'prompts:1'" in found


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch", "0"], "batch is 0"),
        (["--limit", "0"], "limit is 0"),
        (["--temperature", "0,warm"], "0,0,0.8"),
        (["--temperature", ""], "0,0,0.8"),
        (["--temperature", "0,-1"], "temperature is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--prompt", "x"], "did you mean --prompts"),
    ],
)
def test_bad_settings_are_one_line(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    more: list[str],
    said: str,
) -> None:
    """Catches a traceback, a silent default, and a file begun for nothing."""
    assert said in complaint(capsys, command(ask(*MIXED), *more))
    assert not (tmp_path / "out").exists()


def test_nothing_to_answer_is_refused(
    command: Callable[..., list[str]], ask: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an empty file of answers that looks like a success."""
    assert "no prompts in" in complaint(capsys, command(ask("")))
    assert main(command(ask({"prompt": "x" * CONTEXT}))) == USAGE
    assert "no prompt is left (0 broken, 1 too long)" in capsys.readouterr().err
    binary = ask("")
    binary.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in complaint(capsys, command(binary))


def test_chat_for_a_model_without_a_template_is_one_line(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    lm: Generator,
) -> None:
    """Catches a traceback of the template hours into a run."""
    prompts = ask(MIXED[0], MIXED[1])
    try:
        lm.tokenizer.chat_template = None
        found = complaint(capsys, command(prompts))
        assert f"{prompts}, line 2: this model has no chat template" in found
        lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        assert "roles must alternate" in complaint(capsys, command(prompts))
    finally:
        lm.tokenizer.chat_template = CHAT


class FullDisk:
    """A file that takes so many bytes more, then none."""

    def __init__(self, path: Path, room: int) -> None:
        self.file = path.open("ab", buffering=0)
        self.room = room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(content[: self.room])
        self.room -= taken
        return taken

    def truncate(self, size: int) -> int:
        return self.file.truncate(size)

    def close(self) -> None:
        self.file.close()


def test_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """Catches half a record left behind, and a traceback for a full disk."""
    out = tmp_path / "out"
    with AnswerFile(out, {"seed": 0}) as file:
        file.append({"id": "kept"})
        file._file.close()
        file._file = FullDisk(out, room=5)  # type: ignore[assignment]
        with pytest.raises(AnswerError, match="No space left on device") as caught:
            file.append({"id": "lost"})
    assert "--resume" in str(caught.value)
    assert records(out) == [{"id": "kept"}]
    with AnswerFile(out, {"seed": 0}, resume=True) as file:
        assert file.answered == {"kept"}


def test_folder_that_cannot_be_written_is_one_line(
    command: Callable[..., list[str]],
    ask: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback for an --out below a file."""
    prompts = ask(MIXED[0])
    found = complaint(capsys, command(prompts, "--out", str(prompts / "out")))
    assert "cannot write to --out" in found
