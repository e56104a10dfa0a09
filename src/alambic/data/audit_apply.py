"""Apply what was decided of an audit: a new data file, never the old one.

Every column of every row is carried over; only labels that were decided change. The new file is read back and compared
with what it must hold before it gets its name.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic import _extras
from alambic.data.audit_file import Decision, Decisions
from alambic.data.audit_rows import row_id
from alambic.data.columns import Columns
from alambic.data.dataset import Example
from alambic.data.read import ReadResult, read_dataset
from alambic.data.rows import Row, open_source
from alambic.errors import DataError

if TYPE_CHECKING:
    from alambic.task import DataSpec

_SUFFIX = {
    "csv": ".csv", "tsv": ".tsv", "jsonl": ".jsonl", "json": ".jsonl", "parquet": ".parquet", "folder": ".csv",
    "txt": ".csv",
}  # fmt: skip


@dataclass(frozen=True)
class Applied:
    """What was written where.

    Attributes:
        path: the new file.
        rows: rows in it.
        relabelled: rows with a new label.
        dropped: rows left out because it was decided.
        kept: rows that were looked at and stay.
        unreadable: rows of the old file that could not be read, and are not in the new one.
        notes: what the user should know.
    """

    path: Path
    rows: int
    relabelled: int
    dropped: int
    kept: int
    unreadable: int
    notes: tuple[str, ...]


def target_of(data: Path, output: Path | None, form: str) -> Path:
    """Return where the new file goes: `output`, or beside `data` under a name of its own.

    Raises:
        DataError: something is there already, or the format would have to change.
    """
    suffix = _SUFFIX[form]
    target = output if output is not None else data.with_name(f"{data.stem}.reviewed{suffix}")
    if target.suffix.lower() != suffix:
        raise DataError(
            f"{target}: the new file of {data.name} ends in {suffix}", hint=f"--output {target.stem}{suffix}"
        )
    if os.path.lexists(target):
        raise DataError(f"{target}: is there already; nothing is overwritten", hint="give another name with --output")
    return target


def apply_decisions(
    data: Path, spec: DataSpec, decided: Decisions, *, multi_label: bool, output: Path | None
) -> Applied:
    """Write the rows of `data` with what was decided.

    Args:
        data: the training file or folder of the task; it is only read.
        spec: the task's `[data]`.
        decided: what a person decided.
        multi_label: a row may have several labels.
        output: the new file; None gives ``NAME.reviewed.csv`` beside `data`.

    Raises:
        DataError: a decision is about a row that is not there (any more), or the new file exists or cannot be written.
    """
    read = read_dataset(data, spec, multi_label=multi_label)
    target = target_of(data, output, read.format)
    places = _settle(read, decided, data)
    after = _after(read, places)
    _check_left(after, data)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part{target.suffix}")
    try:
        _write(partial, read, places, data, spec)
        _prove(partial, after, read.columns, spec, multi_label)
        target.open("xb").close()  # unlike a rename, it fails where a file has come meanwhile
        partial.replace(target)
    except FileExistsError as error:
        raise DataError(f"{target}: is there already; nothing is overwritten") from error
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written: {error.strerror}", hint="give another place with --output"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    done = Counter(decision.decision for decision in places.values())
    notes = list(decided.notes)
    if read.rows_skipped:
        first = read.rows_skipped[0]
        notes.append(f"{len(read.rows_skipped)} rows of {data.name} cannot be used and are not in the new file; "
                     f"first: {first.where}: {first.reason}")  # fmt: skip
    return Applied(
        target, len(after), done["relabel"], done["drop"], done["keep"], len(read.rows_skipped), tuple(notes)
    )


def _settle(read: ReadResult, decided: Decisions, data: Path) -> dict[str, Decision]:
    """Return the decision about each place (`file:line`) that has one.

    Raises:
        DataError: a decision is about a text that is not there, or that has another label now.
    """
    wanted = {(d.row, d.given): d for d in decided.made}
    now: dict[str, set[tuple[str, ...]]] = {}
    places, met = {}, set()
    for example in read.dataset:
        row = row_id(example.text)
        now.setdefault(row, set()).add(example.labels)
        decision = wanted.get((row, example.labels))
        if decision is not None:
            places[example.where] = decision
            met.add((row, example.labels))
    lost = [d for key, d in wanted.items() if key not in met]
    if lost:
        first = lost[0]
        if first.row in now:
            labels = " / ".join(sorted(", ".join(names) or "no label" for names in now[first.row]))
            said = f"that text is labelled {labels!r} now, not {', '.join(first.given)!r} as in the audit"
        else:
            said = f"no row of {data.name} has that text (row {first.row!r})"
        raise DataError(
            f"{first.where}: {said}; {len(lost)} of {len(wanted)} decisions cannot be applied, nothing was written",
            hint="apply to the data that was audited (change only decision and suggested), or audit again",
        )
    return places


def _after(read: ReadResult, places: dict[str, Decision]) -> list[Example]:
    after = []
    for example in read.dataset:
        decision = places.get(example.where)
        if decision is not None and decision.decision == "drop":
            continue
        labels = decision.labels if decision is not None and decision.decision == "relabel" else example.labels
        after.append(Example(example.text, labels, example.where, example.group))
    return after


def _check_left(after: Sequence[Example], data: Path) -> None:
    left = {label for example in after for label in example.labels}
    if len(left) < 2 and not any(len(example.labels) != 1 for example in after):
        raise DataError(f"{data.name}: these decisions leave {len(left)} label(s); a classifier needs two")


def _write(path: Path, read: ReadResult, places: dict[str, Decision], data: Path, spec: DataSpec) -> None:
    source = open_source(data, spec)
    used = {example.where for example in read.dataset}

    def rows() -> Iterator[dict[str, object]]:
        for row in source.rows():
            if row.where in used and (fields := _changed(row, places.get(row.where), read.columns, spec)) is not None:
                yield fields

    writers: dict[str, Callable[..., None]] = {".csv": _write_csv, ".tsv": _write_csv, ".jsonl": _write_jsonl}
    if path.suffix == ".parquet":
        _write_parquet(path, rows(), data)
    else:
        writers[path.suffix](path, rows(), source.columns, spec)


def _changed(row: Row, decision: Decision | None, columns: Columns, spec: DataSpec) -> dict[str, object] | None:
    if decision is None or decision.decision == "keep":
        return row.fields
    if decision.decision == "drop":
        return None
    assert columns.label is not None
    old = row.fields.get(columns.label)
    return {**row.fields, columns.label: _as_before(old, decision.labels, spec)}


def _as_before(old: object, labels: tuple[str, ...], spec: DataSpec) -> object:
    """Write labels the way that the old value was written."""
    if isinstance(old, list):
        return list(labels)
    if isinstance(old, str) and (len(labels) != 1 or old.lstrip().startswith("[")):
        joined = (spec.label_separator or "").join(labels)
        return joined if spec.label_separator else json.dumps(list(labels), ensure_ascii=False)
    if isinstance(old, bool):
        return labels[0] == "true" if labels[0] in ("true", "false") else labels[0]
    if isinstance(old, int | float) and labels[0].lstrip("-").isdigit():
        return type(old)(labels[0])
    return labels[0]


def _write_csv(path: Path, rows: Iterator[dict[str, object]], columns: Sequence[str], spec: DataSpec) -> None:
    separator = spec.separator or ("\t" if path.suffix == ".tsv" else ",")
    with path.open("w", encoding=spec.encoding or "utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(columns)
        for fields in rows:
            writer.writerow([fields.get(name, "") for name in columns])


def _write_jsonl(path: Path, rows: Iterator[dict[str, object]], columns: Sequence[str], spec: DataSpec) -> None:
    with path.open("w", encoding=spec.encoding or "utf-8", newline="\n") as file:
        for fields in rows:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], data: Path) -> None:
    parquet, arrow = _extras.load("pyarrow.parquet"), _extras.load("pyarrow")
    schema = parquet.read_schema(data)
    parquet.write_table(arrow.Table.from_pylist(list(rows), schema=schema), path)


def _prove(path: Path, after: Sequence[Example], columns: Columns, spec: DataSpec, multi_label: bool) -> None:
    """Read the new file as a build will, and compare it with what it must hold."""
    named = spec.model_copy(update={"text": columns.text, "label": columns.label, "group": columns.group})
    again = read_dataset(path, named, multi_label=multi_label).dataset
    if [(e.text, e.labels, e.group) for e in again] != [(e.text, e.labels, e.group) for e in after]:
        raise DataError(
            f"{path.name}: the new file does not read back as it was meant; it was not kept",
            hint="save the data as UTF-8 CSV or JSONL, and apply again",
        )
