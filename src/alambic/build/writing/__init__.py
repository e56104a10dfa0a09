"""The build of a model that writes: make, pack and measure each candidate on dev rows, choose, score once, seal."""

from __future__ import annotations

import time
from pathlib import Path

from alambic.build.outcome import Ended, conclude
from alambic.build.plan import Plan
from alambic.build.result import BuildResult
from alambic.build.writing.audit import audit_stage
from alambic.build.writing.context import WritingContext
from alambic.build.writing.final import finish
from alambic.build.writing.plan import plan, sampling_of
from alambic.build.writing.preferring import preference_lines, scores_of, with_gains
from alambic.build.writing.prepare import find_base, prepare
from alambic.build.writing.trial import try_candidate
from alambic.engines.nearest_answer import last_said
from alambic.events import Note, Work
from alambic.measure.frontier import choose
from alambic.task import Task
from alambic.workspace import Workspace


def plan_writer(task: Task, run: Path) -> Work[Plan]:
    """Validate, read the rows, predict the time, and stop."""
    base = find_base(task)
    workspace = Workspace(run)
    with workspace.locked():
        ctx = yield from prepare(task, base, workspace)
        made = yield from plan(ctx)
    for note in made.notes:
        yield Note(note)
    return made


def build_writer(task: Task, run: Path) -> Work[BuildResult]:
    """Build `task` into the folder `run`; a generator of events that returns the result."""
    began = time.perf_counter()
    base = find_base(task)
    workspace = Workspace(run)
    with workspace.locked():
        ctx = yield from prepare(task, base, workspace)
        audit = yield from audit_stage(ctx)
        made = yield from plan(ctx)
        for note in made.notes:
            yield Note(note)
        sampling = yield from sampling_of(ctx)
        trials = []
        for candidate in made.candidates:
            trials.append((yield from try_candidate(ctx, candidate, sampling)))
        trials = with_gains(trials, seed=task.seed)
        choice = choose([trial.point for trial in trials], task.budget, seed=task.seed)
        winner = next(trial for trial in trials if trial.name == choice.chosen)
        final = yield from finish(ctx, winner, run)
        preferences = scores_of(trials)
        ended = Ended(
            task=task,
            run=run,
            made=made,
            trials=trials,
            choice=choice,
            dev=winner.written,
            test=final.written,
            bundle=final.bundle,
            point=final.point,
            costs=final.costs,
            audit=audit,
            versions=ctx.machine["versions"],
            sample=_sample(ctx),
            preferences=preferences,
            remarks=tuple(preference_lines(preferences)),
        )
        result = yield from conclude(ended, worked=bool(ctx.workspace.ran), began=began)
    return result


def _sample(ctx: WritingContext) -> str:
    """Return a short real input for the command that the user types next."""
    texts = [last_said(example.chat) for example in ctx.test.examples]
    short = [t for t in texts if 10 <= len(t) <= 200 and not set(t) & set('"\n$`!\\')]
    return short[0] if short else "your text"
