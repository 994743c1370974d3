"""What the log is to tell of one request; filled in on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope


@dataclass
class RequestRecord:
    """What is known of one request.

    Attributes:
        id: the client's own, or a fresh one.
        begun: when it came, by `time.perf_counter`.
        status: of the response; None before it begins.
        facts: what its answer adds.
    """

    id: str
    started: float
    status: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request."""
    record: RequestRecord = scope["state"]["record"]
    return record
