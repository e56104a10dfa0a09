"""What every step of a build shares: the task, the run folder, the rows, the base, the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.build.keeping import Kept
from alambic.data.dataset import Dataset
from alambic.data.split import Splits
from alambic.kinds.cascade import Cascade
from alambic.manifest import PartSpec
from alambic.model.bases import Base
from alambic.task import Task
from alambic.workspace import Workspace

# What a build of one machine cannot share with a build of another: engines, kernels and precisions differ.
ENGINE_LIBRARIES = ("openvino", "openvino-tokenizers", "onnxruntime", "tokenizers", "numpy")


@dataclass(frozen=True)
class Fold:
    """Rows to fit on and rows that decide."""

    tag: str
    train: Dataset
    dev: Dataset

    @property
    def digest(self) -> str:
        """Digest of both parts."""
        return f"{self.train.digest[:16]}-{self.dev.digest[:16]}"


@dataclass(frozen=True)
class Context:
    """The constants of one build; `kept` are rows that no other part has, kept apart for what the task promises."""

    task: Task
    workspace: Workspace
    train: Dataset
    test: Dataset
    splits: Splits
    folds: tuple[Fold, ...]
    base: Base | None
    threads: int | None
    machine: dict[str, Any]
    kept: Kept | None = None
    unlabelled: tuple[str, ...] = ()

    @property
    def machine_digest(self) -> str:
        """Short digest of the machine, for stages whose result depends on it."""
        return str(self.machine["digest"])


@dataclass(frozen=True)
class Fitted:
    """A candidate fitted on some rows: the parts of its bundle, and how the same fit is made on more rows.

    Attributes:
        parts: each part with the folder that holds its files.
        key: digest of the stages that made it.
        refit: what was found while fitting (steps, int8 form) and is kept when the winner is fitted on all rows.
        details: for the report.
        vectors: what the first part, a frozen encoder, gave for every row of the context, by example digest; None when
            the first part was made for this candidate.
        cascade: of a chain, its stages and thresholds; None where one model answers alone.
    """

    parts: tuple[tuple[PartSpec, Path], ...]
    key: str
    refit: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] | None = None
    cascade: Cascade | None = None


def part_record(spec: PartSpec, folder: Path, stage_folder: Path) -> dict[str, Any]:
    """Return `spec` as JSON for a stage's result, its folder relative to the stage."""
    return {
        "name": spec.name,
        "engine": spec.engine,
        "folder": spec.folder,
        "params": spec.params,
        "after": spec.after,
        "at": folder.relative_to(stage_folder).as_posix(),
    }


def parts_of(records: Sequence[dict[str, Any]], stage_folder: Path) -> tuple[tuple[PartSpec, Path], ...]:
    """Read back what `part_record` wrote."""
    return tuple(
        (PartSpec(r["name"], r["engine"], r["folder"], r["params"], r["after"]), stage_folder / r["at"])
        for r in records
    )
