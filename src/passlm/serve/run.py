"""Listening on a port, and going down without losing what is under way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from passlm.serve.events import DecodingWorker
from passlm.serve.settings import SettingsError

LAST_SECONDS = 5  # for clients to take the last bytes once all texts are over
IDLE_SECONDS = 75  # that a connection may wait for its next request; clients assume a minute
BACKLOG = 2048  # connections not accepted yet
_INTERRUPTED = 128 + signal.SIGINT
_READY_EVERY = 0.05
_KEEPALIVE_SECONDS = 30

_log = logging.getLogger(__name__)


class StoppableWorker(DecodingWorker, Protocol):
    """A worker that can be brought to its end."""

    def stop(self, grace: float) -> bool:
        """Take nothing new and finish within so many seconds; False where texts were cut."""


def bound_socket(host: str, port: int, write_seconds: float) -> socket.socket:
    """A socket that has its address and does not listen yet.

    Args:
        host: name or address.
        port: 0 for any that is free.
        write_seconds: the system drops a client that takes nothing for this long.

    Raises:
        SettingsError: the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise SettingsError(f"no address for --host {host} --port {port}: {error}") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _forget_the_dead(listening, write_seconds)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _unusable(error, host, port) from error
    return listening


def _forget_the_dead(listening: socket.socket, write_seconds: float) -> None:
    """Drop clients that are gone without a word, or take nothing; connections inherit it."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (  # where the system has them
        ("TCP_KEEPIDLE", _KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", _KEEPALIVE_SECONDS),
        ("TCP_USER_TIMEOUT", int(1000 * write_seconds)),
    ):
        if hasattr(socket, name):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _unusable(error: OSError, host: str, port: int) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        return SettingsError(
            f"port {port} of {host} is in use: stop what listens there, or give another --port "
            "(0 takes a free one)"
        )
    return SettingsError(f"cannot listen on --host {host} --port {port}: {error.strerror}")


def address_of(listening: socket.socket) -> str:
    """The address as one types it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    host = str(listening.getsockname()[0]).partition("%")[0]
    return ipaddress.ip_address(host).is_loopback


class _Connection(H11Protocol):
    """A connection that is closed where a request's head does not come in time.

    The time runs from the first byte, of a new connection from its beginning; between requests
    `IDLE_SECONDS` are allowed.
    """

    read_seconds: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._mind_the_head()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._mind_the_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._head_came()

    def _mind_the_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._head_came()
        elif self._late is None:
            self._late = self.loop.call_later(self.read_seconds, self.transport.close)

    def _head_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class WebServer(uvicorn.Server):
    """Leaves signals to others.

    Args:
        app: of `create_app`.
        read_seconds: in which a request's head must have come.
    """

    def __init__(self, app: FastAPI, read_seconds: float) -> None:
        connection = type("Connection", (_Connection,), {"read_seconds": read_seconds})
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def serve(
    app: FastAPI,
    worker: StoppableWorker,
    listening: socket.socket,
    grace_seconds: float,
    read_seconds: float,
    announce: Callable[[], None],
) -> int | None:
    """Serve until a signal comes, then finish what is under way; a second one ends at once.

    While it finishes, new requests are answered with 503.

    Args:
        app: of `create_app`.
        worker: started; it is stopped here.
        listening: from `bound_socket`.
        grace_seconds: for the texts under way.
        read_seconds: in which a request's head must have come.
        announce: called once requests are taken.

    Returns:
        The signal that ended it.

    Raises:
        SettingsError: somebody else began to listen on the address.
    """
    try:
        listening.listen(BACKLOG)
    except OSError as error:
        raise _unusable(error, *listening.getsockname()[:2]) from error
    server = WebServer(app, read_seconds)
    return asyncio.run(_serve(server, worker, listening, grace_seconds, announce))


async def _serve(
    server: WebServer,
    worker: StoppableWorker,
    listening: socket.socket,
    grace_seconds: float,
    announce: Callable[[], None],
) -> int | None:
    asked = _first_signal()
    serving = asyncio.create_task(server.serve([listening]))
    announcing = asyncio.create_task(_announced(worker, announce))
    either: set[asyncio.Future[Any]] = {serving, asked}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    announcing.cancel()
    if asked.done():
        _log.info("shutting down", extra={"facts": {"grace_seconds": grace_seconds}})
    if not await _stopped(worker, grace_seconds):
        _log.warning("the worker does not end: it is left where it is")
        os._exit(_INTERRUPTED if asked.done() and asked.result() == signal.SIGINT else os.EX_OK)
    server.should_exit = True
    await serving
    return asked.result() if asked.done() else None


async def _stopped(worker: StoppableWorker, grace_seconds: float) -> bool:
    """Let the worker finish; False where it is caught in something long, as compiling is."""
    state = worker.state()
    patience = LAST_SECONDS + (grace_seconds if state.running or state.waiting else 0)
    stopping = asyncio.create_task(asyncio.to_thread(worker.stop, grace_seconds))
    done, _ = await asyncio.wait({stopping}, timeout=patience)
    if done and not stopping.result():
        _log.warning("texts were cut: they took longer than the grace seconds")
    return bool(done)


def _first_signal() -> asyncio.Future[int]:
    """The first signal that asks to stop; the second ends the process."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[int] = loop.create_future()

    def receive(number: int) -> None:
        if asked.done():
            os._exit(128 + number)
        asked.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, receive, number)
    return asked


async def _announced(worker: DecodingWorker, announce: Callable[[], None]) -> None:
    while not worker.state().ready:
        await asyncio.sleep(_READY_EVERY)
    announce()
