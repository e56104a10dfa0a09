"""Read annotations of other tools, or a table, into a journal: every answer checked before any is written."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from alambic.data.annotation_formats import Answer, answers_of
from alambic.data.annotations import VERDICTS, Journal, text_id
from alambic.data.clean import clean_name, clean_text
from alambic.data.read import BadRow, cell_text, columns_of, iter_rows
from alambic.errors import DataError, nearest

_LEAST_GOOD = 0.5  # share of answers that must be usable; under it the file is the wrong one


@dataclass(frozen=True)
class Imported:
    """What was taken over."""

    tool: str
    added: int
    unchanged: int
    bad: tuple[BadRow, ...]

    def notes(self, name: str) -> list[str]:
        """Say what happened, for people."""
        told = [f"{name}: {self.added} annotations taken over ({self.tool}), {self.unchanged} were known"]
        if self.bad:
            first = self.bad[0]
            told.append(f"{name}: {len(self.bad)} left out; first: {first.where}: {first.reason}")
        return told


def import_annotations(
    path: Path, journal: Journal, *, labels: Collection[str], multi_label: bool, by: str = "imported"
) -> Imported:
    """Add the annotations in the file at `path` to `journal`; what is there already is not written twice.

    Args:
        path: JSON of Label Studio or Argilla, JSON lines of it, or a table with a text and a label column.
        journal: takes them.
        labels: names that exist.
        multi_label: an answer may hold several labels.
        by: annotator of rows that name none.

    Raises:
        DataError: the file cannot be read, or more than half of its answers cannot be used (nothing is written then).
    """
    tool, answers = _read(path, by)
    good, bad = [], []
    for answer in answers:
        reason = _fault(answer, labels, multi_label)
        if reason is None:
            good.append(answer)
        else:
            bad.append(BadRow(answer.where, reason))
    if not answers:
        raise DataError(f"{path.name}: it holds no annotation")
    if len(good) < _LEAST_GOOD * len(answers):
        raise DataError(
            f"{bad[0].where}: {bad[0].reason} ({len(bad)} of {len(answers)} annotations cannot be used; none is taken)",
            hint="are these annotations of this task, with its label names?",
        )
    added = 0
    for answer in good:
        text = clean_text(answer.text).text
        names = tuple(sorted(clean_name(name) for name in answer.labels))
        known = journal.decisions.of(answer.by, text_id(text))
        said = (answer.verdict, names if answer.verdict == "label" else (), answer.note)
        if known is not None and (known.verdict, tuple(sorted(known.labels)), known.note) == said:
            continue
        journal.decide(answer.verdict, by=answer.by, text=text, labels=said[1], note=answer.note)  # type: ignore[arg-type]
        added += 1
    return Imported(tool, added, len(good) - added, tuple(bad))


def _fault(answer: Answer, labels: Collection[str], multi_label: bool) -> str | None:
    assert answer.verdict in VERDICTS
    if not clean_text(answer.text).text:
        return "the text is empty"
    if answer.verdict != "label":
        return None
    for name in map(clean_name, answer.labels):
        if name not in labels:
            return f"label {name!r} is not one of this task; {nearest(name, labels)[:200]}"
    if len(answer.labels) > 1 and not multi_label:
        return f"{len(answer.labels)} labels on one text; the task is not multi_label"
    return None


def _read(path: Path, by: str) -> tuple[str, list[Answer]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        values = _json(path)
        first = next((value for value in values if isinstance(value, dict)), {})
        if not isinstance(first.get("text"), str) or not isinstance(first.get("label"), str) or "annotator" in first:
            return answers_of(values, path.name)
    columns = columns_of(path).columns
    assert columns.label is not None
    found = []
    for row in iter_rows(path):
        if row.error is not None:
            raise DataError(f"{row.where}: {row.error}", hint="mend the row and import again: nothing was taken")
        label = cell_text(row.fields.get(columns.label))
        names = tuple(map(str, json.loads(label))) if label.startswith("[") else (label,) if label else ()
        person = cell_text(row.fields.get("annotator") or row.fields.get("annotators")) or by
        text = cell_text(row.fields.get(columns.text))
        note = cell_text(row.fields.get("note")) or None
        # A row exported for several annotators says the same for each of them.
        for one in person.split(", "):
            found.append(Answer(text, one, "label" if names else "none", names, note, row.where))
    return "table", found


def _json(path: Path) -> list[object]:
    text = path.read_text("utf-8-sig", errors="replace")
    try:
        values = json.loads(text)
        return values if isinstance(values, list) else [values]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path.name}: not JSON: {error}") from error
