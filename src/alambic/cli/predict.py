"""`alambic predict`: one text, lines of stdin, or a file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from alambic.engines import ClassifyEngine
    from alambic.engines.bundle_writer import BundleWriter


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--input", "source", type=click.Path(path_type=Path), help="File of rows (csv, tsv, jsonl, parquet).")
@click.option("--output", "target", type=click.Path(path_type=Path), help="JSON Lines file to write.")
@click.option("--text-column", help="Column of the texts in --input; guessed when absent.")
@click.option("--top-k", type=click.IntRange(min=1), help="Also give the probabilities of the K likeliest labels.")
@click.option("--why", type=click.IntRange(min=1), help="Also show the N training rows nearest to each text.")
@click.option("--remote", is_flag=True, help="Send what the bundle abstains from to the endpoint that it names.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option("--force", is_flag=True, help="Overwrite --output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def predict(bundle: Path, text: str | None, source: Path | None, target: Path | None, **options: object) -> None:
    """Predict the labels of TEXT, of each line of stdin, or of each row of --input; or write the answers."""
    import alambic

    if (source is None) != (target is None):
        raise click.UsageError("--input and --output go together")
    if text is not None and source is not None:
        raise click.UsageError("give TEXT or --input, not both")
    if text is not None and not text.strip():
        raise click.UsageError("TEXT is empty")
    with alambic.open(bundle, threads=options["threads"], remote=bool(options["remote"])) as engine:  # type: ignore[arg-type]
        code = 0
        if source is not None and target is not None:
            code = _file(engine, source, target, options)
        elif text is not None:
            _print(engine, text, options)
        else:
            code = _lines(engine, options)
        if options["remote"]:
            click.echo(engine.last.sentence(), err=True)  # type: ignore[union-attr]  # it was opened with one
    click.get_current_context().exit(code)


def _stdin() -> TextIO:
    if sys.stdin.isatty():
        click.echo("type a text and Enter; Ctrl-D ends", err=True)
    return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")


def _lines(engine: ClassifyEngine | BundleWriter, options: dict[str, object]) -> int:
    """Answer each line that is not blank; one that cannot be answered stops nothing."""
    from alambic.errors import InputTooLong

    failed = 0
    for number, line in enumerate(_stdin(), 1):
        if not line.strip():
            continue
        try:
            _print(engine, line.rstrip("\r\n"), options)
        except InputTooLong as error:
            failed += 1
            said = f"stdin:{number}: {error.message}"
            click.echo(json.dumps({"error": said}, ensure_ascii=False) if options["as_json"] else f"error: {said}")
    return 1 if failed else 0


def _print(engine: ClassifyEngine | BundleWriter, text: str, options: dict[str, object]) -> None:
    from alambic.predict_file import predicting

    top_k: int | None = options["top_k"]  # type: ignore[assignment]
    why: int | None = options["why"]  # type: ignore[assignment]
    answer = predicting(engine, top_k=top_k, why=why)([text])[0]
    if options["as_json"]:
        click.echo(json.dumps(answer, ensure_ascii=False))
        return
    if "confidence" not in answer:
        click.echo(answer["prediction"])
        return
    value = answer["prediction"]
    said = ", ".join(value) or "(none)" if isinstance(value, list) else value
    said = f"{said}\t{answer['confidence']:.3f}"
    click.echo(f"{said}\tabstained: {answer['because'].replace('_', ' ')}" if answer["abstained"] else said)
    if "label_set" in answer:
        click.echo(f"  one of: {', '.join(answer['label_set'])}")
    if "answered_by" in answer:
        click.echo(f"  answered by {answer['answered_by']}")
    for name, p in answer.get("scores", {}).items():
        click.echo(f"  {name:<24} {p:.3f}")
    for row in answer.get("reasons", ()):
        shown = row.get("text") or f"sha256 {row['digest'][:12]}"
        click.echo(f"  near {row['similarity']:.3f}  {', '.join(row['labels']) or '(none)'}  {row['where']}  {shown}")


def _file(engine: ClassifyEngine | BundleWriter, source: Path, target: Path, options: dict[str, object]) -> int:
    from alambic.cli.progress import duration, shown
    from alambic.data.read import columns_of
    from alambic.events import Note, drain
    from alambic.predict_file import predict_file, refuse_existing
    from alambic.task import DataSpec

    refuse_existing(target, force=bool(options["force"]))
    named: str | None = options["text_column"]  # type: ignore[assignment]
    guess = columns_of(source, DataSpec(train=str(source), text=named), need_label=False)  # type: ignore[call-arg]
    spec = DataSpec(train=str(source), text=guess.columns.text)  # type: ignore[call-arg]
    seal = engine.bundle.manifest.seal
    top_k: int | None = options["top_k"]  # type: ignore[assignment]
    why: int | None = options["why"]  # type: ignore[assignment]
    with shown(quiet=bool(options["as_json"])) as listener:
        for note in guess.notes:
            listener(Note(note))
        work = predict_file(engine, source, target, spec=spec, bundle_seal=seal, top_k=top_k, why=why)
        result = drain(work, listener)
    line = {
        "rows": result.rows,
        "errors": result.errors,
        "resumed": result.resumed,
        "seconds": round(result.seconds, 3),
    }
    text = f"{result.rows:,} rows in {duration(result.seconds)}, {result.errors:,} in error: {target}"
    click.echo(json.dumps(line) if options["as_json"] else text, err=not options["as_json"])
    return 1 if result.errors else 0
