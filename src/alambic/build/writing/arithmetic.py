"""What a quantised model computes in, chosen by time at the task's own lengths: f32, or bf16 where the CPU has it.

bf16 reads prompts faster and writes tokens slower (docs/lab-notes.md, 2026-11-21), so a task of long questions and
short answers gains by it and a talkative one loses. Answers are timed both ways before anything is scored: scores and
costs are those of the arithmetic that ships.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alambic.build.writing.context import ENGINE_LIBRARIES, FittedWriter, WritingContext
from alambic.build.writing.faster import Effort, Heard, compare_ways, fastest, told
from alambic.engines.arithmetic import PROPERTY, has_bf16
from alambic.engines.bundle_writer import load_writer
from alambic.engines.genai_options import MODEL
from alambic.engines.writer import Writer
from alambic.errors import TaskError
from alambic.events import Note, Work
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.manifest import PartSpec
from alambic.task import Task
from alambic.toml_file import line_of
from alambic.workspace import StageSpec

USUAL, OTHER = "f32", "bf16"
ENGINE, PRECISIONS = "openvino-genai", ("int8", "int4")
# The share is much the same from answer to answer, so few are enough where they take long.
EFFORT = Effort(repeats=40, seconds=7.5, least=10, warmup=2)
_WORTH_MS = 20.0  # of an answer; below, what could be gained is a few milliseconds
_TRIAL_ANSWERS, _PLENTY = 4, 10.0  # one that takes so many times what is worth it need not be tried again
_MEMORY_SHARE = 0.6  # of the machine's, that the weights of two models open at once may take


def check_arithmetic(task: Task) -> None:
    """Refuse an arithmetic that could not be measured here, before anything slow.

    Raises:
        TaskError: the task fixes bf16, and this CPU does not have it.
    """
    if task.answer.arithmetic == OTHER and not has_bf16():
        line = line_of(task.source, ("answer", "arithmetic"))
        raise TaskError(
            f"{task.path.name}:{line}: answer.arithmetic = 'bf16', which this CPU does not have: what is measured "
            "would not be what ships",
            hint="build where the CPU has it, or leave the line out",
        )


def choose_arithmetic(ctx: WritingContext, name: str, fitted: FittedWriter, sampling: Sampling) -> Work[FittedWriter]:
    """Return `fitted` with the arithmetic that the task fixes or that measured fastest.

    With "auto" these stay as they are, without a word, for there is nothing to choose: models that are not quantised,
    other engines, any CPU without bf16, and a base with an adapter beside it. That base is one part in the bundles of
    several tasks, which share it only where they compute alike, and no task can choose for the others.
    """
    asked = ctx.task.answer.arithmetic
    if fitted.part.engine != ENGINE or fitted.part.params.get("precision") not in PRECISIONS:
        return fitted
    if asked != "auto":
        return fitted if asked == USUAL else _computing(fitted, OTHER)
    if "adapter" in fitted.beside or not has_bf16():
        return fitted
    if not _fits_twice(fitted.folder, ctx.machine):
        yield Note(f"{name}: two of this model do not fit into the memory together, so bf16 is not tried")
        return fitted
    requests = _requests(ctx, sampling)
    spec = StageSpec(
        f"arithmetic.{name}",
        {"threads": ctx.threads, "effort": vars(EFFORT), "worth_ms": _WORTH_MS,
         "sampling": {k: v for k, v in vars(sampling).items() if k != "json_schema"}},
        {"fit": fitted.key, "dev": ctx.dev.digest, "train": ctx.train.digest, "machine": ctx.machine_digest},
        libraries=ENGINE_LIBRARIES,
    )  # fmt: skip

    def open_in(way: str) -> Writer:
        return load_writer(_computing(fitted, way).part, fitted.folder, threads=ctx.threads)

    def work(_: Path) -> Work[dict[str, Any]]:
        yield from ()
        return measure_arithmetic(open_in, requests, seed=ctx.task.seed, effort=EFFORT)

    stage = yield from ctx.workspace.run(spec, work)
    chosen = str(stage.result["chosen"])
    for line in _said(name, stage.result):
        yield Note(line)
    return replace(_computing(fitted, chosen), details={**fitted.details, "arithmetic": stage.result})


def arithmetic_seconds(task: Task, precision: str | None, answer_s: float) -> float:
    """Predict the seconds of choosing for a model of `precision` whose answers take `answer_s` seconds."""
    open_to = task.answer.arithmetic == "auto" and precision in PRECISIONS and 1000 * answer_s >= _WORTH_MS
    return EFFORT.seconds_of(2, answer_s) + 2 * answer_s if open_to and has_bf16() else 0.0


def measure_arithmetic(
    open_in: Callable[[str], Writer], requests: Sequence[GenerationRequest], *, seed: int, effort: Effort
) -> dict[str, Any]:
    """Time the same answers in both arithmetics, interleaved; where answers are quick, one of them is not even opened.

    Args:
        open_in: opens the model in ``"f32"`` or ``"bf16"``.
        requests: of the task; the first few show how long an answer takes.
        seed: of the order.
        effort: how long to measure.

    Returns:
        ``chosen``; ``answer_ms``, the time of an answer in f32; ``ways``, as `compare_ways` tells them, empty where
        answers are quick.
    """
    with ExitStack() as stack:

        def opened(way: str) -> Writer:
            writer = open_in(way)
            stack.callback(writer.close)
            return writer

        usual = opened(USUAL)
        answer_ms = _answer_ms(usual, requests[:_TRIAL_ANSWERS])
        if answer_ms < _WORTH_MS:
            return {"chosen": USUAL, "answer_ms": answer_ms, "ways": {}}
        heard = {USUAL: Heard(usual), OTHER: Heard(opened(OTHER))}
        # An engine keeps the prompts that it has read, so the first ones would favour the usual way.
        found = compare_ways(heard, requests[_TRIAL_ANSWERS:] or requests, effort=effort, seed=seed)
    return {"chosen": fastest(found), "answer_ms": answer_ms, "ways": found}


def _answer_ms(writer: Writer, requests: Sequence[GenerationRequest]) -> float:
    """Return the median milliseconds of an answer, the first left out; a long one says enough by itself."""
    times: list[float] = []
    for request in requests:
        start = time.perf_counter()
        for _ in writer.stream(request):
            pass
        times.append(1000.0 * (time.perf_counter() - start))
        if len(times) > 1 and times[-1] > _PLENTY * _WORTH_MS:
            break
    return float(np.median(times[1:] or times))


def _requests(ctx: WritingContext, sampling: Sampling) -> list[GenerationRequest]:
    """Return the questions of dev, and where these are few of train: one asked twice would be read from the cache."""
    needed = EFFORT.repeats + EFFORT.warmup + _TRIAL_ANSWERS
    chats = [*ctx.dev.chats]
    chats += ctx.train.chats[: max(0, needed - len(chats))]
    return [GenerationRequest(chat=chat.prompt, sampling=sampling) for chat in chats]


def _computing(fitted: FittedWriter, way: str) -> FittedWriter:
    """Return `fitted` computing in `way`, under a key of its own where that is not the usual one."""
    part: PartSpec = fitted.part
    properties = dict(part.params.get("properties", {}))
    if properties.get(PROPERTY, USUAL) == way:
        return fitted
    params = {**part.params, "properties": {**properties, PROPERTY: way}}
    return replace(fitted, part=replace(part, params=params), key=f"{fitted.key}-{way}")


def _fits_twice(folder: Path, machine: dict[str, Any]) -> bool:
    size = (folder / MODEL).with_suffix(".bin").stat().st_size
    return bool(2 * size < _MEMORY_SHARE * 1e9 * machine.get("ram_gb", 8.0))


def _said(name: str, result: dict[str, Any]) -> list[str]:
    if not result["ways"]:
        return [f"{name}: an answer takes {result['answer_ms']:.1f} ms in f32: too little to gain in bf16, not tried"]
    return list(told(name, result["ways"], str(result["chosen"]), than="in f32"))
