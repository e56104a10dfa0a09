"""The honest ladder of the kinds that write: how each candidate is made, as cached stages, into one part of a bundle.

nearest known answer -> the base as it is -> the base fine-tuned, in 4 bits, in 8 bits, and in 16 -> the same after
preferences. The fine-tuned ones share one training; what is measured on dev is what ships, so nothing is trained again
at the end: another training on a tenth more rows would cost as much as the first and could not be scored on rows that
decided nothing but test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic.build.context import part_record, parts_of
from alambic.build.crew import shared
from alambic.build.writing.beside import fit_beside, is_beside, training_recipe
from alambic.build.writing.context import ENGINE_LIBRARIES, FittedWriter, WritingContext
from alambic.errors import TaskError, TrainError
from alambic.events import Work
from alambic.kinds.writing import PREFERRED
from alambic.workspace import Stage, StageSpec

if TYPE_CHECKING:
    from alambic.pack.writer_openvino import Precision
    from alambic.train.sft import SftParams

Recipe = dict[str, Any]
Step = Callable[[WritingContext, str, Recipe], Work[FittedWriter]]

NEEDS_BASE = ("base", "finetune", "finetune-int4", "finetune-int8", *PREFERRED)
PRECISION: dict[str, Precision] = {
    "base": "int8", "finetune": "fp16", "finetune-int8": "int8", "finetune-int4": "int4",
    "preferred": "fp16", "preferred-int8": "int8", "preferred-int4": "int4",
}  # fmt: skip
_PACK_LIBRARIES = ("torch", "transformers", "optimum-intel", "nncf", *ENGINE_LIBRARIES)
_CALIBRATION_ROWS = 128


def fit(ctx: WritingContext, name: str, recipe: Recipe) -> Work[FittedWriter]:
    """Make candidate `name` of the ladder."""
    fitted = yield from _STEPS[name](ctx, name, recipe)
    return fitted


def check_recipe(name: str, recipe: Recipe) -> None:
    """Refuse unknown options of a candidate before anything slow.

    Raises:
        TaskError: naming the option and the nearest one.
    """
    if not recipe:
        return
    try:
        if name == "tagger":
            from alambic.train.tagger import TaggerParams

            TaggerParams.from_recipe(recipe)
            return
        if not trains(name):
            raise TrainError(f"{next(iter(recipe))!r}: {name} has no options")
        finetune_params(recipe)
    except TrainError as error:
        raise TaskError(f"candidate {name!r}: {error.message}", hint=error.hint) from error


def trains(name: str) -> bool:
    """Tell whether candidate `name` begins with the fine-tuning of the base."""
    return name.startswith(("finetune", "preferred"))


def _nearest(ctx: WritingContext, name: str, recipe: Recipe) -> Work[FittedWriter]:
    from alambic.train.nearest import fit_nearest

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        part = fit_nearest([example.chat for example in ctx.train.examples], folder / "writer")
        return {"parts": [part_record(part, folder / "writer", folder)]}

    stage = yield from ctx.workspace.run(StageSpec("nearest", {}, {"train": ctx.train.digest}), work)
    return _fitted(stage)


def _tagger(ctx: WritingContext, name: str, recipe: Recipe) -> Work[FittedWriter]:
    from alambic.build.writing.tagging import fit_tagger_stage

    fitted = yield from fit_tagger_stage(ctx, recipe)
    return fitted


def _base(ctx: WritingContext, name: str, recipe: Recipe) -> Work[FittedWriter]:
    assert ctx.base is not None
    fitted = yield from _pack(ctx, name, ctx.base.folder, ctx.base.digest)
    return fitted


def _finetune(ctx: WritingContext, name: str, recipe: Recipe) -> Work[FittedWriter]:
    if is_beside(recipe):
        fitted = yield from fit_beside(ctx, name, PRECISION[name], train_stage(ctx, recipe))
        return fitted
    model = yield from train_stage(ctx, recipe)
    fitted = yield from _pack(ctx, name, model.folder / "model", model.key)
    return FittedWriter(fitted.part, fitted.folder, fitted.key, {**fitted.details, "training": model.result})


def _preferred(ctx: WritingContext, name: str, recipe: Recipe) -> Work[FittedWriter]:
    from alambic.build.writing.preferring import prefer_stage

    tuned = yield from train_stage(ctx, recipe)
    model = yield from prefer_stage(ctx, tuned)
    fitted = yield from _pack(ctx, name, model.folder / "model", model.key)
    details = {**fitted.details, "training": tuned.result, "preferences": model.result}
    return FittedWriter(fitted.part, fitted.folder, fitted.key, details)


def train_stage(ctx: WritingContext, recipe: Recipe) -> Work[Stage]:
    """Fine-tune the base on the rows, once for every precision."""
    folder, digest = yield from start_of(ctx)
    params = finetune_params(recipe, seed=ctx.task.seed, threads=ctx.threads, long=ctx.task.data.long)
    spec = StageSpec(
        "sft",
        {k: v for k, v in asdict(params).items() if k != "checkpoint_seconds"},
        {"base": digest, "train": ctx.train.digest, "dev": ctx.dev.digest},
        libraries=("torch", "transformers", "tokenizers", "peft"),
    )

    def work(out: Path) -> Work[dict[str, Any]]:
        result = yield from shared("sft", folder, ctx.train.chats, ctx.dev.chats, params=params, out=out / "model")
        if result.interrupted:
            raise KeyboardInterrupt
        record: dict[str, Any] = result.to_dict()
        return record

    stage = yield from ctx.workspace.run(spec, work, resumable=True)
    return stage


def start_of(ctx: WritingContext) -> Work[tuple[Path, str]]:
    """Return the folder of the model to start from and its digest; a new one is made from the task's own text."""
    if ctx.base is not None:
        return ctx.base.folder, ctx.base.digest
    from alambic.model.scratch import make_scratch

    base = ctx.task.base
    params = {"parameters": base.parameters, "shape": base.shape or "decoder", "seed": ctx.task.seed}
    spec = StageSpec("scratch", params, {"train": ctx.train.digest}, libraries=("tokenizers", "transformers"))

    def work(out: Path) -> Work[dict[str, Any]]:
        yield from ()
        return make_scratch(
            [example.chat for example in ctx.train.examples],
            out / "model",
            parameters=base.parameters or 0,
            shape=base.shape or "decoder",
            context_tokens=base.max_tokens,
            seed=ctx.task.seed,
        )

    stage = yield from ctx.workspace.run(spec, work)
    return stage.folder / "model", stage.key


