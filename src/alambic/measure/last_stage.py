"""What a remote adds to a classifier that abstains: how many texts it takes, how often it is right, what it costs."""

from __future__ import annotations

from typing import Any

from alambic.data.dataset import Dataset
from alambic.engines import ClassifyEngine
from alambic.errors import AlambicError
from alambic.events import Progress, Work
from alambic.measure.selective import upper_bound

_BATCH = 64
_SIDE = 0.975  # of each end of an interval


def measure_last_stage(engine: ClassifyEngine, rows: Dataset) -> Work[dict[str, Any]]:
    """Ask the engine and, about what it abstains from, its remote; return shares with 95 % intervals, JSON values only.

    Args:
        engine: opened with its remote, and not used before: counts and cost are those since it was opened.
        rows: labelled, one label each.

    Raises:
        AlambicError: the engine was opened without a remote.
    """
    if engine.last is None:
        raise AlambicError(f"{engine.bundle.source} was opened without its remote")
    here = [0, 0]  # answers given, those that are right
    there = [0, 0]
    texts = rows.texts
    for i in range(0, len(texts), _BATCH):
        said = engine.predict(texts[i : i + _BATCH])
        for one, example in zip(said, rows.examples[i : i + _BATCH], strict=True):
            if not one.abstained:
                tally = there if one.answered_by == engine.last.stage.model else here
                tally[0] += 1
                tally[1] += one.labels == example.labels
        yield Progress("remote", i + len(said), len(texts), {"asked": float(engine.last.asked.texts)})
    asked, cost = engine.last.asked, engine.last.cost_usd
    facts = {
        "model": engine.last.stage.model,
        "n": len(texts),
        "asked": asked.texts,
        "fits_no_label": asked.none,
        "failed": asked.failed,
        "here": _share(*here),
        "remote": _share(*there),
        "together": _share(here[0] + there[0], here[1] + there[1]),
    }
    return facts if cost is None else {**facts, "usd": cost}


def _share(answered: int, right: int) -> dict[str, Any]:
    """Return how many were answered and the share that is right, with its interval (Clopper and Pearson 1934)."""
    if not answered:
        return {"answered": 0}
    low = 1.0 - upper_bound(answered - right, answered, confidence=_SIDE)
    high = upper_bound(right, answered, confidence=_SIDE)
    return {"answered": answered, "right": {"value": right / answered, "low": low, "high": high}}
