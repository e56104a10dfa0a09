"""A configuration file in TOML: read, validated whole, every fault told with its file and line.

The task file and the configurations of `alambic pretrain` and `alambic distil` are read by it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from alambic.errors import TaskError, nearest

Place = tuple[str | int, ...]
File = TypeVar("File", bound=BaseModel)


def read_text(path: Path) -> str:
    """Return the text of the file.

    Raises:
        TaskError: it is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = f"here there is {', '.join(near)}" if near else "alambic new FOLDER writes a first task"
        raise TaskError(f"{path}: no such task file", hint=hint) from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path.name}: not UTF-8 (byte {error.start})", hint="save the task file as UTF-8") from error
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror}") from error


def parse(text: str, path: Path, *, hint: str) -> dict[str, Any]:
    """Return the tables of `text`, the content of `path`.

    Raises:
        TaskError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"{path.name}: not valid TOML: {error}", hint=hint) from error


def validate(
    model: type[File],
    raw: Mapping[str, Any],
    text: str,
    path: Path,
    *,
    tables: Mapping[str, type[BaseModel]],
    hint: str,
) -> File:
    """Return the tables `raw` as `model`.

    Args:
        model: of the whole file.
        raw: tables of `text`.
        text: content of `path`.
        path: of the file, for messages.
        tables: models of the tables, for the keys that a message names.
        hint: what to read, for messages.

    Raises:
        TaskError: it breaks the schema; every fault is listed with its line.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        faults = [_describe(fault, text, path.name, model, tables) for fault in error.errors()]
        raise TaskError("\n".join(faults), hint=hint) from error


def _describe(fault: Any, text: str, file: str, model: type[BaseModel], tables: Mapping[str, type[BaseModel]]) -> str:
    loc: Place = fault["loc"]
    where = f"{file}:{line_of(text, loc)}: {_dotted(loc)}"
    kind = fault["type"]
    if kind == "extra_forbidden":
        known = (tables[str(loc[0])] if len(loc) > 1 else model).model_fields
        return f"{where}: unknown key; {nearest(str(loc[-1]), known)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "literal_error":
        return f"{where} = {fault['input']!r}; allowed: {fault['ctx']['expected']}"
    if kind == "value_error":
        return f"{where}: {fault['ctx']['error']}"
    return f"{where} = {fault['input']!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _dotted(loc: Place) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def line_of(source: str, loc: Place) -> int:
    """Return the line of the key at `loc`, or of the deepest enclosing table that is in the file (1 when none is)."""
    table, index, best = str(loc[0]) if loc else "", -1, 1
    wanted = next((p for p in loc if isinstance(p, int)), None)
    key = next((str(p) for p in reversed(loc[1:]) if isinstance(p, str)), None)
    inside = False
    for number, line in enumerate(source.splitlines(), 1):
        header = re.match(r"\s*\[\[?\s*([^\]\s]+)\s*\]", line)
        if header:
            index += header.group(1) == table
            inside = header.group(1).split(".")[0] == table and (wanted is None or index == wanted)
            best = number if inside else best
        elif (inside and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line)) or (
            len(loc) == 1 and re.match(rf"\s*{re.escape(table)}\s*=", line)
        ):
            return number
    return best
