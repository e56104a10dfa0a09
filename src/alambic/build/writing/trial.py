"""Try a candidate: make it, seal it, let the bundle write the answers of the deciding rows, measure what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alambic.build.assemble import copy_files, provenance
from alambic.build.writing.arithmetic import choose_arithmetic
from alambic.build.writing.context import DECIDING_ROWS, ENGINE_LIBRARIES, FittedWriter, WritingContext
from alambic.build.writing.guessing import choose_guessing, open_draft
from alambic.build.writing.ladder import NEEDS_BASE, fit
from alambic.build.writing.preferring import preference_stage
from alambic.bundle import Bundle, seal
from alambic.data.chats import ChatDataset
from alambic.engines.bundle_writer import open_writer
from alambic.events import Work
from alambic.kinds.generation import Sampling
from alambic.kinds.writing import PREFERRED
from alambic.manifest import GoldenChat, Manifest, WriterSpec
from alambic.measure.frontier import Point
from alambic.measure.writing_costs import measure_writing_costs
from alambic.measure.written import default_metrics, measure_written
from alambic.measure.written_figures import WrittenFigures
from alambic.report.card import render_card
from alambic.task import CandidateSpec
from alambic.workspace import Stage, StageSpec


@dataclass(frozen=True)
class WritingTrial:
    """A candidate measured on the rows that decide.

    Attributes:
        point: its place in quality x time x size x energy.
        written: scores and answers on those rows.
        costs: what `measure_writing_costs` gave, as JSON.
        fitted: what was made.
        sampling: how it was asked, its way of guessing included.
        margins: how much likelier it finds the better answer of each dev pair, in nats; None without preferences.
    """

    name: str
    point: Point
    written: WrittenFigures
    costs: dict[str, Any]
    fitted: FittedWriter
    sampling: Sampling
    margins: list[float | None] | None = None


def try_candidate(ctx: WritingContext, candidate: CandidateSpec, sampling: Sampling) -> Work[WritingTrial]:
    """Make, seal and measure `candidate` on the deciding rows."""
    fitted = yield from fit(ctx, candidate.name, dict(candidate.recipe))
    fitted = yield from choose_arithmetic(ctx, candidate.name, fitted, sampling)
    fitted, sampling = yield from choose_guessing(ctx, candidate.name, fitted, sampling)
    bundle = yield from bundle_stage(ctx, candidate.name, fitted, sampling)
    rows = drawn(ctx.dev, DECIDING_ROWS, ctx.task.seed)
    measured = yield from measure_stage(ctx, candidate.name, bundle, rows, split="dev")
    written = WrittenFigures.from_dict(measured.result["written"])
    costs, margins = measured.result["costs"], None
    if ctx.pairs is not None and candidate.name in NEEDS_BASE:
        preference = yield from preference_stage(ctx, candidate.name, bundle)
        margins = preference.result.get("margins")
        costs = costs if margins is None else {**costs, "preference": preference.result["figures"]}
    return WritingTrial(candidate.name, point_of(candidate.name, measured), written, costs, fitted, sampling, margins)


def drawn(rows: ChatDataset, most: int, seed: int) -> ChatDataset:
    """Return at most `most` of `rows`, drawn by seed, in their order."""
    if len(rows) <= most:
        return rows
    chosen = np.random.default_rng(seed).permutation(len(rows))[:most]
    return rows.take(sorted(int(i) for i in chosen))


def bundle_stage(ctx: WritingContext, name: str, fitted: FittedWriter, sampling: Sampling) -> Work[Stage]:
    """Seal `fitted` as a bundle in a stage of its own; another budget or description must not try it again."""
    spec_of = writer_spec(ctx, sampling, fitted)
    spec = StageSpec(
        f"bundle.{name}",
        {"name": ctx.task.name, "kind": ctx.task.kind, "writer": spec_of.model_dump(mode="json")},
        {"fit": fitted.key},
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        bundle = assemble(ctx, name, fitted, folder / "bundle", spec_of)
        return {"seal": bundle.manifest.seal}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def writer_spec(ctx: WritingContext, sampling: Sampling, fitted: FittedWriter) -> WriterSpec:
    """Say how the bundle is asked."""
    values = {name: value for name, value in vars(sampling).items() if value != getattr(Sampling(), name)}
    values.pop("json_schema", None)
    if "stop" in values:
        values["stop"] = list(values["stop"])
    schema = None if ctx.schema is None else dict(ctx.schema)
    prompt = ctx.task.data.prompt
    # A prompt made of several columns cannot be written from one text: such a bundle is asked with whole messages.
    own = prompt if prompt is not None and "{text}" in prompt else None
    beside = {role: part.name for role, (part, _) in fitted.beside.items()}
    return WriterSpec(prompt=own, system=ctx.task.data.system, sampling=values, json_schema=schema, **beside)


def assemble(
    ctx: WritingContext,
    name: str,
    fitted: FittedWriter,
    out: Path,
    spec: WriterSpec,
    *,
    scores: dict[str, Any] | None = None,
    golden: tuple[GoldenChat, ...] = (),
) -> Bundle:
    """Copy the parts of `fitted` under `out`, write the card and seal."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [(fitted.part, fitted.folder), *fitted.beside.values()]
    for part, folder in parts:
        copy_files(folder, out / part.folder)
    task = ctx.task
    base = _base_of(ctx, name, fitted)
    data = {
        "train": {"digest": ctx.train.digest, "rows": len(ctx.train)},
        "dev": {"digest": ctx.dev.digest, "rows": len(ctx.dev)},
        "test": {"digest": ctx.test.digest, "rows": len(ctx.test)},
        "licence": task.data.licence or "not stated",
    }
    if ctx.pairs is not None and name in PREFERRED:
        data["preferences"] = {"digest": ctx.pairs.train.digest, "rows": len(ctx.pairs.train)}
    specs = tuple(part for part, _ in parts)
    known = provenance(task, name, parts=specs, base=base, data=data, scores=scores or {}, machine=ctx.machine)
    if spec.draft is not None:
        known["licences"]["draft"] = open_draft(task).manifest.licences.get("base", "unknown")
    manifest = Manifest(
        **known,
        long="error",
        entry=fitted.part.name,
        writer=spec,
        golden_chats=golden,
    )
    (out / "README.md").write_text(render_card(manifest.model_dump(mode="json")), "utf-8")
    return seal(out, manifest)


