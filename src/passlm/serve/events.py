"""The events of one request, carried from the worker's thread into the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Receive

from passlm.serve.metrics import RequestMetrics
from passlm.serve.protocol import Event, EventCallback, Failed, Job, SequenceRequest, WorkerState


class ClientDisconnectedError(Exception):
    """Whoever asked hung up, or reads nothing any more."""


class DecodingWorker(Protocol):
    """What the web side needs of the worker."""

    @property
    def max_context(self) -> int:
        """Tokens a text may have, prompt and answer."""

    def submit(self, sequences: Sequence[SequenceRequest], deliver: EventCallback) -> list[Job]:
        """Take on the texts of one request, all or none."""

    def cancel(self, jobs: Iterable[Job]) -> None:
        """End texts before their next step."""

    def state(self) -> WorkerState:
        """How busy it is."""


@dataclass(frozen=True)
class SequenceEvent:
    """An event, and the text it belongs to."""

    index: int
    event: Event

    @property
    def last(self) -> bool:
        """Whether nothing comes of the text after it."""
        return isinstance(self.event, Failed) or self.event.finish_reason is not None


class EventQueue:
    """What comes of one request.

    What waits here is bounded by the tokens that the request may have.

    Args:
        meter: counts everything that comes.
    """

    def __init__(self, metrics: RequestMetrics) -> None:
        self.jobs: list[Job] = []
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[SequenceEvent | None] = asyncio.Queue()
        self._finished: set[int] = set()

    @property
    def unfinished(self) -> list[Job]:
        """The texts whose end has not come."""
        return [job for job in self.jobs if job.index not in self._finished]

    def deliver(self, index: int, event: Event) -> None:
        """Take an event; called in the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, index, event, time.perf_counter())
        except RuntimeError:
            if not self._loop.is_closed():  # else nobody is left to tell
                raise

    def _put(self, index: int, event: Event, at: float) -> None:
        item = SequenceEvent(index, event)
        if item.last:
            self._finished.add(index)
        self._metrics.count_event(self.jobs[index], event, at)
        self._queue.put_nowait(item)

    async def watch_disconnect(self, receive: Receive) -> None:
        """Notice when the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)

    async def batches(self, timeout: float | None = None) -> AsyncIterator[list[SequenceEvent]]:
        """Everything that comes, to the end of all texts, together where it came together.

        Args:
            timeout: seconds after which an empty batch is given; None waits.

        Raises:
            GoneError: the client hung up.
        """
        remaining = len(self.jobs)
        while remaining:
            batch = await self._next_batch(timeout)
            remaining -= sum(item.last for item in batch)
            yield batch

    async def _next_batch(self, timeout: float | None) -> list[SequenceEvent]:
        try:
            async with asyncio.timeout(timeout):
                items = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        received = [item for item in items if item is not None]
        if len(received) < len(items):
            raise ClientDisconnectedError("the client hung up")
        return received


@asynccontextmanager
async def subscribe(
    worker: DecodingWorker,
    sequences: Sequence[SequenceRequest],
    receive: Receive,
    metrics: RequestMetrics,
) -> AsyncIterator[EventQueue]:
    """Ask for texts and listen; whatever is unfinished when the listening ends is cancelled.

    Args:
        worker: who is asked.
        sequences: the texts.
        receive: tells when the client hangs up.
        metrics: counts what comes.

    Raises:
        InputError: the worker does not take them.
    """
    queue = EventQueue(metrics)
    queue.jobs = worker.submit(sequences, queue.deliver)
    watcher = asyncio.create_task(queue.watch_disconnect(receive))
    try:
        yield queue
    finally:
        watcher.cancel()
        if queue.unfinished:
            worker.cancel(queue.unfinished)
