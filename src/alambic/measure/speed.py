"""How fast a classifier answers: one text at a time on the task's real texts, then in batches.

The clock runs around `predict` on plain text, so tokenisation and the choice of label are inside. Several engines are
timed in one run, text by text and in an order drawn anew each time, so that a slower minute of the machine falls on all
of them alike. Cold start needs a fresh process: see probe.py.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.errors import AlambicError
from alambic.measure import probe
from alambic.measure.metrics import Interval, mean_interval, quantile_interval
from alambic.measure.quality import Predictor

Predict = Callable[[Sequence[str]], object]
MIN_REPEATS = 30


@dataclass(frozen=True)
class Speed:
    """Times of one engine.

    Attributes:
        p50_ms: median time of one text, with its interval.
        p95_ms: time that 95% of texts stay under, with its interval.
        mean_ms: mean time of one text, with its interval.
        per_second: texts a second in batches, with its interval over batches.
        batch_size: texts in a batch.
        n: timed single texts.
        times_ms: every single time, in the order of the texts; left out of `to_dict`.
    """

    p50_ms: Interval
    p95_ms: Interval
    mean_ms: Interval
    per_second: Interval
    batch_size: int
    n: int
    times_ms: NDArray[np.float64] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return point estimates under the contract's names, and their intervals beside them."""
        return {
            "p50_ms": self.p50_ms.value,
            "p95_ms": self.p95_ms.value,
            "mean_ms": self.mean_ms.value,
            "per_second": self.per_second.value,
            "n": self.n,
            "batch_size": self.batch_size,
            "intervals": {
                "p50_ms": self.p50_ms.to_dict(),
                "p95_ms": self.p95_ms.to_dict(),
                "mean_ms": self.mean_ms.to_dict(),
                "per_second": self.per_second.to_dict(),
            },
        }


def measure_speed(
    engine: Predictor,
    texts: Sequence[str],
    *,
    repeats: int = 200,
    warmup: int = 5,
    seconds: float = 10.0,
    seed: int = 0,
) -> Speed:
    """Time `engine` alone; see `compare_speed`."""
    timed = compare_speed({"engine": engine.predict}, texts, repeats=repeats, warmup=warmup, seconds=seconds, seed=seed)
    return timed["engine"]


