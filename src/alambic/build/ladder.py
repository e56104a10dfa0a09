"""The honest ladder: how each candidate is fitted, as cached stages, into the parts of a bundle.

majority -> TF-IDF + linear SVM -> k nearest neighbours and logistic regression on the frozen base -> the fine-tuned
base -> its int8 form. A step takes rows and returns parts; measuring and choosing are elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alambic.build.context import ENGINE_LIBRARIES, Context, Fitted, part_record, parts_of
from alambic.build.packing import pack_base, pack_float, pack_int8
from alambic.data.dataset import Dataset
from alambic.errors import TaskError, TrainError
from alambic.events import Work
from alambic.kinds.classify import DISTILLED
from alambic.manifest import PartSpec
from alambic.train import heads, linear
from alambic.workspace import Stage, StageSpec

if TYPE_CHECKING:
    from alambic.train.finetune import FinetuneParams

Recipe = dict[str, Any]
Step = Callable[[Context, Recipe, Dataset, Dataset | None, str], Work[Fitted]]

NEEDS_BASE = ("knn", "logreg", "finetune", "finetune-int8", *DISTILLED)


def fit(ctx: Context, name: str, recipe: Recipe, train: Dataset, *, dev: Dataset | None, tag: str) -> Work[Fitted]:
    """Fit candidate `name` on `train`.

    Args:
        ctx: the build.
        name: a name of the ladder.
        recipe: options of the step; after the choice, what `Fitted.refit` says.
        train: rows to fit on.
        dev: rows that decide within the step (early stopping, int8 form); None for the final fit.
        tag: which rows these are, for the names of the stages.
    """
    fitted = yield from _STEPS[name](ctx, recipe, train, dev, tag)
    return fitted


def agree(fits: Sequence[Fitted]) -> Fitted:
    """Return the first fold's fit, with the way to refit that the folds agree on (`agree_recipes`)."""
    return replace(fits[0], refit=agree_recipes([fit.refit for fit in fits]))


def agree_recipes(refits: Sequence[Recipe]) -> Recipe:
    """Return the first recipe, with the way, the steps and the rate that all of them agree on.

    One fold of few rows stops training almost at random. Among the folds of the way that most of them chose (plain or
    contrastive; the first one's at a tie), the middle share of the schedule and the middle rate are taken.
    """
    first = refits[0]
    if "schedule" not in first:
        return first
    if "teachers" in first:
        names = first["teachers"]
        first = {**first, "teachers": {n: agree_recipes([refit["teachers"][n] for refit in refits]) for n in names}}
    votes = [refit.get("few_shot") for refit in refits]
    way = max(votes, key=votes.count)
    same = [refit for refit in refits if refit.get("few_shot") == way]
    schedule = round(statistics.median(refit["schedule"] for refit in same))
    share = statistics.median(refit["steps"] / max(1, refit["schedule"]) for refit in same)
    rate = statistics.median_low([refit["learning_rate"] for refit in same])
    way_too = {} if way is None else {"few_shot": way}  # a student has only one way
    return {**first, **way_too, "schedule": schedule, "steps": round(share * schedule), "learning_rate": rate}


def check_recipe(name: str, recipe: Recipe) -> None:
    """Refuse unknown options of a candidate before anything slow.

    Raises:
        TaskError: naming the option and the nearest one.
    """
    if not recipe:
        return
    try:
        if name == "tfidf-svm":
            linear.TfidfParams.read(recipe)
        elif name in ("finetune", "finetune-int8"):
            _finetune_params(recipe)
        elif name in DISTILLED:
            from alambic.build.teaching import lessons_of

            lessons_of(name, recipe)
        else:
            raise TrainError(f"{next(iter(recipe))!r}: {name} has no options")
    except TrainError as error:
        raise TaskError(f"candidate {name!r}: {error.message}", hint=error.hint) from error


