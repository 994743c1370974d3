"""Middleware: request ids, log lines, security headers, API keys, body limits.

Plain ASGI, so that no layer hides from a response that its client disconnected.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from passlm.serve.errors import ApiError
from passlm.serve.events import ClientDisconnectedError
from passlm.serve.metrics import Metrics
from passlm.serve.request_record import RequestRecord, record_of

# nginx's status of a request whose client disconnected before the response
CLIENT_CLOSED_REQUEST = 499
PROBES = frozenset({"/health", "/ready", "/metrics"})
_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECURITY = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
# Bytes of a too large body that are read and discarded; many clients read the response only then.
_MAX_DISCARDED = 1 << 26

_log = logging.getLogger(__name__)


class RequestMiddleware:
    """Outermost layer: gives each request an id and a log line, and handles every exception.

    Args:
        app: the wrapped application.
        metrics: counts requests.
        path: returns the label of a path in the metrics.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, path: Callable[[str], str]) -> None:
        self._app = app
        self._metrics = metrics
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, as ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(Headers(scope=scope)), time.perf_counter())
        scope.setdefault("state", {})["record"] = record
        send_with_headers = _SendWithHeaders(send, record, private=scope["path"].startswith("/v1/"))
        try:
            if scope["path"].isprintable():
                await self._app(scope, receive, send_with_headers)
            else:  # the router and the key check might parse such a path differently
                await _send_error(
                    ApiError(404, "there is no such path: see /docs"),
                    scope,
                    receive,
                    send_with_headers,
                )
        except ClientDisconnectedError as gone:
            record.facts["gone"] = str(gone)
            record.status = record.status or CLIENT_CLOSED_REQUEST
        except Exception:
            _log.exception("internal error in a request", extra={"facts": {"id": record.id}})
            record.facts["fault"] = True
            if record.status is None:
                fault = ApiError(
                    500, "an internal error occurred: the server's log has the details"
                )
                await fault.response()(scope, receive, send_with_headers)
        finally:
            self._log_request(scope, record)

    def _log_request(self, scope: Scope, record: RequestRecord) -> None:
        seconds = time.perf_counter() - record.started
        path, status = scope["path"], record.status or CLIENT_CLOSED_REQUEST
        self._metrics.count_request(self._path(path), status, seconds)
        level = logging.DEBUG if path in PROBES and status < 400 else logging.INFO
        facts = {
            "id": record.id,
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            **record.facts,
        }
        _log.log(level, "request", extra={"facts": facts})


class _SendWithHeaders:
    """Records the status of a response and adds headers."""

    def __init__(self, send: Send, record: RequestRecord, private: bool) -> None:
        self._send = send
        self._record = record
        self._private = private

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            headers = MutableHeaders(raw=list(message["headers"]))
            headers["x-request-id"] = self._record.id
            for name, value in _SECURITY.items():
                headers[name] = value
            if self._private:
                headers["cache-control"] = "no-store"
            message = {**message, "headers": headers.raw}
        await self._send(message)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex


async def _send_error(refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    record_of(scope).facts["error"] = refusal.code
    await refusal.response()(scope, receive, send)


class ApiKeyMiddleware:
    """Rejects requests without a valid API key; keys are compared in constant time.

    Args:
        app: the protected application.
        keys: valid keys.
        protected: returns whether a path requires a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], protected: Callable[[str], bool]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._protected = protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, as ASGI calls it."""
        if scope["type"] == "http" and self._protected(scope["path"]):
            refusal = self._refusal(Headers(scope=scope).get("authorization"))
            if refusal is not None:
                await _send_error(refusal, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, given: str | None) -> ApiError | None:
        headers = {"WWW-Authenticate": "Bearer"}
        if given is None:
            return ApiError(
                401, "an API key is missing: send 'Authorization: Bearer KEY'", headers=headers
            )
        scheme, _, key = given.partition(" ")
        digest = _digest(key.strip().encode())
        # All keys are compared, without an early exit, so that the time is constant.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == "bearer" and any(found):
            return None
        return ApiError(401, "the API key is not valid", headers=headers)


def _digest(key: bytes) -> bytes:
    """Return a digest of fixed length, so that comparing does not reveal the length of a key."""
    return hashlib.sha256(key).digest()


class BodyMiddleware:
    """Reads the complete body of a request before the application runs, within limits.

    Args:
        app: receives the complete body.
        max_bytes: maximum size in bytes.
        seconds: time within which the body must arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, as ASGI calls it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as refusal:
            await _send_error(refusal, scope, receive, send)
            return
        await self._app(scope, _Replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "the body is compressed: send it uncompressed")
        length = headers.get("content-length", "")
        content_length = int(length) if length.isdecimal() else 0
        if content_length > self._max_bytes and "expect" in headers:
            raise self._too_large()  # the client waits for "100 Continue"
        try:
            async with asyncio.timeout(self._seconds):
                return await self._collect(receive, content_length)
        except TimeoutError as error:
            raise ApiError(
                http.HTTPStatus.REQUEST_TIMEOUT,
                f"the body did not arrive within {self._seconds} s",
                headers={"Connection": "close"},
            ) from error

    async def _collect(self, receive: Receive, content_length: int) -> bytes:
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError(
                    "the client disconnected before its request was complete"
                )
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if max(size, content_length) <= self._max_bytes:
                body += message.get("body", b"")
            elif size > _MAX_DISCARDED:
                break
        if max(size, content_length) > self._max_bytes:
            raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._max_bytes} bytes: shorten it",
            headers={"Connection": "close"},
        )


class _Replay:
    """Receives a body that was already read, then further messages."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
