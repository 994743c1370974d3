"""Listen on a port, serve, and shut down after running requests have finished."""

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

LAST_SECONDS = 5  # for clients to read the last bytes after all sequences have ended
IDLE_SECONDS = 75  # idle time of a connection; clients often reuse one for up to a minute
BACKLOG = 2048  # connections that the system has not handed to the server yet
_INTERRUPTED = 128 + signal.SIGINT
_READY_POLL_SECONDS = 0.05
_KEEPALIVE_SECONDS = 30

_log = logging.getLogger(__name__)


class StoppableWorker(DecodingWorker, Protocol):
    """A worker that can be stopped."""

    def stop(self, grace: float) -> bool:
        """Stop after at most `grace` seconds; return False if sequences were cut off."""


def bound_socket(host: str, port: int, write_seconds: float) -> socket.socket:
    """Return a socket that is bound to an address and does not listen yet.

    Args:
        host: host name or IP address.
        port: port; 0 for a free one.
        write_seconds: the system closes a connection whose client acknowledges nothing for this
            long.

    Raises:
        SettingsError: the address is unknown, in use or not allowed.
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
    """Close connections to clients that vanished or read nothing; connections inherit this."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (  # options that not every system has
        ("TCP_KEEPIDLE", _KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", _KEEPALIVE_SECONDS),
        ("TCP_USER_TIMEOUT", int(1000 * write_seconds)),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _address_error(error: OSError, host: str, port: int) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        return SettingsError(
            f"port {port} of {host} is in use: stop the other server, or give another --port "
            "(0 chooses a free one)"
        )
    return SettingsError(f"cannot listen on --host {host} --port {port}: {error.strerror}")


def address_of(listener: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only this machine can reach a socket."""
    host = str(listener.getsockname()[0]).partition("%")[0]
    return ipaddress.ip_address(host).is_loopback


class _Connection(H11Protocol):
    """A connection that is closed if the headers of a request do not arrive in time.

    The time is measured from the first byte of a request, on a new connection from its start.
    Between requests, `IDLE_SECONDS` are allowed.
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
    """A uvicorn server that does not handle signals; `serve` does.

    Args:
        app: from `create_app`.
        read_seconds: time within which the headers of a request must arrive.
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
        """Capture no signals."""
        yield


def serve(
    app: FastAPI,
    worker: StoppableWorker,
    listener: socket.socket,
    grace_seconds: float,
    read_seconds: float,
    announce: Callable[[], None],
) -> int | None:
    """Serve until a signal arrives, then finish running requests; a second signal ends at once.

    New requests get status 503 during the shutdown.

    Args:
        app: from `create_app`.
        worker: a started worker; it is stopped here.
        listener: from `bound_socket`.
        grace_seconds: time for running requests to finish.
        read_seconds: time within which the headers of a request must arrive.
        announce: called as soon as requests are accepted.

    Returns:
        The signal that ended the server; None if it ended by itself.

    Raises:
        SettingsError: another process has started to listen on the address.
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
        _log.warning("the worker does not stop in time: the process ends without it")
        os._exit(
            _INTERRUPTED if received.done() and received.result() == signal.SIGINT else os.EX_OK
        )
    server.should_exit = True
    await serving
    return received.result() if received.done() else None


async def _stop_worker(worker: StoppableWorker, grace_seconds: float) -> bool:
    """Stop the worker; return False if it does not stop in time, for example while compiling."""
    state = worker.state()
    timeout = LAST_SECONDS + (grace_seconds if state.running or state.waiting else 0)
    stopping = asyncio.create_task(asyncio.to_thread(worker.stop, grace_seconds))
    done, _ = await asyncio.wait({stopping}, timeout=timeout)
    if done and not stopping.result():
        _log.warning("sequences were cut off: they took longer than the grace period")
    return bool(done)


def _first_signal() -> asyncio.Future[int]:
    """Return a future for the first stop signal; the second signal ends the process."""
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
