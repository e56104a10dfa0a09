"""Students of the fine-tuned encoder: how the candidates `distil`, `distil-int8` and `distil-static` are fitted.

A teacher learns from the rows of the same fold only, so rows that decide are as unseen by its student as by itself.
What it answers is kept under `teachers/` of the run folder by teacher and text: more texts cost only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alambic.build.context import Context, Fitted, part_record, parts_of
from alambic.build.ladder import Recipe, fit, refit_of, train_encoder
from alambic.build.packing import pack_float, pack_int8
from alambic.data.dataset import Dataset, Example
from alambic.data.variants import variants
from alambic.errors import TaskError, TrainError
from alambic.events import Work
from alambic.kinds.classify import DISTILLED
from alambic.model.bases import Base, read_json, resolve
from alambic.task import Task
from alambic.train.recipes import read_recipe
from alambic.workspace import Stage, StageSpec

if TYPE_CHECKING:
    from alambic.model.encoder import Encoder
    from alambic.train.lesson import Lesson
    from alambic.train.teacher import Answers, Ask

TEACHERS = ("finetune", "tfidf-svm", "logreg", "knn")
COPIES = 1  # other wordings of each labelled text (docs/lab-notes.md)
# Of a teacher's training pass: answering alone; what a student's pass costs besides its layers.
_ANSWERING, _FIXED = 0.3, 0.1
_PACK_SECONDS, _STATIC_SECONDS = 12.0, 60.0  # packing an encoder; training a static model, its start vectors included
_SHALLOW = 3  # a student has this part of its teacher's layers
_LIBRARIES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Lessons:
    """Options of a distilled candidate that are not those of the training itself.

    Attributes:
        teacher: names of the ladder, joined by ``+``; several answer with the mean of their label shares.
        seeds: fine-tuned encoders that teach, each of another seed.
        teacher_epochs: passes of the teacher; its candidate's own when None.
        copies: other wordings of each labelled text that are learnt from too.
        layers: of the student; a third of its teacher's when None. Not for `distil-static`.
        base: another encoder that the student starts from; the teacher's own layers when None. Not for `distil-static`.
    """

    teacher: str = "finetune"
    seeds: int = 1
    teacher_epochs: float | None = None
    copies: int = COPIES
    layers: int | None = None
    base: str | None = None

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(name.strip() for name in self.teacher.split("+"))


def lessons_of(step: str, recipe: Mapping[str, Any]) -> tuple[Lessons, Recipe]:
    """Split a recipe into the options of teaching and those of training, which are checked too.

    Raises:
        TrainError: an unknown option, or a value that cannot be.
    """
    names = [name for name in Lessons.__dataclass_fields__ if step != "distil-static" or name not in ("layers", "base")]
    lessons = read_recipe(Lessons, {key: recipe[key] for key in names if key in recipe}, {}, of=step)
    rest = {key: value for key, value in recipe.items() if key not in (*names, "int8", "teachers")}
    for name in lessons.teachers:
        if name not in TEACHERS:
            raise TrainError(f"teacher = {lessons.teacher!r}: allowed are {', '.join(TEACHERS)}, joined by +")
    if "finetune" not in lessons.teachers:
        raise TrainError(f"teacher = {lessons.teacher!r}: a student starts from finetune; others may teach beside it")
    counts = {"seeds": (lessons.seeds, 1), "copies": (lessons.copies, 0), "layers": (lessons.layers, 1)}
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise TrainError(f"{name} = {value!r}: expected a whole number of {least} or more")
    _params(step, rest)
    return lessons, rest


def _params(step: str, recipe: Recipe, **known: Any) -> Any:
    if step == "distil-static":
        from alambic.train.static import StaticParams

        return StaticParams.from_recipe(recipe, **known)
    from alambic.train.distil import DistilParams

    return DistilParams.from_recipe(recipe, **known)


def check_students(task: Task, base: Base | None) -> None:
    """Refuse students as large as their teacher before anything slow.

    Raises:
        TaskError: a student would have as many layers as its teacher, or as many weights.
        BaseModelError: the base that a student starts from cannot be had.
    """
    for candidate in task.candidates:
        if candidate.made_by not in DISTILLED or base is None:
            continue
        lessons, _ = lessons_of(candidate.made_by, candidate.recipe)
        if lessons.base is not None:
            _check_other(candidate.name, base, _other_base(task, lessons.base), lessons.layers)
        elif lessons.layers is not None and lessons.layers >= (most := depth_of(base)):
            raise TaskError(
                f"candidate {candidate.name!r}: layers = {lessons.layers}: its teacher {base.name} has {most}, and a "
                "student must be smaller",
                hint=f"layers = 1 to {most - 1}" if most > 1 else "use the step distil-static",
            )


def _check_other(name: str, base: Base, other: Base, layers: int | None) -> None:
    from alambic.model.encoder import Encoder

    try:
        _other_student(Encoder.load(base), other, layers)
    except TrainError as error:
        raise TaskError(f"candidate {name!r}: {error.message}", hint=error.hint) from error


def depth_of(base: Base) -> int:
    """Return the number of layers of `base`."""
    config = read_json(base.folder / "config.json")
    return int(config.get("num_hidden_layers") or config["n_layers"])


def layers_of(lessons: Lessons, base: Base) -> int:
    """Return how many layers the student has that starts from its teacher."""
    return lessons.layers or max(1, depth_of(base) // _SHALLOW)


def student_seconds(ctx: Context, pass_seconds: float) -> float:
    """Predict the training time of all students, teachers left out; `pass_seconds` is one pass of the teacher."""
    from alambic.train.distil import DistilParams

    if ctx.base is None:
        return 0.0
    share = sum(len(fold.train) for fold in ctx.folds) / len(ctx.train) + 1.0
    seconds, seen = 0.0, set[str]()
    for candidate in ctx.task.candidates:
        made_by = candidate.made_by.removesuffix("-int8")  # both forms of a student share its training
        key = f"{made_by} {sorted(candidate.recipe.items())}"
        if candidate.made_by not in DISTILLED or key in seen:
            continue
        seen.add(key)
        lessons, rest = lessons_of(candidate.made_by, candidate.recipe)
        texts = 1.0 + lessons.copies + len(ctx.unlabelled) / len(ctx.train)
        seconds += pass_seconds * texts * share * _ANSWERING
        if made_by == "distil-static":
            seconds += _STATIC_SECONDS * len(ctx.folds)
            continue
        passes = float(rest.get("epochs", DistilParams.epochs))
        part = layers_of(lessons, ctx.base) / depth_of(ctx.base) + _FIXED
        seconds += pass_seconds * passes * texts * share * part + _PACK_SECONDS * (len(ctx.folds) + 1)
    return seconds


def _other_base(task: Task, name: str) -> Base:
    return resolve(task.base.model_copy(update={"name": name}), root=task.root)


@dataclass(frozen=True)
class _Taught:
    """Teachers fitted on the rows of one fold, and the texts that they answer.

    Attributes:
        models: Model stages of the fine-tuned ones, the first is followed most closely.
        others: the rest, by name.
        refits: how each is fitted on all rows.
        rows: texts of the lesson, the labelled ones first.
        labelled: how many these are.
    """

    models: tuple[Stage, ...]
    others: dict[str, Fitted]
    refits: dict[str, Recipe]
    rows: Dataset
    labelled: int
    inputs: dict[str, str] = field(default_factory=dict)


def distil_encoder(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    """Fit `distil`: an encoder of fewer layers, in 16 bits."""
    model, taught = yield from _student(ctx, recipe, train, dev, tag)
    packed = yield from pack_float(ctx, model, tag=tag)
    return Fitted(packed.parts, packed.key, _refit(ctx, recipe, model, taught, train), model.result)


def distil_int8(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    """Fit `distil-int8`: the same student in 8 bits."""
    model, taught = yield from _student(ctx, recipe, train, dev, tag)
    packed = yield from pack_int8(ctx, model, train, dev, form=recipe.get("int8"), tag=tag)
    refit = {**_refit(ctx, recipe, model, taught, train), **packed.refit}
    return Fitted(packed.parts, packed.key, refit, packed.details)


def distil_static(ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str) -> Work[Fitted]:
    """Fit `distil-static`: one vector a token, their mean, and a small network."""
    from alambic.train import static

    lessons, rest = lessons_of("distil-static", recipe)
    taught = yield from _teach(ctx, recipe, lessons, train, dev, tag)
    params = _params("distil-static", rest, **_known(ctx))
    spec = StageSpec(f"distil-static.{tag}", _identity(params), taught.inputs, libraries=_LIBRARIES)

    def work(folder: Path) -> Work[dict[str, Any]]:
        teacher = _load(taught.models[0])
        lesson = yield from _lesson(ctx, taught, teacher)
        at = folder / "classifier"
        result, part = yield from static.distil_static(teacher, lesson, dev, params=params, out=at)
        if result.interrupted:
            raise KeyboardInterrupt
        return {**asdict(result), "learning_rate": params.learning_rate, "parts": [part_record(part, at, folder)]}

    stage = yield from ctx.workspace.run(spec, work, resumable=True)
    refit = _refit(ctx, recipe, stage, taught, train)
    return Fitted(parts_of(stage.result["parts"], stage.folder), stage.key, refit, {"history": stage.result["history"]})


def _student(
    ctx: Context, recipe: Recipe, train: Dataset, dev: Dataset | None, tag: str
) -> Work[tuple[Stage, _Taught]]:
    from alambic.train import distil

    assert ctx.base is not None
    lessons, rest = lessons_of("distil", recipe)
    taught = yield from _teach(ctx, recipe, lessons, train, dev, tag)
    params = _params("distil", rest, **_known(ctx))
    other = None if lessons.base is None else _other_base(ctx.task, lessons.base)
    layers = lessons.layers if other is not None else layers_of(lessons, ctx.base)
    inputs = {**taught.inputs, "base": other.digest if other is not None else "teacher"}
    spec = StageSpec(f"distil.{tag}", {**_identity(params), "layers": layers}, inputs, libraries=_LIBRARIES)

    def work(folder: Path) -> Work[dict[str, Any]]:
        teacher = _load(taught.models[0])
        lesson = yield from _lesson(ctx, taught, teacher)
        student = _start(teacher, other, layers)
        result = yield from distil.distil(student, lesson, dev, params=params, out=folder / "model", teacher=teacher)
        if result.interrupted:
            raise KeyboardInterrupt
        return {**asdict(result), "learning_rate": params.learning_rate}

    stage = yield from ctx.workspace.run(spec, work, resumable=True)
    return stage, taught


def _start(teacher: Encoder, other: Base | None, layers: int | None) -> Encoder:
    """Return the untrained student: the teacher's own layers, or another encoder under the teacher's labels."""
    from alambic.model.student import shallower, with_head_of

    if other is None:
        assert layers is not None
        return shallower(teacher, layers)
    return with_head_of(_other_student(teacher, other, layers), teacher)


def _other_student(teacher: Encoder, other: Base, layers: int | None) -> Encoder:
    """Open the encoder `other`, with so many of its layers.

    Raises:
        TrainError: it has not so many, or is not smaller than the teacher.
    """
    from alambic.model.encoder import Encoder
    from alambic.model.student import check_smaller, depth, shallower

    student = Encoder.load(other)
    if layers is not None and layers > depth(student):
        raise TrainError(f"layers = {layers}: {other.name} has {depth(student)}")
    if layers is not None and layers < depth(student):
        student = shallower(student, layers)
    check_smaller(student, teacher)
    return student


def _known(ctx: Context) -> dict[str, Any]:
    task = ctx.task
    return {"seed": task.seed, "metric": task.metrics[0], "long": task.data.long, "threads": ctx.threads}


def _identity(params: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(params).items() if key != "checkpoint_seconds"}


def _load(model: Stage) -> Encoder:
    from alambic.model.encoder import Encoder

    return Encoder.load(model.folder / "model")


def _teach(
    ctx: Context, recipe: Recipe, lessons: Lessons, train: Dataset, dev: Dataset | None, tag: str
) -> Work[_Taught]:
    """Fit every teacher on `train`; one that another candidate has fitted already is taken from the run folder."""
    models, others, refits = list[Stage](), dict[str, Fitted](), dict[str, Recipe]()
    known: dict[str, Recipe] = recipe.get("teachers", {})
    for name in lessons.teachers:
        for number in range(lessons.seeds if name == "finetune" else 1):
            label = name if number == 0 else f"{name}-{number}"
            own = known.get(label) or _recipe_of(ctx.task, name, lessons, number)
            if name == "finetune":
                model = yield from train_encoder(ctx, own, train, dev, tag)
                models.append(model)
                refits[label] = refit_of(ctx, own, model, len(train))
            else:
                others[label] = yield from fit(ctx, name, own, train, dev=dev, tag=tag)
                refits[label] = others[label].refit
    rows = _rows(ctx, train, lessons.copies)
    keys = [model.key for model in models] + [other.key for other in others.values()]
    inputs = {"teachers": "+".join(keys), "rows": rows.digest, "dev": dev.digest if dev else "none"}
    return _Taught(tuple(models), others, refits, rows, len(train), inputs)


def _recipe_of(task: Task, name: str, lessons: Lessons, number: int) -> Recipe:
    """Return the recipe of the task's own candidate `name`, so that both share one training."""
    names = ("finetune", "finetune-int8") if name == "finetune" else (name,)
    own: Recipe = next((dict(c.recipe) for c in task.candidates if c.made_by in names), {})
    own.pop("int8", None)
    if name == "finetune" and lessons.teacher_epochs is not None and "steps" not in own:
        own["epochs"] = lessons.teacher_epochs
    return own if number == 0 else {**own, "seed": task.seed + number}


