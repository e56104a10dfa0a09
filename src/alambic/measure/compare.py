"""Several bundles on the same rows: scores with paired differences, times taken in turn in one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from alambic.data.dataset import Dataset
from alambic.events import Finished, Progress, Started, Work
from alambic.measure.machine import fingerprint
from alambic.measure.memory import size_mb
from alambic.measure.metrics import paired_bootstrap
from alambic.measure.quality import Quality, measure_quality
from alambic.measure.speed import compare_speed, speedup


def compare_bundles(
    bundles: Sequence[Path], dataset: Dataset, *, threads: int | None = None, seconds: float = 10.0, seed: int = 0
) -> Work[list[dict[str, Any]]]:
    """Measure every bundle on `dataset`, all of them open at once.

    Returns one record per bundle, with the names of `Measurement.to_dict`. All but the first hold the `difference` of
    the first metric to the first bundle (a paired interval) and `faster`, how many times faster at p50 they are.

    Raises:
        BundleError: a bundle cannot be opened.
        AlambicError: the data set has no row.
    """
    from alambic.engines import open_engine

    with ExitStack() as stack:
        engines = {str(path): stack.enter_context(open_engine(path, threads=threads)) for path in bundles}
        qualities: dict[str, Quality] = {}
        for done, (name, engine) in enumerate(engines.items()):
            yield Progress("quality", done=done, total=len(engines))
            qualities[name] = measure_quality(engine, dataset, seed=seed)
        start = time.perf_counter()
        yield Started("speed", seconds=1.5 * seconds * len(engines))
        predicts = {name: engine.predict for name, engine in engines.items()}
        speeds = compare_speed(predicts, dataset.texts, seconds=seconds, seed=seed)
        yield Finished("speed", time.perf_counter() - start)
    first, *_ = engines
    metric, machine, records = next(iter(qualities[first].scores)), fingerprint(), []
    for name, quality in qualities.items():
        record = {
            "bundle": name,
            "n": quality.n,
            "quality": {key: score.to_dict() for key, score in quality.scores.items()},
            "speed": speeds[name].to_dict(),
            "size_mb": size_mb(Path(name)),
            "machine": machine,
        }
        if name != first:
            record["difference"] = _difference(metric, quality, qualities[first], seed)
            record["faster"] = speedup(speeds[first], speeds[name], seed=seed).to_dict()
        records.append(record)
    return records


def _difference(metric: str, quality: Quality, first: Quality, seed: int) -> dict[str, Any]:
    # Labels that only one bundle knows come after the rows' own; they are never true, so their order does not matter,
    # but indicators need the same width.
    width = max(len(quality.labels), len(first.labels))
    truths, mine, theirs = (
        _widen(array, width)
        for array in (quality.answers.truths, quality.answers.predictions, first.answers.predictions)
    )
    pair = paired_bootstrap(metric, truths, mine, theirs, rng=np.random.default_rng(seed))
    return {**pair.difference.to_dict(), "metric": metric, "p_value": pair.p_value}


def _widen(array: Any, width: int) -> Any:
    return array if array.ndim == 1 else np.pad(array, ((0, 0), (0, width - array.shape[1])))
