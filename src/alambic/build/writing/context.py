"""What every step of the build of a writing model shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alambic.data.chats import ChatDataset
from alambic.data.split_pairs import PairParts
from alambic.manifest import PartSpec
from alambic.model.bases import Base
from alambic.task import Task
from alambic.workspace import Workspace

ENGINE_LIBRARIES = ("openvino", "openvino-genai", "openvino-tokenizers", "tokenizers", "numpy")
# Writing is slow: this many rows decide, and this many are scored at the end; both are said with every figure.
DECIDING_ROWS, TEST_ROWS = 200, 1000


@dataclass(frozen=True)
class WritingContext:
    """The constants of one build.

    Attributes:
        task: what is asked.
        workspace: the run folder, locked.
        train: rows to fit on.
        dev: rows that stop the training; the first `DECIDING_ROWS` of them, drawn by seed, choose.
        test: rows scored once.
        base: the model to start from; None when no candidate needs one, or when it is made from scratch.
        schema: of the answers (`extract`).
        machine: fingerprint.
        pairs: preferences; None when the task has none.
    """

    task: Task
    workspace: Workspace
    train: ChatDataset
    dev: ChatDataset
    test: ChatDataset
    base: Base | None
    schema: Mapping[str, Any] | None
    machine: dict[str, Any]
    pairs: PairParts | None = None

    @property
    def threads(self) -> int | None:
        """Threads to train and measure with."""
        return self.task.task.threads

    @property
    def machine_digest(self) -> str:
        """Short digest of the machine, for stages whose result depends on it."""
        return str(self.machine["digest"])


@dataclass(frozen=True)
class FittedWriter:
    """A candidate made: the part that writes, the folder of its files, and the key of the stages behind it.

    Attributes:
        beside: the parts ``adapter`` and ``draft`` with the folders of their files, where there are any.
    """

    part: PartSpec
    folder: Path
    key: str
    details: dict[str, Any] = field(default_factory=dict)
    beside: Mapping[str, tuple[PartSpec, Path]] = field(default_factory=dict)
