"""`alambic doctor`: what this machine and this installation can do."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import click

_RUN = ("numpy", "openvino", "openvino-tokenizers", "onnxruntime", "tokenizers")
_BUILD = ("torch", "transformers", "scikit-learn", "nncf", "onnx", "pyarrow", "matplotlib", "rensa")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine and this installation can do, and what to install for the rest."""
    from alambic import __version__
    from alambic.measure.machine import fingerprint

    machine = fingerprint()
    found = {name: _version(name) for name in (*_RUN, *_BUILD)}
    record = {"alambic": __version__, "machine": machine, "libraries": found}
    lacking = [name for name in _RUN if found[name] is None]
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False, default=str))
    else:
        for name, version in {**_facts(machine), "alambic": __version__, **found}.items():
            click.echo(f"{name:<22} {version or 'absent'}")
        click.echo(_advice(lacking, [name for name in _BUILD if found[name] is None]))
    ctx.exit(1 if lacking else 0)


def _facts(machine: dict[str, Any]) -> dict[str, str]:
    """What matters of the machine, in words."""
    cores = f"{machine['cores_usable']} usable of {machine['cores']}"
    rows = {
        "processor": machine.get("cpu", machine["arch"]),
        "cores": cores,
        "instructions": ", ".join(machine["flags"]) or "none that engines look for",
        "memory": f"{machine['ram_gb']} GB" if "ram_gb" in machine else "unknown",
        "system": machine["os"],
        "Python": machine["python"],
    }
    return {name: str(value) for name, value in rows.items()}


def _advice(run: list[str], build: list[str]) -> str:
    if run:
        return f"cannot predict: {', '.join(run)} absent; pip install alambic"
    if build:
        return f"can predict, cannot build: {', '.join(build)} absent; pip install 'alambic[build]'"
    return "can predict and build"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
