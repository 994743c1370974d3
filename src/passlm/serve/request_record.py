"""Log record of one request, completed while the request is processed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope


@dataclass
class RequestRecord:
    """Log record of one request.

    Attributes:
        id: request id from the client, or a random one.
        started: time of arrival, by `time.perf_counter`.
        status: HTTP status of the response; None before the response starts.
        facts: additional fields of the log line.
    """

    id: str
    started: float
    status: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def record_of(scope: Scope) -> RequestRecord:
    """Return the record of a request."""
    record: RequestRecord = scope["state"]["record"]
    return record
