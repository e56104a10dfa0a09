"""The HTTP application: routes, and what every request passes through.

    app = create_app({"tickets": LoadedBundle(engine, labels), "replies": LoadedWriter(writer)}, api_key=None)

It reads no environment and no bundle: `alambic.serve.models.load` opens them, `alambic.serve.server` listens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alambic.kinds.classify import Prediction
from alambic.serve import classify, completions, embeddings, openai_chat, pages, responses
from alambic.serve.batcher import Batcher, Predicts
from alambic.serve.embeddings import Embedder, Vector
from alambic.serve.errors import CLIENT_GONE, ApiError, on_api_error, on_bug, on_http_error
from alambic.serve.limits import HostCheck, Limits, check_key, check_site, drop_body, read_body
from alambic.serve.metrics import CONTENT_TYPE, Metrics
from alambic.serve.models import Loaded, LoadedBundle, LoadedWriter, pick
from alambic.serve.streams import Desk

Answering = Callable[..., Awaitable[Response]]


def create_app(
    engines: Mapping[str, Loaded],
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    report: Path | None = None,
    hosts: frozenset[str] | None = None,
) -> Starlette:
    """Make the application that answers for `engines`, by name; the first is the default model.

    Args:
        engines: at least one model. The caller closes them after the application has stopped.
        limits: sizes and waits; the defaults of `Limits` when not given.
        api_key: required of every request but `/`, `/health` when given.
        report: the page of `/report`.
        hosts: names accepted in the Host header; any when not given. Give `LOOPBACK_NAMES` on a loopback address.
    """
    if not engines:
        raise ValueError("create_app needs at least one model")
    limits = limits or Limits()
    server = _Server(engines, limits=limits, api_key=api_key, report=report)
    guards = [Middleware(_Count, metrics=server.metrics, paths=frozenset(route.path for route in server.routes()))]
    if hosts is not None:
        guards.append(Middleware(HostCheck, names=hosts))
    app = Starlette(
        routes=server.routes(),
        middleware=guards,
        lifespan=server.lifespan,
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_bug},
    )
    app.state.stop = server.stop
    return app


class _Server:
    """The state that the routes share."""

    def __init__(
        self, models: Mapping[str, Loaded], *, limits: Limits, api_key: str | None, report: Path | None
    ) -> None:
        self.models = dict(models)
        self.classifiers = {name: model for name, model in self.models.items() if isinstance(model, LoadedBundle)}
        self.writers = {name: model for name, model in self.models.items() if isinstance(model, LoadedWriter)}
        self.embedders = {name: model for name, model in self.models.items() if model.embeds}
        self.limits = limits
        self.api_key = api_key
        self.report = report
        self.metrics = Metrics()
        self.batchers: dict[str, Batcher[Prediction]] = {}
        self.embedding: dict[str, Batcher[Vector]] = {}
        self.desks: dict[str, Desk] = {}
        self.inside = 0  # requests for answers, from their arrival until the last byte has left

    def routes(self) -> list[Route]:
        """Return every route."""
        return [
            Route("/", self.get_page),
            Route("/chat", self.get_chat),
            Route("/classify", self.get_classify),
            Route("/health", self.get_health),
            Route("/metrics", self.get_metrics),
            Route("/report", self.get_report),
            Route("/v1/models", self.get_models),
            Route("/v1/models/{name:path}", self.get_model),
            Route("/v1/classify", self.post_classify, methods=["POST"]),
            Route("/v1/embeddings", self.post_embeddings, methods=["POST"]),
            Route("/v1/chat/completions", partial(self.post_writing, openai_chat.answer), methods=["POST"]),
            Route("/v1/completions", partial(self.post_writing, completions.answer), methods=["POST"]),
            Route("/v1/responses", partial(self.post_writing, responses.answer), methods=["POST"]),
        ]

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Start the workers; at the end let them finish what they began."""
        for name, model in self.classifiers.items():
            self.batchers[name] = self._batcher(name, model.engine)
        for name, encoder in self.embedders.items():
            engine = encoder.engine if isinstance(encoder, LoadedBundle) else encoder.writer
            self.embedding[name] = self._batcher(name, Embedder(engine))  # type: ignore[arg-type]
        for name, writing in self.writers.items():
            desk = Desk(writing.writer, name=name, limits=self.limits, ears=self.metrics)
            self.metrics.watch_streams(name, lambda desk=desk: desk.running, lambda desk=desk: desk.waiting)  # type: ignore[misc]
            self.desks[name] = desk
        yield
        workers: list[Batcher[Any]] = [*self.batchers.values(), *self.embedding.values()]
        for batcher in workers:
            await batcher.close()
        for desk in self.desks.values():
            await desk.close()

    def _batcher(self, name: str, engine: Predicts[Any]) -> Batcher[Any]:
        counted = name in self.classifiers and name not in self.batchers
        on_batch = partial(self.metrics.count_batch, name) if counted else _unheard
        batcher: Batcher[Any] = Batcher(engine, name=name, limits=self.limits, on_batch=on_batch)
        if counted:
            self.metrics.watch_queue(name, lambda: batcher.depth)
        batcher.start()
        return batcher

    def stop(self) -> None:
        """Refuse who waits for an answer; what is being written is finished."""
        for desk in self.desks.values():
            desk.stop()

    async def get_page(self, _request: Request) -> Response:
        return pages.chat() if next(iter(self.models)) in self.writers else pages.page()

    async def get_chat(self, _request: Request) -> Response:
        if not self.writers:
            raise ApiError(404, "not_found", "no model of this server writes")
        return pages.chat()

    async def get_classify(self, _request: Request) -> Response:
        if not self.classifiers:
            raise ApiError(404, "not_found", "no model of this server classifies")
        return pages.page()

    async def get_health(self, _request: Request) -> Response:
        workers: list[Batcher[Any] | Desk] = [*self.batchers.values(), *self.embedding.values(), *self.desks.values()]
        ready = bool(workers) and all(worker.ready for worker in workers)
        state = {
            "ready": ready,
            "model": next(iter(self.models)),
            "models": list(self.models),
            "uptime_s": round(self.metrics.uptime_s, 3),
        }
        return JSONResponse({"status": "ok" if ready else "unavailable", **state}, 200 if ready else 503)

    async def get_models(self, request: Request) -> Response:
        check_key(request, self.api_key)
        cards: list[dict[str, Any]] = [model.card(name) for name, model in self.models.items()]
        ours = {"report": self.report is not None, "max_texts": self.limits.max_texts}
        return JSONResponse({"object": "list", "data": cards, "alambic": ours})

    async def get_model(self, request: Request) -> Response:
        check_key(request, self.api_key)
        name, model = pick(self.models, request.path_params["name"], self.models, "is here")
        return JSONResponse(model.card(name))

    async def get_metrics(self, request: Request) -> Response:
        check_key(request, self.api_key)
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def get_report(self, request: Request) -> Response:
        check_key(request, self.api_key, scheme="Basic")
        if self.report is None or not self.report.is_file():
            raise ApiError(404, "no_report", "this server has no report (alambic serve --report FILE)")
        return pages.report(self.report)

    async def post_classify(self, request: Request) -> Response:
        check_key(request, self.api_key)
        choose = partial(pick, self.models, able=self.classifiers, what="classifies")
        return await classify.answer(request, models=choose, batchers=self.batchers, limits=self.limits)

    async def post_embeddings(self, request: Request) -> Response:
        check_key(request, self.api_key)
        choose = partial(pick, self.models, able=self.embedders, what="gives embeddings")
        try:
            body = await read_body(request, self.limits)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        return await embeddings.answer(request, body, models=choose, batchers=self.embedding, limits=self.limits)

    async def post_writing(self, answer: Answering, request: Request) -> ASGIApp:
        """Admit a request for an answer, or refuse it before its body is kept: memory is bounded by who is inside."""
        check_site(request)
        check_key(request, self.api_key)
        room = self.limits.max_streams * len(self.desks) + self.limits.max_waiting
        if self.desks and self.inside >= room:
            with suppress(ClientDisconnect):
                await drop_body(request, self.limits)
            seconds = str(max(desk.retry_after() for desk in self.desks.values()))
            message = f"{self.inside} requests are being answered or wait (limit {room}); try again in {seconds} s"
            raise ApiError(503, "queue_full", message, headers={"Retry-After": seconds})
        choose = partial(pick, self.models, able=self.writers, what="writes")
        with ExitStack() as stack:
            self.inside += 1
            stack.callback(self._leave)
            try:
                body = await read_body(request, self.limits)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            response = await answer(request, body, models=choose, desks=self.desks, limits=self.limits)
            return _Held(response, stack.pop_all())

    def _leave(self) -> None:
        self.inside -= 1


class _Held:
    """A response that gives its place back once it is sent."""

    def __init__(self, response: Response, place: ExitStack) -> None:
        self._response = response
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await self._response(scope, receive, send)


def _unheard(_texts: int, _failed: int) -> None:
    """Count nothing: embeddings have no metrics of their own."""


class _Count:
    """Counts each request by path and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        began = time.perf_counter()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            # Unknown paths share one name: a scanner must not fill the metrics.
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count_request(path, status, time.perf_counter() - began)
