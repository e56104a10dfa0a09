"""`alambic measure`: quality, speed, size, memory and energy of a bundle on labelled rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alambic.data.dataset import Dataset
    from alambic.manifest import Manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", "data", type=click.Path(path_type=Path), required=True, help="Labelled rows.")
@click.option("--text", "text", help="Text column; guessed when absent.")
@click.option("--label", "label", help="Label column; guessed when absent.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def measure(bundle: Path, data: Path, text: str | None, label: str | None, threads: int | None, as_json: bool) -> None:
    """Measure BUNDLE on this machine."""
    from alambic.bundle import open_bundle
    from alambic.cli.progress import shown
    from alambic.events import drain
    from alambic.measure import measure as measure_bundle

    opened = open_bundle(bundle)
    with shown(quiet=as_json) as listener:
        rows = labelled_rows(data, opened.manifest, text=text, label=label, listener=listener)
        result = drain(measure_bundle(bundle, rows, threads=threads), listener).to_dict()
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else render(result))


def labelled_rows(data: Path, manifest: Manifest, *, text: str | None, label: str | None, listener: Any) -> Dataset:
    """Read labelled rows for a bundle, telling what was guessed."""
    from alambic.data.read import read_dataset
    from alambic.events import Note
    from alambic.task import DataSpec

    spec = DataSpec(train=str(data), text=text, label=label)  # type: ignore[call-arg]
    read = read_dataset(data, spec, multi_label=manifest.multi_label, labels=tuple(manifest.labels))
    for note in read.notes:
        listener(Note(note))
    return read.dataset


def render(result: dict[str, Any]) -> str:
    """Write a measurement as a page of text."""
    from alambic.cli.table import interval, number

    lines = [f"{result['bundle']}  n = {result['n']:,}"]
    lines += [f"  {name:<16} {interval(v, scale=100)} %" for name, v in result["quality"].items()]
    speed = result["speed"]
    lines += [f"  {'p50, p95':<16} {number(speed['p50_ms'], 2)} ms, {number(speed['p95_ms'], 2)} ms"]
    lines += [f"  {'throughput':<16} {number(speed.get('per_second'), 0)} texts/s"]
    lines += [f"  {'size':<16} {number(result['size_mb'])} MB"]
    lines += [f"  {'peak memory':<16} {number(result.get('peak_ram_mb'), 0)} MB"]
    energy = result["energy"]
    joules = energy.get("j_per_request")
    lines += [f"  {'energy':<16} " + (f"{joules:.4g} J/text ({energy['source']})" if joules else energy["source"])]
    lines += [f"  {'machine':<16} {result['machine'].get('cpu', 'unknown')}"]
    return "\n".join(lines)
