"""What a build tells, whatever its kind: the figures of each candidate, and the outcome in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from alambic.measure.frontier import Choice, Point
from alambic.measure.metrics import Interval
from alambic.task import Task


class Tried(Protocol):
    """A candidate that was measured on the rows that decide."""

    @property
    def name(self) -> str:
        """Name of the candidate."""

    @property
    def point(self) -> Point:
        """Its place in quality x time x size x energy."""

    @property
    def costs(self) -> dict[str, Any]:
        """Its costs, as JSON."""


def candidate_lines(trials: Sequence[Tried], choice: Choice) -> list[dict[str, Any]]:
    """Return the figures of each candidate on the rows that decide, as JSON."""
    return [
        {
            "name": trial.name,
            "chosen": trial.name == choice.chosen,
            "on_frontier": trial.name in choice.frontier,
            "n": next(iter(trial.point.quality.values())).n,
            "split": "dev",
            "quality": {k: v.to_dict() for k, v in trial.point.quality.items()},
            **trial.costs,
        }
        for trial in trials
    ]


def sentences(task: Task, choice: Choice, scores: Mapping[str, Interval], shipped: Point, met: bool) -> list[str]:
    """Say what was chosen, why, and how the bundle that ships did on test."""
    name = task.metrics[0]
    score = scores[name]
    lines = [f"chosen: {choice.reasons[0]}"]
    lines.append(
        f"on test: {name} {100 * score.value:.1f} % [{100 * score.low:.1f}, {100 * score.high:.1f}], n = {score.n:,}; "
        f"p95 {shipped.p95_ms.value:.1f} ms, {shipped.size_mb:.1f} MB, through the sealed bundle"
    )
    if choice.ties:
        lines.append(f"cannot be told apart in {choice.metric}: {', '.join(tie.name for tie in choice.ties)}")
    if choice.missed is not None:
        lines += list(choice.missed.helps)
    if not task.budget.quality and not met:
        lines.append("budget: missed")
    elif not met:
        lines.append("budget: missed on test" if choice.met else "budget: missed, the nearest candidate was kept")
    else:
        lines.append("budget: met")
    return lines
