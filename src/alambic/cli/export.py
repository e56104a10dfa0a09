"""`alambic export`: a bundle, or a base, in another form."""

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
@click.option(
    "--precision",
    help="Of a GGUF file: F16, BF16, F32, Q8_0, Q4_0, or a K-form  [default: Q8_0]. Of a base in OpenVINO: fp32, fp16, "
    "int8, int4  [default: int8].",
)
def export(bundle: Path, form: str, out: Path, run: Path | None, precision: str | None) -> None:
    """Write BUNDLE in another form; or a base, by its name in `alambic bases` or its folder."""
    from alambic.bundle import open_bundle, to_file
    from alambic.errors import WorkspaceError

    if out.exists():
        raise WorkspaceError(f"{out}: exists already", hint="give another name with --out")
    if _is_base(bundle):
        _export_base(bundle, form, out, precision)
        return
    opened = open_bundle(bundle)
    if form == "file":
        click.echo(to_file(opened, out))
        return
    from alambic.build.export import export_model
    from alambic.cli.progress import shown
    from alambic.events import drain

    if precision is not None and form != "gguf":
        raise click.UsageError("--precision goes with --to gguf, or with --to openvino of a base")
    folder = run if run is not None else bundle.resolve().parent
    with shown() as listener:
        click.echo(drain(export_model(opened, form, out, run=folder, precision=precision), listener))


def _is_base(name: Path) -> bool:
    """Tell whether `name` is a base, not a bundle: a folder with a config.json alone, or a name of the catalogue."""
    from alambic.manifest import MANIFEST
    from alambic.model.catalogue import catalogue

    if name.exists():
        return (name / "config.json").is_file() and not (name / MANIFEST).is_file()
    return str(name) in catalogue()


def _export_base(name: Path, form: str, out: Path, precision: str | None) -> None:
    from alambic.build.export_base import export_base
    from alambic.cli.progress import shown
    from alambic.events import drain

    if form == "file":
        raise click.UsageError("--to file is for bundles; a base is a folder already (alambic bases show NAME)")
    if precision is not None and form not in ("gguf", "openvino"):
        raise click.UsageError("--precision goes with --to gguf or --to openvino")
    with shown() as listener:
        click.echo(drain(export_base(str(name), form, out, precision=precision), listener))
