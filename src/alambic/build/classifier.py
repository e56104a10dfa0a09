"""The build of a classifier: fit, pack and measure each candidate on dev rows, choose, refit, score once, seal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from alambic.build.audit import audit_trials
from alambic.build.chain import check_rows, try_chains
from alambic.build.check import audit_rows
from alambic.build.context import Context
from alambic.build.final import finish
from alambic.build.outcome import Ended, conclude
from alambic.build.plan import Plan, plan
from alambic.build.prepare import find_base, prepare
from alambic.build.promises import promise_checks, promise_sentences
from alambic.build.result import BuildResult
from alambic.build.trial import deciding_rows, try_candidate
from alambic.events import Note, Work
from alambic.kinds.cascade import is_cascade
from alambic.measure.frontier import choose
from alambic.task import Task
from alambic.workspace import StageSpec, Workspace


def plan_classifier(task: Task, run: Path) -> Work[Plan]:
    """Validate, read the rows, predict the time, and stop; `run` keeps the split and the timing."""
    base = find_base(task)
    workspace = Workspace(run)
    with workspace.locked():
        ctx = yield from prepare(task, base, workspace)
        check_rows(task, ctx.folds)
        made = yield from plan(ctx)
    for note in (*made.notes, *_announce(made)):
        yield Note(note)
    return made


def build_classifier(task: Task, run: Path) -> Work[BuildResult]:
    """Build `task` into the folder `run`; a generator of events that returns the result."""
    began = time.perf_counter()
    base = find_base(task)
    workspace = Workspace(run)
    with workspace.locked():
        ctx = yield from prepare(task, base, workspace)
        check_rows(task, ctx.folds)
        audit = yield from _audit(ctx)
        made = yield from plan(ctx)
        for note in (*made.notes, *_announce(made)):
            yield Note(note)
        singles = []
        for candidate in made.candidates:
            if not is_cascade(candidate.name):
                singles.append((yield from try_candidate(ctx, candidate, made.folds)))
        trials = [*singles, *(yield from try_chains(ctx, made.candidates, made.folds, singles))]
        choice = choose([trial.point for trial in trials], task.budget, seed=task.seed)
        winner = next(trial for trial in trials if trial.name == choice.chosen)
        final = yield from finish(ctx, winner, run)
        ended = Ended(
            task=task,
            run=run,
            made=made,
            trials=trials,
            choice=choice,
            dev=winner.quality,
            test=final.quality,
            bundle=final.bundle,
            point=final.point,
            costs=final.costs,
            audit=audit,
            versions=ctx.machine["versions"],
            sample=_sample(ctx),
            labels=audit_trials(ctx, singles, deciding_rows(made.folds)),
            remarks=(*final.chain, *promise_sentences(final.decision, final.trust)),
            promises=promise_checks(task, final.decision, final.trust),
            trust=final.trust,
        )
        result = yield from conclude(ended, worked=bool(ctx.workspace.ran), began=began)
    return result


def _audit(ctx: Context) -> Work[dict[str, Any]]:
    """Audit the rows once, as a stage."""
    inputs = {"train": ctx.train.digest, "test": ctx.test.digest, "base": ctx.base.digest if ctx.base else "none"}

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        return audit_rows(ctx.splits, ctx.base).to_dict()

    stage = yield from ctx.workspace.run(StageSpec("audit", {}, inputs), work)
    return stage.result


def _announce(made: Plan) -> tuple[str, ...]:
    names = ", ".join(c.name for c in made.candidates)
    rows = sum(len(f.dev) for f in made.folds)
    return (
        f"candidates: {names}; {len(made.folds)} fit(s) each, {rows:,} rows decide",
        f"predicted time: about {made.seconds / 60:.1f} min on this machine",
    )


def _sample(ctx: Context) -> str:
    """Return a short real text for the command that the user types next."""
    texts = [t for t in ctx.test.texts if 20 <= len(t) <= 70 and not set(t) & set('"\n$`!\\')]
    return texts[0] if texts else "your text"
