"""Listens: one uvicorn server on a socket of ours, so that its address is known before it answers."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from alambic.errors import AlambicError

_HEAD_SECONDS = 10.0
_WRITE_SECONDS = 30.0
_STOP_SECONDS = 30
_CONNECTIONS = 1000
_BACKLOG = 512


class PatientH11(H11Protocol):
    """Closes a connection whose request head does not arrive in time, or whose client reads nothing of its answer.

    uvicorn itself waits for ever. A client reads too slowly when what waits for it (64 KiB at most) does not fall to a
    quarter in time; the connection is cut, which the application sees as a departure.
    """

    head_seconds = _HEAD_SECONDS
    write_seconds = _WRITE_SECONDS
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        self._late = self.loop.call_later(self.head_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        """Stop the clock once a head is whole, start it when the next one begins."""
        super().data_received(data)
        incomplete = self.conn.their_state is h11.IDLE
        if incomplete and self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)
        elif not incomplete:
            self._stop_clock()

    def pause_writing(self) -> None:
        """Start the clock of a client that does not read."""
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the clock of a client that reads again."""
        self._stop_waiting()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what its client still has not read must not keep it open."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.write_seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_clock()
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Bind `host:port`; port 0 takes a free one.

    Raises:
        AlambicError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only then: without it each answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "--port 0 takes a free port; --host is an address of this machine"
        raise AlambicError(f"cannot listen on {host}:{port}: {reason}", hint=hint) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address to open for a socket from `listen`."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A uvicorn server that says when it answers."""

    def __init__(self, app: ASGIApp, *, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientH11,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                # Nothing here depends on who the client is, so no forwarded header is believed.
                proxy_headers=False,
                limit_concurrency=_CONNECTIONS,
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )
        self._on_ready = on_ready
        self._stop: Callable[[], None] = getattr(getattr(app, "state", None), "stop", lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the application refuse what waits, then finish what was begun."""
        self._stop()
        await super().shutdown(sockets)


def run(app: ASGIApp, listener: socket.socket, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Answer on `listener` until SIGINT or SIGTERM; requests that were begun are finished."""
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again when it has stopped: let SIGTERM end like Ctrl-C, and engines be closed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listener, suppress(KeyboardInterrupt):
        Server(app, on_ready=on_ready).run(sockets=[listener])
