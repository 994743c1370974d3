"""The web application: its paths and their handlers.

`create_app` builds it around a worker, which the caller starts and stops. Listening on a port is
left to `run.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from passlm import __version__
from passlm.errors import InputError
from passlm.generate import Generator
from passlm.serve.docs import docs_page
from passlm.serve.errors import ApiError, handle, unavailable
from passlm.serve.events import DecodingWorker
from passlm.serve.metrics import Metrics
from passlm.serve.middleware import ApiKeyMiddleware, BodyMiddleware, RequestMiddleware
from passlm.serve.openapi import MODEL_PATH, complete, event, needs_key
from passlm.serve.request_record import record_of
from passlm.serve.request_schema import ChatRequest, CommonRequest, CompletionRequest
from passlm.serve.requests import GenerationRequest, RequestReader
from passlm.serve.response_builder import ChatBuilder, CompletionBuilder, ResponseBuilder
from passlm.serve.response_schema import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    ErrorReply,
    Model,
    ModelList,
    Reply,
    Status,
)
from passlm.serve.responses import GenerationResponse, ResponseContext
from passlm.serve.settings import ServeSettings, SettingsError
from passlm.serve.token_bytes import TokenBytes

STATIC = Path(__file__).parent / "static"
DOCS_STYLE = Path(__file__).parent / "docs.css"
R = TypeVar("R", bound=CommonRequest)

_DESCRIPTION = (
    "An OpenAI-compatible API. The model generates with parallel speculative sampling: several "
    "tokens per pass where its drafts are accepted, with the same distribution as plain decoding."
)
_PAGES = ("/", "/docs", "/docs.css")


def create_app(lm: Generator, worker: DecodingWorker, settings: ServeSettings) -> FastAPI:
    """Create the application with its middleware.

    Args:
        lm: the model that the worker runs; used for its tokenizer.
        worker: runs the requests; started and stopped by the caller.
        settings: limits, keys and the model's name.

    Raises:
        SettingsError: the model has no name.
    """
    if not settings.model_name:
        raise SettingsError("the model has no name in the API: give --model-name")
    api = Api(lm, worker, settings, settings.model_name)
    app = _App(settings, lifespan=api.lifespan)
    app.include_router(_open_routes(api))
    app.include_router(_api_routes(api))
    app.mount("/static", _PageFiles(directory=STATIC), "static")
    for kind in (ApiError, InputError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)
    app.add_middleware(BodyMiddleware, max_bytes=settings.max_body, seconds=settings.read_seconds)
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=settings.api_keys, protected=needs_key)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestMiddleware, metrics=api.metrics, path=app.path_name)
    return app


class _PageFiles(StaticFiles):
    """Static files that browsers revalidate each time, so that an upgrade never mixes versions."""

    def file_response(self, *given: Any, **named: Any) -> Response:
        """See `StaticFiles`."""
        response = super().file_response(*given, **named)
        response.headers["cache-control"] = "no-cache"
        return response


class Api:
    """Handlers of the paths.

    Args:
        lm: see `create_app`.
        worker: see `create_app`.
        settings: see `create_app`.
        name: name of the model in the API.
    """

    def __init__(
        self, lm: Generator, worker: DecodingWorker, settings: ServeSettings, name: str
    ) -> None:
        self.metrics = Metrics(worker.state)
        self._worker = worker
        self._settings = settings
        self._model = Model(id=name, created=int(time.time()))
        self._request_reader = RequestReader(lm, settings, worker.max_context)
        self._token_bytes = TokenBytes(lm.tokenizer)
        self._context = ResponseContext(worker, self.metrics, settings.write_seconds)
        # Long prompts would block the event loop; a tokenizer may be used by one thread at a time.
        self._tokenizer_thread = ThreadPoolExecutor(1, "passlm-tokenizer")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Stop the tokenizer's thread when the application ends."""
        yield
        self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)

    async def page(self) -> Response:
        """Return the web page."""
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def docs(self, request: Request) -> Response:
        """Return the documentation of the API as a page."""
        return HTMLResponse(docs_page(request.app.openapi()))

    async def docs_style(self) -> Response:
        """Return the style sheet of the documentation."""
        return FileResponse(DOCS_STYLE, headers={"cache-control": "no-cache"})

    async def health(self) -> Status:
        """Return status 200 while the process runs."""
        return Status(status="ok")

    async def ready(self) -> Status:
        """Return status 200 if requests are accepted; 503 during warm-up and shutdown."""
        self._check_ready()
        return Status(status="ready")

    def _check_ready(self) -> None:
        if not self._worker.state().ready:
            raise unavailable("the server is warming up or shutting down: try again later")

    async def prometheus(self) -> Response:
        """Return the metrics for Prometheus."""
        content, kind = self.metrics.exposition()
        return Response(content, media_type=kind)

    async def models(self) -> ModelList:
        """List the served model."""
        return ModelList(data=[self._model])

    async def model(self, model: str) -> Model:
        """Describe the served model."""
        if model != self._model.id:
            raise ApiError(
                404,
                f"there is no model {model[:80]!r}: this server serves {self._model.id!r}",
                "model",
                "model_not_found",
            )
        return self._model

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Complete one or several prompts."""
        return await self._answer(body, request, self._request_reader.completion, CompletionBuilder)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await self._answer(body, request, self._request_reader.chat, ChatBuilder)

    async def _answer(
        self,
        body: R,
        request: Request,
        read: Callable[[R], GenerationRequest],
        builder: type[ResponseBuilder],
    ) -> GenerationResponse:
        self._check_ready()
        if self._settings.log_prompts:
            prompts = body.model_dump(include={"prompt", "messages"}, exclude_unset=True)
            record_of(request.scope).facts |= prompts
        generation = await asyncio.get_running_loop().run_in_executor(
            self._tokenizer_thread, read, body
        )
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        replies = builder(generation, self._model.id, self._token_bytes, include_usage)
        return GenerationResponse(
            self._context, generation, replies, bool(body.stream), include_usage
        )


async def _json_only(request: Request) -> None:
    """Require JSON: pages of other sites can send other content types without CORS preflight."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:80] or 'missing'}: send application/json")


