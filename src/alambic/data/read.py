"""Read examples from CSV, TSV, JSONL, JSON, Parquet, plain text and folders of .txt files.

`iter_rows` streams the rows of a file of any format; a bad row carries an error and stops nothing. `read_dataset` makes
a Dataset of them: columns chosen, texts cleaned, labels checked. Neither prints nor writes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from alambic.data.clean import clean_name, clean_text
from alambic.data.columns import Columns, Guess, choose_columns
from alambic.data.dataset import Dataset, Example
from alambic.data.rows import Row, Source, open_source
from alambic.errors import DataError, nearest

if TYPE_CHECKING:
    from alambic.task import DataSpec

__all__ = ["BadRow", "ReadResult", "Row", "columns_of", "iter_rows", "read_dataset"]

_SAMPLE_ROWS = 500
_GUESSED_SEPARATORS = ("|", ";", ",")


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class ReadResult:
    """A Dataset and how it was read."""

    dataset: Dataset
    notes: tuple[str, ...]
    rows_skipped: tuple[BadRow, ...]
    columns: Columns
    encoding: str
    format: str


def iter_rows(path: Path, spec: DataSpec | None = None) -> Iterator[Row]:
    """Stream the rows of a file of any format, labelled or not, with the fields as they are in the file.

    Raises:
        DataError: the file as a whole cannot be read (missing, empty, unknown format, no header).
    """
    source = open_source(path, spec)
    yield from source.rows()


def columns_of(path: Path, spec: DataSpec | None = None, *, need_label: bool = True) -> Guess:
    """Choose the columns of the file at `path` from its first rows.

    Raises:
        DataError: a column named by the task is not there, or a column cannot be guessed.
    """
    return _columns(open_source(path, spec), spec, need_label=need_label)


def read_dataset(path: Path, spec: DataSpec, *, multi_label: bool, labels: tuple[str, ...] | None = None) -> ReadResult:
    """Read labelled examples.

    Args:
        path: a file, or a folder with one folder of .txt files per label.
        spec: the task's `[data]`: column names, encoding, separators; what is None is detected.
        multi_label: a row may have zero, one or more labels.
        labels: the task's labels when they are known already (dev and test files); rows with others are left out.

    Raises:
        DataError: the file cannot be used: missing, empty, wrong encoding, no such column, one label only.
    """
    source = open_source(path, spec)
    guess = _columns(source, spec, need_label=True)
    reader = _Reader(guess.columns, multi_label, spec.label_separator)
    reader.read(source)
    examples, bad = reader.examples, reader.bad
    if labels is not None:
        examples, unknown = _known_only(examples, labels)
        bad = bad + unknown
    _check_bad(path, examples, bad)
    dataset = Dataset(tuple(examples), labels or tuple(sorted({n for e in examples for n in e.labels})), multi_label)
    notes = [*source.notes, *guess.notes, *reader.notes(path)]
    if labels is None:
        notes += _check_labels(path, dataset)
    if bad:
        share = f"{len(bad)} of {len(bad) + len(examples)}"
        notes.append(f"{path.name}: {share} rows left out; first: {bad[0].where}: {bad[0].reason}")
    return ReadResult(dataset, tuple(notes), tuple(bad), guess.columns, source.encoding, source.format)


class _Reader:
    """Turns rows into examples and keeps count of what had to be changed."""

    def __init__(self, columns: Columns, multi_label: bool, separator: str | None) -> None:
        self.columns, self.multi_label, self.separator = columns, multi_label, separator
        self.examples: list[Example] = []
        self.bad: list[BadRow] = []
        self.removed, self.removed_first = 0, ""

    def read(self, source: Source) -> None:
        """Read all rows of `source`; without a label separator, wait for all of them to choose it."""
        kept: list[tuple[Example, object]] = []
        for row in source.rows():
            example = self._text(row)
            if example is None:
                continue
            kept.append((example, row.fields.get(self.columns.label or "")))
        if self.multi_label and self.separator is None:
            cells = [value for _, value in kept if isinstance(value, str) and not value.lstrip().startswith("[")]
            self.separator = next((s for s in _GUESSED_SEPARATORS if any(s in cell for cell in cells)), None)
        for example, value in kept:
            try:
                found = self._labels(value)
            except ValueError as error:
                self.bad.append(BadRow(example.where, str(error)))
                continue
            self.examples.append(Example(example.text, found, example.where, example.group))

    def notes(self, path: Path) -> list[str]:
        """Say what was removed from texts, and the label separator that was guessed."""
        notes = []
        if self.removed:
            notes.append(
                f"{path.name}: {self.removed} control characters removed from texts; first: {self.removed_first}"
            )
        if self.multi_label and self.separator is not None:
            notes.append(f"{path.name}: labels of one row are separated by {self.separator!r}")
        return notes

    def _text(self, row: Row) -> Example | None:
        if row.error is not None:
            self.bad.append(BadRow(row.where, row.error))
            return None
        value = row.fields.get(self.columns.text)
        if isinstance(value, (dict, list)):
            self.bad.append(BadRow(row.where, f"{self.columns.text!r} is a {type(value).__name__}, not a text"))
            return None
        cleaned = clean_text(cell_text(value))
        if cleaned.removed:
            self.removed += cleaned.removed
            self.removed_first = self.removed_first or row.where
        if not cleaned.text:
            self.bad.append(BadRow(row.where, f"the text ({self.columns.text!r}) is empty"))
            return None
        group = clean_name(cell_text(row.fields.get(self.columns.group))) if self.columns.group else ""
        return Example(cleaned.text, (), row.where, group or None)

    def _labels(self, value: object) -> tuple[str, ...]:
        names = [clean_name(cell_text(v)) for v in self._split(value)]
        names = [name for name in names if name]
        if self.multi_label:
            return tuple(sorted(set(names)))
        if not names:
            raise ValueError(f"the label ({self.columns.label!r}) is empty")
        if len(names) > 1:
            raise ValueError(f"{len(names)} labels in one row ({', '.join(names[:5])}); the task is not multi_label")
        return (names[0],)

    def _split(self, value: object) -> Sequence[object]:
        if isinstance(value, list):
            return value
        if not self.multi_label or not isinstance(value, str):
            return (value,)
        if value.lstrip().startswith("["):
            try:
                parsed = json.loads(value)
            except ValueError as error:
                raise ValueError(f"the labels are not a JSON list: {value[:60]!r}") from error
            return parsed if isinstance(parsed, list) else (parsed,)
        return value.split(self.separator) if self.separator else (value,)


def _columns(source: Source, spec: DataSpec | None, *, need_label: bool) -> Guess:
    sample = [row.fields for row in islice((r for r in source.rows() if r.error is None), _SAMPLE_ROWS)]
    names = source.columns or list(dict.fromkeys(name for fields in sample for name in fields))
    if not names:
        first = next((r for r in source.rows() if r.error is not None), None)
        reason = f"; first: {first.where}: {first.error}" if first else ""
        raise DataError(f"{source.path}: no usable row{reason}")
    if source.format == "folder":
        return Guess(Columns("text", "label" if need_label else None), ())
    return choose_columns(names, sample, spec, where=source.path.name, need_label=need_label)


def cell_text(value: object) -> str:
    """Return a value as the text its author meant: a label read from Parquet as 1.0 is 1."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _known_only(examples: Sequence[Example], labels: tuple[str, ...]) -> tuple[list[Example], list[BadRow]]:
    known, kept, bad = set(labels), [], []
    for example in examples:
        strange = next((name for name in example.labels if name not in known), None)
        if strange is None:
            kept.append(example)
        else:
            bad.append(
                BadRow(example.where, f"label {strange!r} is not in the training data; {nearest(strange, known)[:200]}")
            )
    return kept, bad


