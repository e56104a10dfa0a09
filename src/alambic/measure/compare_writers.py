"""Several models that write on the same rows: scores with paired differences, times taken in turn in one run.

A row of the comparison is a bundle, or a remote model that the user names: then rows leave the machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from alambic.data.chats import ChatDataset
from alambic.engines.writer import Writer
from alambic.events import Finished, Started, Work
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.measure.generation_speed import compare_generation_speed
from alambic.measure.machine import fingerprint
from alambic.measure.written import Written, compare_written, measure_written
from alambic.measure.written_figures import WrittenFigures


def compare_writers(
    writers: Mapping[str, Writer],
    rows: ChatDataset,
    *,
    kind: str,
    sampling: Sampling,
    metric: str | None = None,
    seconds: float = 20.0,
    seed: int = 0,
) -> Work[list[dict[str, Any]]]:
    """Let every writer write the answers of `rows`, all of them open at once.

    Args:
        writers: by name; the first is the one that others are compared with.
        rows: conversations with the expected answers.
        kind: of the task: chooses the metrics.
        sampling: how all of them write.
        metric: the one that decides; the first of the kind when None.
        seconds: of timing, for each.
        seed: of every draw.

    Returns one record per writer with `quality`, `speed`, `machine`; all but the first hold the `difference` of the
    deciding metric to the first (a paired interval). A remote writer's record holds `endpoint`: its usage and cost.

    Raises:
        EngineError: a writer cannot answer.
        AlambicError: the data set has no row.
    """
    written: dict[str, Written] = {}
    for name, writer in writers.items():
        written[name] = yield from measure_written(writer, rows, kind=kind, sampling=sampling, split="rows", seed=seed)
    requests = [GenerationRequest(chat=chat.prompt, sampling=sampling) for chat in rows.chats]
    start = time.perf_counter()
    yield Started("speed", seconds=seconds * len(writers))
    speeds = compare_generation_speed(writers, requests, repeats=30, seconds=seconds, seed=seed)
    yield Finished("speed", time.perf_counter() - start)
    first, records = next(iter(writers)), []
    for name, one in written.items():
        figures = WrittenFigures.of(one)
        record: dict[str, Any] = {
            "bundle": name,
            "n": figures.n,
            "quality": {key: score.to_dict() for key, score in figures.scores.items()},
            "endings": figures.endings,
            "speed": speeds[name].to_dict(),
            "machine": fingerprint(),
        }
        described = writers[name].describe()
        if "totals" in described:
            record["endpoint"] = described
        if name != first:
            pair = compare_written(one, written[first], metric=metric, seed=seed)
            deciding = metric or next(iter(figures.scores))
            record["difference"] = {**pair.difference.to_dict(), "metric": deciding, "p_value": pair.p_value}
        records.append(record)
    return records
