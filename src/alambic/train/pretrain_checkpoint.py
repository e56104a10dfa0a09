"""Checkpoints of a pre-training: whole or absent, the last two kept, and the one before the rate decays for good.

    RUN/checkpoints/step-00001200/{tensors.pt, state.json}

A checkpoint is written beside and renamed. The run goes on from the newest that can be read and belongs to it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alambic.errors import TrainError, WorkspaceError

_KEPT = 2
_STABLE = "stable"


def save_checkpoint(folder: Path, tensors: dict[str, Any], state: dict[str, Any], *, stable: bool = False) -> Path:
    """Write a checkpoint of `state["step"]` and remove all but the last two; return where it is.

    Args:
        folder: of all checkpoints.
        tensors: of the model and the optimisers.
        state: JSON values, with ``step``.
        stable: it is kept until the next one that is.

    Raises:
        WorkspaceError: the disk is full or the folder cannot be written.
    """
    name = f"step-{state['step']:08d}"
    place = folder / (f"{_STABLE}-{name}" if stable else name)
    beside = folder / f".{place.name}.partial"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        with open(beside / "tensors.pt", "wb") as out:
            torch.save(tensors, out)
            out.flush()
            os.fsync(out.fileno())
        (beside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)
    except (OSError, RuntimeError) as error:  # torch.save gives RuntimeError when the disk is full
        raise WorkspaceError(
            f"{place}: the checkpoint cannot be written ({error})", hint="free some disk space, then run it again"
        ) from error
    for old in sorted(folder.glob(f"{_STABLE}-step-*" if stable else "step-*"))[: -1 if stable else -_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def load_checkpoint(
    folder: Path, *, identity: dict[str, Any], steps: int
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return tensors and state of the newest checkpoint that this run can go on from; None where there is none.

    A run of more steps than before goes on from a checkpoint written before its rate began to fall.

    Args:
        folder: of all checkpoints.
        identity: what must be equal.
        steps: of the whole run.

    Raises:
        TrainError: the checkpoints are of another run, or all were written after the rate began to fall in a shorter
            run.
    """
    others: set[str] = set()
    late = False
    for place, state in _newest(folder):
        different = sorted(k for k in {*identity, *state["identity"]} if identity.get(k) != state["identity"].get(k))
        if different:
            others.update(different)
            continue
        if state["steps"] != steps and state["step"] > state["free_until"]:
            late = True
            continue
        try:
            return torch.load(place / "tensors.pt", weights_only=True, map_location="cpu"), state
        except (OSError, RuntimeError, EOFError):  # cut short; the one before will do
            continue
    if others:
        raise TrainError(
            f"{folder}: the checkpoints here are of another run; different: {', '.join(sorted(others))}",
            hint="give another output folder, or remove this one to start again",
        )
    if late:
        raise TrainError(
            f"{folder}: the checkpoints here are of a run of another length, whose rate had begun to fall",
            hint="give the length it had, another output folder, or remove this one to start again",
        )
    return None


def _newest(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    found = []
    for place in folder.glob("*step-*"):
        try:
            state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not place.name.startswith("."):
            found.append((place, state))
    yield from sorted(found, key=lambda pair: pair[1]["step"], reverse=True)
