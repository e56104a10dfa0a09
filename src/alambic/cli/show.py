"""`alambic show`: what a bundle or a run holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alambic.bundle import Bundle


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
    if (shared := _shared(bundle)) is not None:
        record["shared"] = shared
    click.echo(json.dumps(record, ensure_ascii=False) if as_json else _bundle(record))


def _shared(bundle: Bundle) -> dict[str, Any] | None:
    """Return what other bundles may hold too: the base that this one keeps an adapter beside."""
    from alambic.engines.bundle_writer import shared_base

    digest = shared_base(bundle) if bundle.manifest.writer is not None else None
    if digest is None:
        return None
    part = bundle.manifest.part(bundle.manifest.entry)
    files = bundle.manifest.files.items()
    size = sum(entry.bytes for name, entry in files if name.startswith(part.folder + "/"))
    own = bundle.size_bytes - size
    return {"part": part.name, "digest": digest, "mb": round(size / 1e6, 2), "own_mb": round(own / 1e6, 2)}


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


def _parts(record: dict[str, Any]) -> str:
    named = {part["name"]: f"{part['name']} ({part['engine']})" for part in record["parts"]}
    writer = record["writer"] or {}
    beside = [named.pop(writer[role]) for role in ("adapter", "draft") if writer.get(role)]
    if record["cascade"] is None:
        return " + ".join([" -> ".join(named.values()), *beside])
    stages = []
    for stage in record["cascade"]["stages"]:
        own = " -> ".join(text for name, text in named.items() if name.startswith(stage["name"] + "."))
        stages.append(f"{own} from confidence {stage['threshold']:.4f}" if stage["threshold"] > 0 else own)
    return ", then ".join(stages)


def _bundle(record: dict[str, Any]) -> str:
    from alambic.cli.table import interval

    labels = record["labels"]
    base = (record["base"] or {}).get("name", "none")
    what = f"{record['kind']}, {len(labels)} labels" if labels else record["kind"]
    lines = [f"{record['name']} ({what}), candidate {record['candidate']}"]
    if labels:
        lines.append(f"  labels    {', '.join(labels[:12])}{' ...' if len(labels) > 12 else ''}")
    lines += [
        f"  parts     {_parts(record)}",
        f"  base      {base}",
        f"  size      {record['size_mb']} MB",
        f"  licences  {', '.join(f'{k}: {v}' for k, v in record['licences'].items())}",
        f"  created   {record['created']} by alambic {record['alambic']}",
    ]
    if (remote := record["remote"]) is not None:
        key = f", key from {remote['key_env']}" if remote["key_env"] else ""
        asked = "asked with --remote only, about texts abstained from"
        lines.append(f"  remote    {remote['model']} at {remote['url']}{key}: {asked}")
    if (shared := record.get("shared")) is not None:
        lines.append(
            f"  shared    {shared['part']}, {shared['mb']} MB, digest {shared['digest'][:12]}: bundles with the same "
            f"one, served together, load it once; its own: {shared['own_mb']} MB"
        )
    for part, scores in record["scores"].items():
        for name, value in scores.items():
            if isinstance(value, dict) and "low" in value:
                lines.append(f"  {part:<9} {name} {interval(value, scale=100)} %  n = {scores['n']:,}")
    return "\n".join(lines)
