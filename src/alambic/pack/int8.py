"""Choose the 8-bit form of a model for this machine and this task: build each form, measure all, keep one.

    choice = yield from choose(model, out, dev, calibration=train.texts)

Which form is fastest depends on the CPU (short 8-bit kernels need VNNI or AMX to shine), and what it costs in accuracy
on the task. The winner is the fastest form whose accuracy drop against the float model is at most 0.2 points; if there
is none, the fastest whose drop cannot be told from none (paired 95% interval); if there is none either, the form that
drops least. Rows that decide are dev rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.data.dataset import Dataset
from alambic.engines import TextReader, open_part
from alambic.engines.arithmetic import PROPERTY, has_bf16
from alambic.errors import MissingExtra, PackError, nearest
from alambic.events import Finished, Note, Progress, Started, Work
from alambic.manifest import PartSpec
from alambic.measure.metrics import indicators, paired_bootstrap
from alambic.measure.speed import compare_times
from alambic.pack import onnx, openvino
from alambic.pack.scratch import whole_folder

MOST_DROP = 0.2  # points of accuracy (subset accuracy when several labels hold)


@dataclass(frozen=True)
class Form:
    """A packed form: engine, precision and the engine's properties."""

    engine: str
    precision: str
    properties: Mapping[str, str | int | bool] = field(default_factory=dict)


_IN_BF16 = {**openvino.PROPERTIES, PROPERTY: "bf16"}
FLOAT_FORMS: dict[str, Form] = {
    "openvino-fp16": Form("openvino", "fp16", openvino.PROPERTIES),
    "openvino-bf16": Form("openvino", "fp16", _IN_BF16),
    "onnx-fp16": Form("onnx", "fp16"),
}
INT8_FORMS: dict[str, Form] = {
    "openvino-int8-weights": Form("openvino", "int8-weights", openvino.PROPERTIES),
    "openvino-int8-weights-bf16": Form("openvino", "int8-weights", _IN_BF16),
    # The engine quantises activations as they come, by groups: fast where the CPU has 8-bit dot products.
    "openvino-int8-dynamic": Form(
        "openvino", "int8-weights", {**openvino.PROPERTIES, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}
    ),
    "openvino-int8-static": Form("openvino", "int8", openvino.PROPERTIES),
    "onnx-int8-dynamic": Form("onnx", "int8"),
    "onnx-int8-signed": Form("onnx", "int8-signed"),
}
FORMS = {**FLOAT_FORMS, **INT8_FORMS}
REFERENCE = "openvino-fp16"


@dataclass(frozen=True)
class FormResult:
    """What was measured of one form.

    Attributes:
        form: its name in `FORMS`.
        accuracy: share of rows right.
        drop: points lost against the float form, with its paired 95% interval `drop_low`, `drop_high`.
        agreement: share of rows with the float form's answer.
        p50_ms: median time of one text, forms interleaved.
        p95_ms: time that 95% of texts stay under.
        size_mb: of the part folder.
        n: rows measured.
    """

    form: str
    accuracy: float
    drop: float
    drop_low: float
    drop_high: float
    agreement: float
    p50_ms: float
    p95_ms: float
    size_mb: float
    n: int


@dataclass(frozen=True)
class Choice:
    """The form kept, and what was measured of all.

    Attributes:
        form: its name in `FORMS`.
        part: the packed part.
        folder: where its files are.
        results: every form measured, the float reference first.
        left_out: forms that could not be made, and why.
        why: the rule that decided, in words.
    """

    form: str
    part: PartSpec
    folder: Path
    results: tuple[FormResult, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "form": self.form,
            "why": self.why,
            "results": [asdict(result) for result in self.results],
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True)
class Options:
    """How forms are measured.

    Attributes:
        long: what to do with texts longer than the model reads.
        threads: of each engine; None lets it choose.
        repeats: single texts timed for each form.
        seconds: time for each form.
        cache: folder where traced graphs are kept.
        seed: of the draws.
    """

    long: str = "windows"
    threads: int | None = None
    repeats: int = 100
    seconds: float = 3.0
    cache: Path | None = None
    seed: int = 0


