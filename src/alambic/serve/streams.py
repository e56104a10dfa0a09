"""The answers being written: who writes now, who waits, and how pieces cross from a writer's thread to the event loop.

    desk = Desk(writer, name="replies", limits=limits)
    stream = await desk.open(request)            # waits for its turn
    while (piece := await stream.read()) is not None:
        ...                                      # all that is ready, as one piece
    stream.cancel()                              # at any time; the writer stops at its next token

Each running stream has a thread that pulls the writer's iterator. Pieces that gather while the loop is busy leave as
one, so a slow consumer costs fewer wake-ups, not more. A stream holds a bounded amount of text: past it the thread
waits, and so does the model. Nothing here knows HTTP's bodies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from alambic.engines.writer import Writer
from alambic.errors import AlambicError, EngineError
from alambic.kinds.generation import Chunk, GenerationRequest, Timings, Usage
from alambic.serve.errors import ApiError
from alambic.serve.limits import Limits

_log = logging.getLogger("alambic.serve")
_CHUNK_CHARACTERS = 16  # what a piece weighs in the buffer besides its text
_CLOSE_SECONDS = 5.0


class Cancelled(Exception):
    """The stream was cancelled: nobody waits for the rest."""


class WriterFailed(Exception):
    """The writer raised `error` in its thread."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Ears(Protocol):
    """Who is told what streams did; see `alambic.serve.metrics`."""

    def count_first(self, model: str, seconds: float) -> None:
        """Count the wait for a first piece."""

    def count_stream(self, model: str, how: str, last: Chunk | None) -> None:
        """Count a stream that ended: its finish reason, or ``cancelled`` or ``error``."""


class Stream:
    """One answer on its way from a writer's thread to the event loop. All but `_pump` runs on the loop."""

    def __init__(
        self,
        writer: Writer,
        request: GenerationRequest,
        *,
        queue_ms: float,
        room: int,
        on_end: Callable[[Stream], None],
    ) -> None:
        self._writer = writer
        self._request = request
        self._queue_ms = queue_ms
        self._room = room
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._space = threading.Condition()
        self._ready: deque[Chunk] = deque()
        self._weight = 0
        self._waking = False
        self._ended = False
        self._cancelled = False
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None
        self._pieces: Any = None
        self.last: Chunk | None = None  # set once the answer is whole
        self.began = time.perf_counter()
        # A daemon: a model that never comes back must not keep the process from ending.
        self.thread = threading.Thread(target=self._pump, daemon=True, name="alambic-stream")
        self.thread.start()

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the rest."""
        return self._cancelled

    @property
    def error(self) -> BaseException | None:
        """What the writer raised."""
        return self._error

    async def read(self) -> Chunk | None:
        """Wait for new pieces and return all there are as one; None after the last.

        Raises:
            Cancelled: the stream was cancelled.
            WriterFailed: the writer raised, after the pieces that came before.
        """
        while True:
            if self._cancelled:
                raise Cancelled
            with self._space:
                chunks = list(self._ready)
                self._ready.clear()
                self._weight = 0
                self._waking = False
                self._space.notify()
            if chunks:
                return chunks[0] if len(chunks) == 1 else join(chunks)
            if self._ended:
                if self._error is not None:
                    raise WriterFailed(self._error)
                return None
            self._reader = self._loop.create_future()
            await self._reader

    def cancel(self) -> None:
        """Stop the work: at once if the writer's iterator has a `cancel` for any thread, else at its next piece."""
        with self._space:
            if self._ended or self._cancelled:
                self._cancelled = True
                return
            self._cancelled = True
            self._space.notify()
        stop = getattr(self._pieces, "cancel", None)
        if stop is not None:
            stop()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _pump(self) -> None:
        """Pull the writer; runs in the thread of this stream."""
        try:
            self._pull()
        except BaseException as raised:  # the edge of the thread: whatever it is belongs to the one who reads
            self._error = raised
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._finish)

    def _pull(self) -> None:
        self._pieces = pieces = iter(self._writer.stream(self._request))
        try:
            for chunk in pieces:
                if chunk.finish_reason is not None:
                    self.last = chunk = self._final(chunk)
                if not self._put(chunk) or self.last is not None:
                    break
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
        if self.last is None and not self._cancelled:
            raise EngineError("the engine ended without saying why")

    def _final(self, chunk: Chunk) -> Chunk:
        """Add the wait before the turn to the timings of the last piece."""
        timings = chunk.timings or Timings(0.0, 0.0)
        return replace(
            chunk,
            usage=chunk.usage or Usage(0, 0),
            timings=replace(timings, queue_ms=timings.queue_ms + self._queue_ms),
        )

    def _put(self, chunk: Chunk) -> bool:
        """Hand over a piece, waiting for room; tell whether to go on."""
        with self._space:
            while self._weight >= self._room and not self._cancelled:
                self._space.wait()
            if self._cancelled:
                return False
            self._ready.append(chunk)
            self._weight += len(chunk.text) + _CHUNK_CHARACTERS
            waking, self._waking = self._waking, True
        if not waking:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop is closed
                return False
        return True

    def _finish(self) -> None:
        self._ended = True
        self._wake()
        self._on_end(self)


