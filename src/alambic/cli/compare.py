"""`alambic compare`: several bundles (and remote models) on the same rows, timed in turn in one run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alambic.engines.writer import Writer
    from alambic.events import Work

_REMOTE = "remote:"


@click.command()
@click.argument("bundles", nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Rows with the expected answers.")
@click.option("--text", help="Text column; guessed when absent.")
@click.option("--label", help="Label column; guessed when absent.")
@click.option("--output", help="Column of the answers, of bundles that write; guessed when absent.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows written, of bundles that write; all when absent.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each engine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(bundles: tuple[str, ...], data: Path, threads: int | None, as_json: bool, **options: Any) -> None:
    """Measure BUNDLES side by side: same rows, times taken in turn, differences with paired intervals.

    Beside bundles that write, remote:NAME is a remote model of `alambic bases --kind remote`: the rows are sent there.
    """
    from alambic.bundle import open_bundle
    from alambic.cli.progress import shown
    from alambic.events import drain

    local = [name for name in bundles if not name.startswith(_REMOTE)]
    if not local:
        raise click.UsageError("name at least one bundle: it says what the task is")
    writes = open_bundle(local[0]).manifest.writer is not None
    if not writes and len(local) < len(bundles):
        raise click.UsageError("remote models write texts; these bundles give labels")
    with shown(quiet=as_json) as listener:
        work = _writers(bundles, local[0], data, threads, options) if writes else _labels(local, data, threads, options)
        records = drain(work, listener)
    click.echo(json.dumps(records, ensure_ascii=False) if as_json else _table(records))


def _labels(bundles: list[str], data: Path, threads: int | None, options: dict[str, Any]) -> Work[list[dict[str, Any]]]:
    from alambic.bundle import open_bundle
    from alambic.cli.measure import labelled_rows
    from alambic.events import Note
    from alambic.measure.compare import compare_bundles

    notes: list[Note] = []
    manifest = open_bundle(bundles[0]).manifest
    rows = labelled_rows(data, manifest, text=options["text"], label=options["label"], listener=notes.append)
    yield from notes
    records = yield from compare_bundles([Path(name) for name in bundles], rows, threads=threads)
    return records


def _writers(
    names: tuple[str, ...], first: str, data: Path, threads: int | None, options: dict[str, Any]
) -> Work[list[dict[str, Any]]]:
    from alambic.data.read_chats import read_chats
    from alambic.engines.bundle_writer import BundleWriter, open_writer
    from alambic.events import Note
    from alambic.measure.compare_writers import compare_writers
    from alambic.measure.memory import size_mb
    from alambic.task import DataSpec

    with ExitStack() as stack:
        own: BundleWriter = stack.enter_context(open_writer(first, threads=threads))
        spec = DataSpec(train=str(data), text=options["text"], output=options["output"])  # type: ignore[call-arg]
        # The prompt and the system message of the task are written into the rows, so that all are asked the same.
        read = read_chats(data, spec, system=own.spec.system, prompt=own.spec.prompt)
        for note in read.notes:
            yield Note(note)
        rows = read.dataset.take(range(min(len(read.dataset), options["rows"] or len(read.dataset))))
        writers: dict[str, Writer] = {}
        for name in names:
            if name.startswith(_REMOTE):
                writers[name] = _remote(name.removeprefix(_REMOTE))
                stack.callback(writers[name].close)
            else:
                writers[name] = own if name == first else stack.enter_context(open_writer(name, threads=threads))
        records = yield from compare_writers(writers, rows, kind=own.kind, sampling=own.sampling)
    for record in records:
        if not record["bundle"].startswith(_REMOTE):
            record["size_mb"] = size_mb(Path(record["bundle"]))
    return records


def _remote(name: str) -> Writer:
    from alambic.engines.remote import Remote
    from alambic.engines.remote_piece import Prices, RemoteSpec
    from alambic.model.catalogue import find_remote

    entry = find_remote(name)
    if entry.url is None or entry.model is None:
        raise click.UsageError(
            f"{name} has no address of its own; name a remote model of `alambic bases --kind remote`"
        )
    known = entry.price_in is not None and entry.price_out is not None
    return Remote(
        RemoteSpec(
            entry.api,
            entry.url,
            entry.model,
            key_env=entry.key_env,
            context_tokens=entry.context_tokens or 128_000,
            max_output_tokens=entry.max_output_tokens,
            prices=Prices(entry.price_in, entry.price_out) if known else None,  # type: ignore[arg-type]
            sampling=entry.sampling,
            body=entry.body,
        )
    )


def _table(records: list[dict[str, Any]]) -> str:
    from alambic.cli.table import interval, number, text_table

    metric = next(iter(records[0]["quality"]))
    header = ["bundle", f"{metric} %", "difference, points", "p50 ms", "p95 ms", "size MB"]
    table = [
        [
            r["bundle"],
            interval(r["quality"][metric], scale=100),
            interval(r.get("difference"), scale=100, digits=2),
            number(r["speed"]["p50_ms"], 2),
            number(r["speed"]["p95_ms"], 2),
            number(r["size_mb"]) if "size_mb" in r else "remote",
        ]
        for r in records
    ]
    costs = [f"\n{r['bundle']}: {r['endpoint']}" for r in records if "endpoint" in r]
    said = f"\nn = {records[0]['n']:,}; differences are to the first, 95 % paired bootstrap"
    return text_table(header, table) + said + "".join(costs)