def suited(forms: Iterable[str]) -> list[str]:
    """Return those of `forms` that this CPU has instructions for; the engine would run the others as float32."""
    return [form for form in forms if FORMS[form].properties.get(PROPERTY) != "bf16" or has_bf16()]


def pack_form(
    form: str, model: Path, out: Path, *, calibration: Sequence[str] = (), cache: Path | None = None
) -> Work[PartSpec]:
    """Pack `model` in the form called `form`; see `FORMS`.

    Raises:
        PackError: the form is unknown, or the model cannot be packed in it.
        WorkspaceError: `out` cannot be written.
    """
    if form not in FORMS:
        raise PackError(f"unknown form {form!r}", hint=nearest(form, FORMS))
    spec = FORMS[form]
    part: PartSpec
    if spec.engine == "onnx":
        part = yield from onnx.pack(model, out, precision=spec.precision, cache=cache)  # type: ignore[arg-type]
    else:
        part = yield from openvino.pack(
            model, out, precision=spec.precision, calibration=calibration, cache=cache,  # type: ignore[arg-type]
            properties=spec.properties,
        )  # fmt: skip
    return part


def choose(
    model: Path,
    out: Path,
    rows: Dataset,
    *,
    calibration: Sequence[str],
    forms: Sequence[str] | None = None,
    options: Options = Options(),
) -> Work[Choice]:
    """Build `forms` and the float reference, measure them on `rows`, and leave the winner in `out`.

    Args:
        model: Model directory.
        out: part folder to make.
        rows: labelled dev rows; they decide.
        calibration: texts of the training rows.
        forms: names in `FORMS` to compare; None is every 8-bit form that suits this CPU.
        options: of the measurement.

    Raises:
        PackError: no form could be made.
        WorkspaceError: `out` cannot be written.
    """
    if not rows.examples:
        raise PackError("no labelled row to choose an 8-bit form on", hint="give the dev rows, or name the form")
    yield Started("int8.choose")
    trials = out.with_name(f".{out.name}.forms")
    shutil.rmtree(trials, ignore_errors=True)
    forms = suited(INT8_FORMS) if forms is None else forms
    names = [REFERENCE, *(name for name in forms if name != REFERENCE)]
    try:
        parts: dict[str, PartSpec] = {}
        left_out: dict[str, str] = {}
        for done, name in enumerate(names):
            yield Progress("int8.choose", done, len(names) + 1)
            try:
                parts[name] = yield from pack_once(name, model, trials, parts, calibration, options.cache)
            except (PackError, MissingExtra) as error:
                if name == REFERENCE:
                    raise
                left_out[name] = error.message
                yield Note(f"8-bit form {name} is left out: {error.message}", "warning")
        yield Progress("int8.choose", len(names), len(names) + 1)
        results = measure_forms(parts, trials, rows, options)
        best, why = decide_form([result for result in results if result.form in forms])
        with whole_folder(out) as folder:
            shutil.copytree(folder_of(best, trials), folder, dirs_exist_ok=True)
    finally:
        shutil.rmtree(trials, ignore_errors=True)
    yield Finished("int8.choose", 0.0)
    return Choice(best, parts[best], out, tuple(results), left_out, why)


def time_forms(
    forms: Mapping[str, tuple[PartSpec, Path]],
    texts: Sequence[str],
    *,
    threads: int | None = None,
    repeats: int = 100,
    seconds: float = 3.0,
    seed: int = 0,
) -> dict[str, float]:
    """Return the median time in ms of one of `texts` for each packed form and its folder, interleaved."""
    with ExitStack() as stack:
        runs: dict[str, Callable[[Sequence[str]], Any]] = {}
        for name, (part, folder) in forms.items():
            runs[name] = stack.enter_context(open_part(part, folder, threads=threads)).run
        times = compare_times(runs, texts, repeats=repeats, seconds=seconds, seed=seed)
    return {name: float(np.median(each)) for name, each in times.items()}


