"""Run a server in a thread of the test, with a real worker or a scripted one.

Contains no assertions; those are left to the tests.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from passlm.generate import Generator
from passlm.outputs import Step
from passlm.serve.app import create_app
from passlm.serve.events import DecodingWorker
from passlm.serve.protocol import (
    Event,
    EventCallback,
    Job,
    SequenceRequest,
    WorkerSettings,
    WorkerState,
)
from passlm.serve.run import WebServer, bound_socket
from passlm.serve.settings import ServeSettings
from passlm.serve.worker import Worker

MODEL = "bytes"
SETTINGS = ServeSettings(model_name=MODEL, max_tokens=64)
WORKER = WorkerSettings(max_batch=4, max_context=192, max_waiting=16, prefill_chunk=16)
Script = Callable[[int, SequenceRequest], Iterable[Event | float]]
"""Returns the events of one sequence, by index and request; a number is seconds to wait."""


class ScriptedWorker:
    """Stands in for `Worker`: delivers scripted events, in a thread per request.

    Args:
        script: returns the events of each sequence.
        refusal: exception that `submit` raises; None to accept requests.
    """

    max_context = 192

    def __init__(self, script: Script, refusal: Exception | None = None) -> None:
        self.script = script
        self.refusal = refusal
        self.asked: list[SequenceRequest] = []
        self.cancelled: list[Job] = []
        self.ready = True

    def submit(self, sequences: Sequence[SequenceRequest], deliver: EventCallback) -> list[Job]:
        """See `Worker`."""
        if self.refusal is not None:
            raise self.refusal
        self.asked += sequences
        jobs = [Job(ask, index, deliver) for index, ask in enumerate(sequences)]
        threading.Thread(target=self._tell, args=(jobs,), daemon=True).start()
        return jobs

    def _tell(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for event in self.script(job.index, job.request):
                if isinstance(event, float):
                    time.sleep(event)
                    continue
                tokens = tuple(token.id for token in getattr(event, "tokens", ()))
                if tokens:
                    job.stats.count(Step(tokens, 0, 0))
                job.deliver(job.index, event)

    def cancel(self, jobs: Iterable[Job]) -> None:
        """See `Worker`."""
        self.cancelled += jobs

    def state(self) -> WorkerState:
        """See `Worker`."""
        return WorkerState(self.ready, 0, 0, 0, 768, 0, 0.0, 0)

    def stop(self, grace: float) -> bool:
        """See `Worker`."""
        self.ready = False
        return True


@dataclass
class Server:
    """A running server.

    Attributes:
        url: its base URL.
        worker: its worker.
        app: its application.
        web: its HTTP server.
    """

    url: str
    worker: Any
    app: FastAPI
    web: WebServer
    clients: list[httpx.Client] = field(default_factory=list)

    def client(self, **options: Any) -> httpx.Client:
        """Return a client that is closed with the server."""
        client = httpx.Client(base_url=self.url, timeout=60, **options)
        self.clients.append(client)
        return client

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        """Send a request with the model's name added."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            return client.post(f"/v1/{path}", json={"model": MODEL, **body}, **options)

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """Return the response to a completion request, greedy by default."""
        asked = {"prompt": prompt, "temperature": 0, **body}
        reply: dict[str, Any] = self.post("completions", asked).raise_for_status().json()
        return reply

    def text(self, prompt: Any, **body: Any) -> str:
        """Return the text of the first choice of a completion."""
        return str(self.complete(prompt, **body)["choices"][0]["text"])

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks of a streamed response."""
        response = self.post(path, {"stream": True, **body}).raise_for_status()
        return chunks(response.text)


def chunks(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream before `[DONE]`; raise `ValueError` if that is missing."""
    *events, end = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if end != "[DONE]":
        raise ValueError(f"the stream ends with {end!r}")
    return [json.loads(event) for event in events]


@contextlib.contextmanager
def web(
    app: FastAPI,
    worker: Any,
    send_buffer: int | None = None,
    write_seconds: float = 60,
    read_seconds: float = 60,
) -> Iterator[Server]:
    """Run an application on a free port.

    Args:
        app: from `create_app`.
        worker: its worker, for the test to inspect.
        send_buffer: size of the socket's send buffer in bytes; a small one fills for slow readers.
        write_seconds: time after which the system closes a connection that reads nothing.
        read_seconds: time within which a request must arrive.
    """
    listening = bound_socket("127.0.0.1", 0, write_seconds)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    host, port = listening.getsockname()
    server = WebServer(app, read_seconds)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    running = Server(f"http://{host}:{port}", worker, app, server)
    try:
        until(lambda: server.started)
        yield running
    finally:
        for client in running.clients:
            client.close()
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def served(
    lm: Generator,
    settings: ServeSettings = SETTINGS,
    worker_settings: WorkerSettings = WORKER,
    send_buffer: int | None = None,
) -> Iterator[Server]:
    """Run a server with a real worker."""
    worker = Worker(lm, worker_settings)
    worker.start()
    try:
        app = create_app(lm, worker, settings)
        with web(app, worker, send_buffer, read_seconds=settings.read_seconds) as server:
            # The first server of a run compiles the native operators, slowly on a busy machine.
            until(lambda: worker.state().ready, 180.0)
            yield server
    finally:
        worker.stop(0)


@contextlib.contextmanager
def scripted(
    lm: Generator,
    script: Script,
    refusal: Exception | None = None,
    settings: ServeSettings = SETTINGS,
    send_buffer: int | None = None,
) -> Iterator[Server]:
    """Run a server with a scripted worker."""
    worker = ScriptedWorker(script, refusal)
    decoding: DecodingWorker = worker
    app, seconds = create_app(lm, decoding, settings), settings.write_seconds
    with web(app, worker, send_buffer, seconds, settings.read_seconds) as server:
        yield server


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds; raise `TimeoutError` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {seconds} s")
        time.sleep(0.01)
