"""How fast a model writes, at the task's own lengths: time to first token, prompt and generation rates, whole answers.

The clock runs around `Writer.stream`, so that rendering, tokenisation and detokenisation are inside. One answer is
prompt evaluation (until the first token) plus generation (until the last): both are reported apart and together.
Several writers are timed in one run, request by request, in an order drawn anew each time. With `concurrency`, several
answers are written at once and the rates are those of all together.
"""

from __future__ import annotations

import gc
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.engines.writer import Writer
from alambic.errors import AlambicError
from alambic.kinds.generation import GenerationRequest
from alambic.measure.metrics import Interval, quantile_interval

MIN_REPEATS = 30
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Timed:
    """One answer that was timed.

    Attributes:
        prompt_ms: from the call until the first token.
        generation_ms: from the first token until the end of the stream.
        prompt_tokens: read, those kept from earlier requests included.
        cached_tokens: of the prompt, kept from earlier requests; None: the engine does not tell.
        tokens: written.
    """

    prompt_ms: float
    generation_ms: float
    prompt_tokens: int
    cached_tokens: int | None
    tokens: int

    @property
    def total_ms(self) -> float:
        """The whole answer."""
        return self.prompt_ms + self.generation_ms


@dataclass(frozen=True)
class GenerationSpeed:
    """Times of one writer; every figure has its bootstrap interval over requests.

    Attributes:
        p50_ms: median time of a whole answer.
        p95_ms: time that 95% of whole answers stay under.
        ttft_ms: median time to the first token, which is prompt evaluation.
        ttft_p95_ms: time that 95% of first tokens stay under.
        generation_ms: median time from first to last token; None when no answer has two tokens.
        prompt_tokens_per_second: tokens of prompts, less those told to be cached, over the time to first tokens.
        tokens_per_second: tokens after the first, over the time they took; with several streams, of all together.
        per_second: answers a second, of all streams together.
        prompt_tokens: mean length of a prompt.
        tokens: mean length of an answer.
        cached_share: of prompt tokens, kept from earlier requests; None: the engine does not tell.
        concurrency: answers written at once.
        n: timed answers.
        timed: every answer in order; left out of `to_dict`.
    """

    p50_ms: Interval
    p95_ms: Interval
    ttft_ms: Interval
    ttft_p95_ms: Interval
    generation_ms: Interval | None
    prompt_tokens_per_second: Interval
    tokens_per_second: Interval | None
    per_second: Interval
    prompt_tokens: float
    tokens: float
    cached_share: float | None
    concurrency: int
    n: int
    timed: tuple[Timed, ...] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return point estimates under the contract's names (`speed` of `alambic measure`), intervals beside them."""
        figures = {name: value for name, value in vars(self).items() if isinstance(value, Interval)}
        plain = {name: getattr(self, name) for name in ("prompt_tokens", "tokens", "cached_share", "concurrency", "n")}
        if self.cached_share is None:
            del plain["cached_share"]
        intervals = {name: value.to_dict() for name, value in figures.items()}
        return {**{name: value.value for name, value in figures.items()}, **plain, "intervals": intervals}


def measure_generation_speed(
    writer: Writer,
    requests: Sequence[GenerationRequest],
    *,
    repeats: int = 60,
    warmup: int = 3,
    seconds: float = 30.0,
    concurrency: int = 1,
    seed: int = 0,
) -> GenerationSpeed:
    """Time `writer` on requests drawn from the task's own.

    Args:
        writer: what is timed.
        requests: real requests; drawn without repetition while there are enough, because engines keep prompts they
            have read (`cached_share` tells how much of them).
        repeats: answers to time, at least 30.
        warmup: answers written before the clock starts.
        seconds: time after which only the 30 answers that a figure needs are still written.
        concurrency: answers written at once.
        seed: of the draw.

    Raises:
        AlambicError: no request is given.
        EngineError: the writer cannot answer one.
    """
    if concurrency == 1:
        timed = compare_generation_speed(
            {"writer": writer}, requests, repeats=repeats, warmup=warmup, seconds=seconds, seed=seed
        )
        return timed["writer"]
    rng = np.random.default_rng(seed)
    drawn = _draw(requests, max(repeats, MIN_REPEATS) + warmup, rng)
    for request in drawn[:warmup]:
        _time(writer, request)
    gc.collect()
    timed_all, wall = _time_together(writer, drawn[warmup:], concurrency=concurrency, seconds=seconds)
    return _speed(timed_all, rng, concurrency=concurrency, wall_s=wall)


