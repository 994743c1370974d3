"""The answer to one request: asks the worker, listens, and sends what comes, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from passlm.serve.errors import ApiError, unavailable
from passlm.serve.events import (
    ClientDisconnectedError,
    DecodingWorker,
    EventQueue,
    SequenceEvent,
    subscribe,
)
from passlm.serve.metrics import Metrics, RequestMetrics
from passlm.serve.protocol import Failed, SequenceOutput
from passlm.serve.request_record import RequestRecord, record_of
from passlm.serve.requests import GenerationRequest
from passlm.serve.response_builder import ResponseBuilder, usage

QUIET_SECONDS = 15.0  # after which a stream says that it is still there: proxies close idle ones
_STILL_HERE = ": waiting\n\n"  # a comment, which clients pass over
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"x-accel-buffering", b"no"),  # nginx is not to collect it
    ],
}


@dataclass(frozen=True)
class ResponseContext:
    """What all answers of a server have in common.

    Attributes:
        worker: who writes them.
        metrics: where they are counted.
        write_seconds: a client that reads nothing for this long is left.
    """

    worker: DecodingWorker
    metrics: Metrics
    write_seconds: float


class GenerationResponse(Response):
    """The answer to one request, made while it is sent.

    Args:
        terms: see `Terms`.
        wanted: what the request comes to.
        composer: makes replies of what comes.
        stream: as events, or whole.
        tell_usage: at the end of a stream; whole replies always do.
    """

    def __init__(
        self,
        terms: ResponseContext,
        wanted: GenerationRequest,
        composer: ResponseBuilder,
        stream: bool,
        tell_usage: bool,
    ) -> None:
        super().__init__()
        self._terms = terms
        self._wanted = wanted
        self._composer = composer
        self._stream = stream
        self._tell_usage = tell_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, listen, send; as ASGI calls it."""
        terms, record = self._terms, record_of(scope)
        record.facts |= {"texts": len(self._wanted.sequences), "stream": self._stream}
        meter = RequestMetrics(terms.metrics, record.begun)
        async with subscribe(terms.worker, self._wanted.sequences, receive, meter) as feed:
            try:
                if self._stream:
                    await self._send_stream(feed, send, record)
                else:
                    await self._send_whole(feed, scope, receive, send)
            finally:
                record.facts |= self._facts(feed)

    async def _send_whole(
        self, feed: EventQueue, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async for batch in feed.batches():
            for arrival in batch:
                self._composer.take(arrival.index, _piece(arrival))
        reply = self._composer.whole(usage(self._wanted, feed.jobs)).model_dump_json()
        await Response(reply, media_type="application/json")(scope, receive, send)

    async def _send_stream(self, feed: EventQueue, send: Send, record: RequestRecord) -> None:
        """Send events as they come; what fails before the first one has a status of its own."""
        begun = False
        async for batch in feed.batches(QUIET_SECONDS):
            events, error = self._events(batch)
            if error is not None and not begun and not events:
                raise error
            if not begun:
                await send(_START)
                begun = True
            if error is not None:
                record.facts["error"] = error.code
                await self._write(send, [*events, error.reply.model_dump_json()], last=True)
                return
            if events or not batch:
                await self._write(send, events)
        used = usage(self._wanted, feed.jobs)
        closing = [self._composer.usage_chunk(used)] if self._tell_usage else []
        await self._write(send, [*closing, "[DONE]"], last=True)

    def _events(self, batch: Sequence[SequenceEvent]) -> tuple[list[str], ApiError | None]:
        """What some arrivals come to, up to the first that is a fault."""
        events: list[str] = []
        for arrival in batch:
            try:
                events += self._composer.chunks(arrival.index, _piece(arrival))
            except ApiError as error:
                return events, error
        return events, None

    async def _write(self, send: Send, events: Sequence[str], last: bool = False) -> None:
        body = "".join(f"data: {event}\n\n" for event in events) or _STILL_HERE
        seconds = self._terms.write_seconds
        try:
            async with asyncio.timeout(seconds):  # it waits while the client's buffers are full
                await send(
                    {"type": "http.response.body", "body": body.encode(), "more_body": not last}
                )
        except TimeoutError as error:
            raise ClientDisconnectedError(f"the client read nothing for {seconds} s") from error

    def _facts(self, feed: EventQueue) -> dict[str, int]:
        used = usage(self._wanted, feed.jobs)
        return {
            "prompt_tokens": used.prompt_tokens,
            "tokens": used.completion_tokens,
            "passes": used.passlm.passes,
            "unfinished": len(feed.unfinished),
        }


def _piece(arrival: SequenceEvent) -> SequenceOutput:
    """What came of a text, unless that is its failure.

    Raises:
        ApiError: it failed, or the server is going down.
    """
    event = arrival.event
    if isinstance(event, Failed):
        raise ApiError(500, event.message)
    if event.finish_reason == "waited":
        raise unavailable("the server is too busy: the request waited for its turn in vain")
    if event.finish_reason == "cancelled":  # not by us: we listen
        raise unavailable("the server is shutting down and could not finish: try another one")
    return event
