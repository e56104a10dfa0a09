"""`alambic new`: a first task file and a few rows to replace."""

from __future__ import annotations

import json
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


_WRITING = """\
# What a text goes in as, and what must be written. Every key: alambic check --schema, or docs/guides/writing.md
[task]
name = "{name}"
kind = "{kind}"
description = "Say in one sentence what the model writes."

[data]
train = "train.jsonl"{columns}

[base]
name = "scratch"             # a new model of your rows alone; a real base: alambic bases --kind decoder
parameters = 4_000_000
{answer}
[budget]                     # optional: what the bundle must meet
size_mb = 60
build_minutes = 20
"""
_COLUMNS = """        # csv, tsv, jsonl, parquet, or a folder of train, valid and test files
text = "text"                # what is asked
output = "answer"            # what is to be written"""
_SCHEMA = """{
 "type": "object",
 "additionalProperties": false,
 "properties": {
  "appliance": {"type": "string", "maxLength": 40},
  "day": {"type": "string", "maxLength": 40}
 },
 "required": ["appliance"]
}
"""
_ASKED = (
    ("Mon four ne chauffe plus, pouvez-vous passer jeudi ?", "four", "jeudi"),
    ("The dishwasher leaks. Monday would suit me.", "dishwasher", "Monday"),
    ("Le lave-linge affiche E18, je suis là samedi matin.", "lave-linge", "samedi matin"),
    ("My oven trips the fuse, could someone come tomorrow?", "oven", "tomorrow"),
)


def _rows(kind: str) -> str:
    """Return four rows of a kind that writes, as JSON Lines."""
    lines = []
    for text, appliance, day in _ASKED:
        fields = {"appliance": appliance, "day": day}
        answer = json.dumps(fields, ensure_ascii=False) if kind == "extract" else f"{appliance}: {day}"
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        row = {"messages": said} if kind == "chat" else {"text": text, "answer": answer}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def _files(kind: str, name: str) -> dict[str, str]:
    if kind == "classify":
        return {"task.toml": _TASK.format(name=name), "train.csv": _ROWS}
    columns = "" if kind == "chat" else _COLUMNS
    answer = '\n[answer]\nschema = "schema.json"\n' if kind == "extract" else ""
    files = {"task.toml": _WRITING.format(name=name, kind=kind, columns=columns, answer=answer)}
    return {**files, "train.jsonl": _rows(kind), **({"schema.json": _SCHEMA} if kind == "extract" else {})}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["classify", "generate", "chat", "extract"]),
    default="classify",
    show_default=True,
    help="What comes out: labels, a text, the next answer of a conversation, JSON under a schema.",
)
def new(folder: Path, kind: str) -> None:
    """Write a first task file and example rows into FOLDER."""
    from alambic.errors import WorkspaceError
    from alambic.workspace import on_disk

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:64] or "task"
    files = _files(kind, name)
    for file in files:
        if (folder / file).exists():
            raise WorkspaceError(f"{folder / file}: exists already", hint="give another folder")
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text, "utf-8")
    wanted = "20 or more a label" if kind == "classify" else "some hundreds at least"
    rows = next(file for file in files if file.startswith("train"))
    click.echo(f"wrote {folder / 'task.toml'} and {folder / rows}: put your rows there ({wanted}), then")
    click.echo(f"  alambic check {folder / 'task.toml'}\n  alambic build {folder / 'task.toml'}")