def compare_generation_speed(
    writers: Mapping[str, Writer],
    requests: Sequence[GenerationRequest],
    *,
    repeats: int = 60,
    warmup: int = 3,
    seconds: float = 30.0,
    seed: int = 0,
    least: int = MIN_REPEATS,
) -> dict[str, GenerationSpeed]:
    """Time several writers, interleaved, on the same requests, one answer at a time; see `measure_generation_speed`.

    `seconds` are of each writer. `least` answers of each are timed however long they take; fewer than 30 are for
    choosing between the writers, not for figures.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw(requests, max(repeats, least) + warmup, rng)
    for writer in writers.values():
        for request in drawn[:warmup]:
            _time(writer, request)
    gc.collect()
    names, times = list(writers), {name: list[Timed]() for name in writers}
    stop = time.perf_counter() + seconds * len(names)
    for done, request in enumerate(drawn[warmup:]):
        if done >= least and time.perf_counter() > stop:
            break
        for i in rng.permutation(len(names)):
            times[names[i]].append(_time(writers[names[i]], request))
    return {name: _speed(timed, rng) for name, timed in times.items()}


def _draw(requests: Sequence[GenerationRequest], n: int, rng: np.random.Generator) -> list[GenerationRequest]:
    if not requests:
        raise AlambicError("no request to time", hint="give a data set with at least one usable row")
    rounds = -(-n // len(requests))
    order = np.concatenate([rng.permutation(len(requests)) for _ in range(rounds)])[:n]
    return [requests[i] for i in order]


def _time(writer: Writer, request: GenerationRequest) -> Timed:
    start = time.perf_counter()
    first, usage = None, None
    for chunk in writer.stream(request):
        if first is None:
            first = time.perf_counter()
        usage = chunk.usage or usage
    end = time.perf_counter()
    if usage is None:
        raise AlambicError("the stream ended without telling its tokens: it is not a whole answer")
    first = end if first is None else first
    return Timed(
        1000.0 * (first - start),
        1000.0 * (end - first),
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
    )


def _time_together(
    writer: Writer, requests: Sequence[GenerationRequest], *, concurrency: int, seconds: float
) -> tuple[list[Timed], float]:
    """Keep `concurrency` streams busy; return the answers and the wall time of all."""
    waiting: queue.SimpleQueue[GenerationRequest] = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)
    done: list[Timed] = []
    start = time.perf_counter()

    def work() -> None:
        while time.perf_counter() - start < seconds or len(done) + concurrency <= MIN_REPEATS:
            try:
                request = waiting.get_nowait()
            except queue.Empty:
                return
            done.append(_time(writer, request))

    with ThreadPoolExecutor(concurrency, thread_name_prefix="stream") as pool:
        for future in [pool.submit(work) for _ in range(concurrency)]:
            future.result()
    return done, time.perf_counter() - start


def _speed(
    timed: Sequence[Timed], rng: np.random.Generator, *, concurrency: int = 1, wall_s: float | None = None
) -> GenerationSpeed:
    told = all(one.cached_tokens is not None for one in timed)
    table = {
        name: np.array([asdict(one)[name] or 0 for one in timed], dtype=np.float64) for name in Timed.__annotations__
    }
    prompt, generation = table["prompt_ms"], table["generation_ms"]
    total, later = prompt + generation, np.maximum(table["tokens"] - 1.0, 0.0)
    fresh = table["prompt_tokens"] - table["cached_tokens"]
    several = table["tokens"] > 1
    rate: Interval | None = None
    if several.any():
        rate = _rate(later[several], generation[several] / 1000.0, rng)
    answers = _rate(np.ones(len(total)), total / 1000.0, rng)
    if wall_s is not None:
        # Streams overlap, so rates are over the wall time that all shared; intervals keep their relative width.
        answers = _at(answers, len(total) / wall_s)
        rate = None if rate is None else _at(rate, float(table["tokens"].sum()) / wall_s)
    return GenerationSpeed(
        p50_ms=quantile_interval(total, 0.5, rng=rng),
        p95_ms=quantile_interval(total, 0.95, rng=rng),
        ttft_ms=quantile_interval(prompt, 0.5, rng=rng),
        ttft_p95_ms=quantile_interval(prompt, 0.95, rng=rng),
        generation_ms=quantile_interval(generation[several], 0.5, rng=rng) if several.any() else None,
        prompt_tokens_per_second=_rate(fresh, prompt / 1000.0, rng),
        tokens_per_second=rate,
        per_second=answers,
        prompt_tokens=float(table["prompt_tokens"].mean()),
        tokens=float(table["tokens"].mean()),
        cached_share=float(table["cached_tokens"].sum() / max(1.0, table["prompt_tokens"].sum())) if told else None,
        concurrency=concurrency,
        n=len(timed),
        timed=tuple(timed),
    )


def _rate(amounts: Floats, seconds: Floats, rng: np.random.Generator, *, n: int = 1000) -> Interval:
    """Return sum of amounts over sum of seconds, resampling requests."""
    draws = rng.integers(len(amounts), size=(n, len(amounts)))
    samples = amounts[draws].sum(axis=1) / np.maximum(seconds[draws].sum(axis=1), 1e-9)
    return Interval.of(float(amounts.sum() / max(seconds.sum(), 1e-9)), samples, n=len(amounts))


def _at(interval: Interval, value: float) -> Interval:
    scale = value / interval.value if interval.value else 0.0
    scaled = {name: getattr(interval, name) * scale for name in ("low", "high", "low_90", "high_90")}
    return Interval(value=value, n=interval.n, level=interval.level, **scaled)
