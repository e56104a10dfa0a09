"""Before anything slow: read and split the conversations, find the base, check recipes and schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alambic.build.writing.arithmetic import check_arithmetic
from alambic.build.writing.beside import check_beside
from alambic.build.writing.context import WritingContext
from alambic.build.writing.guessing import check_draft_of
from alambic.build.writing.ladder import NEEDS_BASE, check_recipe
from alambic.data.split_chats import read_parts
from alambic.data.split_pairs import read_pair_parts
from alambic.engines.grammar import compile_schema
from alambic.errors import EngineError, TaskError
from alambic.events import Note, Work
from alambic.kinds.schema import load_schema
from alambic.measure.frontier import contradictions
from alambic.measure.machine import fingerprint
from alambic.model.bases import Base, resolve
from alambic.task import Task
from alambic.workspace import Workspace

LOCK, PAIRS_LOCK = "splits.lock", "pairs.lock"


def find_base(task: Task) -> Base | None:
    """Resolve the base when a candidate needs one that exists; check recipes and budget before anything slow."""
    faults = contradictions(task.budget, task.metrics)
    if faults:
        raise TaskError(f"{task.path.name}: " + "\n".join(faults), hint="no bundle could ever meet this budget")
    for candidate in task.candidates:
        check_recipe(candidate.name, dict(candidate.recipe))
    check_beside(task)
    check_arithmetic(task)
    needed = any(candidate.name in NEEDS_BASE for candidate in task.candidates)
    if not needed or task.base.name == "scratch":
        check_draft_of(task, None)
        return None
    base = resolve(task.base, root=task.root, kinds=("decoder", "seq2seq"))
    check_draft_of(task, base)
    return base


def read_schema(task: Task) -> dict[str, Any] | None:
    """Read and check the JSON Schema of an `extract` task.

    Raises:
        TaskError: the file is missing, is not JSON, or no answer could ever follow it.
    """
    if task.answer.json_schema is None:
        return None
    path = task.path_of(task.answer.json_schema)
    schema = load_schema(path)
    _check_schema(schema, path)
    return schema


def _check_schema(schema: Any, path: Path) -> None:
    """Refuse a schema that no answer could follow, or that has keywords nobody would hold the model to."""
    try:
        compile_schema(schema)
    except EngineError as error:
        raise TaskError(f"{path}: {error.message}", hint=error.hint) from error


def prepare(task: Task, base: Base | None, workspace: Workspace) -> Work[WritingContext]:
    """Return the context of a build in `workspace`, which is locked; yields what was guessed and set aside.

    Raises:
        DataError: a file or its content cannot be used.
    """
    schema = read_schema(task)
    parts = read_parts(task, lock=workspace.root / LOCK)
    pairs = read_pair_parts(task, parts, lock=workspace.root / PAIRS_LOCK)
    for note in (*parts.notes, *(pairs.notes if pairs is not None else ())):
        yield Note(note)
    return WritingContext(
        task=task,
        workspace=workspace,
        train=parts.train,
        dev=parts.dev,
        test=parts.test,
        base=base,
        schema=schema,
        machine=fingerprint(),
        pairs=pairs,
    )


def lock_of(run: Path) -> Path:
    """Where a run keeps which row went to which part."""
    return run / LOCK
