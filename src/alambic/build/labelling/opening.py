"""The way in: from a task file, or a file of texts and label names, to an annotation that can be worked on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from alambic.build.labelling.encoder import VectorCache, open_encoder
from alambic.build.labelling.session import Session
from alambic.build.labelling.tutor import Tutor
from alambic.data.annotations import Journal
from alambic.data.label_pool import Pool, check_names, language_notes, read_labels, read_pool
from alambic.errors import DataError, TaskError
from alambic.events import Note, Work
from alambic.task import BaseSpec, DataSpec, Task, load_task

NO_MODEL = "none"


@dataclass(frozen=True)
class Ask:
    """What is asked for.

    Attributes:
        target: a task file, or a file of texts.
        texts: the file of texts, when the target is a task whose training file is not where they are.
        labels: names, or a .toml file of names and descriptions; those of the task or of the data when None.
        text: name of the text column; guessed when None.
        multi_label: texts may have several labels (a task file says it itself).
        journal: where decisions are kept; beside the texts when None.
        base: of the guesses; the task's own when None; `none` for no guesses.
        overlap: share of texts that two annotators see.
        rename: ``OLD=NEW`` for label names that changed since; ``OLD=`` asks for the texts again.
    """

    target: Path
    texts: Path | None = None
    labels: str | None = None
    text: str | None = None
    multi_label: bool = False
    journal: Path | None = None
    base: str | None = None
    overlap: float = 0.1
    rename: Sequence[str] = ()


@dataclass(frozen=True)
class Annotation:
    """Texts, label names and journal of one annotation, read and checked; no model yet."""

    name: str
    pool: Pool
    journal: Journal
    labels: Mapping[str, str]
    multi_label: bool
    base: BaseSpec
    root: Path
    threads: int | None
    overlap: float
    notes: tuple[str, ...]


def open_annotation(ask: Ask) -> Annotation:
    """Read the texts and the journal, and settle the label names.

    Raises:
        TaskError: the task file or the label names cannot be used.
        DataError: the texts or the journal cannot be read, or decisions have names that are gone.
    """
    task = load_task(ask.target) if ask.target.suffix.lower() == ".toml" else None
    if task is not None and task.kind != "classify":
        raise TaskError(f"{task.path.name}: texts are labelled for kind 'classify', not {task.kind!r}")
    if task is not None and ask.multi_label:
        raise TaskError("--multi-label: the task file says it itself (task.multi_label)")
    multi_label = task.multi_label if task is not None else ask.multi_label
    source = ask.texts or (task.path_of(task.data.train) if task is not None else ask.target)
    journal = Journal(ask.journal or source.with_name(f"{source.stem}.labels.jsonl"))
    declared = _declared(ask, task)
    known = declared or dict(journal.decisions.labels)
    pool = _pool(ask, task, source, known, multi_label=multi_label)
    labels = known or {name: "" for name in sorted({n for one in pool.texts for n in one.labels or ()})}
    if len(labels) < (1 if multi_label else 2):
        raise TaskError(
            f"{source.name}: {len(labels)} label names are known; annotating needs {1 if multi_label else 2} or more",
            hint='--labels "billing, repair, other", or a table [labels] in the task file: name = "description"',
        )
    _settle_names(journal, labels, ask.rename)
    pool, dropped = _known_only(pool, labels)
    notes = (*pool.notes, *dropped, *_languages(pool, labels))
    base = task.base if task is not None else BaseSpec()  # type: ignore[call-arg]
    if ask.base is not None:
        base = BaseSpec(name=ask.base)  # type: ignore[call-arg]
    return Annotation(
        name=task.name if task is not None else source.stem, pool=pool, journal=journal, labels=labels,
        multi_label=multi_label, base=base, root=task.root if task is not None else Path.cwd(),
        threads=task.task.threads if task is not None else None, overlap=ask.overlap, notes=notes,
    )  # fmt: skip


@contextmanager
def closing(session: Session) -> Iterator[Session]:
    """Close the session at the end of a block."""
    try:
        yield session
    finally:
        session.close()


def start(annotation: Annotation) -> Work[Session]:
    """Open the encoder and begin; yields what the user should know.

    Raises:
        BaseModelError: the base cannot be had (`--base none` goes without).
        MissingExtra: the first use of a base needs the extra `[build]`.
    """
    for note in annotation.notes:
        yield Note(note, "warning" if "another language" in note else "info")
    for note in annotation.journal.repaired:
        yield Note(note, "warning")
    texts = [one.text for one in annotation.pool.texts]
    tutor = None
    if annotation.base.name != NO_MODEL:
        encoder = yield from open_encoder(annotation.base, texts, root=annotation.root, threads=annotation.threads)
        cache = VectorCache(encoder.digest, annotation.name)
        tutor = Tutor(encoder.embed, texts, annotation.labels, multi_label=annotation.multi_label, cache=cache)
    return Session(
        annotation.name, annotation.pool, annotation.journal, annotation.labels, multi_label=annotation.multi_label,
        tutor=tutor, overlap=annotation.overlap, notes=annotation.notes,
    )  # fmt: skip


def _declared(ask: Ask, task: Task | None) -> dict[str, str]:
    if ask.labels is not None:
        return read_labels(ask.labels)
    return dict(task.labels) if task is not None else {}


def _pool(ask: Ask, task: Task | None, source: Path, labels: Mapping[str, str], *, multi_label: bool) -> Pool:
    spec = task.data if task is not None else DataSpec(train=str(ask.target))  # type: ignore[call-arg]
    own = spec.model_copy(update={"text": ask.text}) if ask.text is not None else spec
    if ask.texts is None:
        return read_pool(source, own, labels=labels, multi_label=multi_label)
    # Columns that the task names are those of its own file.
    other = spec.model_copy(update={"text": ask.text, "label": None, "group": None})
    pool = read_pool(source, other, labels=labels, multi_label=multi_label)
    train = task.path_of(task.data.train) if task is not None else None
    if train is not None and train.exists() and train != source.resolve():
        pool += read_pool(train, spec, labels=labels, multi_label=multi_label)
    return pool


def _settle_names(journal: Journal, labels: Mapping[str, str], rename: Sequence[str]) -> None:
    """Apply renames, refuse names that are gone, and write down the names from here on."""
    for one in rename:
        old, equals, new = (part.strip() for part in one.partition("="))
        if not equals or not old:
            raise TaskError(f"--rename {one!r}", hint="write OLD=NEW, or OLD= to be asked for these texts again")
        if new and new not in labels:
            raise TaskError(f"--rename {one!r}: {new!r} is not a label of this task")
        if old not in journal.decisions.names_used():
            raise DataError(f"--rename {one!r}: nothing in {journal.path.name} is annotated {old!r}")
        journal.append("rename", old=old, new=new or None)
    check_names(journal.decisions, labels, journal.path.name)
    if journal.decisions.labels != dict(labels):
        journal.append("labels", labels=dict(labels))


def _known_only(pool: Pool, labels: Mapping[str, str]) -> tuple[Pool, list[str]]:
    """Ask again for texts whose labels in the file are not known."""
    strange = {name for one in pool.texts for name in one.labels or () if name not in labels}
    if not strange:
        return pool, []
    kept = tuple(replace(one, labels=None) if strange & set(one.labels or ()) else one for one in pool.texts)
    n = sum(bool(strange & set(one.labels or ())) for one in pool.texts)
    shown = ", ".join(map(repr, sorted(strange)[:5]))
    return replace(pool, texts=kept), [f"{n} text(s) have labels in the file that are not known ({shown}): asked again"]


def _languages(pool: Pool, labels: Mapping[str, str]) -> list[str]:
    """Compare the language of texts to annotate with that of annotated ones, else of the label descriptions."""
    unlabelled = [one.text for one in pool.texts if one.labels is None]
    labelled = [one.text for one in pool.texts if one.labels]
    if labelled:
        return language_notes(unlabelled, labelled, what="the annotated ones")
    described = [text for text in labels.values() if text]
    return language_notes(unlabelled, described, what="the descriptions of the labels") if described else []
