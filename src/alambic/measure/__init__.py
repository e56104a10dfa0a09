"""Measure a packed bundle through its engine, on this machine: quality, speed, size, memory, energy.

measurement = measure("runs/tickets/bundle", dataset)
measurement.to_dict()["speed"]["p95_ms"]
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alambic.data.dataset import Dataset
from alambic.events import Finished, Started, Work
from alambic.measure.energy import Energy, measure_energy
from alambic.measure.machine import fingerprint
from alambic.measure.memory import Memory, measure_peak_ram, size_mb
from alambic.measure.quality import Quality, measure_quality
from alambic.measure.speed import ColdStart, Speed, measure_cold_start, measure_speed

__all__ = ["Costs", "Measurement", "Options", "measure", "measure_costs"]


@dataclass(frozen=True)
class Options:
    """How long and how to measure.

    Attributes:
        threads: threads of the engine; None lets it decide.
        repeats: single texts to time, at least 30.
        seconds: time for single texts; batches get half of it again.
        energy_seconds: time for energy; 0 leaves energy out.
        cold_starts: fresh processes started; 0 leaves cold start out.
        memory_texts: texts predicted in the fresh process that tells peak memory, the longest among them.
        tdp_watts: thermal design power of the processor, when energy cannot be read and you know it.
        seed: of every draw.
    """

    threads: int | None = None
    repeats: int = 200
    seconds: float = 10.0
    energy_seconds: float = 3.0
    cold_starts: int = 3
    memory_texts: int = 50
    tdp_watts: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Costs:
    """What using a bundle costs, whatever its quality."""

    speed: Speed
    size_mb: float
    memory: Memory
    energy: Energy
    cold_start: ColdStart | None
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names of `Measurement.to_dict`."""
        speed = self.speed.to_dict()
        if self.cold_start is not None:
            speed["cold_start_ms"] = self.cold_start.total_ms
            speed["cold_start_n"] = self.cold_start.n
        figures: dict[str, Any] = {
            "speed": speed,
            "size_mb": self.size_mb,
            "peak_ram_mb": self.memory.peak_ram_mb,
            "memory": self.memory.to_dict(),
            "energy": self.energy.to_dict(),
            "machine": self.machine,
        }
        return {key: value for key, value in figures.items() if value is not None}


@dataclass(frozen=True)
class Measurement:
    """All figures of one bundle on one data set and one machine."""

    bundle: str
    quality: Quality
    costs: Costs

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names that `alambic measure --json` promises; what is not known is absent."""
        return {
            "bundle": self.bundle,
            "n": self.quality.n,
            "split": self.quality.split,
            "quality": {name: score.to_dict() for name, score in self.quality.scores.items()},
            **self.costs.to_dict(),
        }


def measure(
    bundle: Path, dataset: Dataset, *, threads: int | None = None, options: Options | None = None, split: str = "test"
) -> Work[Measurement]:
    """Open the bundle and measure it on the rows of `dataset`.

    Args:
        bundle: a bundle's folder or file.
        dataset: labelled rows, none of which the model may have seen.
        threads: threads of the engine; None lets it decide.
        options: how long and how to measure; its `threads` gives way to the one above when that is given.
        split: what these rows are called in reports.

    Raises:
        BundleError: the bundle cannot be opened.
        AlambicError: the data set has no row.
    """
    from alambic.engines import open_engine

    options = options or Options()
    options = options if threads is None else replace(options, threads=threads)
    with open_engine(bundle, threads=options.threads) as engine:
        yield Started("quality")
        start = time.perf_counter()
        quality = measure_quality(engine, dataset, split=split, seed=options.seed)
        yield Finished("quality", time.perf_counter() - start)
        yield Started("speed, memory, energy", seconds=1.5 * options.seconds + options.energy_seconds)
        start = time.perf_counter()
        costs = measure_costs(bundle, engine, dataset.texts, options=options)
        yield Finished("speed, memory, energy", time.perf_counter() - start)
    return Measurement(str(bundle), quality, costs)


def measure_costs(bundle: Path, engine: Any, texts: list[str], *, options: Options) -> Costs:
    """Measure speed, size, memory, energy and cold start on texts, labelled or not.

    Raises:
        EngineError: predicting in a fresh process failed.
    """
    speed = measure_speed(engine, texts, repeats=options.repeats, seconds=options.seconds, seed=options.seed)
    energy = Energy(None, "unavailable", "not asked for")
    if options.energy_seconds > 0:
        energy = measure_energy(engine.predict, texts, seconds=options.energy_seconds, tdp_watts=options.tdp_watts)
    rng = np.random.default_rng(options.seed)
    drawn = [texts[i] for i in rng.permutation(len(texts))[: options.memory_texts]]
    memory = measure_peak_ram(str(bundle), [*drawn, max(texts, key=len)], threads=options.threads)
    cold = None
    if options.cold_starts > 0:
        cold = measure_cold_start(str(bundle), drawn[0], threads=options.threads, repeats=options.cold_starts)
    return Costs(speed, size_mb(bundle), memory, energy, cold, fingerprint())
