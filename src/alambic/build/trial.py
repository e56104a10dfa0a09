"""Try a candidate: fit it on each fold, pack it, let the bundle predict the held-out rows, measure its costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.build.assemble import Extras, assemble
from alambic.build.context import ENGINE_LIBRARIES, Context, Fitted, Fold
from alambic.build.ladder import agree, fit
from alambic.data.dataset import Dataset
from alambic.engines import ClassifyEngine, open_engine
from alambic.events import Work
from alambic.kinds.classify import decide
from alambic.measure import Options, measure_costs
from alambic.measure.frontier import Point, point_of
from alambic.measure.quality import Quality, quality_of
from alambic.task import CandidateSpec
from alambic.workspace import Stage, StageSpec


@dataclass(frozen=True)
class Trial:
    """A candidate measured on the rows that decide.

    Attributes:
        point: its place in quality x time x size x energy.
        quality: scores, confusion and worst errors on those rows.
        costs: what `measure_costs` gave, as JSON.
        probabilities: of the deciding rows [N, L], in the order of the folds.
        fitted: its fit on the first fold, with the way to refit it that the folds agree on.
        step: the name of the ladder that made it.
    """

    name: str
    point: Point
    quality: Quality
    costs: dict[str, Any]
    probabilities: NDArray[np.float32]
    fitted: Fitted
    step: str


def try_candidate(ctx: Context, candidate: CandidateSpec, folds: tuple[Fold, ...]) -> Work[Trial]:
    """Fit, pack, predict and measure `candidate` on `folds`."""
    blocks, fits, bundle = [], list[Fitted](), None
    recipe = dict(candidate.recipe)
    for fold in folds:
        fitted = yield from fit(ctx, candidate.made_by, recipe, fold.train, dev=fold.dev, tag=fold.tag)
        fits.append(fitted)
        if len(fits) == 1:
            recipe = {**recipe, **{k: v for k, v in fitted.refit.items() if k == "int8"}}
        sealed = yield from bundle_stage(ctx, candidate.name, fitted, tag=fold.tag)
        bundle = bundle or sealed
        blocks.append((yield from predict_stage(ctx, sealed, fitted, fold)))
    assert bundle is not None
    rows = deciding_rows(folds)
    probabilities = np.concatenate(blocks)
    quality = quality_of(
        rows, decide(probabilities, rows.labels, multi_label=rows.multi_label), split="dev", seed=ctx.task.seed
    )
    point, costs = yield from costs_stage(ctx, candidate.name, bundle, rows, quality)
    return Trial(candidate.name, point, quality, costs, probabilities, agree(fits), candidate.made_by)


def deciding_rows(folds: tuple[Fold, ...]) -> Dataset:
    """Return the held-out rows of the folds, one after the other."""
    rows = folds[0].dev
    for fold in folds[1:]:
        rows = rows + fold.dev
    return rows


def bundle_stage(ctx: Context, name: str, fitted: Fitted, *, tag: str, extras: Extras | None = None) -> Work[Stage]:
    """Seal the parts of `fitted` as a bundle in a stage of its own; of `extras`, all that it computes with.

    Its key holds what the bundle computes with, not the whole task file: another budget or description must not try
    every candidate again. The final bundle, the only one that ships, is keyed by the whole task.
    """
    task = ctx.task
    computes = {"name": task.name, "long": task.data.long, "multi_label": task.multi_label, "labels": ctx.train.labels}
    spec = StageSpec(
        f"bundle.{name}.{tag}",
        {
            **computes,
            "parts": [p.name for p, _ in fitted.parts],
            **(extras.computes if extras is not None else {}),
        },
        {"fit": fitted.key},
        version=2,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        bundle = assemble(ctx, name, fitted, folder / "bundle", extras)
        return {"seal": bundle.manifest.seal}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def predict_stage(ctx: Context, bundle: Stage, fitted: Fitted, fold: Fold) -> Work[NDArray[np.float32]]:
    """Return the probabilities [N, L] that the packed bundle gives to the held-out rows of `fold`."""
    rows = fold.dev
    spec = StageSpec(
        bundle.name.replace("bundle.", "predict.", 1),
        {"threads": ctx.threads},
        {"bundle": bundle.key, "rows": rows.digest, "machine": ctx.machine_digest},
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        with open_engine(bundle.folder / "bundle", threads=ctx.threads) as engine:
            probabilities = _predict(engine, fitted, rows)
        np.save(folder / "probabilities.npy", probabilities, allow_pickle=False)
        return {"rows": len(rows)}

    stage = yield from ctx.workspace.run(spec, work)
    probabilities: NDArray[np.float32] = np.load(stage.folder / "probabilities.npy", allow_pickle=False)
    return probabilities


def _predict(engine: ClassifyEngine, fitted: Fitted, rows: Dataset) -> NDArray[np.float32]:
    if fitted.vectors is None:
        return engine.probabilities(rows.texts)
    # The same packed encoder read these rows already; only texts of several windows are averaged after the head.
    probabilities = engine.probabilities_of(np.stack([fitted.vectors[example.digest] for example in rows]))
    limit = fitted.parts[0][0].params["max_tokens"]
    long = [i for i, ids in enumerate(engine.token_ids(rows.texts)) if len(ids) > limit]
    if long:
        probabilities[long] = engine.probabilities([rows.texts[i] for i in long])
    return probabilities


def costs_stage(
    ctx: Context,
    name: str,
    bundle: Stage,
    rows: Dataset,
    quality: Quality,
    *,
    repeats: int = 100,
    seconds: float = 4.0,
) -> Work[tuple[Point, dict[str, Any]]]:
    """Measure what a bundle costs on `rows`, once a machine; return its point and the costs.

    Args:
        ctx: of the build.
        name: of the candidate.
        bundle: stage that packed it.
        rows: whose texts are predicted.
        quality: of the candidate, for its point.
        repeats: see `alambic.measure.Options`.
        seconds: the same.
    """
    spec = StageSpec(
        f"measure.{name}",
        {"threads": ctx.threads},
        {"bundle": bundle.key, "rows": rows.digest, "machine": ctx.machine_digest},
        version=2,
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        at = bundle.folder / "bundle"
        options = Options(
            threads=ctx.threads, repeats=repeats, seconds=seconds, energy_seconds=1.5, cold_starts=0, seed=ctx.task.seed
        )
        with open_engine(at, threads=ctx.threads) as engine:
            costs = measure_costs(at, engine, rows.texts, options=options)
        return {"point": point_of(name, quality, costs).to_dict(), "costs": costs.to_dict()}

    stage = yield from ctx.workspace.run(spec, work)
    saved = Point.from_dict(stage.result["point"])
    point = Point(**{**vars(saved), "quality": quality.scores, "answers": quality.answers, "split": quality.split})
    return point, stage.result["costs"]
