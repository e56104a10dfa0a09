"""Rows kept apart for what a task promises: no model is fitted on them, and nothing else looks at them.

The thresholds of abstention, of label sets and of the scope are fitted on these rows as the bundle that ships answers
them, so what is proven is proven of that bundle.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from alambic.data.clean import clean_text
from alambic.data.dataset import Dataset
from alambic.data.read import cell_text, columns_of, iter_rows
from alambic.data.split import Splits, set_aside
from alambic.errors import DataError, nearest
from alambic.measure.selective import CONFIDENCE, rows_needed, set_rows_needed
from alambic.task import DataSpec, Task

IN_SCOPE = 0.98  # share of the task's own texts that pass as such, unless the task says another
LEAST_OUTSIDE = 10  # texts out of scope that can tell one score from another
_DEV_SHARE, _TRAIN_SHARE = 0.5, 0.2  # at most, of the user's dev rows, or of the training rows without any
_AMPLE = 4  # times the fewest rows: with these, most texts can be answered under the promise
_SET_ROWS, _SCOPE_ROWS = 500, 300


@dataclass(frozen=True)
class Kept:
    """What is kept apart.

    Attributes:
        promise: rows that test the threshold of confidence and set that of label sets.
        scope: rows of the task that set the threshold of the scope; the same rows where no precision is promised.
        label: the label of texts of no other label; None where the data has none.
        outside: texts out of scope that choose the score.
        outside_test: texts out of scope that are only counted at the end.
    """

    promise: Dataset
    scope: Dataset
    label: str | None = None
    outside: tuple[str, ...] = ()
    outside_test: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        parts = (self.promise.digest, self.scope.digest, self.label, *self.outside, "\x1e", *self.outside_test)
        return hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def promises(task: Task) -> bool:
    """Tell whether the task asks for anything that rows must be kept apart for."""
    budget = task.budget
    return any(v is not None for v in (budget.precision, budget.coverage, budget.in_scope, task.data.out_of_scope))


def keep(task: Task, splits: Splits, *, own_dev: bool) -> tuple[Splits, Kept | None, tuple[str, ...]]:
    """Take the rows that the promises need from dev or train; return what is left, what was taken, and notes.

    Args:
        task: what is asked.
        splits: the rows before.
        own_dev: whether dev is the user's; then half of it is taken, otherwise at most a fifth of all but test.

    Raises:
        DataError: there are too few rows for what is promised, or the out-of-scope texts cannot be read.
    """
    if not promises(task):
        return splits, None, ()
    label, texts, notes = _outside(task, splits)
    pool = splits.dev if own_dev and splits.dev is not None else _all(splits)
    most = int(len(pool) * (_DEV_SHARE if own_dev else _TRAIN_SHARE))
    taken = set_aside(pool, most if own_dev else min(most, _wanted(task)), seed=task.seed)
    rows = pool.take(taken)
    n_scope = min(_SCOPE_ROWS, len(rows) // 3) if task.budget.precision is not None and _scoped(task) else 0
    order = sorted(range(len(rows)), key=lambda i: rows.examples[i].digest)
    promise = rows.take(sorted(order[n_scope:]))
    kept = Kept(promise, rows.take(sorted(order[:n_scope])) if n_scope else promise, label, *_halves(texts))
    source = "half of the dev rows" if own_dev else f"{_TRAIN_SHARE:.0%} of the rows but test"
    _check_enough(task, kept, f"at most {source} can be kept apart ({len(pool):,} rows there)")
    said = f"kept apart for what the task promises: {len(rows):,} of {len(pool):,} {'dev' if own_dev else 'training'}"
    return _without(splits, rows, own_dev=own_dev), kept, (*notes, f"{said} rows; nothing else uses them")


def _all(splits: Splits) -> Dataset:
    return splits.train if splits.dev is None else splits.train + splits.dev


def _scoped(task: Task) -> bool:
    return task.budget.in_scope is not None or task.data.out_of_scope is not None


def _wanted(task: Task) -> int:
    precision, coverage = task.budget.precision, task.budget.coverage
    sure = _AMPLE * rows_needed(precision) if precision is not None else 0
    sets = max(_SET_ROWS, _AMPLE * set_rows_needed(coverage)) if coverage is not None else 0
    scope = max(_SCOPE_ROWS, _AMPLE * set_rows_needed(_share(task))) if _scoped(task) else 0
    return max(sure, sets) + scope if sure else max(sets, scope)


def _share(task: Task) -> float:
    return task.budget.in_scope or IN_SCOPE


def _check_enough(task: Task, kept: Kept, why: str) -> None:
    """Refuse before anything slow what the number of rows alone makes impossible."""
    n, precision, coverage = len(kept.promise), task.budget.precision, task.budget.coverage
    if precision is not None and n < (least := rows_needed(precision)):
        within = f"; {n} rows support {(1.0 - CONFIDENCE) ** (1.0 / n):.3f} at most" if n else ""
        raise DataError(
            f"budget.precision = {precision:g} at {CONFIDENCE:.0%} confidence needs at least {least} rows kept apart, "
            f"all answered and all right; this data gives {n}: {why}",
            hint=f"give more rows, in train or as a dev file{within}",
        )
    if coverage is not None and n < (least := set_rows_needed(coverage)):
        raise DataError(
            f"budget.coverage = {coverage:g} needs at least {least} rows kept apart; this data gives {n}: {why}",
            hint="give more rows, or a lower coverage",
        )
    if _scoped(task) and len(kept.scope) < (least := set_rows_needed(_share(task))):
        raise DataError(
            f"budget.in_scope = {_share(task):g} needs at least {least} rows kept apart for the scope; this data gives "
            f"{len(kept.scope)}: {why}",
            hint="give more rows, or a lower in_scope",
        )


def _without(splits: Splits, rows: Dataset, *, own_dev: bool) -> Splits:
    gone = {example.digest for example in rows}
    dev = None if splits.dev is None else _rest(splits.dev, gone)
    if own_dev:
        return replace(splits, dev=dev)
    places = [i for i, example in enumerate(splits.train) if example.digest not in gone]
    moved = {old: new for new, old in enumerate(places)}
    folds = tuple(tuple(moved[i] for i in fold if i in moved) for fold in splits.folds)
    return replace(splits, train=splits.train.take(places), dev=dev, folds=tuple(fold for fold in folds if fold))


def _rest(rows: Dataset, gone: set[str]) -> Dataset:
    return rows.take([i for i, example in enumerate(rows) if example.digest not in gone])


def _outside(task: Task, splits: Splits) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """Return the label, or the texts, of what is out of scope, and notes.

    Raises:
        DataError: `data.out_of_scope` is neither a label nor a readable file.
    """
    name = task.data.out_of_scope
    if name is None:
        return None, (), ()
    labels = splits.train.labels
    path = task.path_of(name)
    if name in labels:
        if len(labels) < 3:
            raise DataError(f"data.out_of_scope = {name!r}: without it the task has one label; a classifier needs two")
        return name, (), (f"out of scope: rows of the label {name!r}",)
    if not path.is_file():
        raise DataError(
            f"data.out_of_scope = {name!r}: no file {path}, and no label of that name",
            hint=f"labels: {nearest(name, labels)[:200]}",
        )
    spec = DataSpec(train=str(path), text=task.data.text, encoding=task.data.encoding, separator=task.data.separator)  # type: ignore[call-arg]
    column = columns_of(path, spec, need_label=False).columns.text
    read = (clean_text(cell_text(row.fields.get(column))).text for row in iter_rows(path, spec) if row.error is None)
    texts = dict.fromkeys(text for text in read if text)
    known = {text for part in (splits.train, splits.dev, splits.test) if part is not None for text in part.texts}
    fresh = tuple(text for text in texts if text not in known)
    if len(fresh) < 2:
        raise DataError(f"{path}: {len(fresh)} usable out-of-scope texts that are no rows of the task; two at least")
    also = f"; {len(texts) - len(fresh)} that are rows of the task too were left out" if len(fresh) < len(texts) else ""
    return (
        None,
        fresh,
        (f"out of scope: {len(fresh):,} texts of {path.name}, half of them only counted at the end{also}",),
    )


def _halves(texts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    return tuple(order[: len(order) // 2]), tuple(order[len(order) // 2 :])