def _one_part(
    ctx: Context,
    name: str,
    recipe: Recipe,
    train: Dataset,
    tag: str,
    make: Callable[[Path], PartSpec],
    *,
    inputs: dict[str, str] | None = None,
) -> Work[Stage]:
    spec = StageSpec(
        f"{name}.{tag}",
        {"recipe": recipe, "seed": ctx.task.seed},
        {"train": train.digest, **(inputs or {})},
        libraries=("scikit-learn", "numpy"),
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        part = make(folder / "classifier")
        yield from ()
        return {"parts": [part_record(part, folder / "classifier", folder)]}

    stage = yield from ctx.workspace.run(spec, work)
    return stage


def _majority(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    def make(out: Path) -> PartSpec:
        return linear.fit_majority(train, out, seed=ctx.task.seed)

    stage = yield from _one_part(ctx, "majority", recipe, train, tag, make)
    return Fitted(parts_of(stage.result["parts"], stage.folder), stage.key, dict(recipe))


def _tfidf(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    def make(out: Path) -> PartSpec:
        return linear.fit_tfidf_svm(train, out, seed=ctx.task.seed, params=recipe)

    stage = yield from _one_part(ctx, "tfidf-svm", recipe, train, tag, make)
    return Fitted(parts_of(stage.result["parts"], stage.folder), stage.key, dict(recipe))


def _knn(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    fitted = yield from _on_frozen(ctx, "knn", recipe, train, tag)
    return fitted


def _logreg(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    fitted = yield from _on_frozen(ctx, "logreg", recipe, train, tag)
    return fitted


def _on_frozen(ctx: Context, name: str, recipe: Recipe, train: Dataset, tag: str) -> Work[Fitted]:
    encoder = yield from pack_base(ctx)
    vectors = yield from embed(ctx, encoder, ctx.train)
    known = {example.digest: vector for example, vector in zip(ctx.train, vectors, strict=True)}
    rows = np.stack([known[example.digest] for example in train])
    fit_head = {"knn": heads.fit_knn_head, "logreg": heads.fit_logreg_head}[name]

    def make(out: Path) -> PartSpec:
        part: PartSpec = fit_head(rows, train, out, seed=ctx.task.seed)
        return part

    stage = yield from _one_part(ctx, name, recipe, train, tag, make, inputs={"encoder": encoder.key})
    parts = (*encoder.parts, *parts_of(stage.result["parts"], stage.folder))
    return Fitted(parts, f"{encoder.key}+{stage.key}", dict(recipe), vectors=known)


def embed(ctx: Context, encoder: Fitted, rows: Dataset) -> Work[NDArray[np.float32]]:
    """Embed all rows once, through the packed encoder that would ship."""
    spec = StageSpec(
        "embed",
        {"long": ctx.task.data.long},
        {"encoder": encoder.key, "rows": rows.digest, "machine": ctx.machine_digest},
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.engines import open_part

        yield from ()
        part, at = encoder.parts[0]
        with open_part(part, at, long=ctx.task.data.long, threads=ctx.threads) as runner:
            np.save(folder / "vectors.npy", runner.run(rows.texts), allow_pickle=False)
        return {"rows": len(rows)}

    stage = yield from ctx.workspace.run(spec, work)
    vectors: NDArray[np.float32] = np.load(stage.folder / "vectors.npy", allow_pickle=False)
    return vectors


def train_encoder(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Stage]:
    """Fine-tune the base on `train`, as a stage that every candidate of the same recipe shares."""
    from alambic.train.finetune import finetune

    assert ctx.base is not None
    base = ctx.base
    task = ctx.task
    options = {k: v for k, v in recipe.items() if k != "int8"}
    params = _finetune_params(options, seed=task.seed, metric=task.metrics[0], long=task.data.long, threads=ctx.threads)
    inputs = {"base": base.digest, "train": train.digest, "dev": dev.digest if dev else "none"}
    spec = StageSpec(
        f"finetune.{tag}",
        {k: v for k, v in asdict(params).items() if k != "checkpoint_seconds"},
        inputs,
        version=4,
        libraries=("torch", "transformers", "tokenizers"),
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        result = yield from finetune(base, train, dev, params=params, out=folder / "model")
        if result.interrupted:
            raise KeyboardInterrupt
        history = [asdict(point) for point in result.history]
        return {
            "steps": result.steps, "schedule": result.schedule, "learning_rate": result.learning_rate,
            "best_dev": result.best_dev, "mode": result.mode, "history": history,
        }  # fmt: skip

    stage = yield from ctx.workspace.run(spec, work, resumable=True)
    return stage


def _finetune(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    model = yield from train_encoder(ctx, recipe, train, dev, tag)
    packed = yield from pack_float(ctx, model, tag=tag)
    refit = refit_of(ctx, recipe, model, len(train))
    return Fitted(packed.parts, packed.key, refit, {"history": model.result["history"]})


def _finetune_int8(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    model = yield from train_encoder(ctx, recipe, train, dev, tag)
    packed = yield from pack_int8(ctx, model, train, dev, form=recipe.get("int8"), tag=tag)
    refit = refit_of(ctx, recipe, model, len(train))
    return Fitted(packed.parts, packed.key, {**refit, **packed.refit}, packed.details)


def refit_of(ctx: Context, recipe: Recipe, model: Stage, rows: int) -> Recipe:
    """Say how the same is trained on all rows: the steps found are scaled so that each row is seen as many times."""
    found, more = model.result, len(ctx.train) / rows
    return {
        **recipe, "steps": round(found["steps"] * more), "schedule": round(found["schedule"] * more),
        "learning_rate": found["learning_rate"], "few_shot": "on" if found["mode"] == "few-shot" else "off",
    }  # fmt: skip


def _finetune_params(recipe: Recipe, **known: Any) -> FinetuneParams:
    from alambic.train.finetune import FinetuneParams

    return FinetuneParams.from_recipe(recipe, **known)


def _distilled(
    ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str, *, step: str
) -> Work[Fitted]:
    from alambic.build import teaching  # it fits its teachers through this module

    made = {"distil": teaching.distil_encoder, "distil-int8": teaching.distil_int8}.get(step, teaching.distil_static)
    return (yield from made(ctx, recipe, train, dev, tag))


_STEPS: dict[str, Step] = {
    "majority": _majority,
    "tfidf-svm": _tfidf,
    "knn": _knn,
    "logreg": _logreg,
    "finetune": _finetune,
    "finetune-int8": _finetune_int8,
    **{step: partial(_distilled, step=step) for step in DISTILLED},
}