def _check_bad(path: Path, examples: Sequence[Example], bad: Sequence[BadRow]) -> None:
    if not examples and not bad:
        raise DataError(f"{path}: the file has no rows", hint="it needs a line of column names and at least one row")
    if len(bad) > len(examples):
        reasons = Counter(row.reason for row in bad).most_common(3)
        said = "; ".join(f"{count} times: {reason}" for reason, count in reasons)
        raise DataError(
            f"{bad[0].where}: {len(bad)} of {len(bad) + len(examples)} rows cannot be used ({said})",
            hint="check data.text, data.label, data.separator and data.encoding",
        )


def _check_labels(path: Path, dataset: Dataset) -> list[str]:
    """Refuse a single label; note labels seen once, labels that differ by case alone, too many labels."""
    counts = dataset.counts
    if (len(dataset.labels) < 2 and not dataset.multi_label) or not dataset.labels:
        found = f"only one label ({dataset.labels[0]!r})" if dataset.labels else "no label"
        raise DataError(f"{path.name}: {found} in {len(dataset)} rows; a classifier needs two", hint="check data.label")
    notes = []
    once = sorted(name for name in dataset.labels if counts[name] == 1)
    if once:
        shown = ", ".join(repr(n) for n in once[:5]) + (" ..." if len(once) > 5 else "")
        notes.append(f"{path.name}: {len(once)} label(s) seen once ({shown}): too few to learn from")
    folded = Counter(name.casefold() for name in dataset.labels)
    twins = sorted(name for name in dataset.labels if folded[name.casefold()] > 1)
    if twins:
        notes.append(f"{path.name}: labels that differ only by case are kept apart: {', '.join(map(repr, twins[:6]))}")
    if len(dataset) >= 20 and len(dataset.labels) > 0.5 * len(dataset):
        notes.append(
            f"{path.name}: {len(dataset.labels)} labels in {len(dataset)} rows; is data.label the right column?"
        )
    return notes