def _open_routes(api: Api) -> APIRouter:
    """Return the routes that are not part of OpenAI's API."""
    routes = APIRouter(responses=_errors("default"))
    pages: tuple[Callable[..., Any], ...] = (api.page, api.docs, api.docs_style)
    for path, page in zip(_PAGES, pages, strict=True):
        routes.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)
    routes.add_api_route("/health", api.health)
    routes.add_api_route("/ready", api.ready, responses=_errors(503))
    routes.add_api_route(
        "/metrics",
        api.prometheus,
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    return routes


def _api_routes(api: Api) -> APIRouter:
    routes = APIRouter(prefix="/v1", responses=_errors("default"))
    routes.add_api_route("/models", api.models)
    routes.add_api_route("/models/{model:path}", api.model, responses=_errors(404))
    kinds: tuple[tuple[str, Callable[..., Any], type[Reply], type[Reply]], ...] = (
        ("/completions", api.completions, Completion, CompletionChunk),
        ("/chat/completions", api.chat, ChatCompletion, ChatChunk),
    )
    for path, endpoint, reply, chunk in kinds:
        routes.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=reply,
            dependencies=[Depends(_json_only)],
            responses={
                200: {"content": {"text/event-stream": {"itemSchema": event(chunk)}}},
                **_errors(400, 404, 408, 413, 415, 429, 500, 503),
            },
        )
    return routes


def _errors(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply} for status in statuses}


class _App(FastAPI):
    """FastAPI with a completed schema, and without the pages that load from other hosts."""

    def __init__(self, settings: ServeSettings, lifespan: Any) -> None:
        super().__init__(
            title="passlm",
            version=__version__,
            description=_DESCRIPTION,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            lifespan=lifespan,
        )
        self._settings = settings

    def openapi(self) -> dict[str, Any]:
        """Return the completed OpenAPI schema."""
        if self.openapi_schema is None:
            complete(super().openapi(), self._settings)
        assert self.openapi_schema is not None
        return self.openapi_schema

    def path_name(self, path: str) -> str:
        """Return the label of a path in the metrics; few labels, whatever clients request."""
        if path in _PAGES or path in self.openapi()["paths"]:
            return path
        for start in (MODEL_PATH, "/static/"):
            if path.startswith(start):
                return start + "*"
        return "other"
