"""The build of a classifier: fit, pack and measure each candidate on dev rows, choose, refit, score once, seal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from alambic.build.check import audit_rows
from alambic.build.context import Context
from alambic.build.final import Final, finish, is_written, write_result
from alambic.build.outcome import candidate_lines, sentences
from alambic.build.plan import Plan, plan
from alambic.build.prepare import find_base, prepare
from alambic.build.result import BuildResult
from alambic.build.trial import Trial, try_candidate
from alambic.bundle import open_bundle
from alambic.events import Note, Work
from alambic.measure.frontier import Choice, check_limits, choose
from alambic.report.page import Report, write_page
from alambic.report.plots import write_tradeoff
from alambic.task import Task
from alambic.workspace import StageSpec, Workspace, on_disk


def plan_classifier(task: Task, run: Path) -> Work[Plan]:
    """Validate, read the rows, predict the time, and stop; `run` keeps the split and the timing."""
    base = find_base(task)
    workspace = Workspace(run)
    with workspace.locked():
        ctx = yield from prepare(task, base, workspace)
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
        audit = yield from _audit(ctx)
        made = yield from plan(ctx)
        for note in (*made.notes, *_announce(made)):
            yield Note(note)
        trials = []
        for candidate in made.candidates:
            trials.append((yield from try_candidate(ctx, candidate, made.folds)))
        choice = choose([trial.point for trial in trials], task.budget, seed=task.seed)
        winner = next(trial for trial in trials if trial.name == choice.chosen)
        final = yield from finish(ctx, winner, run)
        result = _result(ctx, made, trials, choice, final)
        report = run / "report.html"
        record = {**result, "report": str(report)}
        ran = bool(ctx.workspace.ran) or not is_written(run, record)
        if ran:
            with on_disk(run):
                _write_report(_report(ctx, made, trials, choice, final, audit), run)
                write_result(run, record)
    seconds = time.perf_counter() - began
    if not ran:
        yield Note("nothing changed: no work was done, every stage was kept")
    return BuildResult(
        bundle=final.bundle,
        report=report,
        chosen=choice.chosen,
        candidates=tuple(result["candidates"]),
        budget=result["budget"],
        sentences=tuple(result["sentences"]),
        sample=_sample(ctx),
        seconds=seconds,
        ran=ran,
    )


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


def _result(ctx: Context, made: Plan, trials: list[Trial], choice: Choice, final: Final) -> dict[str, Any]:
    """The figures of a build as JSON; nothing that changes from one run to the next with the same stages."""
    checks = check_limits(final.point, ctx.task.budget)
    met = all(check.met for check in checks)
    limits = [{k: v for k, v in vars(check).items() if k != "gap"} for check in checks]
    return {
        "task": ctx.task.name,
        "bundle": str(final.bundle),
        "chosen": choice.chosen,
        "candidates": candidate_lines(trials, choice),
        "choice": choice.to_dict(),
        "test": final.quality.to_dict(),
        "test_costs": final.costs,
        "budget": {"met": met, "surely": all(c.surely for c in checks), "on": "test", "limits": limits},
        "sentences": sentences(ctx.task, choice, final.quality.scores, final.point, met),
        "predicted_seconds": round(made.seconds, 1),
    }


def _report(
    ctx: Context, made: Plan, trials: list[Trial], choice: Choice, final: Final, audit: dict[str, Any]
) -> Report:
    """Gather what the page shows."""
    winner = next(trial for trial in trials if trial.name == choice.chosen)
    return Report(
        task=ctx.task.name,
        description=ctx.task.task.description,
        choice=choice,
        points=tuple(trial.point for trial in trials),
        budget=ctx.task.budget,
        dev=winner.quality,
        test=final.quality,
        shipped=final.point,
        costs=final.costs,
        audit=audit,
        versions=ctx.machine["versions"],
        commands=(
            ("alambic", "build", str(ctx.task.path)),
            ("alambic", "predict", str(final.bundle), _sample(ctx)),
            ("alambic", "serve", str(final.bundle)),
        ),
        notes=made.notes,
        created=open_bundle(final.bundle).manifest.created,
    )


def _write_report(report: Report, run: Path) -> Path:
    """Write the page and the plot beside the bundle."""
    for suffix in ("png", "svg"):
        write_tradeoff(report.points, report.choice, report.budget, run / f"tradeoff.{suffix}")
    return write_page(report, run / "report.html")
