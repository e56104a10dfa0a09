"""The list of rows to review as CSV, and what a person decided there, read back.

One line is one text with one label. `decision` is empty, `keep`, `relabel` (to what stands in `suggested`, which may be
changed) or `drop`. Lines are known by `row` and `label`, so their order means nothing; `rank` ("3 of 120") tells which
are missing.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alambic.data.audit_rows import Suspect, labels_cell
from alambic.data.clean import clean_name
from alambic.data.read import cell_text, iter_rows
from alambic.errors import DataError, nearest

COLUMNS = ("rank", "decision", "label", "suggested", "wrong", "gain", "rows", "text", "why", "where", "row")
DECISIONS = ("keep", "relabel", "drop")
_READ = ("rank", "decision", "label", "suggested", "row")
_RANK = re.compile(r"(\d+) of (\d+)")
# What a spreadsheet would compute instead of showing (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = ("=", "+", "-", "@", "\t")


@dataclass(frozen=True)
class Decision:
    """What was decided of the rows that hold one text with one label; `labels` are the new ones when relabelled."""

    row: str
    given: tuple[str, ...]
    decision: str
    labels: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Decisions:
    """All that an audit file decides.

    Attributes:
        made: the decisions; lines without one are not here.
        open: lines without a decision.
        missing: ranks of the list that have no line.
        notes: what the user should know.
    """

    made: tuple[Decision, ...]
    open: int
    missing: int
    notes: tuple[str, ...]


def audit_text(suspects: Sequence[Suspect], *, multi_label: bool) -> str:
    """Return the list as CSV, with a byte order mark so that spreadsheets read it as UTF-8."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for rank, s in enumerate(suspects, 1):
        shown = "'" + s.text if s.text.startswith(_FORMULA) else s.text
        writer.writerow(
            (f"{rank} of {len(suspects)}", "", _cell(s.labels, multi_label), _cell(s.suggested, multi_label),
             f"{s.wrong:.3f}", f"{s.gain:.3f}", s.rows, shown, "; ".join(s.why), s.where, s.row)
        )  # fmt: skip
    return "\ufeff" + out.getvalue().encode("utf-8", "replace").decode("utf-8")


def _cell(labels: tuple[str, ...], multi_label: bool) -> str:
    return labels_cell(labels, multi_label) if multi_label else labels[0]


def read_decisions(path: Path, labels: Sequence[str], *, multi_label: bool) -> Decisions:
    """Read what was decided in the audit file at `path`.

    Args:
        path: the file, as it was written or as a spreadsheet saved it.
        labels: the labels of the task.
        multi_label: a row may have several of them.

    Raises:
        DataError: it is no audit file, a decision or a label is unknown, or one row is decided twice, differently.
    """
    lines: dict[tuple[str, tuple[str, ...]], Decision | None] = {}
    ranks: set[int] = set()
    total = doubled = 0
    for found in iter_rows(path):
        if found.error is not None:
            raise DataError(f"{found.where}: {found.error}", hint="nothing was written; mend the line or delete it")
        fields = {clean_name(name).casefold(): cell_text(value) for name, value in found.fields.items()}
        _check_columns(path, fields)
        rank = _RANK.fullmatch(fields["rank"].strip())
        if rank is not None:
            ranks.add(int(rank[1]))
            total = max(total, int(rank[2]))
        line = _line(fields, found.where, labels, multi_label)
        key = (fields["row"].strip(), _labels(fields["label"], multi_label, found.where))
        if key in lines:
            doubled += 1
            _check_same(lines[key], line, found.where)
        lines[key] = line or lines.get(key)
    if not lines:
        raise DataError(f"{path}: the file has no rows", hint="alambic check TASK --audit writes it")
    missing = max(0, total - len(ranks & set(range(1, total + 1))))
    made = tuple(line for line in lines.values() if line is not None)
    notes = []
    if doubled:
        notes.append(f"{path.name}: {doubled} lines stand twice, with the same decision or none")
    if missing:
        notes.append(
            f"{path.name}: {missing} of the {total} lines of the audit are missing; their rows stay as they are"
        )
    return Decisions(made, len(lines) - len(made), missing, tuple(notes))


def _check_columns(path: Path, fields: dict[str, str]) -> None:
    absent = [name for name in _READ if name not in fields]
    if absent:
        has = ", ".join(map(repr, fields)) or "none"
        raise DataError(
            f"{path}: not an audit file: no column {absent[0]!r}; it has {has}", hint=nearest(absent[0], fields)
        )


def _line(fields: dict[str, str], where: str, labels: Sequence[str], multi_label: bool) -> Decision | None:
    decision = fields["decision"].strip().casefold()
    if not decision:
        return None
    if decision not in DECISIONS:
        raise DataError(
            f"{where}: decision is {fields['decision'].strip()!r}, not {', '.join(DECISIONS)} or empty",
            hint=nearest(decision, DECISIONS),
        )
    given = _labels(fields["label"], multi_label, where)
    _check_known(
        given, labels, f"{where}: label", "the labels of the data have changed since the audit: audit it again"
    )
    chosen: tuple[str, ...] = ()
    if decision == "relabel":
        chosen = _labels(fields["suggested"], multi_label, where)
        if not chosen and not multi_label:
            raise DataError(f"{where}: relabel, but 'suggested' is empty", hint=f"one of {', '.join(labels[:20])}")
        _check_known(chosen, labels, f"{where}: suggested", None)
        if chosen == given:
            raise DataError(f"{where}: relabel to the label that it has, {fields['label']!r}", hint="write keep")
    return Decision(fields["row"].strip(), given, decision, chosen, where)


def _labels(cell: str, multi_label: bool, where: str) -> tuple[str, ...]:
    if not multi_label:
        name = clean_name(cell)
        return (name,) if name else ()
    try:
        names = json.loads(cell)
        return tuple(sorted({clean_name(str(name)) for name in names}))
    except (ValueError, TypeError) as error:
        raise DataError(f'{where}: {cell[:60]!r} is not a JSON list of labels such as ["a", "b"]') from error


def _check_known(names: Sequence[str], labels: Sequence[str], what: str, because: str | None) -> None:
    known = set(labels)
    for name in names:
        if name not in known:
            close = nearest(name, known)[:300]
            raise DataError(
                f"{what} {name!r} is no label of the data", hint=f"{because}; {close}" if because else close
            )


def _check_same(first: Decision | None, second: Decision | None, where: str) -> None:
    if first is None or second is None:
        return
    if (first.decision, first.labels) != (second.decision, second.labels):
        said = [f"{d.decision} {', '.join(d.labels)}".strip() for d in (first, second)]
        raise DataError(
            f"{where}: the row of {first.where} is decided again, differently: {said[0]!r}, then {said[1]!r}",
            hint="keep one of the two lines; nothing was written",
        )
