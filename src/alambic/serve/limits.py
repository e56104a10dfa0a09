"""What the server accepts: sizes, the API key, the Host header, and how long a body may take to arrive."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from contextlib import suppress
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from alambic.serve.errors import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# A client that is still sending when it is refused would see its connection reset instead of the answer, so that many
# times the limit is read and dropped first.
_LINGER_BODIES = 8
_AT_LEAST_ONE = (
    "max_body_bytes", "max_texts", "max_batch", "queue_limit", "max_streams", "max_choices", "buffer_characters",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        max_body_bytes: size of a request's body.
        max_texts: texts in one request.
        max_batch: texts given to the engine at once.
        max_wait_ms: how long to wait for company before running a batch that is not full; never waited when idle.
        queue_limit: texts waiting, beyond which requests are refused with 503.
        body_seconds: time for a body to arrive.
        max_streams: answers that one model writes at once.
        max_waiting: requests for answers that may wait, beyond which they are refused with 503.
        queue_seconds: longest wait for a turn, then 503.
        max_choices: answers to one request (`n`).
        buffer_characters: text written ahead of a client that reads slowly; then the model waits for the client.
    """

    max_body_bytes: int = 1_000_000
    max_texts: int = 256
    max_batch: int = 32
    max_wait_ms: float = 2.0
    queue_limit: int = 1024
    body_seconds: float = 20.0
    max_streams: int = 16
    max_waiting: int = 256
    queue_seconds: float = 300.0
    max_choices: int = 8
    buffer_characters: int = 65_536

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_wait_ms < 0 or self.body_seconds <= 0 or self.queue_seconds <= 0 or self.max_waiting < 0:
            raise ValueError("max_wait_ms and max_waiting must not be negative, and times must be positive")


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body, refusing early what is announced or found to be too large.

    Raises:
        ApiError: 413 too large, 408 too slow, 400 for a Content-Length that is no number.
        ClientDisconnect: the client went away.
    """
    most = limits.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit()):
        raise ApiError(400, "bad_content_length", f"Content-Length is {announced[:40]!r}, not a number")
    # With Expect: 100-continue the client waits for leave to send: refusing at once costs it nothing.
    hopeless = int(announced) > most and (int(announced) > most * _LINGER_BODIES or "expect" in request.headers)
    try:
        async with asyncio.timeout(limits.body_seconds):
            body, size = (b"", 0) if hopeless else await _receive(request, most)
    except TimeoutError as error:
        message = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, "body_too_slow", message, headers={"Connection": "close"}) from error
    if max(size, int(announced)) > most:
        message = f"the body is larger than {most} bytes; send fewer or shorter texts"
        raise ApiError(413, "body_too_large", message, headers={"Connection": "close"})
    return body


async def drop_body(request: Request, limits: Limits) -> None:
    """Read the body of a request that is refused anyway and keep nothing of it, so that its client hears the answer."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body_bytes * _LINGER_BODIES:
                    return


async def _receive(request: Request, most: int) -> tuple[bytes, int]:
    """Return at most `most` bytes of the body, and how many came before giving up."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
        elif size > most * _LINGER_BODIES:
            break
    return b"".join(chunks), size


def check_key(request: Request, api_key: str | None, *, scheme: str = "Bearer") -> None:
    """Refuse a request without the API key; `Basic` (any user, the key as password) lets a browser ask for it.

    Raises:
        ApiError: 401.
    """
    if api_key is None:
        return
    given = _given_key(request.headers.get("authorization", ""))
    if given is not None and hmac.compare_digest(given, api_key.encode()):
        return
    what = "no API key was given" if given is None else "the API key is wrong"
    message = f"{what}; send the header 'Authorization: Bearer KEY'"
    challenge = {"WWW-Authenticate": f'{scheme} realm="alambic"'}
    raise ApiError(401, "invalid_api_key" if given is not None else "missing_api_key", message, headers=challenge)


def check_site(request: Request) -> None:
    """Refuse what a page of another site asks for: it cannot read the answer, but would have it computed.

    Browsers say where a request comes from; a page may send text to any address without being asked first.

    Raises:
        ApiError: 403.
    """
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise ApiError(403, "cross_site", "a page of another site may not ask this server")


def _given_key(header: str) -> bytes | None:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


class HostCheck:
    """Refuses requests whose Host is none of `names`.

    A page of another site can point a name of its own at 127.0.0.1 (DNS rebinding) and would then be read as the same
    origin; its requests still carry that name as Host.
    """

    def __init__(self, app: ASGIApp, *, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 421."""
        if scope["type"] == "http" and _host_name(scope) not in self._names:
            allowed = ", ".join(sorted(self._names))
            message = f"this server answers only to these host names: {allowed} (serve --allow-host adds one)"
            await ApiError(421, "wrong_host", message).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _host_name(scope: Scope) -> str:
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        return ""
    host: str = hosts[0].strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