def _rows(ctx: Context, train: Dataset, copies: int) -> Dataset:
    """Return the texts of a lesson: the labelled rows, other wordings of them, and the texts without labels."""
    taken = set(train.texts)
    made = dict.fromkeys(
        text for example in train for text in variants(example.text, copies=copies, seed=ctx.task.seed)
    )
    more = [text for text in (*made, *ctx.unlabelled) if text not in taken]
    return replace(train, examples=train.examples + tuple(Example(text, ()) for text in dict.fromkeys(more)))


def _lesson(ctx: Context, taught: _Taught, first: Encoder) -> Work[Lesson]:
    """Ask every teacher; what one answered before is not asked again."""
    from alambic.train.lesson import Lesson
    from alambic.train.teacher import encoder_answers, mean_answers, teacher_answers

    texts, root = taught.rows.texts, ctx.workspace.root / "teachers"
    asked: list[tuple[str, Callable[[], Ask]]] = []
    for i, model in enumerate(taught.models):
        asked.append((model.key, lambda i=i, model=model: encoder_answers(  # type: ignore[misc]
            first if i == 0 else _load(model), long=ctx.task.data.long)))  # fmt: skip
    for other in taught.others.values():
        asked.append((other.key, lambda other=other: _parts_answer(ctx, other)))  # type: ignore[misc]
    answers = list["Answers"]()
    for key, opened in asked:
        answers.append((yield from teacher_answers(opened(), texts, root / key, threads_used=ctx.threads)))
    logits = mean_answers([each.logits for each in answers], multi_label=taught.rows.multi_label)
    return Lesson(taught.rows, taught.labelled, logits, answers[0].vectors)


