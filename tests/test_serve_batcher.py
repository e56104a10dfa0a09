"""The batcher by itself: what shares a batch, what is refused, what a failure or a departure costs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from alambic.errors import EngineError
from alambic.kinds.classify import Prediction
from alambic.serve.batcher import Batcher
from alambic.serve.errors import ApiError
from alambic.serve.limits import Limits


class GatedEngine:
    """Notes its batches and threads; waits at the gate when closed."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> list[Prediction]:
        self.batches.append(list(inputs))
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(60)
        if "bad" in inputs:
            raise EngineError("this text is bad")
        return [Prediction((text,), 1.0, {text: 1.0}) for text in inputs if text != "lost"]


def _run(scenario: Callable[[Batcher, GatedEngine], Awaitable[None]], **limits: float) -> GatedEngine:
    """Run `scenario` with a started batcher."""
    engine = GatedEngine()

    async def main() -> None:
        batcher = Batcher(engine, name="m", limits=Limits(**limits))  # type: ignore[arg-type]
        batcher.start()
        try:
            async with asyncio.timeout(60):
                await scenario(batcher, engine)
        finally:
            engine.gate.set()
            await batcher.close()

    asyncio.run(main())
    return engine


async def _busy(batcher: Batcher, engine: GatedEngine) -> None:
    """Leave the engine busy with the text "first"."""
    engine.gate.clear()
    batcher.submit(["first"])
    await asyncio.to_thread(engine.entered.wait, 60)


def test_text_runs_at_once_when_idle() -> None:
    async def scenario(batcher: Batcher, _engine: GatedEngine) -> None:
        async with asyncio.timeout(50):
            await batcher.submit(["a"]).done

    assert _run(scenario, max_wait_ms=600_000).batches == [["a"]]


def test_texts_share_a_batch_when_the_engine_is_busy() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        await _busy(batcher, engine)
        jobs = [batcher.submit([f"t{i}"]) for i in range(5)]
        assert batcher.depth == 5
        engine.gate.set()
        await asyncio.gather(*(job.done for job in jobs))
        assert [job.outcomes[0].label for job in jobs] == ["t0", "t1", "t2", "t3", "t4"]  # type: ignore[union-attr]

    engine = _run(scenario)
    assert engine.batches == [["first"], ["t0", "t1", "t2", "t3", "t4"]]


def test_next_batch_waits_for_company_when_the_last_one_was_shared() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        await _busy(batcher, engine)
        shared = [batcher.submit(["a"]), batcher.submit(["b"])]
        engine.gate.set()
        await asyncio.gather(*(job.done for job in shared))
        one = batcher.submit(["c"])
        for _ in range(10):  # turns of the loop: time enough for a batcher that does not wait
            await asyncio.sleep(0)
        two = batcher.submit(["d"])
        await asyncio.gather(one.done, two.done)

    assert _run(scenario, max_wait_ms=500).batches[-1] == ["c", "d"]


def test_large_request_does_not_starve_a_small_one() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        await _busy(batcher, engine)
        large = batcher.submit([f"l{i}" for i in range(6)])
        small = batcher.submit(["s"])
        engine.gate.set()
        await asyncio.gather(large.done, small.done)
        assert [large.outcomes[i].label for i in range(6)] == [f"l{i}" for i in range(6)]  # type: ignore[union-attr]

    engine = _run(scenario, max_batch=2)
    assert engine.batches[1:3] == [["l0", "l1"], ["s", "l2"]]


def test_one_thread_owns_the_engine() -> None:
    async def scenario(batcher: Batcher, _engine: GatedEngine) -> None:
        for _ in range(5):
            await batcher.submit(["a"]).done

    threads = _run(scenario).threads
    assert len(threads) == 1
    assert threads != {threading.main_thread().name}


def test_request_is_refused_when_the_queue_is_full() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        await _busy(batcher, engine)
        batcher.submit(["a", "b"])
        with pytest.raises(ApiError, match=r"2 texts are waiting already \(limit 3\)") as caught:
            batcher.submit(["c", "d"])
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "1")

    _run(scenario, queue_limit=3)


def test_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    async def scenario(batcher: Batcher, _engine: GatedEngine) -> None:
        await batcher.submit(["a", "b", "c", "d"]).done

    assert _run(scenario, queue_limit=2).batches == [["a", "b", "c", "d"]]


def test_other_requests_are_answered_when_one_text_of_the_batch_fails() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        await _busy(batcher, engine)
        jobs = [batcher.submit([text]) for text in ("a", "bad", "b")]
        engine.gate.set()
        await asyncio.gather(*(job.done for job in jobs))
        assert isinstance(jobs[0].outcomes[0], Prediction)
        assert str(jobs[1].outcomes[0]) == "this text is bad"
        assert isinstance(jobs[2].outcomes[0], Prediction)

    assert _run(scenario).batches[2:] == [["a"], ["bad"], ["b"]]


def test_text_fails_when_the_engine_returns_too_few_predictions() -> None:
    async def scenario(batcher: Batcher, _engine: GatedEngine) -> None:
        job = batcher.submit(["a", "lost"])
        await job.done
        assert isinstance(job.outcomes[0], Prediction)
        assert str(job.outcomes[1]) == "the engine returned 0 predictions for 1 texts"

    _run(scenario)


def test_waiting_texts_never_run_when_their_request_is_dropped() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        await _busy(batcher, engine)
        gone, kept = batcher.submit(["gone"]), batcher.submit(["kept"])
        batcher.drop(gone)
        assert batcher.depth == 1
        engine.gate.set()
        await kept.done

    assert _run(scenario).batches == [["first"], ["kept"]]


def test_batcher_goes_on_when_a_running_request_is_dropped() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        engine.gate.clear()
        job = batcher.submit(["gone"])
        await asyncio.to_thread(engine.entered.wait, 60)
        batcher.drop(job)
        engine.gate.set()
        await batcher.submit(["next"]).done

    assert _run(scenario).batches == [["gone"], ["next"]]


def test_accepted_texts_are_finished_when_the_batcher_closes() -> None:
    async def scenario(batcher: Batcher, engine: GatedEngine) -> None:
        await _busy(batcher, engine)
        job = batcher.submit(["a", "b", "c"])
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="the server is stopping"):
            batcher.submit(["late"])
        engine.gate.set()
        await closing
        assert len(job.outcomes) == 3

    _run(scenario, max_batch=2)
