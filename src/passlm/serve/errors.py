"""Errors in the format of the OpenAI API, made from every exception that a request can raise."""

from __future__ import annotations

import http
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from passlm.decoding.decoder import PromptError
from passlm.errors import InputError
from passlm.params import ParameterError
from passlm.serve.protocol import ClosedError, QueueFullError
from passlm.serve.request_record import record_of
from passlm.serve.request_schema import printable
from passlm.serve.response_schema import ErrorDetails, ErrorReply

RETRY_SECONDS = 10  # Retry-After during warm-up and shutdown
_UNION_ARM = re.compile(r"[a-z-]*\[.*\]|str|int|float|bool|dict|none")
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
}


class ApiError(Exception):
    """An error that is sent to the client in place of a response.

    Args:
        status: HTTP status.
        message: one line that says what was wrong.
        param: field of the request that caused the error.
        code: machine-readable error code; by default it follows from the status.
        headers: additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        field_error = status == http.HTTPStatus.BAD_REQUEST and param is not None
        self.code = code or ("invalid_value" if field_error else _CODES.get(status, _CODES[400]))
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """Value of `type` in OpenAI's API."""
        if self.status == http.HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def reply(self) -> ErrorReply:
        """Body of the response."""
        details = ErrorDetails(
            message=printable(str(self)),
            type=self.kind,
            param=None if self.param is None else printable(self.param),
            code=self.code,
        )
        return ErrorReply(error=details)

    def response(self) -> Response:
        """Return the response to send."""
        return JSONResponse(self.reply.model_dump(), self.status, self.headers)


def from_input_error(error: InputError) -> ApiError:
    """Return the API error of an exception about the user's input."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ClosedError):
        return unavailable(str(error))
    if isinstance(error, PromptError):
        return ApiError(400, str(error), code="invalid_prompt")
    if isinstance(error, ParameterError):
        return ApiError(400, str(error), str(error).split(maxsplit=1)[0], "invalid_value")
    return ApiError(400, str(error))


def unavailable(message: str) -> ApiError:
    """Return a 503 error, for a server that starts up, shuts down or is overloaded."""
    return ApiError(503, message, headers={"Retry-After": str(RETRY_SECONDS)})


def from_validation(error: RequestValidationError) -> ApiError:
    """Return the API error of the first problem that validation found.

    Where a field allows several types, the error comes from the type that matched deepest.
    """
    errors: Sequence[dict[str, Any]] = error.errors()
    same_field = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    first = max(same_field, key=lambda each: len(each["loc"]))
    kind, context = str(first["type"]), first.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error', 'send a JSON object')}")
    path = _location(first["loc"])
    if not path and kind == "missing":
        return ApiError(400, "the body is missing: send a JSON object")
    param = ".".join(filter(None, (path, context.get("field"))))
    message = f"{param or 'the body'}: {str(first['msg'])[:1].lower()}{str(first['msg'])[1:]}"
    return ApiError(400, message, param or None, kind if kind in _OWN_CODES else _code(kind))


_OWN_CODES = ("unknown_parameter", "unsupported_parameter", "unsupported_value")


def _code(kind: str) -> str:
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"


def _location(location: Sequence[int | str]) -> str:
    """Return the path of a field in the body, such as `messages[0].content`."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _UNION_ARM.fullmatch(part):
            path += f".{part[:80]}" if path else part
    return path


def from_http(error: HTTPException, path: str) -> ApiError:
    """Return the API error of a framework error: unknown path, wrong method, unreadable body."""
    headers = dict(error.headers or {})
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        return ApiError(404, f"there is no path {path[:200]}: see /docs", headers=headers)
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers.get("allow") or headers.get("Allow") or "another method"
        return ApiError(
            405, f"{path[:200]} does not support this HTTP method: use {allowed}", headers=headers
        )
    if error.status_code == http.HTTPStatus.BAD_REQUEST:
        return ApiError(400, "the body cannot be read: send a JSON object", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


async def handle(request: Request, error: Exception) -> Response:
    """Handle an exception for FastAPI: record its code for the log and return the response."""
    answer = _as_api_error(error, request.scope["path"])
    record_of(request.scope).facts["error"] = answer.code
    return answer.response()


def _as_api_error(error: Exception, path: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return from_validation(error)
    if isinstance(error, InputError):
        return from_input_error(error)
    assert isinstance(error, HTTPException), "the handler is registered for these exceptions only"
    return from_http(error, path)
