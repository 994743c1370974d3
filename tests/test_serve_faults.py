"""What goes wrong in service: clients that leave, crawl or flood, and faults of our own."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest
from byte_model import byte_generator
from serving import MODEL, SETTINGS, WORKER, ScriptedWorker, Server, chunks, scripted, served, until

from passlm.cli.serve import raise_file_limit
from passlm.generate import Generator
from passlm.serve.events import EventQueue
from passlm.serve.metrics import Metrics, RequestMetrics
from passlm.serve.protocol import (
    ClosedError,
    Event,
    Failed,
    QueueFullError,
    SequenceOutput,
    SequenceRequest,
    Token,
)
from passlm.serve.run import _stop_worker

PROMPT = "def f(x):"
LONG = {"prompt": PROMPT, "max_tokens": 64, "temperature": 0}


@pytest.fixture(scope="module")
def lm() -> Generator:
    return byte_generator()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(byte_generator()) as running:
        yield running


def letters(count: int, pause: float = 0.0) -> list[Event | float]:
    """Pieces of one letter each."""
    pieces: list[Event | float] = []
    for _ in range(count):
        pieces += [SequenceOutput((Token(65, "a", 0, -0.5, ((65, -0.5),) * 20),)), pause]
    return pieces


def written(body: dict[str, Any], headers: str = "") -> bytes:
    """A request for a completion, as it goes over the wire."""
    content = json.dumps({"model": MODEL, **body}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n{headers}\r\n"
    )
    return head.encode() + content


def connected(url: str, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A socket that a request was sent on."""
    host, port = url.removeprefix("http://").split(":")
    raw = socket.socket()
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(30)
    raw.connect((host, int(port)))
    raw.sendall(written(body))
    return raw


def read_all(raw: socket.socket, size: int = 65536) -> bytes:
    """Everything until the other side closes, or the stream is over."""
    found = bytearray()
    while not found.endswith(b"0\r\n\r\n"):
        part = raw.recv(size)
        if not part:
            break
        found += part
    return bytes(found)


# Clients


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(lm: Generator, stream: bool) -> None:
    """Catches texts that are written for nobody, streamed or not."""
    with scripted(lm, lambda index, ask: letters(40, 0.1)) as server:
        raw = connected(server.url, {**LONG, "n": 2, "stream": stream})
        if stream:
            assert b"200 OK" in raw.recv(4096)
        else:
            until(lambda: bool(server.worker.asked))
        raw.close()
        until(lambda: len(server.worker.cancelled) == 2, 5)


def test_a_client_that_hangs_up_between_pieces_is_noticed(lm: Generator) -> None:
    """Catches a server that notices only when it has something to send."""
    with scripted(lm, lambda index, ask: [*letters(1), 30.0]) as server:
        raw = connected(server.url, {**LONG, "stream": True})
        assert b"200 OK" in raw.recv(4096)
        raw.close()
        until(lambda: bool(server.worker.cancelled), 5)


def test_others_go_on_when_a_client_is_killed(server: Server) -> None:
    """Catches a text that changes or ends because its neighbour's reader is gone."""
    alone = server.text(PROMPT, max_tokens=64)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(server.text, PROMPT, max_tokens=64) for _ in range(2)]
        for _ in range(3):
            raw = connected(server.url, {**LONG, "stream": True})
            raw.recv(1024)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raw.close()  # a reset, as of a killed process
        assert [other.result() for other in others] == [alone, alone]
    until(lambda: server.worker.state().running == 0 and server.worker.state().waiting == 0)


