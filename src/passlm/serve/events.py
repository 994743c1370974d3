"""Pass the events of one request from the worker's thread to the event loop."""

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
    """The client disconnected, or it no longer reads."""


class DecodingWorker(Protocol):
    """The part of the worker that the web side uses."""

    @property
    def max_context(self) -> int:
        """Maximum length of a sequence, prompt and answer, in tokens."""

    def submit(self, sequences: Sequence[SequenceRequest], deliver: EventCallback) -> list[Job]:
        """Accept the sequences of one request, all or none."""

    def cancel(self, jobs: Iterable[Job]) -> None:
        """End sequences before their next step."""

    def state(self) -> WorkerState:
        """Return the current load."""


@dataclass(frozen=True)
class SequenceEvent:
    """An event and the index of the sequence that it belongs to."""

    index: int
    event: Event

    @property
    def last(self) -> bool:
        """True if it is the last event of its sequence."""
        return isinstance(self.event, Failed) or self.event.finish_reason is not None


class EventQueue:
    """Queue of the events of one request.

    Unbounded, but it never holds more events than the request may have tokens.

    Args:
        metrics: counts every event.
    """

    def __init__(self, metrics: RequestMetrics) -> None:
        self.jobs: list[Job] = []
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[SequenceEvent | None] = asyncio.Queue()
        self._finished: set[int] = set()

    @property
    def unfinished(self) -> list[Job]:
        """Jobs whose last event has not arrived."""
        return [job for job in self.jobs if job.index not in self._finished]

    def deliver(self, index: int, event: Event) -> None:
        """Add an event; called in the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, index, event, time.perf_counter())
        except RuntimeError:
            if not self._loop.is_closed():  # after the loop has closed, no subscriber is left
                raise

    def _put(self, index: int, event: Event, at: float) -> None:
        item = SequenceEvent(index, event)
        if item.last:
            self._finished.add(index)
        self._metrics.count_event(self.jobs[index], event, at)
        self._queue.put_nowait(item)

    async def watch_disconnect(self, receive: Receive) -> None:
        """Wait until the client disconnects, and put None into the queue as a mark."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)

    async def batches(self, timeout: float | None = None) -> AsyncIterator[list[SequenceEvent]]:
        """Yield events in batches, until all sequences have ended.

        A batch contains all events that have arrived since the previous one.

        Args:
            timeout: seconds without an event after which an empty batch is yielded; None for no
                limit.

        Raises:
            ClientDisconnectedError: the client disconnected.
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
            raise ClientDisconnectedError("the client disconnected")
        return received


@asynccontextmanager
async def subscribe(
    worker: DecodingWorker,
    sequences: Sequence[SequenceRequest],
    receive: Receive,
    metrics: RequestMetrics,
) -> AsyncIterator[EventQueue]:
    """Submit sequences and yield the queue of their events; on exit, cancel unfinished ones.

    Args:
        worker: runs the sequences.
        sequences: the sequences of one request.
        receive: ASGI's receive function, which reports that the client disconnected.
        metrics: counts every event.

    Raises:
        InputError: the worker does not accept them.
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
