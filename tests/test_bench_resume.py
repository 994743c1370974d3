"""A benchmark that is cut off and gone on with: nothing lost, nothing else, and only the same."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_bench import NEW_TOKENS, arguments, folder

from passlm.bench.engines.decoding import Record
from passlm.bench.engines.methods import Method
from passlm.bench.measuring.journal import (
    Journal,
    JournalError,
    check_same,
    prompt_line,
    read_record,
)
from passlm.bench.measuring.measure import Prompt, Sample, Turn, interleave
from passlm.cli import main
from passlm.outputs import Stats, Step
from passlm.params import SamplingParams

__all__ = ["folder"]
# Of each process, not of what was run.
PROCESS = ("provenance", "resumed", "peak_memory_bytes", "start_seconds", "load_seconds")
FIRST = ("first_run_seconds", "first_run_first_token_seconds")
LISTS = ("--temperature", "0,0.8", "--lookahead-tokens", "1,3", "--batch-size", "1,2")
METHODS = ("--methods", "ar,two-pass,auto,hf")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one whenever somebody looks, so that the same takes the same."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def stop_at(patch: pytest.MonkeyPatch, count: int, number: int = signal.SIGINT) -> None:
    """Let a signal meet the process in the turn behind so many."""
    run, turns = Turn.run, itertools.count()

    def stopped(self: Turn, prompts: Sequence[Prompt], longest: int) -> list[Sample]:
        found = run(self, prompts, longest)
        if next(turns) == count:
            os.kill(os.getpid(), number)
            time.sleep(5)
        return found

    patch.setattr(Turn, "run", stopped)


def results_in(out: Path) -> dict[str, Any]:
    """All that does not belong to the process that wrote it."""
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    runs = [{k: v for k, v in run.items() if k not in FIRST} for run in results["runs"]]
    return {k: v for k, v in results.items() if k not in PROCESS} | {"runs": runs}


def lines_in(out: Path) -> list[bytes]:
    return (out / "prompts.jsonl").read_bytes().splitlines(keepends=True)


@pytest.fixture
def two_suites(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that runs two suites, of which one has categories and another length."""
    from passlm.bench.suites.tasks import Task

    given = [Task("text", f"t{n}", f"w{n + 5} w7 w8", category="ab"[n % 2]) for n in range(4)]
    monkeypatch.setattr("passlm.bench.suites.prompts.load_suite", lambda *_: given)
    return arguments(folder, "--suite", "text", *METHODS, *LISTS)


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_a_run_that_is_cut_off_gives_what_a_whole_one_does(
    two_suites: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an order that shifts, turns lost or taken twice, and figures that forget what an
    earlier process counted; the clock is part of what has to agree."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    main([*two_suites, "--out", str(tmp_path / "warm")])  # costs are measured and kept
    assert main([*two_suites, "--out", str(whole)]) == 0
    report = capsys.readouterr().out.split("## Loading and first runs")[0]
    turns = 0
    for more, count in enumerate((0, 17, 1, 40)):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, count)
            line = [*two_suites, "--out", str(out), *(["--resume"] if more else [])]
            assert main(line) == 130
        turns += count
        kept = json.loads((out / "run.json").read_text())
        assert len(kept["resumed"]) == more
    assert lines_in(out) == lines_in(whole)[: len(lines_in(out))]
    assert len(lines_in(whole)) > len(lines_in(out)) > turns  # batches are of two lines
    assert main([*two_suites, "--out", str(out), "--resume"]) == 0
    assert lines_in(out) == lines_in(whole)
    assert results_in(out) == results_in(whole)
    assert results_in(out)["complete"] is True
    assert capsys.readouterr().out.split("## Loading and first runs")[0] == report


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """Catches a traceback, a wrong exit code, and what was done being lost with the process."""
    before = signal.getsignal(signal.SIGTERM)
    line = arguments(folder, "--methods", "ar,hf")
    stop_at(monkeypatch, 3, number)
    assert main([*line, "--out", str(tmp_path), "--overwrite"]) == 130
    assert "continue with --resume instead of --overwrite" in caplog.text
    assert len(lines_in(tmp_path)) == 3
    assert not (tmp_path / "results.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    stop_at(monkeypatch, 0, number)
    assert main(line) == 130
    assert "finished runs are lost without --out" in caplog.text


@pytest.mark.slow
def test_a_killed_process_loses_one_prompt_at_most(folder: Path, tmp_path: Path) -> None:
    """Catches lines that are kept in a buffer, where no handler gets to write them."""
    out = tmp_path / "out"
    line = [*arguments(folder, "--methods", "ar,hf", "--repeats", "40"), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "passlm.cli", *line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if (out / "prompts.jsonl").exists() and len(lines_in(out)) > 20:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    kept = lines_in(out)
    assert len(kept) > 20
    assert not (out / "results.json").exists()
    assert main([*line, "--resume", "--threads", "1"]) == 2  # not what it was begun with
    assert main([*line, "--resume"]) == 0
    done = [json.loads(text) for text in lines_in(out)]
    assert lines_in(out)[: len(kept)] == kept
    assert len(done) == 2 * 3 * 40 == len({(d["number"], d["method"], d["repeat"]) for d in done})
    assert results_in(out)["runs"][0]["tokens"] == 3 * 40 * NEW_TOKENS


def test_a_torn_line_is_dropped(folder: Path, tmp_path: Path) -> None:
    """Catches half a line read as a record, or the next one written behind it."""
    line = [*arguments(folder, "--methods", "ar"), "--out", str(tmp_path)]
    assert main(line) == 0
    whole, results = lines_in(tmp_path), results_in(tmp_path)
    (tmp_path / "results.json").unlink()
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(whole)[:-30])
    assert main([*line, "--resume"]) == 0
    found = [json.loads(text) for text in lines_in(tmp_path)]
    assert [f["record"]["tokens"] for f in found] == [
        json.loads(text)["record"]["tokens"] for text in whole
    ]
    assert lines_in(tmp_path)[:2] == whole[:2]
    assert results_in(tmp_path)["runs"][0]["tokens"] == results["runs"][0]["tokens"]


def test_half_a_batch_is_taken_again(folder: Path, tmp_path: Path) -> None:
    """Catches a batch whose seconds are those of some of its texts."""
    more = ("--methods", "ar", "--batch-size", "3")
    line = [*arguments(folder, *more), "--out", str(tmp_path)]
    assert main(line) == 0
    whole = lines_in(tmp_path)
    (tmp_path / "results.json").unlink()
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(whole[:2]))
    assert main([*line, "--resume"]) == 0
    found = [json.loads(text) for text in lines_in(tmp_path)]
    assert [text["number"] for text in found] == [0, 1, 2]
    assert len({text["seconds"] for text in found}) == 1


