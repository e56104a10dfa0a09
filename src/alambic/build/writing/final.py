"""The chosen writer, scored once on test through its bundle, sealed with its scores and golden conversations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alambic.build.final import publish
from alambic.build.writing.context import ENGINE_LIBRARIES, TEST_ROWS, WritingContext
from alambic.build.writing.trial import (
    WritingTrial,
    assemble,
    bundle_stage,
    drawn,
    measure_stage,
    point_of,
    writer_spec,
)
from alambic.bundle import open_bundle
from alambic.engines.bundle_writer import BundleWriter, open_writer
from alambic.events import Work
from alambic.kinds.generation import GenerationRequest
from alambic.kinds.golden_chats import GOLDEN_CHATS
from alambic.manifest import GoldenChat
from alambic.measure.frontier import Point
from alambic.measure.written_figures import WrittenFigures
from alambic.workspace import StageSpec


@dataclass(frozen=True)
class WritingFinal:
    """The bundle that ships, with its only score on test."""

    bundle: Path
    written: WrittenFigures
    point: Point
    costs: dict[str, Any]


def finish(ctx: WritingContext, trial: WritingTrial, run: Path) -> Work[WritingFinal]:
    """Score the chosen candidate once on test and seal it under `run`."""
    draft = yield from bundle_stage(ctx, trial.name, trial.fitted, trial.sampling)
    rows = drawn(ctx.test, TEST_ROWS, ctx.task.seed)
    scored = yield from measure_stage(ctx, trial.name, draft, rows, split="test")
    written = WrittenFigures.from_dict(scored.result["written"])
    spec = StageSpec(
        "final", {}, {"bundle": draft.key, "test": scored.key, "task": ctx.task.digest}, libraries=ENGINE_LIBRARIES
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        kept = {k: scored.result["costs"][k] for k in ("speed", "peak_ram_mb", "energy") if k in scored.result["costs"]}
        scores = {"dev": _scores(trial.written), "test": {**_scores(written), "costs": kept}}
        with open_writer(draft.folder / "bundle", threads=ctx.threads) as writer:
            golden = golden_of(writer)
        own = writer_spec(ctx, trial.sampling, trial.fitted)
        bundle = assemble(ctx, trial.name, trial.fitted, folder / "bundle", own, scores=scores, golden=golden)
        return {"seal": bundle.manifest.seal}

    final = yield from ctx.workspace.run(spec, work)
    bundle = publish(final, run / "bundle")
    size_mb = open_bundle(bundle).size_bytes / 1e6
    point = replace(point_of(trial.name, scored), size_mb=size_mb)
    return WritingFinal(bundle, written, point, {**scored.result["costs"], "size_mb": size_mb})


def _scores(written: WrittenFigures) -> dict[str, Any]:
    return {"n": written.n, **{name: score.to_dict() for name, score in written.scores.items()}}


def golden_of(writer: BundleWriter) -> tuple[GoldenChat, ...]:
    """Record what the engine reads for the golden conversations; none where it reads no tokens."""
    if "token_ids" not in writer.capabilities:
        return ()
    return tuple(
        GoldenChat(chat=chat.to_dict(as_text=True), ids=tuple(writer.token_ids(GenerationRequest(chat=chat))))
        for chat in GOLDEN_CHATS.values()
    )
