"""Sources of rows: one small class per way of storing them, all streaming, all giving `file:line` for each row."""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic import _extras
from alambic.data.clean import clean_name
from alambic.data.delimited import ONE_COLUMN, Line, read_records, sniff_separator
from alambic.data.encoding import check_name, detect
from alambic.errors import DataError

if TYPE_CHECKING:
    from alambic.task import DataSpec

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "txt", "folder")
_SUFFIXES = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "txt",
}  # fmt: skip
_PACKED = {".gz", ".xz", ".bz2", ".zip", ".zst", ".7z"}
_OFFICE = {".xlsx", ".xls", ".ods"}
_MAX_LINE = 1 << 24
_SNIFFED_LINES = 200
_SEPARATOR_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", ONE_COLUMN: "none"}


@dataclass(frozen=True)
class Row:
    """One row as stored: its place, its fields by column, and why it is unusable, if it is."""

    where: str
    fields: dict[str, object]
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened file: what is known of it, and a function that streams its rows from the start."""

    path: Path
    format: str
    encoding: str
    columns: list[str]
    rows: Callable[[], Iterator[Row]]
    notes: tuple[str, ...] = field(default=())


def open_source(path: Path, spec: DataSpec | None) -> Source:
    """Find out how the file or folder at `path` is stored.

    Raises:
        DataError: it is missing, unreadable, empty, compressed or of a format that is not read.
    """
    try:
        if path.is_dir():
            return _open_folder(path, spec)
        if not path.exists():
            raise _missing(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty", hint="it needs a line of column names and at least one row")
        kind = _format(path)
        if kind == "parquet":
            return _open_parquet(path)
        encoding = check_name(spec.encoding) if spec and spec.encoding else detect(path)
    except PermissionError as error:
        raise DataError(f"{path}: permission to read it is denied") from error
    opened = {
        "csv": _open_delimited,
        "tsv": _open_delimited,
        "jsonl": _open_jsonl,
        "json": _open_json,
        "txt": _open_txt,
    }
    return opened[kind](path, kind, encoding, spec)


def _missing(path: Path) -> DataError:
    names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return DataError(f"{path}: no such file", hint=f"did you mean {close[0]!r}?")
    near = f"the folder has: {', '.join(names[:10])}" if names else "its folder does not exist or is empty"
    return DataError(f"{path}: no such file", hint=near)


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if suffix in _PACKED:
        raise DataError(f"{path}: compressed files are not read", hint="decompress it first")
    if suffix in _OFFICE:
        raise DataError(f"{path}: spreadsheets are not read", hint="save the sheet as CSV UTF-8")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{" else "csv"


def _lines(path: Path, encoding: str) -> Iterator[Line]:
    """Yield the lines of a text file; one with undecodable bytes or of endless length carries a problem.

    Raises:
        DataError: the file cannot be in `encoding` at all (UTF-16 without its mark).
    """
    try:
        yield from _decoded_lines(path, encoding)
    except UnicodeError as error:
        hint = "set data.encoding to utf-16-le or utf-16-be, or leave it out to let it be detected"
        raise DataError(f"{path.name}: not {encoding}: {error}", hint=hint) from error


def _decoded_lines(path: Path, encoding: str) -> Iterator[Line]:
    exact = encoding.startswith("utf-8")
    with path.open(encoding=encoding, errors="surrogateescape" if exact else "replace", newline=None) as file:
        number = 0
        while text := file.readline(_MAX_LINE):
            number += 1
            if len(text) == _MAX_LINE and not text.endswith("\n"):
                while (rest := file.readline(_MAX_LINE)) and not rest.endswith("\n"):
                    pass
                yield Line(number, "", f"the line is longer than {_MAX_LINE >> 20} million characters")
                continue
            text = text.removesuffix("\n")
            yield Line(number, text, None if text.isascii() else _undecodable(text, exact, encoding))


def _undecodable(text: str, exact: bool, encoding: str) -> str | None:
    if exact:
        bad = next((c for c in text if "\udc80" <= c <= "\udcff"), None)
        return f"byte 0x{ord(bad) - 0xDC00:02X} is not UTF-8 (set data.encoding if the file is not)" if bad else None
    return f"it has bytes that are not {encoding}" if "\ufffd" in text else None


def _open_delimited(path: Path, kind: str, encoding: str, spec: DataSpec | None) -> Source:
    head = [line for line, _ in zip(_lines(path, encoding), range(_SNIFFED_LINES), strict=False)]
    declared = re.fullmatch(r"\ufeff?sep=(.)", head[0].text.strip('"')) if head else None
    skip = 1 if declared else 0
    texts = [line.text for line in head[skip:] if line.problem is None and line.text.strip()]
    if not texts:
        raise DataError(f"{path}: the file has no rows", hint="it needs a line of column names and at least one row")
    notes: tuple[str, ...] = ()
    if spec and spec.separator:
        separator = spec.separator
    elif declared:
        separator = declared[1]
    else:
        separator = sniff_separator(texts)
        expected = "\t" if kind == "tsv" else ","
        if separator not in (expected, ONE_COLUMN) or not encoding.startswith("utf-8"):
            notes = (f"{path.name}: read as {encoding}, separator {_SEPARATOR_NAMES.get(separator, repr(separator))}",)

    def records() -> Iterator[Any]:
        lines = _lines(path, encoding)
        return read_records((line for line in lines if line.number > skip), separator)

    header = next(records())
    if header.problem is not None:
        raise DataError(f"{path.name}:{header.number}: the line of column names cannot be read: {header.problem}")
    columns = _column_names(header.fields, f"{path.name}:{header.number}")

    def rows() -> Iterator[Row]:
        stream = records()
        next(stream)
        for record in stream:
            yield _row(f"{path.name}:{record.number}", columns, record.fields, record.problem)

    return Source(path, kind, encoding, columns, rows, notes)


def _column_names(fields: list[str], where: str) -> list[str]:
    while len(fields) > 1 and not fields[-1].strip():
        fields = fields[:-1]
    names = [clean_name(name) or f"column_{i}" for i, name in enumerate(fields, 1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are named {twice!r}", hint="give each column a name of its own")
    return names


def _row(where: str, columns: list[str], fields: list[str], problem: str | None) -> Row:
    if problem is not None:
        return Row(where, {}, problem)
    extra = fields[len(columns) :]
    if any(value.strip() for value in extra) or (len(fields) < len(columns) and len(columns) > 1 and len(fields) == 1):
        return Row(where, {}, f"it has {len(fields)} field(s), the line of column names has {len(columns)}")
    return Row(where, dict(zip(columns, fields, strict=False)))


def _open_jsonl(path: Path, kind: str, encoding: str, spec: DataSpec | None) -> Source:
    def rows() -> Iterator[Row]:
        for line in _lines(path, encoding):
            where = f"{path.name}:{line.number}"
            if line.problem is not None:
                yield Row(where, {}, line.problem)
            elif line.text.strip():
                yield _json_row(where, line.text)

    return Source(path, kind, encoding, [], rows)


def _json_row(where: str, text: str) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return Row(where, {}, f"not JSON: {error.msg} (character {error.pos + 1})")
    except (ValueError, RecursionError) as error:
        return Row(where, {}, f"not JSON that can be read: {error}")
    return _object_row(where, value)


def _object_row(where: str, value: object) -> Row:
    if not isinstance(value, dict):
        return Row(where, {}, f"a JSON object is expected, not {type(value).__name__}")
    return Row(where, value)


def _open_json(path: Path, kind: str, encoding: str, spec: DataSpec | None) -> Source:
    """Read one array of objects; JSON lines under the name .json are read as such."""
    with path.open(encoding=encoding, errors="replace") as file:
        if not file.read(4096).lstrip().startswith("["):
            return _open_jsonl(path, "jsonl", encoding, spec)
    try:
        values = json.loads(path.read_text(encoding=encoding))
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: not JSON that can be read: {error}") from error

    def rows() -> Iterator[Row]:
        for i, value in enumerate(values, 1):
            yield _object_row(f"{path.name}:item {i}", value)

    return Source(path, kind, encoding, [], rows)


def _open_txt(path: Path, kind: str, encoding: str, spec: DataSpec | None) -> Source:
    def rows() -> Iterator[Row]:
        for line in _lines(path, encoding):
            if line.problem is not None or line.text.strip():
                yield Row(f"{path.name}:{line.number}", {"text": line.text}, line.problem)

    return Source(path, kind, encoding, ["text"], rows)


def _open_parquet(path: Path) -> Source:
    parquet, arrow = _extras.load("pyarrow.parquet"), _extras.load("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            columns = [str(name) for name in file.schema_arrow.names]
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error

    def rows() -> Iterator[Row]:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.name}:{number}", fields)

    return Source(path, "parquet", "utf-8", columns, rows)


def _open_folder(path: Path, spec: DataSpec | None) -> Source:
    files = sorted(p for p in path.rglob("*.txt") if p.is_file())
    if not files:
        raise DataError(
            f"{path}: the folder has no .txt file", hint="expected one folder per label: LABEL/anything.txt"
        )
    chosen = check_name(spec.encoding) if spec and spec.encoding else None

    def rows() -> Iterator[Row]:
        for file in files:
            relative = file.relative_to(path)
            lines = list(_lines(file, chosen or detect(file)))
            problem = next((line.problem for line in lines if line.problem), None)
            fields: dict[str, object] = {"text": "\n".join(line.text for line in lines)}
            if len(relative.parts) > 1:
                fields["label"] = relative.parts[0]
            yield Row(f"{path.name}/{relative.as_posix()}:1", fields, problem)

    return Source(path, "folder", chosen or "utf-8", ["text", "label"], rows)
