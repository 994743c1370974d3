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

    def __init__(self, meter: RequestMetrics) -> None:
        self.jobs: list[Job] = []
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[SequenceEvent | None] = asyncio.Queue()
        self._over: set[int] = set()

    @property
    def unfinished(self) -> list[Job]:
        """The texts whose end has not come."""
        return [job for job in self.jobs if job.index not in self._over]

    def deliver(self, index: int, event: Event) -> None:
        """Take an event; called in the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, index, event, time.perf_counter())
        except RuntimeError:
            if not self._loop.is_closed():  # else nobody is left to tell
                raise

    def _take(self, index: int, event: Event, at: float) -> None:
        arrival = SequenceEvent(index, event)
        if arrival.last:
            self._over.add(index)
        self._meter.event(self.jobs[index], event, at)
        self._arrived.put_nowait(arrival)

    async def watch(self, receive: Receive) -> None:
        """Notice when the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._arrived.put_nowait(None)

    async def batches(self, patience: float | None = None) -> AsyncIterator[list[SequenceEvent]]:
        """Everything that comes, to the end of all texts, together where it came together.

        Args:
            patience: seconds after which an empty batch is given; None waits.

        Raises:
            GoneError: the client hung up.
        """
        left = len(self.jobs)
        while left:
            batch = await self._next(patience)
            left -= sum(arrival.last for arrival in batch)
            yield batch

    async def _next(self, patience: float | None) -> list[SequenceEvent]:
        try:
            async with asyncio.timeout(patience):
                found = [await self._arrived.get()]
        except TimeoutError:
            return []
        while not self._arrived.empty():
            found.append(self._arrived.get_nowait())
        arrived = [arrival for arrival in found if arrival is not None]
        if len(arrived) < len(found):
            raise ClientDisconnectedError("the client hung up")
        return arrived


@asynccontextmanager
async def subscribe(
    worker: DecodingWorker,
    sequences: Sequence[SequenceRequest],
    receive: Receive,
    meter: RequestMetrics,
) -> AsyncIterator[EventQueue]:
    """Ask for texts and listen; whatever is unfinished when the listening ends is cancelled.

    Args:
        worker: who is asked.
        sequences: the texts.
        receive: tells when the client hangs up.
        meter: counts what comes.

    Raises:
        InputError: the worker does not take them.
    """
    feed = EventQueue(meter)
    feed.jobs = worker.submit(sequences, feed.deliver)
    watcher = asyncio.create_task(feed.watch(receive))
    try:
        yield feed
    finally:
        watcher.cancel()
        if feed.unfinished:
            worker.cancel(feed.unfinished)
