"""`alambic compare`: several bundles on the same rows, timed in turn in one run."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Labelled rows.")
@click.option("--text", help="Text column; guessed when absent.")
@click.option("--label", help="Label column; guessed when absent.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each engine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(
    bundles: tuple[Path, ...], data: Path, text: str | None, label: str | None, threads: int | None, as_json: bool
) -> None:
    """Measure BUNDLES side by side: same rows, times taken in turn, differences with paired intervals."""
    from alambic.bundle import open_bundle
    from alambic.cli.measure import labelled_rows
    from alambic.cli.progress import shown
    from alambic.cli.table import interval, number, text_table
    from alambic.events import drain
    from alambic.measure.compare import compare_bundles

    with shown(quiet=as_json) as listener:
        rows = labelled_rows(data, open_bundle(bundles[0]).manifest, text=text, label=label, listener=listener)
        records = drain(compare_bundles(bundles, rows, threads=threads), listener)
    if as_json:
        click.echo(json.dumps(records, ensure_ascii=False))
        return
    metric = next(iter(records[0]["quality"]))
    header = ["bundle", f"{metric} %", "difference, points", "p50 ms", "p95 ms", "size MB"]
    table = [
        [
            r["bundle"],
            interval(r["quality"][metric], scale=100),
            interval(r.get("difference"), scale=100, digits=2),
            number(r["speed"]["p50_ms"], 2),
            number(r["speed"]["p95_ms"], 2),
            number(r["size_mb"]),
        ]
        for r in records
    ]
    click.echo(
        text_table(header, table) + f"\nn = {records[0]['n']:,}; differences are to the first, 95 % paired bootstrap"
    )
