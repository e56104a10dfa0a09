"""Write docs/reference/ from the program itself: the command line, the task file, the errors, the Python API.

python docs/generate.py            write
python docs/generate.py --check    exit 1 when a page is not what would be written (tests run this)
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import alambic
from alambic import pretrain_config
from alambic.cli.main import COMMANDS, cli
from alambic.errors import AlambicError
from alambic.task import json_schema

OUT = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py; edit the source, then run `make docs`. -->\n\n"


def cli_page() -> str:
    """Return the help of every command."""
    parts = ["# Command line\n", NOTE, "Exit codes: 0 done, 1 failed, 2 misused, 3 budget missed.\n"]
    context = click.Context(cli, info_name="alambic")
    parts.append(f"```text\n{cli.get_help(context)}\n```\n")
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        parts.append(_command(command, click.Context(command, info_name=name, parent=context)))
    return "\n".join(parts)


def _command(command: click.Command, context: click.Context) -> str:
    text = f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            text += "\n" + _command(child, click.Context(child, info_name=name, parent=context))
    return text


def task_page() -> str:
    """Return one table per section of the task file."""
    parts = ["# Task file\n", NOTE, "`alambic check --schema` prints this as JSON Schema for editors.\n"]
    names = {
        "task": "TaskSpec",
        "data": "DataSpec",
        "base": "BaseSpec",
        "budget": "Budget",
        "answer": "AnswerSpec",
        "preferences": "PreferencesSpec",
        "remote": "RemoteStageSpec",
        "[candidate]": "CandidateSpec",
    }
    return "\n".join([*parts, *_sections(json_schema(), names)])


def pretrain_page() -> str:
    """Return one table per section of the configuration of `alambic pretrain`."""
    parts = ["# Pre-training configuration\n", NOTE, "`alambic pretrain --schema` prints this as JSON Schema.\n"]
    names = {
        "pretrain": "PretrainSpec",
        "[source]": "SourceSpec",
        "clean": "CleanSpec",
        "dedup": "DedupSpec",
        "contamination": "ContaminationSpec",
        "mix": "MixSpec",
        "tokenizer": "TokenizerSpec",
        "model": "ModelSpec",
        "train": "TrainSpec",
        "valid": "ValidSpec",
    }
    return "\n".join([*parts, *_sections(pretrain_config.json_schema(), names)])


def _sections(schema: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    """Yield one table a section; `names` are the sections with their models."""
    for section, model in names.items():
        definition = schema["$defs"][model]
        required = set(definition.get("required", ()))
        yield f"## [{section}]\n\n{definition.get('description', '')}\n"
        yield "| key | type | default | what |\n|---|---|---|---|"
        for key, field in definition["properties"].items():
            default = "required" if key in required else f"`{field.get('default')!r}`" if "default" in field else ""
            yield f"| `{key}` | {_type(field)} | {default} | {field.get('description', '')} |"
        yield ""


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"] if option.get("type") != "null")
    return str(field.get("type", field.get("const", "")))


def errors_page() -> str:
    """Return the tree of errors."""
    module = importlib.import_module("alambic.errors")
    tree = inspect.getdoc(module) or ""
    rows = [
        f"| `{name}` | {value.exit_code} | {(inspect.getdoc(value) or '').splitlines()[0]} |"
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, AlambicError)
    ]
    table = "\n".join(["| error | exit code | when |", "|---|---|---|", *rows])
    return f"# Errors\n\n{NOTE}```text\n{tree}\n```\n\n{table}\n"


def python_page() -> str:
    """Return the public names with their docstrings."""
    parts = ["# Python\n", NOTE, f"```python\n{inspect.getdoc(alambic)}\n```\n"]
    for name in alambic.__all__:
        value = getattr(alambic, name)
        title = f"alambic.{name}" + ("" if inspect.isclass(value) else str(inspect.signature(value)))
        parts.append(f"## `{title}`\n\n{inspect.getdoc(value)}\n")
    return "\n".join(parts)


PAGES = {
    "cli.md": cli_page,
    "task-file.md": task_page,
    "pretrain-file.md": pretrain_page,
    "errors.md": errors_page,
    "python.md": python_page,
}


def main() -> int:
    """Write or check the pages."""
    stale = []
    for name, make in PAGES.items():
        path, text = OUT / name, make().rstrip() + "\n"
        if path.exists() and path.read_text("utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            OUT.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
    if "--check" in sys.argv and stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run make docs\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
