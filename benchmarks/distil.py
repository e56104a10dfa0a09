"""Students of the fine-tuned encoder: what share of its test accuracy they keep, in what share of its time.

The teacher is the one of `tuned` (fine-tuned on train, stopped by one half of dev; trained here where it is not kept).
Students learn from the same training rows and their teacher's answers, are chosen on the same half of dev, packed, and
scored once on test through their bundles, teacher and students timed in turn on the same texts.
Students of two layers on each set, of three on one and of one layer on another: what more or fewer bring is seen there.
ALAMBIC_BENCH_PARTS=banking77,hwu64 runs a part of the sets; ALAMBIC_BENCH_TINY=1 tries all on few rows.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tuned
from run import TINY, say

MINUTES = 70
WHAT = "Students of the fine-tuned encoder: share of its test accuracy kept, and share of its time per text"
SETS = ("banking77", "clinc150", "hwu64")
BAR, TIME = 98.0, 0.25  # per cent of the teacher's accuracy, in this share of its time
LAYERS = {"banking77": (2, 3), "clinc150": (2,), "hwu64": (2, 1)}


def run(store: Any) -> str:
    """Train what is not kept yet, and write the table of what is."""
    done = {}
    for name in os.environ.get("ALAMBIC_BENCH_PARTS", ",".join(SETS)).split(","):
        teacher = store.part(f"{name}-teacher", partial(_teacher, name, store.folder))
        students = [store.part(f"{name}-{form}", partial(_student, name, form, store.folder)) for form in _forms(name)]
        times = store.part(f"{name}-times", partial(_times, name, store.folder))
        done[name] = (teacher, students, times)
    return _table(done)


def _forms(name: str) -> list[str]:
    layers = LAYERS[name]
    return ["teacher-int8", *(f"distil-{n}" for n in layers), *(f"distil-{n}-int8" for n in layers), "distil-static"]


def _rows(name: str) -> Any:
    """Return train, the half of dev that chooses, and test; few of each when trying out."""
    train, choose, _, test = tuned.parts_of(name)
    if not TINY:
        return train, choose, test
    return (
        train.take(range(0, len(train), 40)),
        choose.take(range(0, len(choose), 20)),
        test.take(range(0, len(test), 40)),
    )


def _model(name: str, folder: Path) -> Path:
    return (folder if TINY else tuned.FOLDER) / f"{name}.model"


def _teacher(name: str, folder: Path) -> dict[str, Any]:
    """Make sure that the teacher is there; pack it, and answer test."""
    from alambic.pack import int8

    train, choose, test = _rows(name)
    if TINY:
        from alambic.events import drain
        from alambic.model.bases import resolve
        from alambic.train.finetune import FinetuneParams, finetune

        params = FinetuneParams(steps=3, few_shot="off", threads=1)
        drain(finetune(resolve(tuned.BASE), train, choose, params=params, out=_model(name, folder)))
    else:
        tuned.answers(name, "finetune")
    return _packed(_model(name, folder), int8.REFERENCE, train, test, folder / f"{name}-teacher.bundle")


def _student(name: str, form: str, folder: Path) -> dict[str, Any]:
    from alambic.build.teaching import COPIES
    from alambic.data.dataset import Dataset, Example
    from alambic.data.variants import variants
    from alambic.events import drain
    from alambic.model.encoder import Encoder
    from alambic.train.lesson import Lesson
    from alambic.train.teacher import encoder_answers, teacher_answers

    train, choose, test = _rows(name)
    if form == "teacher-int8":  # what eight bits alone save
        return _eight_bits(_model(name, folder), train, choose, test, folder / f"{name}-{form}.bundle")
    bundle, model = folder / f"{name}-{form}.bundle", folder / f"{name}-{form.removesuffix('-int8')}.model"
    if form.endswith("-int8"):  # of the student trained just before
        return _eight_bits(model, train, choose, test, bundle)
    teacher = Encoder.load(_model(name, folder))
    copies = [Example(text, ()) for e in train for text in variants(e.text, copies=COPIES, seed=0)]
    rows = Dataset(train.examples + tuple(copies), train.labels)
    asking = teacher_answers(encoder_answers(teacher, long="windows"), rows.texts, folder / f"{name}-answers")
    answers = drain(asking)
    lesson = Lesson(rows, len(train), answers.logits, answers.vectors)
    if form == "distil-static":
        return _static(teacher, lesson, choose, test, bundle)
    return _shallow(teacher, lesson, choose, test, int(form.removeprefix("distil-")), model, bundle)


def _shallow(
    teacher: Any, lesson: Any, choose: Any, test: Any, layers: int, model: Path, bundle: Path
) -> dict[str, Any]:
    from alambic.events import drain
    from alambic.model.student import shallower
    from alambic.pack import int8
    from alambic.train.distil import DistilParams, distil

    params = DistilParams(threads=1, epochs=0.5 if TINY else DistilParams.epochs)
    work = distil(shallower(teacher, layers), lesson, choose, params=params, out=model, teacher=teacher)
    result = drain(work, _listen(bundle.stem))
    facts = {"steps": result.steps, "seconds": result.seconds, "best_dev": result.best_dev}
    return {**facts, **_packed(model, int8.REFERENCE, lesson.rows, test, bundle)}


def _static(teacher: Any, lesson: Any, choose: Any, test: Any, bundle: Path) -> dict[str, Any]:
    from alambic.events import drain
    from alambic.train.static import StaticParams, distil_static

    at = bundle.with_suffix(".part")
    shutil.rmtree(at, ignore_errors=True)
    params = StaticParams(threads=1, epochs=1 if TINY else StaticParams.epochs)
    result, part = drain(distil_static(teacher, lesson, choose, params=params, out=at), _listen(bundle.stem))
    facts = {"steps": result.steps, "seconds": result.seconds, "best_dev": result.best_dev}
    return {**facts, **_answered(part, at, lesson.rows, test, bundle)}


def _eight_bits(model: Path, train: Any, choose: Any, test: Any, bundle: Path) -> dict[str, Any]:
    from alambic.events import drain
    from alambic.pack import int8

    at = bundle.with_suffix(".part")
    shutil.rmtree(at, ignore_errors=True)
    options = int8.Options(threads=1, cache=tuned.FOLDER / "graphs")
    choice = drain(int8.choose(model, at, choose, calibration=train.texts, options=options))
    return {"form": choice.form, **_answered(choice.part, at, train, test, bundle)}


def _packed(model: Path, form: str, train: Any, test: Any, bundle: Path) -> dict[str, Any]:
    from alambic.events import drain
    from alambic.pack import int8

    at = bundle.with_suffix(".part")
    shutil.rmtree(at, ignore_errors=True)
    part = drain(int8.pack_form(form, model, at, calibration=train.texts, cache=tuned.FOLDER / "graphs"))
    return {"form": form, **_answered(part, at, train, test, bundle)}


def _answered(part: Any, at: Path, train: Any, test: Any, bundle: Path) -> dict[str, Any]:
    """Seal the part and say which test rows its bundle has right."""
    from alambic.bundle import open_bundle
    from alambic.engines import open_engine

    tuned.seal_part(part, at, bundle, train.labels)
    with open_engine(bundle, threads=1) as engine:
        chosen = engine.probabilities(test.texts).argmax(1)
    right = chosen == np.array([t[0] for t in test.targets()])
    return {"correct": right.astype(int).tolist(), "size_mb": round(open_bundle(bundle).size_bytes / 1e6, 2)}


def _times(name: str, folder: Path) -> dict[str, Any]:
    """Time all bundles of a set in turn, one text at a time, tokenisation included, on one thread."""
    from alambic.engines import open_engine
    from alambic.measure.speed import compare_speed, speedup

    _, _, test = _rows(name)
    with ExitStack() as stack:
        runs = {
            form: stack.enter_context(open_engine(folder / f"{name}-{form}.bundle", threads=1)).predict
            for form in ("teacher", *_forms(name))
        }
        speeds = compare_speed(runs, test.texts, repeats=30 if TINY else 300, seconds=1.0 if TINY else 10.0)
    slow = speeds["teacher"]
    return {
        form: {"p50_ms": speed.p50_ms.value, "n": len(speed.times_ms), "faster": vars_of(speedup(slow, speed))}
        for form, speed in speeds.items()
    }


def vars_of(interval: Any) -> list[float]:
    """Return value, low and high."""
    return [interval.value, interval.low, interval.high]


def _listen(name: str) -> Any:
    from alambic.events import Progress

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and "dev" in event.values and event.done % 100 == 0:
            say(f"  {name} {event.done}/{event.total} {event.values} {event.seconds_left or 0:.0f} s left")

    return listen


def _table(done: dict[str, Any]) -> str:
    lines = [
        "CLINC150 with its rows out of scope as one more label. Kept: the student's accuracy over the teacher's, 95 % "
        "interval over resampled test rows. Times: median of one text, one thread, in turn.",
        "",
        "| set | model | n test | accuracy % [95 %] | kept % [95 %] | ms a text | times as fast [95 %] | MB | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (teacher, students, times) in done.items():
        truth = np.array(teacher["correct"])
        for form, found in zip(("teacher", *_forms(name)), (teacher, *students), strict=True):
            own, time = np.array(found["correct"]), times[form]
            kept, low, high = _ratio(own, truth)
            value, *ends = _ratio(own, np.ones_like(own))
            met = kept >= BAR and time["faster"][0] >= 1 / TIME
            bar = "" if form.startswith("teacher") else "met" if met else "not met"
            lines.append(
                f"| {name} | {form} | {len(own):,} | {value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}] | {kept:.2f} "
                f"[{low:.2f}, {high:.2f}] | {time['p50_ms']:.3f} | {time['faster'][0]:.1f} [{time['faster'][1]:.1f}, "
                f"{time['faster'][2]:.1f}] | {found['size_mb']} | {bar} |"
            )
    return "\n".join([*lines, "", f"Bar: at least {BAR:g} % kept in at most {TIME:g} of the time."])


def _ratio(own: Any, other: Any) -> tuple[float, float, float]:
    """Return the ratio of two accuracies on the same rows in per cent, with its interval over resampled rows."""
    draws = np.random.default_rng(0).integers(len(own), size=(2000, len(own)))
    samples = own[draws].mean(1) / np.maximum(other[draws].mean(1), 1e-9)
    low, high = np.percentile(samples, [2.5, 97.5])
    return 100 * own.mean() / max(other.mean(), 1e-9), 100 * low, 100 * high
