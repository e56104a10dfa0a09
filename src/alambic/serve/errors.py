"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

Every refusal of the server is an `ApiError`; what the engine raises is turned into one here. An unexpected failure says
nothing of its cause to the client: the traceback goes to the log.
"""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alambic.errors import AlambicError, DataError, EngineError, InputTooLong, TemplateError

CLIENT_GONE = 499


class ApiError(AlambicError):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        code: stable name of the error, for programs.
        param: the part of the request that is wrong, such as ``input[3]``.
        kind: OpenAI's `type` of error.
        headers: headers to add to the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        """OpenAI's name for the family of the error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 503:
            return "overloaded_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """Return the `error` object."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def response(self) -> Response:
        """Return the whole answer."""
        return JSONResponse({"error": self.body()}, self.status, headers=self.headers)


def from_engine(error: BaseException, *, param: str) -> ApiError:
    """Turn what an engine raised on one text into an `ApiError` at `param`."""
    if isinstance(error, ApiError):
        return ApiError(error.status, error.code, error.message, param=param)
    if isinstance(error, InputTooLong):
        return ApiError(400, "text_too_long", error.message, param=param)
    if isinstance(error, AlambicError):
        return ApiError(500, "engine_error", error.message, param=param)
    return ApiError(500, "engine_error", "the engine failed on this text; the log of the server says more", param=param)


def from_writer(error: BaseException, *, param: str, begun: bool = False) -> ApiError:
    """Turn what a writer raised into an `ApiError`; `param` is what holds the prompt.

    Before it has `begun` to answer, a writer says with an `EngineError` what it was asked and cannot do; one that comes
    of another error is the engine's own failure.
    """
    if isinstance(error, ApiError):
        return error
    hint = f" ({error.hint})" if isinstance(error, AlambicError) and error.hint else ""
    if isinstance(error, InputTooLong):
        return ApiError(400, "context_length_exceeded", error.message + hint, param=param)
    if isinstance(error, TemplateError | DataError):
        return ApiError(400, "invalid_value", error.message + hint, param=param)
    if isinstance(error, EngineError) and not begun and error.__cause__ is None:
        return ApiError(400, "unsupported_parameter", error.message + hint)
    if isinstance(error, AlambicError):
        return ApiError(500, "engine_error", error.message)
    return ApiError(500, "engine_error", "the engine failed on this request; the log of the server says more")


async def on_api_error(_request: Request, error: Exception) -> Response:
    """Answer an `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer what Starlette refuses by itself: an unknown path or method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        routes = request.app.routes if "app" in request.scope else ()
        found = ", ".join(sorted({route.path for route in routes}))
        return ApiError(404, "not_found", f"no such path: {request.url.path[:200]!r}; there is {found}").response()
    if error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        message = f"{request.method} is not allowed on {request.url.path}; allowed: {allowed}"
        return ApiError(405, "method_not_allowed", message, headers=headers).response()
    return ApiError(error.status_code, "http_error", str(error.detail), headers=headers).response()


async def on_bug(_request: Request, _error: Exception) -> Response:
    """Answer an unexpected failure; the server logs the traceback."""
    return ApiError(500, "internal_error", "the server failed; its log has the details").response()
