"""`alambic measure`: quality, speed, size, memory and energy of a bundle on labelled rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alambic.bundle import Bundle
    from alambic.data.dataset import Dataset
    from alambic.events import Work
    from alambic.manifest import Manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", "data", type=click.Path(path_type=Path), required=True, help="Labelled rows.")
@click.option("--text", "text", help="Text column; guessed when absent.")
@click.option("--label", "label", help="Label column; guessed when absent.")
@click.option("--output", "output", help="Column of the answers, of a bundle that writes; guessed when absent.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows written, of a bundle that writes; all when absent.")
@click.option("--remote", is_flag=True, help="Also send what it abstains from to the endpoint that it names.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def measure(bundle: Path, data: Path, threads: int | None, remote: bool, as_json: bool, **columns: Any) -> None:
    """Measure BUNDLE on this machine."""
    from alambic.bundle import open_bundle
    from alambic.cli.progress import shown
    from alambic.events import drain
    from alambic.measure import measure as measure_bundle

    opened = open_bundle(bundle)
    with shown(quiet=as_json) as listener:
        if opened.manifest.writer is not None and not remote:
            result = drain(_writer(opened, data, threads, columns), listener)
            click.echo(json.dumps(result, ensure_ascii=False) if as_json else render(result))
            return
        rows = labelled_rows(data, opened.manifest, text=columns["text"], label=columns["label"], listener=listener)
        asked = drain(_remote(opened, rows, threads), listener) if remote else None
        result = drain(measure_bundle(bundle, rows, threads=threads), listener).to_dict()
        result = result if asked is None else {**result, "remote": asked}
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else render(result))


def _remote(bundle: Bundle, rows: Dataset, threads: int | None) -> Work[dict[str, Any]]:
    from alambic.engines import open_engine
    from alambic.measure.last_stage import measure_last_stage

    with open_engine(bundle, threads=threads, remote=True) as engine:
        return (yield from measure_last_stage(engine, rows))


def _writer(bundle: Bundle, data: Path, threads: int | None, columns: dict[str, Any]) -> Work[dict[str, Any]]:
    """Measure a bundle that writes on conversations with answers."""
    from alambic.data.read_chats import read_chats
    from alambic.engines.bundle_writer import open_writer
    from alambic.events import Note
    from alambic.measure.writing_costs import measure_writing_costs
    from alambic.measure.written import measure_written
    from alambic.measure.written_figures import WrittenFigures
    from alambic.task import DataSpec

    spec = DataSpec(train=str(data), text=columns["text"], output=columns["output"])  # type: ignore[call-arg]
    read = read_chats(data, spec)
    for note in read.notes:
        yield Note(note)
    with open_writer(bundle, threads=threads) as writer:
        chats = [writer.asked(chat) for chat in read.dataset.chats[: columns["rows"]]]
        written = yield from measure_written(writer, chats, kind=writer.kind, sampling=writer.sampling, split=data.name)
        costs = measure_writing_costs(bundle.path, writer, chats, threads=threads)
    figures = WrittenFigures.of(written)
    quality = {name: score.to_dict() for name, score in figures.scores.items()}
    return {"bundle": str(bundle.source), "n": figures.n, "split": data.name, "quality": quality, **costs.to_dict()}


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
    if "tokens_per_second" in speed:
        lines += [f"  {'first token':<16} {number(speed['ttft_ms'], 2)} ms"]
        lines += [f"  {'writes':<16} {number(speed['tokens_per_second'], 0)} tokens/s"]
    else:
        lines += [f"  {'throughput':<16} {number(speed.get('per_second'), 0)} texts/s"]
    lines += [f"  {'size':<16} {number(result['size_mb'])} MB"]
    lines += [f"  {'peak memory':<16} {number(result.get('peak_ram_mb'), 0)} MB"]
    energy = result["energy"]
    joules = energy.get("j_per_request")
    lines += [f"  {'energy':<16} " + (f"{joules:.4g} J/text ({energy['source']})" if joules else energy["source"])]
    lines += [f"  {'machine':<16} {result['machine'].get('cpu', 'unknown')}"]
    if "remote" in result:
        lines += _remote_lines(result["remote"])
    return "\n".join(lines)


def _remote_lines(asked: dict[str, Any]) -> list[str]:
    from alambic.cli.table import interval

    price = f", {asked['usd']:.4g} USD" if "usd" in asked else ""
    lines = [
        f"  {asked['model']} was asked about {asked['asked']:,} of {asked['n']:,} texts: "
        f"{asked['fits_no_label']:,} fit no label, {asked['failed']:,} not answered{price}"
    ]
    for name, who in (("here", "answered here"), ("remote", "by the remote"), ("together", "together")):
        share = asked[name]
        right = f", right {interval(share['right'], scale=100)} %" if share["answered"] else ""
        lines.append(f"  {who:<16} {share['answered']:,} texts{right}")
    return lines
