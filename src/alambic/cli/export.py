"""`alambic export`: a bundle in another form."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["file", "onnx", "hf"]),
    required=True,
    help="file: one .alambic file; onnx: model.onnx and tokenizer.json; hf: sentence-transformers layout.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="File (file) or folder (onnx, hf) to write."
)
@click.option(
    "--run", type=click.Path(path_type=Path), help="Run folder that holds the model.  [default: the bundle's]"
)
def export(bundle: Path, form: str, out: Path, run: Path | None) -> None:
    """Write BUNDLE in another form."""
    from alambic.bundle import open_bundle, to_file
    from alambic.errors import WorkspaceError

    if out.exists():
        raise WorkspaceError(f"{out}: exists already", hint="give another name with --out")
    opened = open_bundle(bundle)
    if form == "file":
        click.echo(to_file(opened, out))
        return
    from alambic.build.export import export_model

    click.echo(export_model(opened, form, out, run=run if run is not None else bundle.resolve().parent))
