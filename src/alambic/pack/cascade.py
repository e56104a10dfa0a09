"""Several packed classifiers -> the parts of one bundle: a chain. Copies nothing; the caller does, and seals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alambic.kinds.cascade import CascadeStage
from alambic.manifest import PartSpec

Parts = tuple[tuple[PartSpec, Path], ...]


def join(stages: Sequence[CascadeStage], packed: Sequence[Parts]) -> tuple[tuple[CascadeStage, ...], Parts]:
    """Return the stages with their entries, and all parts, those of each stage under its name.

    Args:
        stages: cheapest first; their entries are found here.
        packed: of each stage, the parts with the folders of their files, its entry last.
    """
    joined: list[tuple[PartSpec, Path]] = []
    named: list[CascadeStage] = []
    for stage, parts in zip(stages, packed, strict=True):
        for part, folder in parts:
            after = None if part.after is None else f"{stage.name}.{part.after}"
            own = replace(part, name=f"{stage.name}.{part.name}", folder=f"{stage.name}/{part.folder}", after=after)
            joined.append((own, folder))
        named.append(replace(stage, entry=joined[-1][0].name))
    return tuple(named), tuple(joined)
