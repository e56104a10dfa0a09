"""`alambic check`: every cheap validation that build would do, and the data audit."""

from __future__ import annotations

import json
from pathlib import Path

import click


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
    from alambic.build.check import check_task
    from alambic.cli.progress import shown
    from alambic.data.check import render
    from alambic.events import drain

    loaded = load_task(task)
    with shown(quiet=as_json) as listener:
        audit = drain(check_task(loaded), listener)
    click.echo(json.dumps(audit.to_dict(), ensure_ascii=False) if as_json else render(audit))
