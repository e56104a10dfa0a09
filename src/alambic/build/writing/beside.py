"""Adapters kept beside their base: the base is packed once for every task, the bundle adds what training changed.

The packed base lies in the user's cache and is linked into each bundle, so that bundles of several tasks hold the very
same files, and `alambic serve` loads them once. It is quantised without the rows of any task for that reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from alambic.build.context import part_record, parts_of
from alambic.build.writing.context import ENGINE_LIBRARIES, FittedWriter, WritingContext
from alambic.bundle import user_cache
from alambic.engines.bundle_writer import TAKES_PARTS
from alambic.errors import TaskError, TrainError, WorkspaceError
from alambic.events import Note, Work
from alambic.manifest import PartSpec
from alambic.task import Task
from alambic.workspace import Stage, StageSpec, Workspace

OPTION, MODES = "adapter", ("merged", "beside")
_METHODS = ("auto", "lora", "qlora")
_PACK_LIBRARIES = ("torch", "transformers", "optimum-intel", "nncf", *ENGINE_LIBRARIES)
_WEIGHTS = ("openvino_model.xml", "openvino_model.bin")


def is_beside(recipe: Mapping[str, Any]) -> bool:
    """Tell whether a recipe keeps its adapter beside the base."""
    return bool(recipe.get(OPTION, MODES[0]) == "beside")


def training_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the training gets of a recipe: an adapter that stays beside is LoRA, whatever the size of the base.

    Raises:
        TrainError: the option has another value, or the method changes more than an engine can add to a base.
    """
    kept = {name: value for name, value in recipe.items() if name != OPTION}
    if recipe.get(OPTION, MODES[0]) not in MODES:
        raise TrainError(f"recipe of finetune: {OPTION} = {recipe[OPTION]!r}; allowed: {', '.join(MODES)}")
    if not is_beside(recipe):
        return kept
    if kept.get("method", "auto") not in _METHODS:
        raise TrainError(
            f"recipe of finetune: method = {kept['method']!r} leaves nothing that can stay beside a base",
            hint='method = "lora", or adapter = "merged"',
        )
    return {**kept, "method": "lora" if kept.get("method", "auto") == "auto" else kept["method"]}


def check_beside(task: Task) -> None:
    """Refuse adapters beside a base that nothing could share, before anything slow.

    Raises:
        TaskError: the base is made from scratch, or the candidate is not a fine-tuned one.
    """
    for i, candidate in enumerate(task.candidates):
        if not is_beside(candidate.recipe):
            continue
        where = f"{task.path.name}: candidate[{i}].recipe.adapter = 'beside'"
        if task.base.name == "scratch":
            raise TaskError(f"{where}: a base from scratch is trained whole and shared with nothing")
        if not candidate.name.startswith("finetune"):
            raise TaskError(f"{where}: goes with finetune, finetune-int8 and finetune-int4, not {candidate.name!r}")


def fit_beside(ctx: WritingContext, name: str, precision: Any, train: Any) -> Work[FittedWriter]:
    """Pack the base in `precision` or find it packed, train (`train` is that stage's work), and write the adapter.

    Raises:
        TaskError: no engine of ours adds an adapter to this base.
        PackError: the adapter cannot be written, or training saw other tokens than the packed base reads.
    """
    assert ctx.base is not None, "`check_beside` refuses a base from scratch"
    base = yield from _base_stage(ctx, precision)
    (part, folder), *_ = parts_of(base.result["parts"], base.folder)
    if part.engine not in TAKES_PARTS:
        raise TaskError(
            f"candidate {name!r}: the base {ctx.base.name!r} runs on the engine {part.engine!r}, which adds no adapter",
            hint='recipe = { adapter = "merged" }',
        )
    model: Stage = yield from train
    spec = StageSpec(f"adapter.{name}", {}, {"model": model.key, "base": base.key}, libraries=_PACK_LIBRARIES)
    start = ctx.base.folder

    def work(out: Path) -> Work[dict[str, Any]]:
        from alambic.pack.writer_hf import write_adapter
        from alambic.pack.writer_proof import prove_writer

        adapter = write_adapter(model.folder / "model" / "adapter", start, out / "adapter")
        # The proof leaves a file beside what it proves, and the files of the base are shared.
        proven = shutil.copytree(folder, out / "proven", ignore=shutil.ignore_patterns(*_WEIGHTS, "proof.json"))
        proof = yield from prove_writer(model.folder / "model", proven, part)
        shutil.rmtree(proven)
        return {"parts": [part_record(adapter, out / "adapter", out)], "proof": proof.to_dict()}

    stage = yield from ctx.workspace.run(spec, work)
    (adapter, where), *_ = parts_of(stage.result["parts"], stage.folder)
    details = {"proof": stage.result["proof"], "training": model.result}
    return FittedWriter(part, folder, stage.key, details, beside={"adapter": (adapter, where)})


def _base_stage(ctx: WritingContext, precision: Any) -> Work[Stage]:
    """Pack the base where every build of this user finds it; in the run folder when there is no such place."""
    assert ctx.base is not None
    start = ctx.base.folder
    spec = StageSpec(f"base.{precision}", {}, {"model": ctx.base.digest}, libraries=_PACK_LIBRARIES)

    def work(out: Path) -> Work[dict[str, Any]]:
        from alambic.model.adapter import model_digest
        from alambic.pack.writer_openvino import pack_openvino
        from alambic.pack.writer_proof import prove_writer

        part: PartSpec = yield from pack_openvino(start, out / "writer", precision=precision)
        yield from prove_writer(start, out / "writer", part)
        part = replace(part, params={**part.params, "model_digest": model_digest(start)})
        return {"parts": [part_record(part, out / "writer", out)]}

    cache = user_cache("packed-bases")
    if cache is None:
        yield Note("the user's cache cannot be written: the packed base is kept in the run folder, for this run alone")
        stage = yield from ctx.workspace.run(spec, work)
        return stage
    shared = Workspace(cache)
    with ExitStack() as stack:
        if shared.find(spec) is None:
            try:
                stack.enter_context(shared.locked())
            except WorkspaceError:
                yield Note("another build packs a base now: this run packs its own copy")
                shared = ctx.workspace
        stage = yield from shared.run(spec, work)
    return stage