def compare_speed(
    engines: Mapping[str, Predict],
    texts: Sequence[str],
    *,
    repeats: int = 200,
    warmup: int = 5,
    seconds: float = 10.0,
    seed: int = 0,
) -> dict[str, Speed]:
    """Time several engines, interleaved, on the same texts drawn from `texts`.

    Args:
        engines: a bound `predict` for each name.
        texts: real texts of the task; drawn without repetition while there are enough.
        repeats: single texts to time for each engine, at least 30.
        warmup: texts predicted before the clock starts.
        seconds: time for each engine, after which only the 30 repeats that a figure needs are still made.
        seed: of the texts' draw and of the order of engines.

    Raises:
        AlambicError: no text is given.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw(texts, max(repeats, MIN_REPEATS), rng)
    singles = _time_singles(engines, drawn, warmup=warmup, seconds=seconds * len(engines), rng=rng)
    rates = _time_batches(engines, drawn, seconds=seconds * len(engines) / 2, rng=rng)
    return {name: _speed(singles[name], rates[name], rng) for name in engines}


def compare_times(
    engines: Mapping[str, Predict],
    texts: Sequence[str],
    *,
    repeats: int = 200,
    warmup: int = 5,
    seconds: float = 10.0,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Time single texts alone, as `compare_speed` does: enough to choose the fastest engine, without its batches.

    Returns:
        By engine, the milliseconds of each text, in the order in which they were drawn.

    Raises:
        AlambicError: no text is given.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw(texts, max(repeats, MIN_REPEATS), rng)
    singles = _time_singles(engines, drawn, warmup=warmup, seconds=seconds * len(engines), rng=rng)
    return {name: np.array(times) for name, times in singles.items()}


def speedup(slow: Speed, fast: Speed, *, n: int = 1000, seed: int = 0) -> Interval:
    """Return how many times faster `fast` is at p50, its interval from the texts both were timed on."""
    rows = min(len(slow.times_ms), len(fast.times_ms))
    a, b = slow.times_ms[:rows], fast.times_ms[:rows]
    draws = np.random.default_rng(seed).integers(rows, size=(n, rows))
    samples = np.median(a[draws], axis=1) / np.median(b[draws], axis=1)
    return Interval.of(float(np.median(a) / np.median(b)), samples, n=rows)


@dataclass(frozen=True)
class ColdStart:
    """A fresh process, with the bundle's files already in the disk cache.

    Attributes:
        total_ms: from starting Python to the first prediction, median.
        open_ms: opening the bundle, median.
        first_ms: the first prediction, median.
        n: processes started.
    """

    total_ms: float
    open_ms: float
    first_ms: float
    n: int


def measure_cold_start(
    bundle: str, text: str, *, threads: int | None = None, repeats: int = 3, command: Sequence[str] = probe.COMMAND
) -> ColdStart:
    """Open the bundle and predict one text in fresh processes.

    Raises:
        EngineError: the process failed; its own message is given.
    """
    request = probe.Request(bundle, (text,), threads=threads)
    results = [probe.run(request, command=command) for _ in range(repeats)]
    totals, opens, firsts = (
        [getattr(result, name) for result in results] for name in ("total_ms", "open_ms", "first_ms")
    )
    return ColdStart(float(np.median(totals)), float(np.median(opens)), float(np.median(firsts)), repeats)


def _draw(texts: Sequence[str], n: int, rng: np.random.Generator) -> list[str]:
    if not texts:
        raise AlambicError("no text to time", hint="give a data set with at least one usable row")
    rounds = -(-n // len(texts))
    order = np.concatenate([rng.permutation(len(texts)) for _ in range(rounds)])[:n]
    return [texts[i] for i in order]


def _time_singles(
    engines: Mapping[str, Predict], texts: Sequence[str], *, warmup: int, seconds: float, rng: np.random.Generator
) -> dict[str, list[float]]:
    for predict in engines.values():
        for text in texts[:warmup]:
            predict([text])
    gc.collect()
    names, times = list(engines), {name: list[float]() for name in engines}
    stop = time.perf_counter() + seconds
    for done, text in enumerate(texts):
        if done >= MIN_REPEATS and time.perf_counter() > stop:
            break
        for i in rng.permutation(len(names)):
            predict, batch = engines[names[i]], [text]
            start = time.perf_counter()
            predict(batch)
            times[names[i]].append(1000.0 * (time.perf_counter() - start))
    return times


def _time_batches(
    engines: Mapping[str, Predict], texts: Sequence[str], *, seconds: float, rng: np.random.Generator
) -> dict[str, list[float]]:
    # Each call gets several engine batches, as a user with a file would hand them over.
    chunk = min(len(texts), 4 * _BATCH_SIZE)
    names, rates = list(engines), {name: list[float]() for name in engines}
    stop = time.perf_counter() + seconds
    for name in names:
        engines[name](texts[:chunk])
    for done in range(_BATCH_REPEATS):
        if done >= 3 and time.perf_counter() > stop:
            break
        batch = [texts[i] for i in rng.permutation(len(texts))[:chunk]]
        for i in rng.permutation(len(names)):
            start = time.perf_counter()
            engines[names[i]](batch)
            rates[names[i]].append(len(batch) / (time.perf_counter() - start))
    return rates


_BATCH_SIZE = 32
_BATCH_REPEATS = 30


def _speed(times: list[float], rates: list[float], rng: np.random.Generator) -> Speed:
    values = np.array(times)
    return Speed(
        p50_ms=quantile_interval(values, 0.5, rng=rng),
        p95_ms=quantile_interval(values, 0.95, rng=rng),
        mean_ms=mean_interval(values, rng=rng),
        per_second=quantile_interval(np.array(rates), 0.5, rng=rng),
        batch_size=_BATCH_SIZE,
        n=len(values),
        times_ms=values,
    )