def test_a_complete_run_is_told_and_not_run_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a model loaded for nothing, and results that a second look changes."""
    line = [*arguments(folder, "--methods", "ar"), "--out", str(tmp_path)]
    assert main(line) == 0
    said = capsys.readouterr().out
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("passlm.cli.bench.loaded", None)
    assert main([*line, "--resume", "--json"]) == 0
    again = capsys.readouterr().out
    assert again.startswith(said)
    assert json.loads(again.splitlines()[-1])["complete"] is True
    assert "is complete" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not [name for name in before if name.name not in SHOWN]


SHOWN = ("run.json", "prompts.jsonl", "results.json", "report.md", "report.html")


def test_other_arguments_are_refused_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches two runs in one result, and a refusal that leaves the reader to find out why."""
    line = [*arguments(folder, "--methods", "ar", "--limit", "2"), "--out", str(tmp_path)]
    assert main(line) == 0
    for complete in (True, False):
        if not complete:
            (tmp_path / "results.json").unlink()
        more = ("--limit", "3", "--temperature", "0,0.5", "--no-pack", "--top-k", "7", "--resume")
        assert main([*line, *more]) == 2
        (said,) = [
            text for text in capsys.readouterr().err.splitlines() if "other settings" in text
        ]
        for part in (
            "--limit was 2, now 3",
            "--temperature was 0, now 0,0.5",
            "--no-pack was not given, now given",
            "--top-k was 0, now 7",
            "--overwrite",
        ):
            assert part in said
        assert "--methods" not in said
    assert main([*line, "--resume", "--overwrite"]) == 2
    assert main([*line]) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_other_prompts_and_machines_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches prompts that changed under the same name, and seconds of two machines in one sum."""
    own = tmp_path / "mine.jsonl"
    own.write_text('{"prompt": "w5 w6"}\n{"prompt": "w7 w8"}\n')
    out = tmp_path / "out"
    line = arguments(folder, "--prompts", str(own), "--methods", "ar", "--out", str(out))
    assert main(line) == 0
    (out / "results.json").unlink()
    own.write_text('{"prompt": "w5 w6"}\n{"prompt": "w7 w9"}\n')
    assert main([*line, "--resume"]) == 2
    assert "the prompts of suite mine have changed" in capsys.readouterr().err
    own.write_text('{"prompt": "w5 w6"}\n{"prompt": "w7 w8"}\n')
    run = json.loads((out / "run.json").read_text())
    run["about"]["environment"]["machine"]["cores"] = 977
    run["about"]["model"]["d_model"] = 7
    (out / "run.json").write_text(json.dumps(run))
    assert main([*line, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "environment machine cores was 977," in said
    assert "model d model was 7, now 32" in said


@pytest.mark.parametrize("content", [None, "", "{}", '{"about": 1, "resumed": []}'])
def test_a_folder_without_a_run_is_no_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    """Catches a new run where an old one was meant, and a traceback for a damaged file."""
    line = [*arguments(folder, "--methods", "ar"), "--resume"]
    assert main(line) == 2
    assert "give the folder with --out" in capsys.readouterr().err
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main([*line, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        "contains no run to resume" if content is None else "is not a valid file of bench"
    ) in said


def test_what_is_kept_has_to_be_of_this_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches lines that somebody changed, moved or broke being counted."""
    line = [*arguments(folder, "--methods", "ar,hf"), "--out", str(tmp_path)]
    assert main(line) == 0
    whole = lines_in(tmp_path)
    (tmp_path / "results.json").unlink()
    broken = (
        ([whole[0], b"{\n", *whole[2:]], 2),
        ([*whole[:3], whole[2], *whole[4:]], 4),
        ([whole[0].replace(b'"stats"', b'"start"'), *whole[1:]], 1),
    )
    for lines, number in broken:
        (tmp_path / "prompts.jsonl").write_bytes(b"".join(lines))
        assert main([*line, "--resume"]) == 2
        assert (
            f"prompts.jsonl, line {number}: does not belong to this run" in capsys.readouterr().err
        )


