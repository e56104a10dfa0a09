"""`alambic show`: what a bundle or a run holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(path: Path, as_json: bool) -> None:
    """Show the bundle or the run folder at PATH."""
    from alambic.bundle import open_bundle

    result = path / "result.json"
    if result.is_file():
        record = json.loads(result.read_text("utf-8"))
        click.echo(json.dumps(record, ensure_ascii=False) if as_json else _run(record))
        return
    bundle = open_bundle(path)
    record = bundle.manifest.model_dump(mode="json", exclude={"golden", "golden_chats", "files", "seal"})
    record["size_mb"] = round(bundle.size_bytes / 1e6, 2)
    click.echo(json.dumps(record, ensure_ascii=False) if as_json else _bundle(record))


def _run(record: dict[str, Any]) -> str:
    from alambic.cli.table import candidates_table

    return "\n".join(
        [
            candidates_table(record["candidates"], record["chosen"]),
            "",
            *record["sentences"],
            "",
            f"bundle  {record['bundle']}",
            f"report  {record['report']}",
        ]
    )


def _bundle(record: dict[str, Any]) -> str:
    from alambic.cli.table import interval

    labels = record["labels"]
    base = (record["base"] or {}).get("name", "none")
    what = f"{record['kind']}, {len(labels)} labels" if labels else record["kind"]
    lines = [f"{record['name']} ({what}), candidate {record['candidate']}"]
    if labels:
        lines.append(f"  labels    {', '.join(labels[:12])}{' ...' if len(labels) > 12 else ''}")
    lines += [
        f"  parts     {' -> '.join(p['name'] + ' (' + p['engine'] + ')' for p in record['parts'])}",
        f"  base      {base}",
        f"  size      {record['size_mb']} MB",
        f"  licences  {', '.join(f'{k}: {v}' for k, v in record['licences'].items())}",
        f"  created   {record['created']} by alambic {record['alambic']}",
    ]
    for part, scores in record["scores"].items():
        for name, value in scores.items():
            if isinstance(value, dict) and "low" in value:
                lines.append(f"  {part:<9} {name} {interval(value, scale=100)} %  n = {scores['n']:,}")
    return "\n".join(lines)
