"""The winner, fitted on all rows but test, packed, scored once on test, sealed with its scores."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import __version__
from alambic.build.assemble import Extras, assemble
from alambic.build.chain import chain_sentences, refit
from alambic.build.context import ENGINE_LIBRARIES, Context, Fitted
from alambic.build.deciding import calibrate, calibration_of, decision_stage, judge, scoped
from alambic.build.indexing import index_part, index_stage
from alambic.build.trial import Trial, bundle_stage
from alambic.bundle import open_bundle, seal
from alambic.data.dataset import Dataset
from alambic.engines import ClassifyEngine, open_engine
from alambic.errors import BundleError
from alambic.events import Work
from alambic.kinds.classify import decide
from alambic.kinds.decision import Decision
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.manifest import Golden
from alambic.measure import Costs, Options, measure_costs
from alambic.measure.frontier import Point, point_of
from alambic.measure.quality import Quality, quality_of
from alambic.workspace import Stage, StageSpec, on_disk, write_text

RESULT = "result.json"
PAGES = ("report.html", "tradeoff.png", "tradeoff.svg")


@dataclass(frozen=True)
class Final:
    """The bundle that ships, with its only score on test.

    Attributes:
        trust: how calibration and decision did there.
        chain: how a cascade answered there, in words.
    """

    bundle: Path
    quality: Quality
    point: Point
    costs: dict[str, Any]
    decision: Decision | None
    trust: dict[str, Any]
    chain: tuple[str, ...] = ()


def finish(ctx: Context, trial: Trial, run: Path) -> Work[Final]:
    """Refit the chosen candidate on train and dev, score it once on test, seal it under `run`."""
    fitted = yield from refit(ctx, trial)
    temperature, threshold = calibrate(trial, ctx.task)
    draft, decision, index = yield from _drafted(ctx, trial, fitted, temperature)
    scored = yield from _test_stage(ctx, trial.name, draft, threshold, decision)
    quality = Quality.from_dict(scored.result["quality"])
    spec = StageSpec(
        "final",
        {
            "temperature": temperature,
            "threshold": threshold,
            "scores": scored.result["scores"],
            "decision": asdict(decision) if decision else None,
        },
        {"fit": fitted.key, "test": scored.key, "task": ctx.task.digest, "index": index.key if index else "none"},
        version=5,
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        dev = {"n": trial.quality.n, **{k: v.to_dict() for k, v in trial.quality.scores.items()}}
        scores = {"dev": dev, "test": scored.result["scores"]}
        extras = Extras(scores, temperature, threshold, decision, index_part(index) if index else None)
        bundle = assemble(ctx, trial.name, fitted, folder / "bundle", extras)
        # Golden answers come from the bundle that ships, with its temperature; then it is sealed again with them.
        with open_engine(bundle.path, threads=ctx.threads) as engine:
            golden = golden_of(engine)
        bundle = seal(bundle.path, bundle.manifest.model_copy(update={"golden": golden}))
        return {"seal": bundle.manifest.seal}

    final = yield from ctx.workspace.run(spec, work)
    bundle = publish(final, run / "bundle")
    # The draft that was timed lacks the scores and golden answers that ship: sizes are of what ships.
    size_mb = open_bundle(bundle).size_bytes / 1e6
    point = replace(Point.from_dict(scored.result["point"]), size_mb=size_mb)
    trust = {} if ctx.task.multi_label else {"dev": calibration_of(trial, temperature, seed=ctx.task.seed)}
    trust |= scored.result["trust"]
    chain = chain_sentences(fitted.cascade, scored.result["answered"], point.cost("mean_ms"))
    return Final(bundle, quality, point, {**scored.result["costs"], "size_mb": size_mb}, decision, trust, chain)


def _drafted(
    ctx: Context, trial: Trial, fitted: Fitted, temperature: float
) -> Work[tuple[Stage, Decision | None, Stage | None]]:
    """Return the bundle that ships but for its scores, its decision, and the index of training rows."""
    extras = Extras(temperature=temperature)
    draft = yield from bundle_stage(ctx, trial.name, fitted, tag="all", extras=extras)
    index = yield from index_stage(ctx, fitted, draft)
    if index is not None and scoped(ctx.task):  # how near its rows are may tell what is out of scope
        extras = replace(extras, index=index_part(index))
        draft = yield from bundle_stage(ctx, trial.name, fitted, tag="all", extras=extras)
    decision = yield from decision_stage(ctx, trial, draft, temperature)
    if decision is not None:  # so that its cost is measured too
        draft = yield from bundle_stage(ctx, trial.name, fitted, tag="all", extras=replace(extras, decision=decision))
    return draft, decision, index


def _test_stage(ctx: Context, name: str, draft: Stage, threshold: float, decision: Decision | None) -> Work[Stage]:
    spec = StageSpec(
        f"test.{name}",
        {"threads": ctx.threads, "threshold": threshold, "decision": asdict(decision) if decision else None},
        {"bundle": draft.key, "rows": ctx.test.digest, "machine": ctx.machine_digest},
        version=2,
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        at = draft.folder / "bundle"
        with open_engine(at, threads=ctx.threads) as engine:
            probabilities, trust = judge(ctx.test, ctx.kept, decision, engine, seed=ctx.task.seed)
            costs = measure_costs(at, engine, ctx.test.texts, options=Options(threads=ctx.threads, seed=ctx.task.seed))
            answered = Counter(engine.answered_by(ctx.test.texts) if engine.stages else ())
            counts = {name: answered[name] for name in engine.stages}
        quality = quality_of(ctx.test, _decide(ctx.test, probabilities, threshold), split="test", seed=ctx.task.seed)
        return {**_scores(name, quality, costs), "trust": trust, "answered": counts}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def _scores(name: str, quality: Quality, costs: Costs) -> dict[str, Any]:
    figures = costs.to_dict()
    kept: dict[str, Any] = {k: figures[k] for k in ("speed", "peak_ram_mb", "energy") if k in figures}
    scores: dict[str, Any] = {"n": quality.n, **{k: v.to_dict() for k, v in quality.scores.items()}, "costs": kept}
    return {
        "quality": quality.to_dict(rows=True),
        "scores": scores,
        "costs": figures,
        "point": point_of(name, quality, costs).to_dict(),
    }


def _decide(rows: Dataset, probabilities: NDArray[np.float32], threshold: float) -> list[Any]:
    return decide(probabilities, rows.labels, multi_label=rows.multi_label, threshold=threshold)


def golden_of(engine: ClassifyEngine) -> tuple[Golden, ...]:
    """Record what the final engine sees and answers on the golden texts; no text of the user's data is kept."""
    texts = list(GOLDEN_TEXTS)
    ids = engine.token_ids(texts) if "token_ids" in engine.capabilities else [[] for _ in texts]
    rows = engine.probabilities(texts)
    return tuple(
        Golden(text=text, ids=tuple(tokens), probabilities=tuple(round(float(p), 6) for p in row))
        for text, tokens, row in zip(texts, ids, rows, strict=True)
    )


def publish(stage: Stage, target: Path) -> Path:
    """Copy the sealed bundle to where users look for it, unless it is there already."""
    try:
        if open_bundle(target).manifest.seal == stage.result["seal"]:
            return target
    except BundleError:
        pass
    with on_disk(target):
        fresh = target.with_name(".bundle.new")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(stage.folder / "bundle", fresh)
        old = target.with_name(".bundle.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    return target


def write_result(run: Path, record: dict[str, Any]) -> None:
    """Write `result.json`, what `alambic show RUN` reads; it comes last, so a run that has it is whole."""
    write_text(run / RESULT, _text(record))


def is_written(run: Path, record: dict[str, Any]) -> bool:
    """Tell whether an earlier build ended with this very `record` and its pages are still there."""
    try:
        same = (run / RESULT).read_text("utf-8") == _text(record)
    except (OSError, UnicodeDecodeError):
        return False
    return same and all((run / name).is_file() for name in PAGES)


def _text(record: dict[str, Any]) -> str:
    return json.dumps({"alambic": __version__, **record}, ensure_ascii=False, indent=1, default=str)
