"""Records that the web side and the worker exchange: requests, outputs, state, settings.

Plain dataclasses, so that neither side imports the other. Scheduling is left to `worker.py` and
`scheduler.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from passlm.errors import InputError
from passlm.outputs import Stats
from passlm.serve.settings import SettingsError

if TYPE_CHECKING:  # a command's help lists the settings, and torch takes seconds
    from passlm.generate import Options

INTERNAL_ERROR = "an internal error occurred while generating this sequence"

EndReason = Literal["eos", "stop", "length", "context", "time", "waited", "cancelled"]
"""Why a sequence ended.

Two reasons mean that the time limit was reached: `time` for a sequence that was being generated,
`waited` for one that had not joined the batch."""


class QueueFullError(InputError):
    """The queue is full.

    Args:
        retry_after: estimated seconds until a new request can be accepted.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(InputError):
    """The server is shutting down and accepts no further requests."""


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """Limits of the worker.

    Raises:
        SettingsError: a limit leaves no room for any sequence.
    """

    max_batch: int = field(default=8, metadata={"help": "number of sequences decoded at a time"})
    max_context: int = field(
        default=2048,
        metadata={
            "help": "tokens of a sequence, prompt and answer; at most the model's context length"
        },
    )
    max_cache: int = field(
        default=0,
        metadata={
            "help": "maximum number of tokens in the KV cache, of running and finished sequences; "
            "0 is max-batch x max-context"
        },
    )
    max_waiting: int = field(
        default=64,
        metadata={"help": "number of sequences that may wait; further requests get status 429"},
    )
    prefill_chunk: int = field(
        default=128,
        metadata={"help": "prompt tokens prefilled between two steps of the other sequences"},
    )
    max_seconds: float = field(
        default=600.0,
        metadata={"help": "time limit of a sequence; one that takes longer is cut off"},
    )

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            zero_allowed = limit.name in ("max_cache", "max_waiting")
            if value < 0 or (value == 0 and not zero_allowed):
                flag = limit.name.replace("_", "-")
                minimum = "0 or more" if zero_allowed else "more than 0"
                raise SettingsError(f"--{flag} is {value}: it must be {minimum}")


@dataclass(frozen=True)
class SequenceRequest:
    """A request for one sequence.

    Attributes:
        prompt: token ids.
        options: sampling parameters, stop conditions and decoding method.
        logprobs: number of most probable tokens to return with each token, 0 or more; None
            returns no log-probabilities at all.
    """

    prompt: tuple[int, ...]
    options: Options
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One settled token.

    Attributes:
        id: token id.
        text: text that can be shown with this token; empty while a character or a possible stop
            string is incomplete.
        position: position among the candidates of its pass at which it was accepted, from 1; 0 if
            it was drawn.
        logprob: natural log-probability under the model itself, before temperature, penalties and
            filters; None if not requested.
        top: ids and log-probabilities of the most probable tokens, best first, as many as
            requested.
    """

    id: int
    text: str
    position: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SequenceOutput:
    """The tokens that one pass added to a sequence; the last output has a finish reason."""

    tokens: tuple[Token, ...]
    finish_reason: EndReason | None = None


@dataclass(frozen=True)
class Failed:
    """An internal error ended the sequence; the details are in the log, not here."""

    message: str


Event = SequenceOutput | Failed
EventCallback = Callable[[int, Event], None]
"""Receives the events of one request: the index of the sequence, and the event.

Called in the worker's thread, so it must not block. The last event of a sequence is a
`SequenceOutput` with a finish reason, or `Failed`."""


@dataclass(eq=False)
class Job:
    """A sequence that the worker has accepted; its statistics are complete after its last event."""

    request: SequenceRequest
    index: int
    deliver: EventCallback
    stats: Stats = field(default_factory=Stats)
    reused: int = 0
    """Number of prompt tokens whose keys and values were found in the cache."""

    def notify(self, event: Event) -> None:
        """Deliver an event to the subscriber and log any exception it raises."""
        try:
            self.deliver(self.index, event)
        except Exception:
            _log.exception("an event could not be delivered")


@dataclass(frozen=True)
class WorkerState:
    """Load of the worker, for metrics and health checks.

    Attributes:
        ready: passes can be run.
        running: number of sequences in the batch.
        waiting: number of sequences that wait or whose prompt is being prefilled.
        cached_tokens: tokens in the KV cache, those of finished sequences included.
        max_cache: maximum of `cached_tokens`.
        passes: passes run since the start.
        pass_seconds: time spent in them.
        faults: internal errors in steps and sequences.
    """

    ready: bool
    running: int
    waiting: int
    cached_tokens: int
    max_cache: int
    passes: int
    pass_seconds: float
    faults: int
