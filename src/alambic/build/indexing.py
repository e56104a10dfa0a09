"""The index of training rows that a bundle shows as reasons, when the task asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from alambic.build.context import Context, Fitted
from alambic.engines.examples import HASHING, NAME, write_index
from alambic.events import Work
from alambic.manifest import PartSpec
from alambic.workspace import Stage, StageSpec


def index_stage(ctx: Context, fitted: Fitted) -> Work[Stage | None]:
    """Index the rows that the bundle was fitted on; None when the task asks for no reasons.

    Their texts are written only with ``reasons = "texts"``; otherwise places and digests are, which tell the text to
    nobody who does not have the file.
    """
    how = ctx.task.data.reasons
    if how is None:
        return None
    spec = StageSpec(
        "index",
        {"reasons": how, "hashing": HASHING},
        {"rows": ctx.train.digest, "fit": fitted.key},
        libraries=("numpy",),
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        rows = [
            {"labels": e.labels, "where": e.where, "digest": e.digest, **({"text": e.text} if how == "texts" else {})}
            for e in ctx.train
        ]
        known = fitted.vectors
        vectors = None if known is None else np.stack([known[example.digest] for example in ctx.train])
        return {"params": write_index(folder / NAME, rows, ctx.train.texts, vectors)}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def index_part(stage: Stage) -> tuple[PartSpec, Path]:
    """Return the part that `index_stage` made, and where its files are."""
    return PartSpec(NAME, NAME, NAME, stage.result["params"]), stage.folder / NAME