def test_a_client_that_left_is_told_apart_in_the_log(
    lm: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches hang-ups that are logged as answers, or as faults of ours."""
    with caplog.at_level(logging.INFO), scripted(lm, lambda i, a: letters(50, 0.1)) as server:
        connected(server.url, LONG).close()
        until(lambda: any(r.getMessage() == "request" for r in caplog.records), 10)
    [facts] = [r.__dict__["facts"] for r in caplog.records if r.getMessage() == "request"]
    assert facts["status"] == 499
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)


def test_a_slow_reader_gets_everything(lm: Generator) -> None:
    """Catches pieces that are lost where a client's buffers are full."""
    with scripted(
        lm, lambda i, a: [*letters(300), SequenceOutput((), "eos")], send_buffer=4096
    ) as server:
        raw = connected(server.url, {**LONG, "stream": True, "logprobs": 5}, receive_buffer=4096)
        found = bytearray()
        while not found.endswith(b"0\r\n\r\n"):
            found += raw.recv(2048)
            if len(found) < 40_000:
                time.sleep(0.01)
        raw.close()
    events = [line for line in bytes(found).decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert len(events) == 302


def test_a_reader_that_has_stopped_is_left_and_others_are_not(lm: Generator) -> None:
    """Catches a server that keeps texts for a client that reads nothing, or waits for it."""
    settings = replace(SETTINGS, write_seconds=0.5)
    endless = [*letters(600), 30.0]

    def script(index: int, ask: SequenceRequest) -> list[Event | float]:
        return endless if ask.logprobs else [*letters(3), SequenceOutput((), "eos")]

    with scripted(lm, script, settings=settings, send_buffer=4096) as server:
        stuck = {**LONG, "stream": True, "logprobs": 5}
        raw = connected(server.url, stuck, receive_buffer=4096)
        assert server.text(PROMPT) == "aaa"
        until(lambda: bool(server.worker.cancelled), 10)
        assert server.text(PROMPT) == "aaa"
        until(lambda: not server.web.server_state.connections, 20)  # nor what it did not read
        raw.close()


def test_a_body_of_ten_megabytes_is_refused(server: Server) -> None:
    """Catches memory that anybody can fill, and a client that sees a reset instead of an error."""
    huge = {"model": MODEL, "prompt": "x" * 10_000_000}
    client = server.client()
    for _ in range(3):
        assert client.post("/v1/completions", json=huge).status_code == 413
    parts = (b"x" * 100_000 for _ in range(100))  # of a length that is not announced
    response = client.post("/v1/completions", content=parts)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    waits = {"expect": "100-continue", "content-length": str(10**12)}
    raw = socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10)
    lines = "".join(f"{name}: {value}\r\n" for name, value in waits.items())
    raw.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode())
    assert raw.recv(4096).startswith(b"HTTP/1.1 413")
    raw.close()
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.completions.create(**huge)
    assert refused.value.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(lm: Generator) -> None:
    """Catches connections that clients hold open with half a request."""
    settings = replace(SETTINGS, read_seconds=0.3)
    with scripted(lm, lambda i, a: [], settings=settings) as server:
        host, port = server.url.removeprefix("http://").split(":")
        raw = socket.create_connection((host, int(port)), timeout=10)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
        raw.sendall(head.encode())
        answer = read_all(raw)
        raw.close()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\nx-"])
def test_a_request_that_does_not_come_is_not_waited_for(lm: Generator, sent: bytes) -> None:
    """Catches connections that cost nothing to hold open, until nobody else can connect."""
    settings = replace(SETTINGS, read_seconds=0.3)
    with scripted(lm, lambda i, a: [], settings=settings) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            for _ in range(2):  # the time runs for each request of a connection
                raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += raw.recv(2000)
                assert answer.startswith(b"HTTP/1.1 200")
            raw.sendall(sent or b"G")
            assert read_all(raw) == b""
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(sent)
            assert read_all(raw) == b""


def test_a_request_in_work_is_not_cut_by_the_time_it_had_to_come(lm: Generator) -> None:
    """Catches a clock of the head that runs on while the answer is written."""
    script = [*letters(2, 0.3), SequenceOutput((), "eos")]
    settings = replace(SETTINGS, read_seconds=0.2)
    with scripted(lm, lambda i, a: script, settings=settings) as server:
        assert server.text(PROMPT) == "aa"


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_waited_in_vain_is_told_so(lm: Generator, stream: bool) -> None:
    """Catches an empty text that looks like the model's answer."""
    with scripted(lm, lambda index, ask: [SequenceOutput((), "waited")]) as server:
        refused = server.post("completions", {**LONG, "stream": stream})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")


