"""`alambic check`: every cheap validation that build would do, the data audit, and the review of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alambic.events import Work
    from alambic.task import Task


@click.command()
@click.argument("task", type=click.Path(path_type=Path), required=False)
@click.option("--audit", is_flag=True, help="Find labels that look wrong; write the rows to review as CSV.")
@click.option(
    "--apply", "decided", type=click.Path(path_type=Path), metavar="FILE",
    help="Apply the decisions written in an audit's CSV: write a new data file.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="--audit: run folder.  [default: runs/<task name>]")
@click.option(
    "--output", type=click.Path(path_type=Path),
    help="File to write.  [default: --audit: RUN/labels-to-review.csv; --apply: NAME.reviewed.csv beside the data]",
)  # fmt: skip
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the task file, for editors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(
    task: Path | None, audit: bool, decided: Path | None, out: Path | None, output: Path | None, schema: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Validate TASK and audit its data; nothing is written but by --audit and --apply.

    --audit fits cheap models out of fold, ranks the rows by what reading them should bring, and tells what 100 more
    labelled rows would.
    """
    from alambic.task import json_schema, load_task

    if schema:
        click.echo(json.dumps(json_schema(), indent=1))
        return
    if task is None:
        raise click.UsageError("name a task file, or --schema")
    if audit and decided is not None:
        raise click.UsageError("--audit writes the list to review, --apply reads it back: one at a time")
    if (out is not None and not audit) or (output is not None and not audit and decided is None):
        raise click.UsageError("--out goes with --audit, --output with --audit or --apply")
    from alambic.cli.progress import shown
    from alambic.events import drain

    loaded = load_task(task)
    if (audit or decided is not None) and loaded.writes:
        raise click.UsageError(f"--audit and --apply are for labels; kind {loaded.kind!r} writes texts")
    with shown(quiet=as_json) as listener:
        if decided is not None:
            from alambic.cli.check_labels import apply_audit

            record, text = apply_audit(loaded, decided, output)
        elif audit:
            from alambic.cli.check_labels import write_audit

            run = out if out is not None else Path("runs") / loaded.name
            record, text = drain(write_audit(loaded, run, output), listener)
        else:
            record, text = drain(_audit(loaded), listener)
    click.echo(json.dumps(record, ensure_ascii=False) if as_json else text)


def _audit(task: Task) -> Work[tuple[dict[str, Any], str]]:
    """Audit the rows of a task of any kind; return the figures and the page of text."""
    if task.writes:
        from alambic.build.writing.audit import check_writer
        from alambic.data import chat_check, pair_check

        chats, pairs = yield from check_writer(task)
        if pairs is None:
            return chats.to_dict(), chat_check.render(chats)
        texts = (chat_check.render(chats), pair_check.render(pairs))
        return {**chats.to_dict(), "preferences": pairs.to_dict()}, "\n\n".join(texts)
    from alambic.build.check import check_task
    from alambic.data.check import render

    audit = yield from check_task(task)
    return audit.to_dict(), render(audit)