def _base_of(ctx: WritingContext, name: str, fitted: FittedWriter) -> dict[str, Any] | None:
    """Return the provenance of what the candidate was made from; None: of nothing but the rows."""
    if name == "tagger":
        return dict(fitted.details["encoder"])
    return ctx.base.to_dict() if ctx.base is not None and name != "nearest" else None


def measure_stage(ctx: WritingContext, name: str, bundle: Stage, rows: ChatDataset, *, split: str) -> Work[Stage]:
    """Let the bundle write the answers to `rows`, score them, and measure its costs, as one stage."""
    spec = StageSpec(
        f"{split}.{name}",
        {"threads": ctx.threads, "metrics": list(ctx.task.metrics)},
        {"bundle": bundle.key, "rows": rows.digest, "machine": ctx.machine_digest},
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        at = bundle.folder / "bundle"
        with open_writer(at, threads=ctx.threads) as writer:
            written = yield from measure_written(
                writer,
                rows,
                kind=ctx.task.kind,
                metrics=metrics_of(ctx, rows),
                sampling=writer.sampling,
                split=split,
                seed=ctx.task.seed,
            )
            costs = measure_writing_costs(at, writer, rows.chats, threads=ctx.threads, seed=ctx.task.seed)
        figures = WrittenFigures.of(written)
        return {"written": figures.to_dict(rows=True), "costs": costs.to_dict(), "point": costs.figures()}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def point_of(name: str, measured: Stage) -> Point:
    """Make a point from a finished measuring stage."""
    written = WrittenFigures.from_dict(measured.result["written"])
    quality = {metric: score.to_dict() for metric, score in written.scores.items()}
    figures = {**measured.result["point"], "name": name, "quality": quality, "split": written.split}
    return replace(Point.from_dict(figures), row_scores=np.array(written.row_scores, dtype=np.float64))


def metrics_of(ctx: WritingContext, rows: ChatDataset) -> tuple[str, ...]:
    """Return the metrics of the task that these rows have, the one that decides first."""
    having = default_metrics(ctx.task.kind, rows.chats)
    return tuple(name for name in ctx.task.metrics if name in having)
