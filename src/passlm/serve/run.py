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
_READY_POLL_SECONDS = 0.05
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
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _detect_dead_clients(listener, write_seconds)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _address_error(error, host, port) from error
    return listener


def _detect_dead_clients(listener: socket.socket, write_seconds: float) -> None:
    """Drop clients that are gone without a word, or take nothing; connections inherit it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (  # where the system has them
        ("TCP_KEEPIDLE", _KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", _KEEPALIVE_SECONDS),
        ("TCP_USER_TIMEOUT", int(1000 * write_seconds)),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _address_error(error: OSError, host: str, port: int) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        return SettingsError(
            f"port {port} of {host} is in use: stop what listens there, or give another --port "
            "(0 takes a free one)"
        )
    return SettingsError(f"cannot listen on --host {host} --port {port}: {error.strerror}")


def address_of(listener: socket.socket) -> str:
    """The address as one types it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    host = str(listener.getsockname()[0]).partition("%")[0]
    return ipaddress.ip_address(host).is_loopback


class _Connection(H11Protocol):
    """A connection that is closed where a request's head does not come in time.

    The time runs from the first byte, of a new connection from its beginning; between requests
    `IDLE_SECONDS` are allowed.
    """

    read_seconds: float
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._update_head_timer()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._update_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._cancel_head_timer()

    def _update_head_timer(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._cancel_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.read_seconds, self.transport.close)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


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
    listener: socket.socket,
    grace_seconds: float,
    read_seconds: float,
    announce: Callable[[], None],
) -> int | None:
    """Serve until a signal comes, then finish what is under way; a second one ends at once.

    While it finishes, new requests are answered with 503.

    Args:
        app: of `create_app`.
        worker: started; it is stopped here.
        listener: from `bound_socket`.
        grace_seconds: for the texts under way.
        read_seconds: in which a request's head must have come.
        announce: called once requests are taken.

    Returns:
        The signal that ended it.

    Raises:
        SettingsError: somebody else began to listen on the address.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _address_error(error, *listener.getsockname()[:2]) from error
    server = WebServer(app, read_seconds)
    return asyncio.run(_serve(server, worker, listener, grace_seconds, announce))


async def _serve(
    server: WebServer,
    worker: StoppableWorker,
    listener: socket.socket,
    grace_seconds: float,
    announce: Callable[[], None],
) -> int | None:
    received = _first_signal()
    serving = asyncio.create_task(server.serve([listener]))
    announcing = asyncio.create_task(_announce_when_ready(worker, announce))
    either: set[asyncio.Future[Any]] = {serving, received}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    announcing.cancel()
    if received.done():
        _log.info("shutting down", extra={"facts": {"grace_seconds": grace_seconds}})
    if not await _stop_worker(worker, grace_seconds):
        _log.warning("the worker does not end: it is left where it is")
        os._exit(
            _INTERRUPTED if received.done() and received.result() == signal.SIGINT else os.EX_OK
        )
    server.should_exit = True
    await serving
    return received.result() if received.done() else None


async def _stop_worker(worker: StoppableWorker, grace_seconds: float) -> bool:
    """Let the worker finish; False where it is caught in something long, as compiling is."""
    state = worker.state()
    timeout = LAST_SECONDS + (grace_seconds if state.running or state.waiting else 0)
    stopping = asyncio.create_task(asyncio.to_thread(worker.stop, grace_seconds))
    done, _ = await asyncio.wait({stopping}, timeout=timeout)
    if done and not stopping.result():
        _log.warning("texts were cut: they took longer than the grace seconds")
    return bool(done)


def _first_signal() -> asyncio.Future[int]:
    """The first signal that asks to stop; the second ends the process."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[int] = loop.create_future()

    def receive(number: int) -> None:
        if received.done():
            os._exit(128 + number)
        received.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, receive, number)
    return received


async def _announce_when_ready(worker: DecodingWorker, announce: Callable[[], None]) -> None:
    while not worker.state().ready:
        await asyncio.sleep(_READY_POLL_SECONDS)
    announce()
