"""The HTTP response of a generation request, streamed or complete."""

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

KEEP_ALIVE_SECONDS = 15.0  # a silent stream sends a comment: proxies close idle connections
_KEEP_ALIVE = ": waiting\n\n"  # a comment of server-sent events, which clients ignore
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"x-accel-buffering", b"no"),  # nginx must not buffer the stream
    ],
}


@dataclass(frozen=True)
class ResponseContext:
    """What all responses of a server share.

    Attributes:
        worker: runs the sequences.
        metrics: counts events.
        write_seconds: a client that reads nothing for this long is disconnected.
    """

    worker: DecodingWorker
    metrics: Metrics
    write_seconds: float


class GenerationResponse(Response):
    """Submits a request to the worker when it is sent, and sends the outputs as they arrive.

    Args:
        context: see `ResponseContext`.
        request: the request.
        builder: turns outputs into chunks or a response.
        stream: send server-sent events in place of one response.
        include_usage: end a stream with the usage; a complete response always has it.
    """

    def __init__(
        self,
        context: ResponseContext,
        request: GenerationRequest,
        builder: ResponseBuilder,
        stream: bool,
        include_usage: bool,
    ) -> None:
        super().__init__()
        self._context = context
        self._request = request
        self._builder = builder
        self._stream = stream
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit the sequences and send their outputs, as ASGI calls it."""
        context, record = self._context, record_of(scope)
        record.facts |= {"texts": len(self._request.sequences), "stream": self._stream}
        metrics = RequestMetrics(context.metrics, record.started)
        async with subscribe(context.worker, self._request.sequences, receive, metrics) as queue:
            try:
                if self._stream:
                    await self._send_stream(queue, send, record)
                else:
                    await self._send_whole(queue, scope, receive, send)
            finally:
                record.facts |= self._facts(queue)

    async def _send_whole(
        self, queue: EventQueue, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async for batch in queue.batches():
            for item in batch:
                self._builder.add(item.index, _output(item))
        reply = self._builder.response(usage(self._request, queue.jobs)).model_dump_json()
        await Response(reply, media_type="application/json")(scope, receive, send)

    async def _send_stream(self, queue: EventQueue, send: Send, record: RequestRecord) -> None:
        """Send events as they arrive; an error before the first one gets its own HTTP status."""
        started = False
        async for batch in queue.batches(KEEP_ALIVE_SECONDS):
            events, error = self._events(batch)
            if error is not None and not started and not events:
                raise error
            if not started:
                await send(_START)
                started = True
            if error is not None:
                record.facts["error"] = error.code
                await self._write(send, [*events, error.reply.model_dump_json()], last=True)
                return
            if events or not batch:
                await self._write(send, events)
        total = usage(self._request, queue.jobs)
        closing = [self._builder.usage_chunk(total)] if self._include_usage else []
        await self._write(send, [*closing, "[DONE]"], last=True)

    def _events(self, batch: Sequence[SequenceEvent]) -> tuple[list[str], ApiError | None]:
        """Return the events to send for a batch, up to the first error, and that error."""
        events: list[str] = []
        for item in batch:
            try:
                events += self._builder.chunks(item.index, _output(item))
            except ApiError as error:
                return events, error
        return events, None

    async def _write(self, send: Send, events: Sequence[str], last: bool = False) -> None:
        body = "".join(f"data: {event}\n\n" for event in events) or _KEEP_ALIVE
        seconds = self._context.write_seconds
        try:
            # Sending blocks while the client's buffers are full.
            async with asyncio.timeout(seconds):
                await send(
                    {"type": "http.response.body", "body": body.encode(), "more_body": not last}
                )
        except TimeoutError as error:
            raise ClientDisconnectedError(f"the client read nothing for {seconds} s") from error

    def _facts(self, queue: EventQueue) -> dict[str, int]:
        total = usage(self._request, queue.jobs)
        return {
            "prompt_tokens": total.prompt_tokens,
            "tokens": total.completion_tokens,
            "passes": total.passlm.passes,
            "unfinished": len(queue.unfinished),
        }


def _output(item: SequenceEvent) -> SequenceOutput:
    """Return the output of an event.

    Raises:
        ApiError: the sequence failed, waited too long, or was ended by a shutdown.
    """
    event = item.event
    if isinstance(event, Failed):
        raise ApiError(500, event.message)
    if event.finish_reason == "waited":
        raise unavailable(
            "the server is too busy: the request reached the time limit before it started"
        )
    if event.finish_reason == "cancelled":  # a shutdown: this response has not cancelled it
        raise unavailable(
            "the server is shutting down and could not finish the request: send it again later"
        )
    return event
