"""Before anything slow: read and split the rows, find the base, check the recipes, open the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alambic.build.chain import check_chain
from alambic.build.context import Context, Fold
from alambic.build.keeping import keep
from alambic.build.ladder import NEEDS_BASE, check_recipe
from alambic.build.teaching import check_students
from alambic.data.dataset import Dataset
from alambic.data.read import read_dataset
from alambic.data.split import Splits, split
from alambic.data.unlabelled import read_unlabelled
from alambic.errors import DataError, TaskError, nearest
from alambic.events import Note, Work
from alambic.kinds.cascade import is_cascade
from alambic.measure.frontier import contradictions
from alambic.measure.machine import fingerprint
from alambic.model.bases import Base, resolve
from alambic.model.bases_default import AUTO, default_base
from alambic.task import Task
from alambic.workspace import Workspace

LOCK = "splits.lock"


@dataclass(frozen=True)
class Rows:
    """What the data section of a task gives: the user's own parts, and how they were split."""

    train: Dataset
    dev: Dataset | None
    test: Dataset | None
    splits: Splits
    notes: tuple[str, ...]


def read_rows(task: Task, *, lock: Path | None) -> Rows:
    """Read every data file of the task and split the rows.

    Raises:
        DataError: a file or its content cannot be used.
    """
    first = read_dataset(task.path_of(task.data.train), task.data, multi_label=task.multi_label)
    _check_declared(task, first.dataset)
    notes = list(first.notes)
    labels = first.dataset.labels
    found = first.columns
    spec = task.data.model_copy(update={"text": found.text, "label": found.label, "group": found.group})
    others: list[Dataset | None] = []
    for name in (task.data.dev, task.data.test):
        if name is None:
            others.append(None)
            continue
        read = read_dataset(task.path_of(name), spec, multi_label=task.multi_label, labels=labels)
        notes += [note for note in read.notes if note not in notes]
        others.append(read.dataset)
    dev, test = others
    splits = split(first.dataset, dev, test, spec=task.data, seed=task.seed, lock=lock)
    return Rows(first.dataset, dev, test, splits, (*notes, *splits.notes))


def _check_declared(task: Task, train: Dataset) -> None:
    """Refuse labels that the task's `[labels]` does not list: one that is misspelt would become a label of its own."""
    strange = next((e for e in train if task.labels and not set(e.labels) <= task.labels.keys()), None)
    if strange is not None:
        name = next(name for name in strange.labels if name not in task.labels)
        raise DataError(f"{strange.where}: label {name!r} is not in [labels]; {nearest(name, task.labels)}")


def folds_of(splits: Splits) -> tuple[Fold, ...]:
    """Return what is fitted and what decides: one pair with a dev part, one per fold otherwise."""
    if splits.dev is not None:
        return (Fold("dev", splits.train, splits.dev),)
    everything = range(len(splits.train))
    folds = []
    for i, held in enumerate(splits.folds):
        out = set(held)
        rest = splits.train.take([j for j in everything if j not in out])
        folds.append(Fold(f"fold{i}", rest, splits.train.take(held)))
    return tuple(folds)


def find_base(task: Task) -> Base | None:
    """Resolve the base that the task names; check every recipe and the budget before anything slow.

    None when no candidate needs a base, or when the texts decide (`settle_base`).
    """
    faults = contradictions(task.budget, task.metrics)
    if faults:
        raise TaskError(f"{task.path.name}: " + "\n".join(faults), hint="no bundle could ever meet this budget")
    for candidate in task.candidates:
        check = check_chain if is_cascade(candidate.name) else check_recipe
        check(candidate.made_by, dict(candidate.recipe))
    if task.base.name == AUTO or not _needs_base(task):
        return None
    return resolve(task.base, root=task.root)


def settle_base(task: Task, base: Base | None, rows: Rows) -> Work[Base | None]:
    """Return `base`, or the default one for the language of the training rows, which is said with its reason.

    Raises:
        BaseModelError: the default base cannot be had.
    """
    if base is not None or not _needs_base(task):
        return base
    default = default_base(rows.train.texts)
    yield Note(default.reason, "warning" if default.missing else "info")
    return resolve(task.base.model_copy(update={"name": default.name}), root=task.root)


def _needs_base(task: Task) -> bool:
    return any(candidate.made_by in NEEDS_BASE for candidate in task.candidates)


def prepare(task: Task, base: Base | None, workspace: Workspace) -> Work[Context]:
    """Return the context of a build in `workspace`, which is locked; yields what was guessed and set aside.

    Raises:
        DataError: a file or its content cannot be used.
    """
    rows = read_rows(task, lock=workspace.root / LOCK)
    for note in rows.notes:
        yield Note(note)
    splits, kept, notes = keep(task, rows.splits, own_dev=rows.dev is not None)
    for note in notes:
        yield Note(note)
    base = yield from settle_base(task, base, rows)
    unlabelled = yield from for_students(task, base, rows)
    everything = splits.train if splits.dev is None else splits.train + splits.dev
    return Context(
        task=task,
        workspace=workspace,
        train=everything,
        test=splits.test,
        splits=rows.splits,
        folds=folds_of(splits),
        base=base,
        threads=task.task.threads,
        machine=fingerprint(),
        kept=kept,
        unlabelled=unlabelled,
    )


def for_students(task: Task, base: Base | None, rows: Rows) -> Work[tuple[str, ...]]:
    """Check the students and read the texts that they learn from besides the rows; none is a text of any row.

    Raises:
        TaskError: a student would be as large as its teacher.
        BaseModelError: the base of a student cannot be had.
        DataError: the file of texts cannot be used.
    """
    check_students(task, base)
    if task.data.unlabelled is None:
        return ()
    parts = [part for part in (rows.train, rows.dev, rows.test, rows.splits.test) if part is not None]
    taken = [text for part in parts for text in part.texts]
    path = task.path_of(task.data.unlabelled)
    read = read_unlabelled(path, task.data, train=rows.splits.train.texts, taken=taken)
    for note in read.notes:
        yield Note(note)
    for warning in read.warnings:
        yield Note(warning, "warning")
    return read.texts
