"""What `alambic check` does: every cheap validation of a build, and the audit of the rows."""

from __future__ import annotations

from collections.abc import Sequence

from alambic.build.chain import check_rows
from alambic.build.keeping import keep
from alambic.build.prepare import find_base, folds_of, for_students, read_rows, settle_base
from alambic.data.check import Audit, audit
from alambic.data.split import Splits
from alambic.events import Note, Work
from alambic.model.bases import Base
from alambic.task import Task


def check_task(task: Task) -> Work[Audit]:
    """Validate the task, read its rows without writing anything, and audit them.

    Raises:
        TaskError, DataError, BaseModelError: each says what and where.
    """
    base = find_base(task)
    rows = read_rows(task, lock=None)
    for note in rows.notes:
        yield Note(note)
    left, _, notes = keep(task, rows.splits, own_dev=rows.dev is not None)
    for note in notes:
        yield Note(note)
    check_rows(task, folds_of(left))
    base = yield from settle_base(task, base, rows)
    yield from for_students(task, base, rows)
    return audit_rows(rows.splits, base)


def audit_rows(splits: Splits, base: Base | None) -> Audit:
    """Audit the rows against what the base reads."""
    if base is None:
        return audit(splits)
    from alambic.model.encoder import load_tokenizer

    tokenizer = load_tokenizer(base.folder)

    def count_tokens(texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]

    return audit(splits, count_tokens=count_tokens, max_tokens=base.max_tokens)
