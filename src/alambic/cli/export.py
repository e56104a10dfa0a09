"""`alambic export`: a bundle in another form."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["file", "gguf", "openvino", "onnx", "hf"]),
    required=True,
    help="file: one .alambic file; gguf: for llama.cpp and Ollama; openvino: its folder; onnx: model.onnx and "
    "tokenizer.json; hf: Hugging Face layout (of a classifier: sentence-transformers').",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="File (file) or folder (all others) to write."
)
@click.option(
    "--run", type=click.Path(path_type=Path), help="Run folder that holds the model.  [default: the bundle's]"
)
@click.option("--precision", help="Of a GGUF file: F16, BF16, F32, Q8_0, Q4_0, or a K-form.  [default: Q8_0]")
def export(bundle: Path, form: str, out: Path, run: Path | None, precision: str | None) -> None:
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
    from alambic.cli.progress import shown
    from alambic.events import drain

    if precision is not None and form != "gguf":
        raise click.UsageError("--precision goes with --to gguf")
    folder = run if run is not None else bundle.resolve().parent
    with shown() as listener:
        click.echo(drain(export_model(opened, form, out, run=folder, precision=precision), listener))