def likeness(
    forms: Mapping[str, tuple[PartSpec, Path]], texts: Sequence[str], *, threads: int | None = None
) -> dict[str, float]:
    """Return the mean cosine of each packed form's outputs on `texts` with those of the reference form."""
    rows = {}
    for name, (part, folder) in forms.items():
        with open_part(part, folder, threads=threads) as reader:
            found = reader.run(texts)
        rows[name] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return {name: float((row * rows[REFERENCE]).sum(axis=1).mean()) for name, row in rows.items()}


def decide_form(results: Sequence[FormResult]) -> tuple[str, str]:
    """Return the form to keep and the rule that decided."""
    small = [result for result in results if result.drop <= MOST_DROP]
    if small:
        best = min(small, key=lambda result: result.p50_ms)
        return best.form, f"fastest form that drops at most {MOST_DROP} points (it drops {best.drop:.2f})"
    unsure = [result for result in results if result.drop_low <= 0.0]
    if unsure:
        best = min(unsure, key=lambda result: result.p50_ms)
        return best.form, f"fastest form whose drop of {best.drop:.2f} points cannot be told from none"
    if not results:
        raise PackError("no 8-bit form could be made of this model", hint="use the float form")
    best = min(results, key=lambda result: (result.drop, result.p50_ms))
    return best.form, f"every form drops more than {MOST_DROP} points; this one drops least ({best.drop:.2f})"


def measure_forms(parts: Mapping[str, PartSpec], trials: Path, rows: Dataset, options: Options) -> list[FormResult]:
    """Measure packed forms on `rows`: accuracy against the first of them, and speed, interleaved."""
    truths = indicators(rows.targets(), len(rows.labels))
    metric = "subset_accuracy" if rows.multi_label else "accuracy"
    with ExitStack() as stack:
        readers = {
            name: stack.enter_context(
                open_part(part, folder_of(name, trials), long=options.long, threads=options.threads)
            )
            for name, part in parts.items()
        }
        answers = {name: _answers(reader, rows) for name, reader in readers.items()}
        runs: dict[str, Callable[[Sequence[str]], Any]] = {name: reader.run for name, reader in readers.items()}
        times = compare_times(runs, rows.texts, repeats=options.repeats, seconds=options.seconds, seed=options.seed)
    reference = answers[REFERENCE]
    results = []
    for name, answer in answers.items():
        rng = np.random.default_rng(options.seed)
        lost = paired_bootstrap(metric, truths, reference, answer, rng=rng).difference
        results.append(
            FormResult(
                form=name,
                accuracy=float((answer == truths).all(axis=1).mean()),
                drop=100 * lost.value,
                drop_low=100 * lost.low,
                drop_high=100 * lost.high,
                agreement=float((answer == reference).all(axis=1).mean()),
                p50_ms=float(np.median(times[name])),
                p95_ms=float(np.quantile(times[name], 0.95)),
                size_mb=_size_mb(folder_of(name, trials)),
                n=len(rows),
            )
        )
    return results


def pack_once(
    name: str, model: Path, trials: Path, parts: Mapping[str, PartSpec], calibration: Sequence[str], cache: Path | None
) -> Work[PartSpec]:
    """Pack the form `name` under `trials`; one that differs from another in properties only takes its files."""
    form = FORMS[name]
    for other, part in parts.items():
        if (FORMS[other].engine, FORMS[other].precision) == (form.engine, form.precision):
            return replace(part, params={**part.params, "properties": dict(form.properties)})
    part = yield from pack_form(name, model, folder_of(name, trials), calibration=calibration, cache=cache)
    return part


def folder_of(name: str, trials: Path) -> Path:
    """Return where `pack_once` puts the form `name`."""
    form = FORMS[name]
    return trials / f"{form.engine}-{form.precision}"


def _answers(reader: TextReader, rows: Dataset) -> NDArray[np.bool_]:
    """Return what a form answers, as indicators [N, L]."""
    logits = reader.run(rows.texts)
    if rows.multi_label:
        return np.asarray(logits >= 0.0)  # a probability of one half
    return indicators([[int(best)] for best in logits.argmax(axis=1)], logits.shape[1])


def _size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6
