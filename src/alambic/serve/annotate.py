"""The HTTP side of an annotation: one page, and a few JSON calls that a `Desk` answers.

    app = create_annotation_app(session, token=None, hosts=LOOPBACK_NAMES)

Every call that changes something must come from the page itself: browsers say where a request comes from, and a body
that is not declared as JSON is refused, which no form of another site can send unasked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from alambic.errors import AlambicError
from alambic.serve import pages
from alambic.serve.errors import ApiError, on_api_error, on_bug, on_http_error
from alambic.serve.limits import HostCheck, Limits, check_key, check_site, read_body

_TYPES = {
    "csv": ("text/csv", "csv"),
    "label-studio": ("application/json", "json"),
    "argilla": ("application/json", "json"),
}
_LIMITS = Limits(max_body_bytes=100_000)


class Desk(Protocol):
    """Where the decisions are made: `alambic.build.labelling.session.Session`."""

    name: str

    def state(self) -> dict[str, Any]:
        """Return how far the annotation is."""
        ...

    def next(self, by: str, *, besides: Collection[str] = ()) -> dict[str, Any] | None:
        """Return the next text for `by`."""
        ...

    def item(self, text: str, by: str) -> dict[str, Any]:
        """Return one text."""
        ...

    def decide(
        self,
        by: str,
        text: str,
        verdict: str,
        labels: Sequence[str] = (),
        *,
        note: str | None = None,
        ms: int | None = None,
    ) -> Any:
        """Record a decision."""
        ...

    def undo(self, by: str) -> Any:
        """Take the last decision of `by` back."""
        ...

    def history(self, by: str) -> list[dict[str, Any]]:
        """Return the decisions of `by`."""
        ...

    def export(self, form: str) -> Any:
        """Return all annotations as a file."""
        ...


def create_annotation_app(desk: Desk, *, token: str | None, hosts: frozenset[str] | None) -> Starlette:
    """Make the application that shows `desk`.

    Args:
        desk: answers the calls. The caller closes it after the application has stopped.
        token: required of every call when given; the page finds it behind the # of its address.
        hosts: names accepted in the Host header; any when None. Give `LOOPBACK_NAMES` on a loopback address.
    """

    def route(path: str, answer: Any, *methods: str) -> Route:
        return Route(path, partial(_answer, answer, desk, token), methods=list(methods or ("GET",)))

    return Starlette(
        routes=[
            Route("/", _page),
            route("/label/state", _state),
            route("/label/next", _next),
            route("/label/item", _item),
            route("/label/history", _history),
            route("/label/decide", _decide, "POST"),
            route("/label/undo", _undo, "POST"),
            route("/label/export", _export),
        ],
        middleware=[] if hosts is None else [Middleware(HostCheck, names=hosts)],
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_bug},
    )


async def _page(_request: Request) -> Response:
    return pages.label()


async def _answer(answer: Any, desk: Desk, token: str | None, request: Request) -> Response:
    """Check who asks, then answer in a thread: a decision waits for the disk."""
    check_site(request)
    check_key(request, token)
    body = await _body(request) if request.method == "POST" else dict(request.query_params)
    try:
        found: Response = await run_in_threadpool(answer, desk, body)
    except ApiError:
        raise
    except AlambicError as error:
        raise ApiError(400, "refused", str(error)) from error
    return found


async def _body(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "not_json", "send the body as application/json")
    raw = await read_body(request, _LIMITS)
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ApiError(400, "not_json", f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "not_json", "the body is not a JSON object")
    return body


def _json(value: object) -> Response:
    return JSONResponse(value, headers={"Cache-Control": "no-store"})


def _state(desk: Desk, _body: dict[str, Any]) -> Response:
    return _json(desk.state())


def _next(desk: Desk, body: dict[str, Any]) -> Response:
    besides = _text(body, "besides", "").split(",")
    return _json({"item": desk.next(_text(body, "by"), besides=besides)})


def _item(desk: Desk, body: dict[str, Any]) -> Response:
    return _json({"item": desk.item(_text(body, "id"), _text(body, "by"))})


def _history(desk: Desk, body: dict[str, Any]) -> Response:
    return _json({"decisions": desk.history(_text(body, "by"))})


def _decide(desk: Desk, body: dict[str, Any]) -> Response:
    labels = body.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise ApiError(400, "bad_labels", "labels is a list of names", param="labels")
    ms = body.get("ms")
    if ms is not None and (isinstance(ms, bool) or not isinstance(ms, int) or ms < 0):
        raise ApiError(400, "bad_ms", "ms is a number of milliseconds", param="ms")
    by, text, note = _text(body, "by"), _text(body, "id"), _text(body, "note", "")
    decision = desk.decide(by, text, _text(body, "do"), labels, note=note or None, ms=ms)
    return _json({"seq": decision.seq})


def _undo(desk: Desk, body: dict[str, Any]) -> Response:
    by = _text(body, "by")
    undone = desk.undo(by)
    return _json({"item": None if undone is None else desk.item(undone.id, by)})


def _export(desk: Desk, body: dict[str, Any]) -> Response:
    form = _text(body, "form")
    exported = desk.export(form)
    media, suffix = _TYPES[form]
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in desk.name)
    headers = {
        "Content-Disposition": f'attachment; filename="{name}.{form}.{suffix}"', "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }  # fmt: skip
    return Response(exported.body, media_type=media, headers=headers)


def _text(body: dict[str, Any], name: str, default: str | None = None) -> str:
    value = body.get(name, default)
    if not isinstance(value, str):
        raise ApiError(400, "missing", f"{name} is missing or is not a text", param=name)
    return value
