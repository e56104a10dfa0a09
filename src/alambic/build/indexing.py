"""The index of training rows that a bundle shows as reasons, when the task asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.build.context import ENGINE_LIBRARIES, Context, Fitted
from alambic.engines import open_engine
from alambic.engines.examples import HASHING, NAME, write_index
from alambic.events import Work
from alambic.manifest import PartSpec
from alambic.workspace import Stage, StageSpec


def index_stage(ctx: Context, fitted: Fitted, draft: Stage) -> Work[Stage | None]:
    """Index the rows that the bundle was fitted on; None when the task asks for no reasons.

    By the vectors that the bundle gives, where it gives any; otherwise by words. Their texts are written only with
    ``reasons = "texts"``; otherwise places and digests are, which tell the text to nobody who does not have the file.

    Args:
        ctx: the build.
        fitted: what the bundle is made of.
        draft: stage that packed it.
    """
    how = ctx.task.data.reasons
    if how is None:
        return None
    spec = StageSpec(
        "index",
        {"reasons": how, "hashing": HASHING},
        {"rows": ctx.train.digest, "fit": fitted.key, "machine": ctx.machine_digest},
        version=2,
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        rows = [
            {"labels": e.labels, "where": e.where, "digest": e.digest, **({"text": e.text} if how == "texts" else {})}
            for e in ctx.train
        ]
        return {"params": write_index(folder / NAME, rows, ctx.train.texts, _vectors(ctx, fitted, draft))}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def _vectors(ctx: Context, fitted: Fitted, draft: Stage) -> NDArray[np.float32] | None:
    if fitted.vectors is not None:  # the frozen encoder read these rows already
        return np.stack([fitted.vectors[example.digest] for example in ctx.train])
    with open_engine(draft.folder / "bundle", threads=ctx.threads) as engine:
        return engine.embed(ctx.train.texts) if "embed" in engine.capabilities else None


def index_part(stage: Stage) -> tuple[PartSpec, Path]:
    """Return the part that `index_stage` made, and where its files are."""
    return PartSpec(NAME, NAME, NAME, stage.result["params"]), stage.folder / NAME
