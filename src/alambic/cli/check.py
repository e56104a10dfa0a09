"""`alambic check`: every cheap validation that build would do, and the data audit."""

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
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the task file, for editors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(task: Path | None, schema: bool, as_json: bool) -> None:
    """Validate TASK and audit its data; nothing is trained and nothing is written."""
    from alambic.task import json_schema, load_task

    if schema:
        click.echo(json.dumps(json_schema(), indent=1))
        return
    if task is None:
        raise click.UsageError("name a task file, or --schema")
    from alambic.cli.progress import shown
    from alambic.events import drain

    loaded = load_task(task)
    with shown(quiet=as_json) as listener:
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
