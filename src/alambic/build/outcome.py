"""What a build tells, whatever its kind: the figures of each candidate, and the outcome in words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from alambic.build.final import is_written, write_result
from alambic.build.plan import Plan
from alambic.build.result import BuildResult
from alambic.bundle import open_bundle
from alambic.events import Note, Work
from alambic.measure.frontier import Check, Choice, Point, check_limits
from alambic.measure.metrics import Interval
from alambic.measure.quality import Quality
from alambic.measure.written_figures import WrittenFigures
from alambic.report.page import Report, write_page
from alambic.report.plots import write_tradeoff
from alambic.task import Task
from alambic.workspace import on_disk


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


@dataclass(frozen=True)
class Ended:
    """What a build gathered, whatever its kind.

    Attributes:
        task: what was asked.
        run: the run folder.
        made: the plan that was followed.
        trials: candidates measured on the rows that decide.
        choice: which one, and why.
        dev: quality of the chosen one on the rows that decide.
        test: quality of the bundle that ships.
        bundle: where it is.
        point: its place in quality x time x size x energy.
        costs: its costs, as JSON.
        audit: what the check of the data found.
        versions: libraries that made it.
        sample: a text to try.
        preferences: accuracy on dev pairs by candidate, where there are any.
        remarks: further sentences.
        promises: what the task asks of single answers, held against test.
        trust: how calibration and decision did, as JSON; empty for kinds that write.
        labels: the audit of the labels of the rows that decided, as JSON; empty for kinds that write.
    """

    task: Task
    run: Path
    made: Plan
    trials: Sequence[Tried]
    choice: Choice
    dev: Quality | WrittenFigures
    test: Quality | WrittenFigures
    bundle: Path
    point: Point
    costs: dict[str, Any]
    audit: dict[str, Any]
    versions: dict[str, str]
    sample: str
    preferences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    promises: tuple[Check, ...] = ()
    trust: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)


def conclude(ended: Ended, *, worked: bool, began: float) -> Work[BuildResult]:
    """Write result, page and plots, unless an earlier build wrote the very same, and return what the caller gets.

    Args:
        ended: what was gathered.
        worked: a stage had to run.
        began: when the build did (perf_counter).
    """
    run, result = ended.run, _result(ended)
    report = run / "report.html"
    record = {**result, "report": str(report)}
    ran = worked or not is_written(run, record)
    if ran:
        with on_disk(run):
            page = _report(ended)
            for suffix in ("png", "svg"):
                write_tradeoff(page.points, page.choice, page.budget, run / f"tradeoff.{suffix}")
            write_page(page, report)
            write_result(run, record)
    else:
        yield Note("nothing changed: no work was done, every stage was kept")
    return BuildResult(
        bundle=ended.bundle,
        report=report,
        chosen=ended.choice.chosen,
        candidates=tuple(result["candidates"]),
        budget=result["budget"],
        sentences=tuple(result["sentences"]),
        sample=ended.sample,
        seconds=time.perf_counter() - began,
        ran=ran,
    )


def _result(ended: Ended) -> dict[str, Any]:
    """The figures of a build as JSON; nothing that changes from one run to the next with the same stages."""
    checks = (*check_limits(ended.point, ended.task.budget), *ended.promises)
    met = all(check.met for check in checks)
    limits = [{k: v for k, v in vars(check).items() if k != "gap"} for check in checks]
    return {
        "task": ended.task.name,
        "bundle": str(ended.bundle),
        "chosen": ended.choice.chosen,
        "candidates": candidate_lines(ended.trials, ended.choice),
        "choice": ended.choice.to_dict(),
        "test": ended.test.to_dict(),
        "test_costs": ended.costs,
        "budget": {"met": met, "surely": all(c.surely for c in checks), "on": "test", "limits": limits},
        "sentences": [*sentences(ended.task, ended.choice, ended.test.scores, ended.point, met), *ended.remarks],
        "predicted_seconds": round(ended.made.seconds, 1),
        **({"trust": ended.trust} if ended.trust else {}),
    }


def _report(ended: Ended) -> Report:
    """Gather what the page shows."""
    return Report(
        task=ended.task.name,
        description=ended.task.task.description,
        choice=ended.choice,
        points=tuple(trial.point for trial in ended.trials),
        budget=ended.task.budget,
        dev=ended.dev,
        test=ended.test,
        shipped=ended.point,
        costs=ended.costs,
        audit=ended.audit,
        versions=ended.versions,
        commands=(
            ("alambic", "build", str(ended.task.path)),
            ("alambic", "predict", str(ended.bundle), ended.sample),
            ("alambic", "serve", str(ended.bundle)),
        ),
        notes=ended.made.notes,
        created=open_bundle(ended.bundle).manifest.created,
        preferences=ended.preferences,
        promises=ended.promises,
        trust=ended.trust,
        remarks=ended.remarks if ended.trust else (),
        labels=ended.labels,
    )
