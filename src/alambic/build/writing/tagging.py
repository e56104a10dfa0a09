"""The first rung of `extract`: a token classifier on an encoder, its spans assembled into JSON under the schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alambic.build.context import part_record, parts_of
from alambic.build.writing.context import ENGINE_LIBRARIES, FittedWriter, WritingContext
from alambic.data.chats import ChatDataset
from alambic.engines.nearest_answer import last_said
from alambic.errors import TrainError
from alambic.events import Work
from alambic.model.bases import Base, resolve
from alambic.workspace import Stage, StageSpec

if TYPE_CHECKING:
    from alambic.train.tagger import TagRow

# Where the task's own base is a model that writes, the tagger starts from the embedded encoder.
ENCODER = "all-minilm-l6-v2"
_RUNTIME: Literal["onnx"] = "onnx"
_PRECISION = "int8"
_LIBRARIES = ("torch", "transformers", "onnx", *ENGINE_LIBRARIES)


def fit_tagger_stage(ctx: WritingContext, recipe: dict[str, Any]) -> Work[FittedWriter]:
    """Train the token classifier on train, stopped by dev, and pack it in 8 bits.

    Raises:
        TrainError: an answer is no JSON object, or its values do not stand in the texts.
        EngineError: the schema has a part that a token classifier cannot give.
    """
    encoder = resolve(ENCODER)
    trained = yield from _train(ctx, encoder, recipe)
    choices = {name: tuple(values) for name, values in trained.result["choices"].items()}
    spec = StageSpec("pack.tagger", {"precision": _PRECISION}, {"model": trained.key}, libraries=_LIBRARIES)

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.pack.tagger import pack_tagger

        part = yield from pack_tagger(
            trained.folder / "model",
            folder / "tagger",
            runtime=_RUNTIME,
            precision=_PRECISION,
            choices=choices,
            schema=ctx.schema,
            calibration=[last_said(chat) for chat in ctx.train.chats[:200]],
            cache=ctx.workspace.root / "graphs",
        )
        return {"parts": [part_record(part, folder / "tagger", folder)]}

    stage = yield from ctx.workspace.run(spec, work)
    (part, folder), *_ = parts_of(stage.result["parts"], stage.folder)
    return FittedWriter(part, folder, stage.key, {"training": trained.result, "encoder": encoder.to_dict()})


def _train(ctx: WritingContext, encoder: Base, recipe: dict[str, Any]) -> Work[Stage]:
    from alambic.engines.tag_fields import fields_of
    from alambic.train.tagger import Answers, TaggerParams, rows_of_answers, train_tagger

    assert ctx.schema is not None, "an extract task has a schema"
    fields = fields_of(ctx.schema)
    params = TaggerParams.from_recipe(recipe, seed=ctx.task.seed, threads=ctx.threads)
    inputs = {"base": encoder.digest, "train": ctx.train.digest, "dev": ctx.dev.digest}
    kept = {k: v for k, v in asdict(params).items() if k != "checkpoint_seconds"} | {"schema": json.dumps(ctx.schema)}
    spec = StageSpec("tagger", kept, inputs, version=2, libraries=_LIBRARIES)

    def rows_of(rows: ChatDataset) -> tuple[list[TagRow], dict[str, float]]:
        return rows_of_answers([last_said(chat) for chat in rows.chats], _answers(rows), fields)

    def work(out: Path) -> Work[dict[str, Any]]:
        (train, lost), (dev, _) = rows_of(ctx.train), rows_of(ctx.dev)
        choices = {field.name: tuple(field.choices) for field in fields.chosen}
        answers = Answers(tuple(field.name for field in fields.spans), choices)
        result = yield from train_tagger(encoder, train, dev, answers=answers, params=params, out=out / "model")
        if result.interrupted:
            raise KeyboardInterrupt
        history = [asdict(point) for point in result.history]
        found = {"steps": result.steps, "best_dev": result.best_dev, "unit": result.unit, "history": history}
        return {**found, "choices": choices, "not_in_text": lost}

    stage = yield from ctx.workspace.run(spec, work, resumable=True)
    return stage


def _answers(rows: ChatDataset) -> list[Mapping[str, Any]]:
    """Return the answers as objects.

    Raises:
        TrainError: one is no JSON object.
    """
    answers: list[Mapping[str, Any]] = []
    for example in rows.examples:
        try:
            value = json.loads(example.answer)
        except ValueError as error:
            raise TrainError(f"{example.where}: the answer is no JSON ({error})") from error
        if not isinstance(value, Mapping):
            raise TrainError(f"{example.where}: the answer is a JSON {type(value).__name__}, not an object")
        answers.append(value)
    return answers
