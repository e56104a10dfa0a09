"""CSV and its cousins, one record at a time, so that one broken quote costs one row.

The csv module reads on to the end of the file after a quote that is never closed, and gives no place. Here a record
that stays open is watched: when what follows looks like rows of the table, breaks the quoting rules, or grows past a
limit, the line that opened it is reported and reading resumes on the next line. RFC 4180 otherwise.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SEPARATORS = (",", ";", "\t", "|")
ONE_COLUMN = "\x1f"
MAX_RECORD = 1 << 24
_WATCHED_LINES = 50
_ENOUGH_LINES = 8
_LEARNT_RECORDS = 5000
_SHORT = 60
_QUOTED = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"')
_INSIDE = re.compile(r'[^"]*+(?:""[^"]*+)*+')
_SPLIT_QUOTE = "a quote inside a quoted field is not doubled"


class _Open(Exception):
    """The text ends inside a quoted field."""


class _Broken(Exception):
    """A closing quote is followed by something else than a separator."""


@dataclass(frozen=True)
class Line:
    """A physical line, without its end; `problem` says why it cannot be used."""

    number: int
    text: str
    problem: str | None = None


@dataclass(frozen=True)
class Record:
    """The fields of one record and the line it begins on; `problem` says why there are none."""

    number: int
    fields: list[str]
    problem: str | None = None


def split_fields(record: str, separator: str) -> list[str]:
    """Split one whole record into fields, removing quotes."""
    if '"' not in record:
        return record.split(separator)
    fields, at = [], 0
    while True:
        if record.startswith('"', at):
            match = _QUOTED.match(record, at)
            if match is None:
                raise _Open
            fields.append(match[1].replace('""', '"'))
            at = match.end()
            if at == len(record):
                return fields
            if record[at] != separator:
                raise _Broken
        else:
            end = record.find(separator, at)
            fields.append(record[at:] if end < 0 else record[at:end])
            if end < 0:
                return fields
            at = end
        at += 1


def sniff_separator(lines: list[str]) -> str:
    """Return the separator that splits the first records most alike; `ONE_COLUMN` when the header has none."""
    scores: dict[str, tuple[float, int]] = {}
    for separator in SEPARATORS:
        records = [r.fields for r in read_records((Line(i, t) for i, t in enumerate(lines, 1)), separator) if r.fields]
        width = len(records[0]) if records else 0
        if width > 1:
            scores[separator] = (sum(len(fields) == width for fields in records) / len(records), width)
    return max(scores, key=lambda separator: scores[separator]) if scores else ONE_COLUMN


def read_records(lines: Iterable[Line], separator: str) -> Iterator[Record]:
    """Yield the records of `lines`, header first; a broken one carries a problem, and blank lines are passed over."""
    waiting: deque[Line] = deque()
    source = iter(lines)
    seen: list[set[str]] = []
    learnt = 0
    while (line := waiting.popleft() if waiting else next(source, None)) is not None:
        if line.problem is not None:
            yield Record(line.number, [], line.problem)
            continue
        if not line.text or line.text.isspace():
            continue
        try:
            record = Record(line.number, split_fields(line.text, separator))
        except _Broken:
            record = Record(line.number, [], _SPLIT_QUOTE)
        except _Open:
            record = _finish(line, waiting, source, separator, seen)
        seen = seen or [set() for _ in record.fields]
        if learnt < _LEARNT_RECORDS and len(record.fields) == len(seen):
            learnt += 1
            for values, value in zip(seen, record.fields, strict=True):
                if 0 < len(value) <= _SHORT:
                    values.add(value)
        yield record


def _finish(first: Line, waiting: deque[Line], source: Iterator[Line], separator: str, seen: list[set[str]]) -> Record:
    """Read on until the open record closes; if it is broken, put the lines after `first` back and say so."""
    taken: list[Line] = []
    size, alike, width = len(first.text), 0, len(seen)
    problem = "a quote opened here is never closed"
    while (line := waiting.popleft() if waiting else next(source, None)) is not None:
        taken.append(line)
        size += len(line.text)
        if line.problem is not None or size > MAX_RECORD:
            break
        if _INSIDE.fullmatch(line.text) is None:
            try:
                fields = split_fields("\n".join([first.text, *(t.text for t in taken)]), separator)
            except _Open:
                continue
            except _Broken:
                break
            if (width and len(fields) != width) or _looks_like_rows(alike, len(taken) - 1):
                break
            return Record(first.number, fields)
        alike += _is_like_row(line.text.split(separator), seen)
        if len(taken) >= _WATCHED_LINES and _looks_like_rows(alike, len(taken)):
            break
    waiting.extendleft(reversed(taken))
    return Record(first.number, [], problem)


def _is_like_row(fields: list[str], seen: list[set[str]]) -> bool:
    """Tell whether a line has the width of the table and, in some column, a value met there before.

    Width alone would take a list of prices or an address inside a message for rows.
    """
    return len(fields) == len(seen) > 1 and any(value in values for value, values in zip(fields, seen, strict=True))


def _looks_like_rows(alike: int, lines: int) -> bool:
    """Tell whether the lines inside a quoted field are, nearly all, like rows of the table."""
    return lines >= _ENOUGH_LINES and alike >= 0.9 * lines
