"""The one thread that owns a core: it takes requests from any thread, steps, and hands out what comes.

No request is lost: each gets an end or an error, also when the engine fails (then every later one is refused) and when
it is closed. What one reader leaves unread is bounded by the length of its answer.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from alambic.engines.genai_core import Ask, News
from alambic.errors import AlambicError, EngineError


class Steps(Protocol):
    """A core, here or in another process."""

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""

    def add(self, ask: Ask) -> News | None:
        """Take a request."""

    def cancel(self, id: int) -> None:
        """Stop a request."""

    def step(self) -> list[News]:
        """Compute once for all requests."""

    def close(self) -> None:
        """Free the models."""


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        ask: what is asked.
        news: what came, with the time when it did; an exception ends it.
        queued, started: when it was handed in, and when the engine got it (perf_counter).
        cancelled: nobody waits for it any more.
        begun: something of it was handed out.
    """

    ask: Ask
    news: queue.SimpleQueue[tuple[News, float] | BaseException] = field(default_factory=queue.SimpleQueue)
    queued: float = 0.0
    started: float = 0.0
    cancelled: bool = False
    begun: bool = False


# After a step the readers get the lock: for a share of its time, and longer when an answer begins.
_PAUSE_SHARE, _LONGEST_PAUSE_S, _FIRST_PAUSE_S = 0.02, 0.001, 0.003


class Loop:
    """Runs a core in a thread of its own."""

    def __init__(self, open_core: Callable[[], Steps], *, most_running: int) -> None:
        """Open the core; raises what `open_core` raises.

        Args:
            open_core: called once, in the thread that will own what it gives.
            most_running: requests handed to the engine at once; the others wait in order.
        """
        self._open_core = open_core
        self._most_running = most_running
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._dead: BaseException | None = None
        self._closing = False
        self._cancel_all = False
        opened: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="alambic-genai", daemon=True)
        self._thread.start()
        if (error := opened.get()) is not None:
            self._thread.join()
            raise error

    def submit(self, ask: Ask) -> Job:
        """Hand in a request; its number is given here.

        Raises:
            EngineError: the engine failed, or is closed.
        """
        with self._changed:
            if self._dead is not None:
                raise _failed(self._dead)
            if self._closing:
                raise EngineError("this engine is closed")
            job = Job(replace(ask, id=next(self._numbers)), queued=time.perf_counter())
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Give up a request: nothing more is computed for it."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def close(self, *, finish_s: float) -> None:
        """Take nothing more, finish what began within `finish_s` seconds, cancel the rest, free the models."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(finish_s)
        if self._thread.is_alive():
            with self._changed:
                self._cancel_all = True
                self._changed.notify_all()
            self._thread.join()

    def _run(self, opened: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            core = self._open_core()
        except BaseException as error:  # the edge of the thread: it belongs to the one who opens
            opened.put(error)
            return
        opened.put(None)
        try:
            while self._wait():
                self._feed(core)
                if core.busy:
                    began = time.perf_counter()
                    first = self._hand_out(core.step())
                    # The next step keeps the interpreter's lock: what came would leave this process one step later.
                    share = _PAUSE_SHARE * (time.perf_counter() - began)
                    time.sleep(_FIRST_PAUSE_S if first else min(share, _LONGEST_PAUSE_S))
        except BaseException as error:  # the edge of the thread: it belongs to everyone who waits
            self._die(error)
        finally:
            core.close()

    def _wait(self) -> bool:
        """Wait until there is work; False when there never will be."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _feed(self, core: Steps) -> None:
        """Pass on cancellations, then waiting requests while there is room."""
        with self._changed:
            if self._cancel_all:
                for job in (*self._running.values(), *self._waiting):
                    job.cancelled = True
            dropped = [job for job in self._waiting if job.cancelled]
            for job in dropped:
                self._waiting.remove(job)
            stopped = [job for job in self._running.values() if job.cancelled]
            admitted = self._admitted()
            for job in admitted:
                self._waiting.remove(job)
                self._running[job.ask.id] = job
        now = time.perf_counter()
        for job in dropped:
            job.started = now
            job.news.put((News(job.ask.id, end="cancelled"), now))
        for job in stopped:
            core.cancel(job.ask.id)
        for job in admitted:
            job.started = now
            refused = core.add(job.ask)
            if refused is not None:
                self._hand_out([refused])

    def _admitted(self) -> list[Job]:
        """Choose what starts now, in order. Adapters take turns: an engine computes with one of them at a time.

        When nothing runs, the turn is of the adapter that waited longest; nobody joins it while another one waits.
        """
        if not self._waiting:
            return []
        adapter = self._waiting[0].ask.adapter
        if self._running:
            adapter = next(iter(self._running.values())).ask.adapter
            if any(job.ask.adapter != adapter for job in self._waiting):
                return []
        same = (job for job in self._waiting if job.ask.adapter == adapter)
        return list(itertools.islice(same, self._most_running - len(self._running)))

    def _hand_out(self, news: list[News]) -> bool:
        """Give each piece to its reader; tell whether one is the first of its answer."""
        now = time.perf_counter()
        first = False
        for item in news:
            with self._changed:
                job = self._running.pop(item.id) if item.end or item.error else self._running[item.id]
            first, job.begun = first or not job.begun, True
            job.news.put(EngineError(item.error) if item.error else (item, now))
        return first

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._dead = error
            jobs = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for job in jobs:
            job.news.put(_failed(error))


def _failed(error: BaseException) -> EngineError:
    said = error.message if isinstance(error, AlambicError) else f"{type(error).__name__}: {error}"
    failed = EngineError(f"the engine failed and answers nothing more: {said}", hint="open the bundle again")
    failed.__cause__ = error
    return failed
