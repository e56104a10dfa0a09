"""`alambic new`: a first task file and a few rows to replace."""

from __future__ import annotations

import re
from pathlib import Path

import click

_TASK = """\
# What a text goes in as, and what must come out. Every key: alambic check --schema, or docs/guides/task-file.md
[task]
name = "{name}"
kind = "classify"
description = "Say in one sentence what the model decides."

[data]
train = "train.csv"          # csv, tsv, jsonl, parquet, or a folder of .txt files per label
text = "text"
label = "label"

[budget]                     # optional: what the bundle must meet
quality = {{ macro_f1 = 0.80 }}
p95_ms = 50
size_mb = 60
build_minutes = 10
"""
_ROWS = """\
text,label
"The washing machine shows E18 and does not drain",breakdown
"Le four ne chauffe plus depuis hier soir",breakdown
"The dishwasher stops in the middle of the programme",breakdown
"Puis-je décaler le rendez-vous de jeudi ?",appointment
"Nobody came this morning, can you send someone on Monday?",appointment
"Je voudrais confirmer le passage du technicien à 14 h",appointment
"I was charged twice for order 4412",billing
"Merci de m'envoyer la facture de mars",billing
"When will the refund reach my account?",billing
"""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def new(folder: Path) -> None:
    """Write a first task file and example rows into FOLDER."""
    from alambic.errors import WorkspaceError
    from alambic.workspace import on_disk

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:64] or "task"
    files = {"task.toml": _TASK.format(name=name), "train.csv": _ROWS}
    for file in files:
        if (folder / file).exists():
            raise WorkspaceError(f"{folder / file}: exists already", hint="give another folder")
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text, "utf-8")
    click.echo(
        f"wrote {folder / 'task.toml'} and {folder / 'train.csv'}: put your rows there (20 or more a label), then"
    )
    click.echo(f"  alambic check {folder / 'task.toml'}\n  alambic build {folder / 'task.toml'}")
