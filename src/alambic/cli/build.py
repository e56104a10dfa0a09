"""`alambic build`: from a task file to a measured bundle."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alambic.build import BuildResult
    from alambic.build.plan import Plan


@click.command()
@click.argument("task", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<task name>]")
@click.option("--dry-run", is_flag=True, help="Validate, read the data, predict the time, and stop.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@click.pass_context
def build(ctx: click.Context, task: Path, out: Path | None, dry_run: bool, as_json: bool) -> None:
    """Build the smallest model that meets the budget of TASK.

    Interrupt it as you like: finished stages are kept, and the same command goes on from there.
    """
    from alambic.build import build_events, plan_events
    from alambic.build.crew import crew, processes
    from alambic.cli.progress import shown
    from alambic.events import Note, drain
    from alambic.task import load_task

    with crew() as leads:
        if not leads:  # started by torchrun: this process has done its share of the first one's trainings
            return
        loaded = load_task(task)
        run = out if out is not None else Path("runs") / loaded.name
        with shown() as listener:
            if processes() > 1 and not loaded.writes:
                listener(Note(f"kind {loaded.kind!r} trains in one process: the others wait", "warning"))
            if dry_run:
                made = drain(plan_events(loaded, run), listener)
                if as_json:
                    click.echo(json.dumps(_plan(made), ensure_ascii=False))
                return
            result = drain(build_events(loaded, run), listener)
    click.echo(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else _summary(result))
    ctx.exit(0 if result.met else 3)


def _plan(made: Plan) -> dict[str, Any]:
    return {
        "candidates": [candidate.name for candidate in made.candidates],
        "folds": len(made.folds),
        "n": sum(len(fold.dev) for fold in made.folds),
        "seconds": round(made.seconds, 1),
        "notes": list(made.notes),
    }


def _summary(result: BuildResult) -> str:
    from alambic.cli.table import candidates_table

    command = own_command()
    lines = ["", candidates_table(result.candidates, result.chosen), "", *result.sentences, ""]
    lines += [
        f"  bundle   {result.bundle}",
        f"  report   {result.report}",
        "",
        "next:",
        f'  {command} predict {result.bundle} "{result.sample}"',
        f"  {command} serve {result.bundle}",
    ]
    return "\n".join(lines)


def own_command() -> str:
    """Return what to type to call this same alambic from the current folder."""
    script = Path(sys.executable).with_name("alambic")
    found = shutil.which("alambic")
    if not script.exists() or (found is not None and Path(found).resolve() == script.resolve()):
        return "alambic"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
