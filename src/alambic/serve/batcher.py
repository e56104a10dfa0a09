"""Batches the texts of concurrent requests for one engine, which one worker thread owns.

All bookkeeping lives on the event loop; the thread only computes. When the engine is idle a text runs at once. While it
is busy texts gather, and the next batch takes what is there. Only after a batch shared by several requests is it worth
waiting a little (`max_wait_ms`) for the next one to fill.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from alambic.errors import EngineError
from alambic.serve.errors import ApiError
from alambic.serve.limits import Limits

_log = logging.getLogger("alambic.serve")
_Result = TypeVar("_Result")
_Result_co = TypeVar("_Result_co", covariant=True)


class Predicts(Protocol[_Result_co]):
    """The part of an engine that the server uses."""

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> Sequence[_Result_co]:
        """Return one result per input."""
        ...


@dataclass(eq=False)
class Job(Generic[_Result]):
    """The texts of one request, and what became of each of them."""

    texts: Sequence[str]
    done: asyncio.Future[None]
    queued: float
    outcomes: dict[int, _Result | BaseException] = field(default_factory=dict)
    taken: int = 0
    started: float | None = None
    engine_s: float = 0.0

    @property
    def waiting(self) -> int:
        """Texts not yet given to the engine."""
        return len(self.texts) - self.taken


class Batcher(Generic[_Result]):
    """The queue and the worker thread of one engine."""

    def __init__(
        self,
        engine: Predicts[_Result],
        *,
        name: str,
        limits: Limits,
        on_batch: Callable[[int, int], None] = lambda _n, _f: None,
    ) -> None:
        self._engine = engine
        self._name = name
        self._limits = limits
        self._on_batch = on_batch
        self._jobs: deque[Job[_Result]] = deque()
        self._running: set[Job[_Result]] = set()
        self._arrived = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"alambic-{name}")
        self._seconds_per_text = 0.0

    @property
    def depth(self) -> int:
        """Texts waiting."""
        return sum(job.waiting for job in self._jobs)

    @property
    def ready(self) -> bool:
        """Whether texts are taken."""
        return self._task is not None and not self._task.done() and not self._closing

    def start(self) -> None:
        """Begin to work; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work(), name=f"batcher {self._name}")

    async def close(self) -> None:
        """Finish what was accepted, then stop the thread."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._thread.shutdown(wait=True)

    def submit(self, texts: Sequence[str]) -> Job[_Result]:
        """Queue `texts`; await `done` of the job, then read its outcomes.

        Raises:
            ApiError: 503 when the queue is full or the server is stopping.
        """
        if not self.ready:
            raise ApiError(503, "shutting_down", "the server is stopping", headers={"Retry-After": "5"})
        depth = self.depth
        # A request larger than the whole queue is taken when nothing waits, or it could never be served.
        if depth and depth + len(texts) > self._limits.queue_limit:
            seconds = min(60, max(1, math.ceil(depth * self._seconds_per_text)))
            message = f"{depth} texts are waiting already (limit {self._limits.queue_limit}); try again in {seconds} s"
            raise ApiError(503, "queue_full", message, headers={"Retry-After": str(seconds)})
        job: Job[_Result] = Job(texts, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._jobs.append(job)
        self._arrived.set()
        return job

    def drop(self, job: Job[_Result]) -> None:
        """Forget a job whose client is gone; texts already in the engine run to their end unheard."""
        if job in self._jobs:
            self._jobs.remove(job)
        self._running.discard(job)
        job.done.cancel()

    async def _work(self) -> None:
        crowded = False
        try:
            while True:
                await self._arrived.wait()
                if crowded and self.depth < self._limits.max_batch and not self._closing:
                    await asyncio.sleep(self._limits.max_wait_ms / 1000)
                batch = self._take()
                if batch:
                    crowded = len({id(job) for job, _ in batch}) > 1
                    await self._run(batch)
                elif self._closing:
                    return
                else:
                    crowded = False
                    self._arrived.clear()
        finally:
            # Reached with jobs left only if this loop has a bug: nobody must wait for ever on it.
            for job in (*self._jobs, *self._running):
                job.done.cancel()

    def _take(self) -> list[tuple[Job[_Result], int]]:
        """Take up to `max_batch` texts, oldest request first; an unfinished one goes to the back of the queue."""
        batch: list[tuple[Job[_Result], int]] = []
        unfinished: list[Job[_Result]] = []
        now = time.perf_counter()
        while self._jobs and len(batch) < self._limits.max_batch:
            job = self._jobs.popleft()
            count = min(job.waiting, self._limits.max_batch - len(batch))
            batch.extend((job, index) for index in range(job.taken, job.taken + count))
            job.taken += count
            job.started = now if job.started is None else job.started
            (unfinished.append if job.waiting else self._running.add)(job)
        self._jobs.extend(unfinished)
        return batch

    async def _run(self, batch: list[tuple[Job[_Result], int]]) -> None:
        began = time.perf_counter()
        outcomes = await self._outcomes([job.texts[index] for job, index in batch])
        seconds = time.perf_counter() - began
        self._seconds_per_text = 0.7 * self._seconds_per_text + 0.3 * seconds / len(batch)
        self._on_batch(len(batch), sum(isinstance(outcome, BaseException) for outcome in outcomes))
        for (job, index), outcome in zip(batch, outcomes, strict=True):
            job.outcomes[index] = outcome
        for job in {job for job, _ in batch}:
            job.engine_s += seconds
            if len(job.outcomes) == len(job.texts):
                self._running.discard(job)
                if not job.done.done():
                    job.done.set_result(None)

    async def _outcomes(self, texts: list[str]) -> list[_Result | BaseException]:
        """Predict `texts`; if that fails, predict each by itself, so that one bad text costs the others nothing."""
        outcome = await self._compute(texts)
        if not isinstance(outcome, BaseException):
            return list(outcome)
        if len(texts) == 1:
            return [outcome]
        singles = [await self._compute([text]) for text in texts]
        return [one if isinstance(one, BaseException) else one[0] for one in singles]

    async def _compute(self, texts: list[str]) -> list[_Result] | BaseException:
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._predict, texts)
        await asyncio.wait([future])
        error = future.exception()
        if error is None:
            return future.result()
        if not isinstance(error, EngineError):
            _log.error("%s: the engine failed on a batch of %d", self._name, len(texts), exc_info=error)
        return error

    def _predict(self, texts: list[str]) -> list[_Result]:
        predictions = list(self._engine.predict(texts, batch_size=self._limits.max_batch))
        if len(predictions) != len(texts):
            raise EngineError(f"the engine returned {len(predictions)} predictions for {len(texts)} texts")
        return predictions