def test_one_process_at_a_time(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches two processes that write their lines among each other's."""
    line = [*arguments(folder, "--methods", "ar", "--limit", "1"), "--out", str(tmp_path)]
    with Journal.opened(tmp_path, {}):
        assert main([*line, "--overwrite"]) == 2
        assert "is being written by another process" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0


# The parts


def a_record(stats: Stats | None) -> Record:
    asked = (((5, 6, 1, 2, 7), 2), ((5, 6, 1, 2, 7, 3, 8), 3))
    return Record((1, 2, 3), 0.1 + 0.2, stats, None, 1e-3 / 3, 4, asked, (0, 1, 0))


def test_a_record_is_read_as_it_was_written() -> None:
    """Catches a part that is lost, rounded, or no longer of its kind."""
    stats = Stats(prompt_tokens=7)
    stats.count(Step((1, 2), 1, 2))
    method = Method("ar", "ar", SamplingParams(), 0, lambda *_: a_record(None))
    prompt = Prompt("own", "one", (5, 6), category="qa")
    for record in (a_record(None), a_record(stats)):
        line = prompt_line(prompt, Sample(3, method, record, 2))
        read = read_record(json.loads(json.dumps(line)))
        assert read == record
        assert read.answers == record.answers
        assert [type(getattr(read, name)) for name in ("tokens", "turns")] == [tuple, tuple]
        assert (line["category"], line["number"], line["repeat"]) == ("qa", 3, 2)


def test_nothing_is_kept_without_a_folder() -> None:
    """Catches files in the folder that somebody happens to stand in."""
    prompt = Prompt("own", "one", (5, 6))
    method = Method("ar", "ar", SamplingParams(), 0, lambda *_: a_record(None))
    (turn,) = interleave([prompt], [method], 0)
    with Journal.opened(None, {}) as journal:
        assert journal.recall([prompt], turn) == []
        journal.write([prompt], turn.run([prompt], 3))
        assert journal.recall([prompt], turn) == []
        assert journal.origin["resumed"] == []


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback after hours."""

    class Full:
        def write(self, content: bytes) -> int:
            raise OSError(28, "No space left on device")

    prompt = Prompt("own", "one", (5, 6))
    method = Method("ar", "ar", SamplingParams(), 0, lambda *_: a_record(None))
    (turn,) = interleave([prompt], [method], 0)
    with Journal.opened(tmp_path, {}) as journal:
        monkeypatch.setattr(journal, "_file", Full())
        with pytest.raises(JournalError, match=r"No space left on device; .* --resume"):
            journal.write([prompt], turn.run([prompt], 3))
        monkeypatch.undo()


def differences() -> Iterator[Any]:
    yield {"arguments": {"a_b": 1}}, {"arguments": {"a_b": 2}}, "--a-b was 1, now 2"
    yield {"arguments": {"x": True}}, {"arguments": {"x": False}}, "--x was given, now not given"
    turned_off = "--no-pack was not given, now given"
    yield {"arguments": {"pack": True}}, {"arguments": {"pack": False}}, turned_off
    yield {"arguments": {"x": [1, 2]}}, {"arguments": {"x": []}}, "--x was 1,2, now none"
    yield {"passlm": "1"}, {"passlm": "2"}, "passlm was 1, now 2"
    yield {"look": None}, {"look": "ab"}, "look was not given, now ab"
    yield {}, {"model": {"layers": 2}}, "model"


@pytest.mark.parametrize(("there", "now", "said"), list(differences()))
def test_differences_are_told_in_the_users_words(
    there: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    """Catches names that nobody typed."""
    with pytest.raises(JournalError, match=f"with other settings: {said}"):
        check_same(Path("out"), there, now)
    check_same(Path("out"), now | {"provenance": 1}, now)