def join(chunks: list[Chunk]) -> Chunk:
    """Return pieces in a row as one."""
    last = chunks[-1]
    return Chunk(
        text="".join([chunk.text for chunk in chunks]),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
    )


class Desk:
    """The streams of one writer: so many write, the others wait in line, first come first served."""

    def __init__(self, writer: Writer, *, name: str, limits: Limits, ears: Ears | None = None) -> None:
        self._writer = writer
        self._name = name
        self._limits = limits
        self._ears = ears
        self._free = limits.max_streams
        self._line: deque[asyncio.Future[None]] = deque()
        self._running: set[Stream] = set()
        self._stopping = False
        self._seconds_per_stream = 1.0

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Streams at work."""
        return len(self._running)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self._stopping

    async def open(self, request: GenerationRequest) -> Stream:
        """Wait for a turn and start to write.

        Raises:
            ApiError: 503 when the wait is too long, or the server is stopping.
        """
        began = time.perf_counter()
        await self._turn()
        waited = time.perf_counter() - began
        room = self._limits.buffer_characters
        stream = Stream(self._writer, request, queue_ms=1000 * waited, room=room, on_end=self._ended)
        self._running.add(stream)
        return stream

    def retry_after(self) -> int:
        """Guess after how many seconds a place in line will be free, 1 to 60."""
        return min(60, max(1, math.ceil(self._seconds_per_stream * (len(self._line) + 1) / self._limits.max_streams)))

    def heard(self, stream: Stream) -> None:
        """Note that the first piece of `stream` is there."""
        if self._ears is not None:
            self._ears.count_first(self._name, time.perf_counter() - stream.began)

    def stop(self) -> None:
        """Refuse who waits and who comes; what is being written goes on."""
        self._stopping = True
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_exception(_stopping())

    async def close(self) -> None:
        """Stop, cancel what is still being written, and wait a little for its threads."""
        self.stop()
        streams = list(self._running)
        for stream in streams:
            stream.cancel()
        end = time.monotonic() + _CLOSE_SECONDS
        while any(stream.thread.is_alive() for stream in streams) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for stream in streams:
            if stream.thread.is_alive():
                _log.error("%s: the engine did not stop within %g s", self._name, _CLOSE_SECONDS)

    async def _turn(self) -> None:
        if self._stopping:
            raise _stopping()
        if self._free > 0:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(self._limits.queue_seconds):
                await turn
        except TimeoutError as error:
            self._leave(turn)
            seconds = self.retry_after()
            message = f"no turn came within {self._limits.queue_seconds:g} s; try again in {seconds} s"
            raise ApiError(503, "queue_full", message, headers={"Retry-After": str(seconds)}) from error
        except asyncio.CancelledError:
            self._leave(turn)
            raise

    def _leave(self, turn: asyncio.Future[None]) -> None:
        """Step out of the line; a turn that was given already goes to the next."""
        with suppress(ValueError):
            self._line.remove(turn)
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self._free += 1
            self._call_next()

    def _call_next(self) -> None:
        while self._line and self._free > 0:
            turn = self._line.popleft()
            if not turn.done():
                self._free -= 1
                turn.set_result(None)

    def _ended(self, stream: Stream) -> None:
        """Take the place back once the writer's thread is through, whoever still reads what it wrote."""
        self._running.discard(stream)
        seconds = time.perf_counter() - stream.began
        self._seconds_per_stream = 0.8 * self._seconds_per_stream + 0.2 * seconds
        self._free += 1
        self._call_next()
        error = stream.error
        if self._ears is not None:
            self._ears.count_stream(self._name, _how(stream), stream.last)
        if error is not None and not stream.cancelled and not isinstance(error, AlambicError):
            _log.error("%s: the engine failed", self._name, exc_info=error)


def _how(stream: Stream) -> str:
    """Name how a stream ended, for the metrics."""
    if stream.last is not None:
        return stream.last.finish_reason or "stop"
    return "cancelled" if stream.cancelled else "error"


def _stopping() -> ApiError:
    return ApiError(503, "shutting_down", "the server is stopping", headers={"Retry-After": "5"})
