"""The wire of the remote engine: one POST, its status turned into an error or a retry, server-sent events read.

Standard library only (`http.client`, `ssl`), so that a bundle's runtime stays light. The key is read from the
environment when a request is sent, put into its header and nowhere else: it is no attribute of any object, is never
logged, and is cut out of whatever a server says back.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from alambic.errors import EngineError, InputTooLong

_RETRIED = (408, 429, 500, 502, 503, 504, 529)
_MAX_LINE = 4_000_000  # bytes of one event; a server must not fill the memory
_MAX_BODY = 50_000_000
_MAX_SAID = 400  # characters of a server's own words in our message


class Transient(Exception):
    """The request failed in a way that trying again may mend; `after_s` is what the server asks to wait."""

    def __init__(self, reason: str, *, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = after_s


@dataclass(frozen=True)
class Event:
    """One server-sent event, its data read as JSON; `failure` is what an error in the middle of a stream says."""

    data: Any
    failure: str | None = None


class Endpoint:
    """An address that answers POSTs of JSON; keeps connections open between requests. Safe for several threads."""

    def __init__(self, url: str, *, key_env: str | None, key_header: str, headers: Mapping[str, str],
                 timeout_s: float, total_s: float) -> None:  # fmt: skip
        self.url = url.rstrip("/")
        self.key_env = key_env
        self._key_header = key_header
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json", **headers}
        self._timeout_s, self._total_s = timeout_s, total_s
        self._parts = _checked(url, key_env)
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False
        self._key()  # says now, not at the first request, that it is absent

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, key_env={self.key_env!r})"

    @contextmanager
    def post(self, path: str, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """Send `body` and give the response once its status is 200; leaving the block early drops the connection.

        Raises:
            Transient: the connection failed, or the server asks to try again.
            EngineError: the server refuses the request.
            InputTooLong: because it is longer than the model reads.
        """
        data = json.dumps(body, ensure_ascii=False).encode()
        connection = None
        whole = False
        try:
            connection, response = self._send(path, data)
            if response.status != 200:
                raise self._refusal(response)
            yield response
            whole = response.isclosed() and not response.will_close
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        finally:
            if connection is not None:
                self._release(connection, keep=whole)

    def events(self, response: http.client.HTTPResponse) -> Generator[Event, None, None]:
        """Read the server-sent events of `response` until it ends; ``[DONE]`` ends it too.

        A server that answers with one JSON object, although a stream was asked for, gives one event.

        Raises:
            Transient: data that is not JSON, or a stream that outlasts the time allowed.
        """
        deadline = time.monotonic() + self._total_s
        if "text/event-stream" not in (response.getheader("Content-Type") or ""):
            raw = response.read(_MAX_BODY + 1)
            if len(raw) > _MAX_BODY:
                raise EngineError(f"{self.url} answers with more than {_MAX_BODY:,} bytes")
            yield self._event(raw)
            return
        lines: list[str] = []
        while raw := response.readline(_MAX_LINE + 1):
            if len(raw) > _MAX_LINE:
                raise EngineError(f"{self.url} sends an event of more than {_MAX_LINE:,} bytes")
            if time.monotonic() > deadline:
                raise Transient(f"no end of the answer within {self._total_s:g} s")
            line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
            field, _, value = line.partition(":")
            if field == "data":
                lines.append(value.removeprefix(" "))
            elif not line and lines:
                if lines == ["[DONE]"]:
                    response.read()  # the connection can be used again once all is read
                    return
                yield self._event("\n".join(lines).encode())
                lines = []
        if lines and lines != ["[DONE]"]:
            yield self._event("\n".join(lines).encode())

    def _event(self, raw: bytes) -> Event:
        data = _json(raw)
        failed = isinstance(data, Mapping) and bool(data.get("error"))
        return Event(data, self.cleaned(_said(raw)) if failed else None)

    def cleaned(self, text: str) -> str:
        """Cut the key out of what a server says, and shorten it."""
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        text = " ".join((text.replace(key, "***") if len(key) >= 4 else text).split())
        return text if len(text) <= _MAX_SAID else text[:_MAX_SAID] + " ..."

    def close(self) -> None:
        """Drop every connection; a thread that waits on one gets an EngineError."""
        with self._lock:
            self._closed = True
            connections = [*self._idle, *self._busy]
            self._idle.clear()
        for connection in connections:
            _drop(connection)

    def _send(self, path: str, data: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send on an idle connection, or on a new one when the server has closed that meanwhile."""
        headers = {**self._headers, **self._authorisation()}
        target = self._parts.path.rstrip("/") + path
        while True:
            connection, used = self._take()
            try:
                connection.request("POST", target, body=data, headers=headers)
                return connection, connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine) as error:
                self._release(connection, keep=False)
                if not used:
                    raise self._broken(error) from None
            except BaseException:
                self._release(connection, keep=False)
                raise

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._closed:
                raise EngineError(f"the connection to {self.url} is closed")
            connection, used = (self._idle.pop(), True) if self._idle else (self._connection(), False)
            self._busy.add(connection)
        return connection, used

    def _release(self, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if keep and not self._closed:
                self._idle.append(connection)
                return
        _drop(connection)

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        context = ssl.create_default_context()
        proxy = urllib.request.getproxies().get("https")
        if proxy and not urllib.request.proxy_bypass(host):
            through = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
            connection = http.client.HTTPSConnection(
                through.hostname or "", through.port, timeout=self._timeout_s, context=context
            )
            connection.set_tunnel(host, port or 443)
            return connection
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)

    def _authorisation(self) -> dict[str, str]:
        key = self._key()
        if key is None:
            return {}
        return {self._key_header: f"Bearer {key}" if self._key_header == "Authorization" else key}

    def _key(self) -> str | None:
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise EngineError(
                f"{self.url} needs a key, and the environment variable {self.key_env} holds none",
                hint=f"export {self.key_env}=... (keys are read from the environment only)",
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            # http.client would quote it in its own message.
            raise EngineError(f"the key in {self.key_env} holds characters that no HTTP header may hold")
        return key

    def _refusal(self, response: http.client.HTTPResponse) -> Exception:
        """Turn a status other than 200 into the error to raise."""
        raw = response.read(_MAX_LINE)
        status, said = response.status, self.cleaned(_said(raw))
        if status in _RETRIED:
            return Transient(f"{status}: {said or response.reason}", after_s=_retry_after(response))
        if status in (401, 403):
            return EngineError(
                f"{self.url} refuses the key in {self.key_env or 'the environment (none was sent)'}: {status} {said}"
            )
        if 300 <= status < 400:
            return EngineError(
                f"{self.url} redirects to {response.getheader('Location')}", hint="give that address as url"
            )
        lower = said.lower()
        if status in (400, 413) and ("context_length" in lower or "context length" in lower or "too long" in lower):
            return InputTooLong(f"{self.url}: {said}")
        return EngineError(f"{self.url} refuses the request: {status} {said or response.reason}")

    def _broken(self, error: Exception) -> Exception:
        """Say that the connection broke; a closed endpoint is not tried again."""
        if self._closed:
            return EngineError(f"the connection to {self.url} is closed")
        if isinstance(error, ssl.SSLCertVerificationError):
            return EngineError(f"{self.url}: its certificate is not trusted ({error.verify_message})")
        if isinstance(error, TimeoutError):
            return Transient(f"no answer within {self._timeout_s:g} s")
        return Transient(f"the connection failed ({type(error).__name__}: {self.cleaned(str(error))})")


def _checked(url: str, key_env: str | None) -> urllib.parse.SplitResult:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineError(f"the address {url!r} is not an http or https URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        # Such an address would be written into reports.
        raise EngineError(
            f"the address of {parts.hostname} holds a user, a password or a query",
            hint="give the plain base URL, and the key in an environment variable",
        )
    if parts.scheme == "http" and key_env is not None and not _near(parts.hostname):
        raise EngineError(
            f"the key in {key_env} would travel to {parts.hostname} in clear text", hint="use an https address"
        )
    return parts


def _near(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private


def _drop(connection: http.client.HTTPConnection) -> None:
    """Close a connection even while another thread reads from it."""
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def _retry_after(response: http.client.HTTPResponse) -> float | None:
    """Return the seconds a server asks to wait: milliseconds, seconds, or a date."""
    exact = response.getheader("retry-after-ms")
    value = response.getheader("Retry-After")
    try:
        if exact is not None:
            return max(float(exact) / 1000, 0.0)
        if value is None:
            return None
        return max(float(value), 0.0)
    except ValueError:
        date = email.utils.parsedate_tz(value or "")
        return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)


def _said(raw: bytes) -> str:
    """Return the message inside an error body, in OpenAI's, Anthropic's or any other form."""
    text = raw.decode("utf-8", errors="replace")
    try:
        data = json.loads(text)
    except ValueError:
        return "" if text.lstrip().startswith("<") else text  # a gateway's HTML page says nothing
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        words = [str(error[key]) for key in ("code", "type", "message") if error.get(key)]
        return ": ".join(dict.fromkeys(words)) or (text if error else "")
    return str(error)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise Transient("the server sent data that is not JSON") from None
