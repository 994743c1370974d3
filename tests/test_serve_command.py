"""`passlm serve`: the command, its process, signals, keys, and the API under fuzzing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import pytest
from byte_model import save_folders
from serving import until

from passlm.cli import INTERRUPTED, USAGE, main
from passlm.cli.serve import KEY_VARIABLE, model_name, read_keys
from passlm.errors import InputError
from passlm.serve.run import address_of, bound_socket, is_loopback

TESTS = Path(__file__).parent
BODY = {"model": "model", "prompt": "def f(x):", "max_tokens": 100, "temperature": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_folders(tmp_path_factory.mktemp("serve"))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A server writes its log in its own way, and would in the tests that follow."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    root.handlers = handlers
    logging.captureWarnings(False)


@dataclass
class Process:
    """A server's process.

    Attributes:
        process: itself.
        url: where it listens.
        log: its lines, each JSON.
    """

    process: subprocess.Popen[str]
    url: str
    log: list[str]

    def lines(self) -> list[dict[str, object]]:
        """The log so far."""
        return [json.loads(line) for line in self.log if line.strip()]


@contextlib.contextmanager
def process(
    folders: tuple[Path, Path], *further: str, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    """`passlm serve` on a free port."""
    model, rows = folders
    flags = ["--model", str(model), "--lookahead", str(rows), "--dtype", "float32", "--port", "0"]
    few = ["--max-batch", "2", "--no-compile", "--threads", "1"]
    source = str(TESTS.parent / "src")
    running = subprocess.Popen(
        [sys.executable, "-m", "passlm.cli", "serve", *flags, *few, *further],
        env={
            **os.environ,
            "PYTHONPATH": source,
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    assert running.stdout is not None
    assert running.stderr is not None
    reader = threading.Thread(target=_collect, args=(running.stderr, log), daemon=True)
    reader.start()
    try:
        line = running.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, "".join(log)
        yield Process(running, found[0], log)
    finally:
        running.kill()
        running.wait(30)
        reader.join(30)
        running.stdout.close()


def _collect(pipe: IO[str], into: list[str]) -> None:
    with pipe:
        into.extend(pipe)


@pytest.mark.slow
def test_it_serves_and_ends_on_sigterm(folders: tuple[Path, Path]) -> None:
    """Catches a server that loses the text under way, or does not end."""
    with process(folders) as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        whole = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60).json()
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json={**BODY, "stream": True}, timeout=60) as response:
            parts = response.iter_lines()
            next(parts)
            server.process.send_signal(signal.SIGTERM)
            lines = [line[6:] for line in parts if line.startswith("data: {")]
        assert server.process.wait(30) == 0
    texts = [json.loads(line)["choices"][0] for line in lines]
    assert texts[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert whole["choices"][0]["text"].endswith("".join(each["text"] for each in texts))
    assert "shutting down" in [line["event"] for line in server.lines()]


@pytest.mark.slow
def test_requests_that_come_while_it_goes_down_are_sent_away(folders: tuple[Path, Path]) -> None:
    """Catches a port that is closed while texts are still being finished."""
    with process(folders, "--max-tokens", "180") as server:
        url = f"{server.url}/v1/completions"
        many = {**BODY, "max_tokens": 180, "n": 6, "stream": True}
        with httpx.stream("POST", url, json=many, timeout=60) as response:
            parts = response.iter_lines()
            next(parts)
            server.process.send_signal(signal.SIGTERM)
            statuses = []
            while 503 not in statuses:
                statuses.append(httpx.post(url, json={**BODY, "max_tokens": 1}).status_code)
            assert httpx.get(f"{server.url}/ready").status_code == 503
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert [line for line in parts if line][-1] == "data: [DONE]"
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_texts_are_cut_when_the_grace_is_over(folders: tuple[Path, Path]) -> None:
    """Catches a server that never ends because of a long text, and one open by mistake."""
    open_to_all = ["--host", "0.0.0.0", "--grace-seconds", "0", "--max-tokens", "180"]
    with process(folders, *open_to_all) as server:
        assert any("no API key" in str(line["event"]) for line in server.lines())
        url = f"{server.url}/v1/completions".replace("0.0.0.0", "127.0.0.1")
        many = {**BODY, "max_tokens": 180, "n": 6, "stream": True}
        with httpx.stream("POST", url, json=many, timeout=60) as response:
            parts = response.iter_lines()
            next(parts)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in parts if line][-1]
        assert server.process.wait(30) == 0
    assert json.loads(last[6:])["error"]["code"] == "unavailable"
    assert any("were cut" in str(line["event"]) for line in server.lines())


@pytest.mark.slow
def test_interrupting_is_130_and_a_second_signal_ends_at_once(
    folders: tuple[Path, Path],
) -> None:
    """Catches an interrupt that looks like success, and one that cannot be hurried."""
    with process(folders) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == INTERRUPTED
    with process(folders, "--max-tokens", "180") as server:
        url = f"{server.url}/v1/completions"
        many = {**BODY, "max_tokens": 180, "n": 6, "stream": True}
        with (
            contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
            httpx.stream("POST", url, json=many, timeout=60) as response,
        ):
            next(response.iter_lines())
            server.process.send_signal(signal.SIGTERM)
            until(lambda: any("shutting down" in line for line in server.log))
            server.process.send_signal(signal.SIGTERM)
            # Its own code, or the signal's where the process was past listening to signals.
            assert server.process.wait(5) in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--host", "no.such.host.invalid"], "no address for --host"),
        (["--host", "192.0.2.1"], "cannot listen on --host 192.0.2.1"),
        (["--grace-seconds", "-1"], "--grace-seconds is -1"),
        (["--max-body", "0"], "--max-body is 0"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--api-key", "secret"], "did you mean --api-key-file"),
    ],
)
def test_bad_settings_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Catches a traceback, a key on the command line, and a model loaded for nothing."""
    assert main(["serve", "--port", "0", *arguments]) == USAGE
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("passlm: ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, and a model that is loaded first."""
    with bound_socket("127.0.0.1", 0, 60) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == USAGE
    said = capsys.readouterr().err.strip()
    assert f"port {port} of 127.0.0.1 is in use" in said
    assert "\n" not in said


def test_without_its_packages_it_says_which(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an ImportError's traceback where the extra was not installed."""
    for name in ("fastapi", "prometheus_client"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve"]) == USAGE
    said = capsys.readouterr().err.strip()
    assert said == ("passlm: serving needs fastapi, prometheus-client: pip install 'passlm[serve]'")


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches comments taken for keys, keys that no header can hold, and files for everybody."""
    file = tmp_path / "keys"
    file.write_text("# ours\n\n one \ntwo\n")
    file.chmod(0o600)
    assert read_keys(file, "three") == ("three", "one", "two")
    assert not caplog.records
    file.chmod(0o600 | stat.S_IROTH)
    assert read_keys(file, None) == ("one", "two")
    assert "chmod 600" in caplog.text
    assert read_keys(None, None) == ()
    for content in ("", "# nothing\n", "a b\n", "schl\u00fcssel\n"):
        file.write_text(content)
        with pytest.raises(InputError):
            read_keys(file, None)
    for variable in ("", "a b", "a\n"):
        with pytest.raises(InputError, match=KEY_VARIABLE):
            read_keys(None, variable)


def test_models_are_called_by_their_own_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches the paths of a machine told to its clients."""
    assert model_name(str(folders[0])) == "model"
    assert model_name("smollm2-135m") == "smollm2-135m"
    assert model_name("somebody/model-1b") == "somebody/model-1b"
    file = tmp_path / "some.gguf"
    file.touch()
    assert model_name(str(file)) == "some.gguf"


def test_addresses_are_told_as_one_types_them() -> None:
    """Catches an IPv6 address without its brackets, and a network taken for this machine."""
    for host, local in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with bound_socket(host, 0, 60) as listening:
            assert is_loopback(listening) == local
            assert address_of(listening).startswith("http://")
    if socket.has_ipv6:
        with contextlib.suppress(InputError), bound_socket("::1", 0, 60) as listening:
            assert address_of(listening).startswith("http://[::1]:")
            assert is_loopback(listening)


@pytest.mark.slow
def test_fuzzing_finds_no_fault_and_no_break_of_the_schema(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Catches 5xx, replies that the schema does not allow, and invalid data that is taken.

    And a key of the environment that is not needed, or told in the log.
    """
    key = "of-the-environment"
    with process(folders, "--max-tokens", "8", environment={KEY_VARIABLE: key}) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        options = ["--config-file", str(TESTS / "schemathesis.toml")]
        limits = ["--max-time", "12", "--seed", "1", "-H", f"Authorization: Bearer {key}"]
        command = ["run", f"{server.url}/openapi.json", *limits, "--no-color"]
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *options, *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not any(line["level"] == "error" for line in server.lines())
        assert key not in "".join(server.log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_loading_at_once(number: signal.Signals) -> None:
    """Catches an interrupt that waits for a download, and one that nobody hears in a container."""
    code = (
        "import time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from passlm.cli.serve import ending_at_once\n"
        "with ending_at_once():\n"
        "    loading = ThreadPoolExecutor(1).submit(time.sleep, 600)\n"
        "    print('loading', flush=True)\n"
        "    loading.result()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(number)
        assert process.wait(60) == 128 + number
