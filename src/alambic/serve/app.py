"""The HTTP application: routes, and what every request passes through.

    app = create_app({"tickets": LoadedBundle(engine, labels)}, api_key=None, report=None)

It reads no environment and no bundle: `alambic.serve.models.load` opens them, `alambic.serve.server` listens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alambic.serve import pages
from alambic.serve.batcher import Batcher
from alambic.serve.classify import answer
from alambic.serve.errors import ApiError, on_api_error, on_bug, on_http_error
from alambic.serve.limits import HostCheck, Limits, check_key
from alambic.serve.metrics import CONTENT_TYPE, Metrics
from alambic.serve.models import LoadedBundle

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    engines: Mapping[str, LoadedBundle],
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
    return Starlette(
        routes=server.routes(),
        middleware=guards,
        lifespan=server.lifespan,
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_bug},
    )


class _Server:
    """The state that the routes share."""

    def __init__(
        self, models: Mapping[str, LoadedBundle], *, limits: Limits, api_key: str | None, report: Path | None
    ) -> None:
        self.models = dict(models)
        self.limits = limits
        self.api_key = api_key
        self.report = report
        self.metrics = Metrics()
        self.batchers: dict[str, Batcher] = {}

    def routes(self) -> list[Route]:
        """Return every route."""
        return [
            Route("/", self.get_page),
            Route("/health", self.get_health),
            Route("/metrics", self.get_metrics),
            Route("/report", self.get_report),
            Route("/v1/models", self.get_models),
            Route("/v1/classify", self.post_classify, methods=["POST"]),
        ]

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Start the workers; at the end let them finish what they began."""
        for name, model in self.models.items():
            batcher = Batcher(
                model.engine, name=name, limits=self.limits, on_batch=partial(self.metrics.count_batch, name)
            )
            self.metrics.watch_queue(name, lambda batcher=batcher: batcher.depth)  # type: ignore[misc]
            batcher.start()
            self.batchers[name] = batcher
        yield
        for batcher in self.batchers.values():
            await batcher.close()

    async def get_page(self, _request: Request) -> Response:
        return pages.page()

    async def get_health(self, _request: Request) -> Response:
        ready = bool(self.batchers) and all(batcher.ready for batcher in self.batchers.values())
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
        return await answer(request, models=self.models, batchers=self.batchers, limits=self.limits)


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
