"""The build of a model that writes: make, pack and measure each candidate on dev rows, choose, score once, seal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from alambic.build.final import is_written, write_result
from alambic.build.outcome import candidate_lines, sentences
from alambic.build.plan import Plan
from alambic.build.result import BuildResult
from alambic.build.writing.audit import audit_stage
from alambic.build.writing.context import WritingContext
from alambic.build.writing.final import WritingFinal, finish
from alambic.build.writing.plan import plan, sampling_of
from alambic.build.writing.prepare import find_base, prepare
from alambic.build.writing.trial import WritingTrial, try_candidate
from alambic.bundle import open_bundle
from alambic.engines.nearest_answer import last_said
from alambic.events import Note, Work
from alambic.measure.frontier import Choice, check_limits, choose
from alambic.report.page import Report, write_page
from alambic.report.plots import write_tradeoff
from alambic.task import Task
from alambic.workspace import Workspace, on_disk


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
        choice = choose([trial.point for trial in trials], task.budget, seed=task.seed)
        winner = next(trial for trial in trials if trial.name == choice.chosen)
        final = yield from finish(ctx, winner, sampling, run)
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


def _sample(ctx: WritingContext) -> str:
    """Return a short real input for the command that the user types next."""
    texts = [last_said(example.chat) for example in ctx.test.examples]
    short = [t for t in texts if 10 <= len(t) <= 200 and not set(t) & set('"\n$`!\\')]
    return short[0] if short else "your text"


def _result(
    ctx: WritingContext, made: Plan, trials: list[WritingTrial], choice: Choice, final: WritingFinal
) -> dict[str, Any]:
    checks = check_limits(final.point, ctx.task.budget)
    met = all(check.met for check in checks)
    limits = [{k: v for k, v in vars(check).items() if k != "gap"} for check in checks]
    return {
        "task": ctx.task.name,
        "bundle": str(final.bundle),
        "chosen": choice.chosen,
        "candidates": candidate_lines(trials, choice),
        "choice": choice.to_dict(),
        "test": final.written.to_dict(),
        "test_costs": final.costs,
        "budget": {"met": met, "surely": all(c.surely for c in checks), "on": "test", "limits": limits},
        "sentences": sentences(ctx.task, choice, final.written.scores, final.point, met),
        "predicted_seconds": round(made.seconds, 1),
    }


def _report(
    ctx: WritingContext,
    made: Plan,
    trials: list[WritingTrial],
    choice: Choice,
    final: WritingFinal,
    audit: dict[str, Any],
) -> Report:
    """Gather what the page shows."""
    winner = next(trial for trial in trials if trial.name == choice.chosen)
    return Report(
        task=ctx.task.name,
        description=ctx.task.task.description,
        choice=choice,
        points=tuple(trial.point for trial in trials),
        budget=ctx.task.budget,
        dev=winner.written,
        test=final.written,
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
    for suffix in ("png", "svg"):
        write_tradeoff(report.points, report.choice, report.budget, run / f"tradeoff.{suffix}")
    return write_page(report, run / "report.html")
