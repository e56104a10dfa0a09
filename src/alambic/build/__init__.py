"""Build: the only place where all stages meet. A task in, a measured, chosen and sealed bundle out.

    from alambic import build
    result = build("task.toml", out="runs/tickets")

Every stage is cached in the run folder: a second build with nothing changed does no work, and a killed one goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alambic.build.classifier import build_classifier, plan_classifier
from alambic.build.plan import Plan
from alambic.build.result import BuildResult
from alambic.events import Event, Work, drain
from alambic.task import Task, load_task

__all__ = ["BuildResult", "build", "build_events", "plan_events"]


def build(
    task: Task | Path | str, *, out: Path | str | None = None, on_event: Callable[[Event], None] | None = None
) -> BuildResult:
    """Build `task` into the run folder `out` (``runs/<task name>`` by default) and return the result.

    Raises:
        AlambicError: see its subclasses; what was finished is kept in the run folder.
    """
    loaded = task if isinstance(task, Task) else load_task(task)
    run = Path(out) if out is not None else Path("runs") / loaded.name
    return drain(build_events(loaded, run), on_event)


def plan_events(task: Task, run: Path) -> Work[Plan]:
    """Validate, read the rows, predict the time, and stop; `run` keeps the split and the timing."""
    if task.writes:
        from alambic.build.writing import plan_writer

        made = yield from plan_writer(task, run)
        return made
    made = yield from plan_classifier(task, run)
    return made


def build_events(task: Task, run: Path) -> Work[BuildResult]:
    """Build `task` into the folder `run`; a generator of events that returns the result."""
    if task.writes:
        from alambic.build.writing import build_writer

        result = yield from build_writer(task, run)
        return result
    result = yield from build_classifier(task, run)
    return result