def test_a_thousand_requests_at_once_are_all_answered() -> None:
    """Catches requests that are lost, refused without a time to come back, or answered wrongly."""
    raise_file_limit()
    small = replace(WORKER, max_batch=2, max_waiting=4)
    with served(byte_generator(), worker_settings=small) as server:
        expected = server.text(PROMPT, max_tokens=20)
        host, port = server.url.removeprefix("http://").split(":")
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
        request = written(body, "connection: close\r\n")

        async def ask() -> bytes:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            answer = await reader.read()
            writer.close()
            return answer

        async def flood() -> list[bytes]:
            return await asyncio.gather(*(ask() for _ in range(1000)))

        answers = [answer.split(b"\r\n\r\n", 1) for answer in asyncio.run(flood())]
        until(lambda: server.worker.state().running == 0)
    counts = Counter(head.split()[1] for head, _ in answers)
    assert set(counts) == {b"200", b"429"}
    assert counts[b"200"] >= 6
    for head, content in answers:
        if head.split()[1] == b"200":
            assert json.loads(content)["choices"][0]["text"] == expected
        else:
            assert re.search(rb"retry-after: [1-9]", head)
            assert json.loads(content)["error"]["code"] == "rate_limit_exceeded"


def test_a_refused_client_succeeds_when_it_comes_back(lm: Generator) -> None:
    """Catches a Retry-After that the official client does not follow."""
    script = [*letters(2), SequenceOutput((), "eos")]
    with scripted(lm, lambda index, ask: script, QueueFullError(1)) as server:
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=2)
        threading.Timer(0.5, setattr, (server.worker, "refusal", None)).start()
        begun = time.monotonic()
        reply = sdk.completions.create(model=MODEL, prompt=PROMPT)
        assert reply.choices[0].text == "aa"
        assert time.monotonic() - begun >= 1


# Faults of ours