def _parts_answer(ctx: Context, fitted: Fitted) -> Ask:
    """Return what asks the packed parts of a candidate: logits, and no vectors."""
    from alambic.engines import load_part, open_part
    from alambic.train.teacher import Answers

    def ask(texts: list[str]) -> Answers:
        (first, at), *rest = fitted.parts
        with open_part(first, at, long=ctx.task.data.long, threads=ctx.threads) as reader:
            values, output = reader.run(texts), reader.output
        for part, folder in rest:
            head = load_part(part, folder, threads=ctx.threads)
            values, output = head.run(values), head.output
        if output == "probabilities":
            shares = np.clip(values, 1e-6, 1 - 1e-6)
            values = np.log(shares / (1 - shares)) if ctx.train.multi_label else np.log(shares)
        return Answers(values.astype(np.float32), np.zeros((len(texts), 0), dtype=np.float16))

    return ask


def _refit(ctx: Context, recipe: Recipe, model: Stage, taught: _Taught, train: Dataset) -> Recipe:
    """Say how the same is made of all rows: as many passes of the student, teachers refitted too."""
    found = model.result
    grown = len(_rows(ctx, ctx.train, int(recipe.get("copies", COPIES)))) / len(taught.rows)
    return {
        **recipe, "steps": max(1, round(found["steps"] * grown)), "schedule": round(found["schedule"] * grown),
        "learning_rate": found["learning_rate"], "teachers": taught.refits,
    }  # fmt: skip
