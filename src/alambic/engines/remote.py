"""A model behind an address: OpenAI-compatible endpoints and Anthropic's Messages API, as a Writer.

    with Remote(RemoteSpec("openai", "http://127.0.0.1:8080/v1", "qwen")) as writer:
        reply = writer.write([GenerationRequest(Chat.of("Bonjour"))])[0]

It is a teacher, a judge or a row to compare with, never a silent dependency: it exists only where the user names it.
The key comes from the environment variable that the user names, at each request, and appears in no message, log or
description. Tokens and dollars are added up and told by `describe`.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from types import ModuleType, TracebackType
from typing import Any

from alambic.engines import remote_anthropic, remote_openai
from alambic.engines.remote_http import Endpoint, Transient
from alambic.engines.remote_piece import Piece, Prices, RemoteSpec
from alambic.engines.toolcalls import HERMES
from alambic.errors import EngineError
from alambic.kinds.generation import Chunk, GenerationRequest, Reply, Timings, TokenLogprob, Usage

__all__ = ["Prices", "Remote", "RemoteSpec"]

_APIS: dict[str, ModuleType] = {"openai": remote_openai, "anthropic": remote_anthropic}
_FIRST_WAIT_S = 0.5
_log = logging.getLogger("alambic")


@dataclass(frozen=True)
class Totals:
    """What an endpoint was used for so far.

    Attributes:
        replies: whole answers.
        failures: answers given up.
        retries: tries after the first.
        prompt_tokens: read, as the provider counts.
        completion_tokens: written, as the provider counts.
        unmeasured: answers without a count of tokens, which no sum here includes.
        cost_usd: None where the prices are not known.
    """

    replies: int = 0
    failures: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmeasured: int = 0
    cost_usd: float | None = None


class Remote:
    """A Writer over HTTP. Safe to call from several threads; close it when done."""

    def __init__(
        self,
        spec: RemoteSpec,
        *,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Prepare the endpoint; no connection is opened before the first request.

        Args:
            spec: the endpoint.
            sleep: waits that many seconds between two tries.
            jitter: gives a number in 0..1, so that clients which failed together do not come back together.

        Raises:
            EngineError: the API is unknown, the address is unsafe, or the key is absent.
        """
        if spec.api not in _APIS:
            raise EngineError(f"no API {spec.api!r}", hint=f"allowed: {', '.join(_APIS)}")
        self.spec = spec
        self.context_tokens = spec.context_tokens
        self.tool_style = HERMES  # how tool calls are written into the text of a stream
        self._api = _APIS[spec.api]
        self._endpoint = Endpoint(
            spec.url,
            key_env=spec.key_env,
            key_header=self._api.KEY_HEADER,
            headers=self._api.HEADERS,
            timeout_s=spec.timeout_s,
            total_s=spec.total_s,
        )
        self._sleep, self._jitter = sleep, jitter
        self._slots = threading.BoundedSemaphore(spec.concurrency)
        self._lock = threading.Lock()
        self._totals = Totals(cost_usd=None if spec.prices is None else 0.0)

    def __repr__(self) -> str:
        return f"Remote({self.spec.api!r}, {self.spec.url!r}, {self.spec.model!r})"

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do besides `write`."""
        found: frozenset[str] = self._api.CAPABILITIES
        return found

    @property
    def totals(self) -> Totals:
        """What it was used for so far."""
        with self._lock:
            return self._totals

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Write one answer piece by piece; closing the iterator drops the connection.

        Tool calls come in the last piece before the end, as text in Hermes' form. A try that fails is repeated only
        while nothing was given yet: what was read cannot be taken back.

        Raises:
            InputTooLong: the prompt does not fit the context.
            EngineError: the endpoint refuses, fails for good, or cannot do what is asked.
        """
        with self._slot() as queue_ms:
            clock = _Clock(queue_ms)
            for attempt in range(1, self.spec.attempts + 1):
                given = False
                try:
                    for piece in self._pieces(request):
                        chunk = clock.chunk(piece)
                        given = given or bool(chunk.text)
                        if piece.finish_reason is not None:
                            self._count(piece.usage)
                        yield chunk
                    return
                except Transient as error:
                    self._pause(error, attempt, final=given)

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Write all answers, in the order of `requests`, at most `concurrency` at once.

        A stream that breaks in the middle is asked for again. The first failure for good cancels what has not begun.

        Raises:
            InputTooLong: a prompt does not fit the context.
            EngineError: the endpoint refuses, fails for good, or cannot do what is asked.
        """
        for request in requests:
            self._body(request)  # what cannot be asked is said before anything is spent
        if len(requests) <= 1:
            return [self._reply(request) for request in requests]
        with ThreadPoolExecutor(min(self.spec.concurrency, len(requests)), thread_name_prefix="remote") as pool:
            futures = [pool.submit(self._reply, request) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def write_each(self, requests: Iterable[GenerationRequest]) -> Generator[Reply | EngineError, None, None]:
        """Give for each request its reply or the error that ended it, in order, reading `requests` as it goes.

        For many rows (a teacher, a judge): one that fails costs none of the others, and what was paid for is kept.
        """
        pool = ThreadPoolExecutor(self.spec.concurrency, thread_name_prefix="remote")
        waiting: deque[Future[Reply | EngineError]] = deque()
        try:
            for request in requests:
                waiting.append(pool.submit(self._reply_or_error, request))
                if len(waiting) >= 2 * self.spec.concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Raise EngineError: an endpoint does not tell the ids that its model reads."""
        raise EngineError(f"{self.spec.url} does not tell token ids")

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Raise EngineError: an endpoint does not score given texts."""
        raise EngineError(f"{self.spec.url} does not score given texts")

    def describe(self) -> dict[str, Any]:
        """Return the endpoint, its prices and the totals so far, as JSON values; the key is not among them."""
        spec = self.spec
        facts = {
            "engine": "remote",
            "api": spec.api,
            "url": spec.url,
            "model": spec.model,
            "context_tokens": spec.context_tokens,
            "concurrency": spec.concurrency,
            "sampling": spec.sampling,
            "body": dict(spec.body),
            "totals": {key: value for key, value in asdict(self.totals).items() if value is not None},
        }
        if spec.prices is not None:
            facts["usd_per_million_tokens"] = {"in": spec.prices.per_million_in, "out": spec.prices.per_million_out}
        return facts

    def close(self) -> None:
        """Drop every connection; answers under way end with an EngineError."""
        self._endpoint.close()

    def _reply_or_error(self, request: GenerationRequest) -> Reply | EngineError:
        try:
            return self._reply(request)
        except EngineError as error:
            return error

    def _reply(self, request: GenerationRequest) -> Reply:
        with self._slot() as queue_ms:
            for attempt in range(1, self.spec.attempts + 1):
                clock = _Clock(queue_ms)
                pieces, chunks = [], []
                try:
                    for piece in self._pieces(request):
                        pieces.append(piece)
                        chunks.append(clock.chunk(piece))
                except Transient as error:
                    self._pause(error, attempt)
                    continue
                self._count(pieces[-1].usage)
                return _joined(pieces, chunks)
        raise AssertionError("the last attempt either returns or raises")

    def _pieces(self, request: GenerationRequest) -> Iterator[Piece]:
        """Make one try."""
        body = self._body(request)
        with (
            self._endpoint.post(self._api.path_of(request), body) as response,
            closing(self._endpoint.events(response)) as events,
        ):
            yield from self._api.read(events, request)

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        most, asked = self.spec.max_output_tokens, request.sampling.max_tokens
        if most is not None and asked is not None and asked > most:
            raise EngineError(f"max_tokens is {asked}; {self.spec.model} writes at most {most}")
        body: dict[str, Any] = self._api.body_of(request, self.spec)
        return body

    def _pause(self, error: Transient, attempt: int, *, final: bool = False) -> None:
        """Wait before the next try, or raise what ends the tries."""
        wait_s = error.after_s
        if wait_s is None:
            wait_s = _FIRST_WAIT_S * 2 ** (attempt - 1) * (0.5 + self._jitter() / 2)
        too_long = wait_s > self.spec.longest_wait_s
        if final or too_long or attempt >= self.spec.attempts:
            with self._lock:
                self._totals = replace(self._totals, failures=self._totals.failures + 1)
            asked = f"; it asks to wait {wait_s:.0f} s" if too_long else ""
            tries = "" if final else f" (tried {attempt} time{'s' if attempt > 1 else ''}{asked})"
            # `from None`: what is below may hold the request.
            raise EngineError(f"{self.spec.model} at {self.spec.url}: {error.reason}{tries}") from None
        with self._lock:
            self._totals = replace(self._totals, retries=self._totals.retries + 1)
        _log.info("%s: %s; trying again in %.1f s", self.spec.url, error.reason, wait_s)
        self._sleep(wait_s)

    def _count(self, usage: Usage | None) -> None:
        with self._lock:
            now = self._totals
            now = replace(now, replies=now.replies + 1)
            if usage is None:
                now = replace(now, unmeasured=now.unmeasured + 1)
            else:
                prices = self.spec.prices
                now = replace(
                    now,
                    prompt_tokens=now.prompt_tokens + usage.prompt_tokens,
                    completion_tokens=now.completion_tokens + usage.completion_tokens,
                    cost_usd=None if prices is None else (now.cost_usd or 0.0) + prices.cost(usage),
                )
            self._totals = now

    @contextmanager
    def _slot(self) -> Iterator[float]:
        """Wait for one of `concurrency` places; give the milliseconds that took."""
        begun = time.perf_counter()
        with self._slots:
            yield 1000 * (time.perf_counter() - begun)


class _Clock:
    """Times of one answer, from before its first try."""

    def __init__(self, queue_ms: float) -> None:
        self._queue_ms = queue_ms
        self._begun = time.perf_counter()
        self._first: float | None = None

    def chunk(self, piece: Piece) -> Chunk:
        """Return the chunk of one piece; tool calls become text."""
        now = time.perf_counter()
        text = piece.text + "".join(_written(call.name, dict(call.arguments)) for call in piece.calls)
        if self._first is None and text:
            self._first = now
        if piece.finish_reason is None:
            return Chunk(text, piece.logprobs)
        first = now if self._first is None else self._first
        timings = Timings(1000 * (first - self._begun), 1000 * (now - first), self._queue_ms)
        return Chunk(text, piece.logprobs, piece.finish_reason, piece.usage, timings)


def _written(name: str, arguments: dict[str, Any]) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{HERMES.begin}{call}{HERMES.end}"


def _joined(pieces: Sequence[Piece], chunks: Sequence[Chunk]) -> Reply:
    last, end = pieces[-1], chunks[-1]
    assert end.finish_reason is not None and end.timings is not None, "a protocol gives no answer without an end"
    logprobs: list[TokenLogprob] = [item for piece in pieces for item in piece.logprobs]
    return Reply(
        text="".join(chunk.text for chunk in chunks),
        finish_reason=end.finish_reason,
        usage=last.usage or Usage(0, 0),
        timings=end.timings,
        content="".join(piece.text for piece in pieces),
        tool_calls=last.calls,
        logprobs=tuple(logprobs),
    )
