"""Start `passlm serve` and send requests to it, for the recipes that measure the server."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from passlm.errors import InputError

HOST = "127.0.0.1"
START_SECONDS = 1800  # a server that compiles its passes takes minutes
STOP_SECONDS = 60
TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class RefusedError(Exception):
    """Raised when the server answers with an error.

    Args:
        status: HTTP status.
        text: Body of the response.
        retry_after: Seconds to wait before the next attempt, from the Retry-After header.
    """

    def __init__(self, status: int, text: str, retry_after: float = 1.0) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.retry_after = retry_after


@dataclass
class Reply:
    """Reply to one streamed request; times are in seconds since it was sent."""

    text: str = ""
    tokens: int = 0
    chunks: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    seconds: float = 0.0

    def add(self, chunk: dict[str, Any], now: float) -> None:
        """Add one event of the stream, received at `now`."""
        for choice in chunk["choices"]:
            self.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.chunks.append(now)
        if chunk.get("usage"):
            self.usage = chunk["usage"]
            self.tokens = self.usage["completion_tokens"]


def streaming(model: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the path and the complete body of a streaming request that reports its usage."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return path, {"model": model, **body, "stream": True, "stream_options": {"include_usage": True}}


async def ask(client: Client, body: dict[str, Any], events: int | None = None) -> Reply:
    """Send a completion or chat request and read its stream.

    Args:
        client: Client of a server.
        body: Body of the request, without the model and the streaming options.
        events: Disconnect after this number of events; None reads to the end.

    Raises:
        RefusedError: The server answered with an error.
        httpx.HTTPError: The connection broke.
    """
    path, streamed = streaming(client.model, body)
    begun = time.perf_counter()
    reply = Reply()
    async with client.stream("POST", path, json=streamed) as response:
        if response.status_code != httpx.codes.OK:
            text = (await response.aread()).decode()
            retry_after = float(response.headers.get("Retry-After", 1))
            raise RefusedError(response.status_code, text, retry_after)
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                break
            if line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RefusedError(500, line)
                reply.add(chunk, time.perf_counter() - begun)
                if len(reply.chunks) == events:
                    break
        else:
            raise httpx.RemoteProtocolError("the stream ended without [DONE]")
    reply.seconds = time.perf_counter() - begun
    return reply


class Client(httpx.AsyncClient):
    """HTTP client with a limited number of connections.

    Args:
        url: Base URL of the server.
        model: Name of the model that it serves.
        connections: Maximum number of concurrent requests.
    """

    def __init__(self, url: str, model: str, connections: int) -> None:
        limits = httpx.Limits(max_connections=connections)
        super().__init__(base_url=url, timeout=TIMEOUT, limits=limits)
        self.model = model


class Served:
    """Context manager that runs `passlm serve` in a separate process; its log is discarded.

    Entering waits until the server is ready; leaving stops it.

    Args:
        flags: Flags for `passlm serve`, without host and port.

    Attributes:
        url: Base URL.
        port: Port.
        model: Name of the model; set once the server is ready.
    """

    model: str

    def __init__(self, flags: Sequence[str]) -> None:
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        command = ["serve", "--host", HOST, "--port", str(self.port), *flags]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "passlm.cli", *command], stdout=self._log, stderr=self._log
        )

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def __enter__(self) -> Self:
        try:
            self._wait()
            self.model = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._log.close()

    def metrics(self) -> dict[str, float]:
        """Return the server's metrics by name; values of different labels are summed."""
        found: dict[str, float] = {}
        page = httpx.get(f"{self.url}/metrics", timeout=TIMEOUT).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def client(self, connections: int) -> Client:
        """Return a client for at most `connections` concurrent requests."""
        return Client(self.url, self.model, connections)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise InputError(f"passlm serve did not start: {self._last_log_line()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(1.0)
        raise InputError(f"passlm serve was not ready after {START_SECONDS} s")

    def _last_log_line(self) -> str:
        """Return the last line of the server's log."""
        self._log.seek(0)
        lines = self._log.read().decode().splitlines()
        return lines[-1] if lines else "its log is empty"


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into those of the recipe and those after `--`, for the server."""
    given = list(arguments)
    if "--" not in given:
        return given, []
    at = given.index("--")
    return given[:at], given[at + 1 :]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