def _pack(ctx: WritingContext, name: str, model: Path, key: str) -> Work[FittedWriter]:
    """Export for the engine in the precision of candidate `name`, and prove the round trip."""
    precision = PRECISION[name]
    calibrated = precision == "int4"
    inputs = {"model": key, **({"train": ctx.train.digest} if calibrated else {})}
    spec = StageSpec(f"pack.{name}", {"precision": precision}, inputs, libraries=_PACK_LIBRARIES)

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.pack.writer_openvino import pack_openvino
        from alambic.pack.writer_proof import prove_writer

        texts = [example.chat for example in ctx.train.examples[:_CALIBRATION_ROWS]] if calibrated else ()
        part = yield from pack_openvino(model, folder / "writer", precision=precision, calibration=texts)
        proof = yield from prove_writer(model, folder / "writer", part)
        return {"parts": [part_record(part, folder / "writer", folder)], "proof": proof.to_dict()}

    stage = yield from ctx.workspace.run(spec, work)
    return _fitted(stage)


def _fitted(stage: Stage) -> FittedWriter:
    (part, folder), *_ = parts_of(stage.result["parts"], stage.folder)
    details = {name: value for name, value in stage.result.items() if name != "parts"}
    return FittedWriter(part, folder, stage.key, details)


def finetune_params(recipe: Recipe, **known: Any) -> SftParams:
    """Return the checked parameters of a recipe; `known` are the task's own values."""
    from alambic.train.sft import SftParams

    return SftParams.from_recipe(training_recipe(recipe), **known)


_STEPS: dict[str, Step] = {
    "nearest": _nearest,
    "tagger": _tagger,
    "base": _base,
    "finetune": _finetune,
    "finetune-int4": _finetune,
    "finetune-int8": _finetune,
    **dict.fromkeys(PREFERRED, _preferred),
}
