"""What the server's two sides tell each other: the web side asks, the worker answers in pieces.

Plain records, so that neither side needs the other. Who runs what when is left to `worker.py`.
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

INTERNAL_ERROR = "the server met a fault while writing this text"

EndReason = Literal["eos", "stop", "length", "context", "time", "waited", "cancelled"]
"""Of texts cut by the clock, `waited` are those that had not begun."""


class QueueFullError(InputError):
    """The waiting line is full.

    Args:
        retry_after: seconds after which trying again is worth it.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(InputError):
    """The server is going down and takes nothing any more."""


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """How much the worker takes on.

    Raises:
        SettingsError: a limit leaves no room for any text.
    """

    max_batch: int = field(default=8, metadata={"help": "texts decoded at a time"})
    max_context: int = field(
        default=2048, metadata={"help": "tokens of a text, prompt and answer; at most the model's"}
    )
    max_cache: int = field(
        default=0,
        metadata={
            "help": "tokens kept of all texts, running and remembered; 0 is max-batch x max-context"
        },
    )
    max_waiting: int = field(
        default=64, metadata={"help": "requests that may wait; beyond it they are refused (429)"}
    )
    prefill_chunk: int = field(
        default=128, metadata={"help": "prompt tokens run between two steps of the others"}
    )
    max_seconds: float = field(
        default=600.0, metadata={"help": "a text that takes longer is ended where it is"}
    )

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, zero_allowed = (
                getattr(self, limit.name),
                limit.name in ("max_cache", "max_waiting"),
            )
            if value < 0 or (value == 0 and not zero_allowed):
                flag, minimum = (
                    limit.name.replace("_", "-"),
                    "0 or more" if zero_allowed else "more than 0",
                )
                raise SettingsError(f"--{flag} is {value}: it must be {minimum}")


@dataclass(frozen=True)
class SequenceRequest:
    """One text that is wanted.

    Attributes:
        prompt: token ids.
        options: how it is drawn, where it ends, by which method.
        logprobs: how many of the likeliest tokens to tell beside each token, 0 or more; None tells
            no log-probabilities at all.
    """

    prompt: tuple[int, ...]
    options: Options
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One settled token.

    Attributes:
        id: its id.
        text: what it lets show; empty while a character or a possible stop string is unfinished.
        position: where it stood among the candidates of its pass, from 1; 0 if it was drawn.
        logprob: its natural log-probability under the model itself, before temperature, penalties
            and filters; None where that was not asked for.
        top: the likeliest ids with theirs, best first, as many as were asked for.
    """

    id: int
    text: str
    position: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SequenceOutput:
    """What one pass added to a text; the last one says why it ended."""

    tokens: tuple[Token, ...]
    finish_reason: EndReason | None = None


@dataclass(frozen=True)
class Failed:
    """A fault of ours ended the text; the details are in the log, not here."""

    message: str


Event = SequenceOutput | Failed
EventCallback = Callable[[int, Event], None]
"""Takes the events of one request: which of its texts, and what came. Called in the worker's
thread, so it must not block. The last event of a text is a `Piece` with a reason, or `Failed`."""


@dataclass(eq=False)
class Job:
    """A text under way. Its counts are whole once its last event has come."""

    request: SequenceRequest
    index: int
    deliver: EventCallback
    stats: Stats = field(default_factory=Stats)
    reused: int = 0
    """Tokens of the prompt whose keys and values were still at hand."""

    def notify(self, event: Event) -> None:
        """Hand an event to whoever asked; their faults are theirs."""
        try:
            self.deliver(self.index, event)
        except Exception:
            _log.exception("an event could not be handed over")


@dataclass(frozen=True)
class WorkerState:
    """How busy the worker is, for metrics and health.

    Attributes:
        ready: passes can be run.
        running: texts in the batch.
        waiting: texts not begun, or whose prompt is being read.
        cached_tokens: tokens whose keys and values are held, remembered texts included.
        max_cache: the most there may be.
        passes: run since the start.
        pass_seconds: spent in them.
        faults: steps that failed.
    """

    ready: bool
    running: int
    waiting: int
    cached_tokens: int
    max_cache: int
    passes: int
    pass_seconds: float
    faults: int