def test_a_fault_before_the_first_token_is_a_500(lm: Generator) -> None:
    """Catches a fault that looks like an empty answer, and details told to strangers."""
    with scripted(lm, lambda index, ask: [Failed("the server met a fault")]) as server:
        for stream in (False, True):
            response = server.post("completions", {**LONG, "stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"


def test_a_fault_amid_a_stream_is_its_last_event(lm: Generator) -> None:
    """Catches a broken text that looks whole."""
    script = [*letters(3), 0.2, Failed("the server met a fault")]
    with scripted(lm, lambda index, ask: script) as server:
        text = server.post("completions", {**LONG, "stream": True}).text
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        parts = sdk.completions.create(model=MODEL, prompt=PROMPT, stream=True)
        with pytest.raises(openai.APIError, match="met a fault"):
            list(parts)
    *events, last = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert len(events) == 3
    assert json.loads(last)["error"]["code"] == "internal_error"
    with pytest.raises(ValueError, match="the stream ends with"):
        chunks(text)


def test_a_fault_in_one_of_several_texts_ends_the_others(lm: Generator) -> None:
    """Catches texts that go on for a request which was answered already."""

    def script(index: int, ask: SequenceRequest) -> list[Event | float]:
        return [Failed("broken")] if index == 0 else letters(100, 0.1)

    with scripted(lm, script) as server:
        assert server.post("completions", {**LONG, "n": 3}).status_code == 500
        until(lambda: {job.index for job in server.worker.cancelled} == {1, 2}, 5)


def test_a_step_that_fails_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an exception inside a step that ends the server, or every text of the batch."""
    with served(byte_generator()) as server:
        expected = server.text(PROMPT, max_tokens=30)
        target = server.worker.lm.target
        whole, calls = target.run, Counter[str]()

        def fails_once(*given: Any, **further: Any) -> Any:
            calls["run"] += 1
            if calls["run"] == 5:
                raise RuntimeError("thrown inside a step")
            return whole(*given, **further)

        monkeypatch.setattr(target, "run", fails_once)
        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda _: server.text(PROMPT, max_tokens=30), range(3)))
        assert texts == [expected] * 3
        assert server.worker.state().faults == 1

        def fails(*given: Any, **further: Any) -> Any:
            raise RuntimeError("thrown inside every step")

        monkeypatch.setattr(target, "run", fails)
        assert server.post("completions", LONG).status_code == 500
        monkeypatch.setattr(target, "run", whole)
        assert server.text(PROMPT, max_tokens=30) == expected


def test_a_fault_of_the_web_side_is_a_500(lm: Generator, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a traceback sent to a client, and a fault that nobody hears of."""
    with scripted(lm, lambda index, ask: [], RuntimeError("hidden")) as server:
        response = server.post("completions", LONG)
    assert response.status_code == 500
    assert "hidden" not in response.text
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"]
    assert any(record.exc_info for record in caplog.records)


def test_an_event_for_nobody_is_dropped(lm: Generator) -> None:
    """Catches a worker's thread that dies because the event loop is gone."""

    async def made() -> EventQueue:
        return EventQueue(RequestMetrics(Metrics(lambda: None), 0.0))  # type: ignore[arg-type, return-value]

    feed = asyncio.run(made())
    feed.deliver(0, SequenceOutput((), "eos"))


# Going down


def test_a_server_that_goes_down_finishes_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches texts that are cut although there was time, and requests that hang."""
    with served(byte_generator()) as server:
        expected = server.text(PROMPT, max_tokens=64)
        taken: list[object] = []
        submit = server.worker.submit

        def counted(*given: Any) -> Any:
            job = submit(*given)
            taken.append(job)
            return job

        monkeypatch.setattr(server.worker, "submit", counted)
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(server.text, PROMPT, max_tokens=64) for _ in range(6)]
            until(lambda: len(taken) == 6)
            stopped = pool.submit(server.worker.stop, 30.0)
            until(lambda: not server.worker.state().ready)
            refused = server.post("completions", LONG)
            assert [each.result() for each in running] == [expected] * 6
            assert stopped.result()
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "unavailable"


def test_a_worker_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an interrupt that does nothing while passes are being compiled."""
    monkeypatch.setattr("passlm.serve.run.LAST_SECONDS", 0.1)

    class Caught(ScriptedWorker):
        def stop(self, grace: float) -> bool:
            time.sleep(1)
            return True

    assert not asyncio.run(_stop_worker(Caught(lambda index, ask: []), 30))
    assert asyncio.run(_stop_worker(ScriptedWorker(lambda index, ask: []), 30))


@pytest.mark.parametrize("stream", [True, False])
def test_texts_that_are_cut_say_so(lm: Generator, stream: bool) -> None:
    """Catches half a text that looks whole because the server went down."""
    script = [*letters(2), 0.2, SequenceOutput((), "cancelled")]
    with scripted(lm, lambda index, ask: script) as server:
        response = server.post("completions", {**LONG, "stream": stream})
    assert response.status_code == (200 if stream else 503)
    assert "shutting down" in response.text
    assert "[DONE]" not in response.text
    with scripted(lm, lambda index, ask: [], ClosedError("going down")) as server:
        refused = server.post("completions", LONG)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")


def test_a_stream_that_waits_says_that_it_is_there(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches proxies that close a stream whose text has not begun."""
    monkeypatch.setattr("passlm.serve.responses.KEEP_ALIVE_SECONDS", 0.1)
    script = [0.5, *letters(1), SequenceOutput((), "eos")]
    with scripted(lm, lambda index, ask: script) as server:
        text = server.post("completions", {**LONG, "stream": True}).text
        assert text.startswith(": waiting\n\n")
        assert len(chunks(text)) == 2
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        parts = sdk.completions.create(model=MODEL, prompt=PROMPT, stream=True)
        assert "".join(part.choices[0].text for part in parts) == "a"


def test_no_thread_is_left_by_a_server() -> None:
    """Catches servers that cannot be made and closed again and again."""
    before = set(threading.enumerate())
    with served(byte_generator()) as server:
        server.text(PROMPT)
    until(lambda: not {t for t in threading.enumerate() if t.is_alive()} - before, 10)
