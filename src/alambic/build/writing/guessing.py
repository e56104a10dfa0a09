"""Guess tokens and check them together: from the prompt (lookup) or with a draft model, kept where it is faster.

Answers to rows of dev are timed without guesses, with lookup and with the draft, in turn. The greedy answer is the same
in exact arithmetic; where the engine rounds, checking several tokens at once rounds otherwise than one by one, so the
answers are compared and the difference is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alambic.build.writing.context import ENGINE_LIBRARIES, FittedWriter, WritingContext
from alambic.build.writing.faster import Effort, Heard, compare_ways, fastest, told
from alambic.bundle import Bundle, open_bundle
from alambic.engines.bundle_writer import TAKES_PARTS, Beside, load_writer
from alambic.engines.genai import check_draft
from alambic.engines.writer import Writer
from alambic.errors import EngineError, TaskError
from alambic.events import Note, Work
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.manifest import PartSpec
from alambic.model.bases import Base
from alambic.task import Task
from alambic.workspace import StageSpec

USUAL, _TRIED = 4, (3, 6)  # tokens guessed from the prompt: of `lookup = true`, and those that "auto" tries
_EFFORT = Effort()
_PLAIN, _DRAFT = "plain", "draft"


def check_draft_of(task: Task, base: Base | None) -> None:
    """Open the draft that the task names and refuse what could not guess, before anything slow.

    Raises:
        BundleError: it is no bundle.
        TaskError: it is no plain model of the engine that checks guesses, or its tokens are others.
    """
    if task.answer.draft is None:
        return
    bundle = open_draft(task)
    manifest = bundle.manifest
    assert manifest.writer is not None
    part = manifest.part(manifest.entry)
    if base is not None and (base.folder / "tokenizer.json").is_file():
        try:
            check_draft(base.folder, bundle.folder(part))
        except EngineError as error:
            raise TaskError(f"{task.path.name}: answer.draft: {error.message}", hint=error.hint) from error


def open_draft(task: Task) -> Bundle:
    """Open the bundle that `answer.draft` names.

    Raises:
        BundleError: it is no bundle.
        TaskError: it is no plain model of the engine that checks guesses.
    """
    assert task.answer.draft is not None
    bundle = open_bundle(task.path_of(task.answer.draft))
    writer, part = bundle.manifest.writer, bundle.manifest.part(bundle.manifest.entry)
    why = None
    if writer is None or part.engine not in TAKES_PARTS:
        why = f"its engine is {part.engine!r}, and a draft runs on {', '.join(sorted(TAKES_PARTS))}"
    elif writer.adapter is not None:
        why = "its adapter lies beside its base; merge it (recipe adapter = 'merged')"
    if why is not None:
        raise TaskError(f"{task.path.name}: answer.draft = {task.answer.draft!r}: {why}")
    return bundle


def choose_guessing(
    ctx: WritingContext, name: str, fitted: FittedWriter, sampling: Sampling
) -> Work[tuple[FittedWriter, Sampling]]:
    """Return `fitted` and `sampling` with the way of guessing that the task fixes or that measured fastest.

    Raises:
        EngineError: the draft has other tokens.
    """
    answer = ctx.task.answer
    if answer.lookup is False and answer.draft is None:
        return fitted, sampling
    if fitted.part.engine not in TAKES_PARTS:
        yield Note(f"{name}: the engine {fitted.part.engine!r} cannot check guesses, so it writes without")
        return fitted, sampling
    draft = None if answer.draft is None else open_draft(ctx.task)
    modes = _modes(answer.lookup, draft)
    spec = StageSpec(
        f"guess.{name}",
        {"threads": ctx.threads, "modes": {mode: vars(each) for mode, each in modes.items()},
         "sampling": {k: v for k, v in vars(sampling).items() if k != "json_schema"}},
        {"fit": fitted.key, "rows": ctx.dev.digest, "machine": ctx.machine_digest,
         "draft": "none" if draft is None else draft.manifest.seal},
        version=2,
        libraries=ENGINE_LIBRARIES,
    )  # fmt: skip

    def work(_: Path) -> Work[dict[str, Any]]:
        yield from ()
        found = _measure(ctx, fitted, sampling, modes, draft)
        fixed = answer.lookup is not False and answer.lookup != "auto"
        return {"modes": found, "chosen": next(mode for mode in modes if mode != _PLAIN) if fixed else fastest(found)}

    stage = yield from ctx.workspace.run(spec, work)
    chosen = str(stage.result["chosen"])
    for line in told(name, stage.result["modes"], chosen, than="without guesses"):
        yield Note(line)
    kept = replace(sampling, lookup_tokens=modes[chosen].lookup_tokens)
    details = {**fitted.details, "guessing": stage.result}
    if not modes[chosen].draft or draft is None:
        return replace(fitted, details=details), kept
    part, folder = _part_of(draft)
    key = f"{fitted.key}-{draft.manifest.seal[:16]}"
    return replace(fitted, key=key, details=details, beside={**fitted.beside, "draft": (part, folder)}), kept


def guessing_seconds(task: Task, answer_s: float) -> float:
    """Predict the seconds of timing the guesses of one model whose answers take `answer_s` seconds without them."""
    ways = len(_modes(task.answer.lookup, None)) + (task.answer.draft is not None)
    return _EFFORT.seconds_of(ways, answer_s) if ways > 1 else 0.0


@dataclass(frozen=True)
class Mode:
    """A way of guessing."""

    lookup_tokens: int = 0
    draft: bool = False


def _modes(lookup: bool | int | str, draft: Bundle | None) -> dict[str, Mode]:
    """Return what is tried, by name; plain first."""
    counts: Sequence[int] = ()
    if lookup == "auto":
        counts = _TRIED
    elif lookup is not False:
        counts = (USUAL,) if lookup is True else (int(lookup),)
    modes = {_PLAIN: Mode(), **{f"lookup-{count}": Mode(count) for count in counts}}
    return modes if draft is None else {**modes, _DRAFT: Mode(draft=True)}


def _part_of(draft: Bundle) -> tuple[PartSpec, Path]:
    entry = draft.manifest.part(draft.manifest.entry)
    return replace(entry, name=_DRAFT, folder=_DRAFT, after=None), draft.folder(entry)


def _measure(
    ctx: WritingContext, fitted: FittedWriter, sampling: Sampling, modes: Mapping[str, Mode], draft: Bundle | None
) -> dict[str, dict[str, Any]]:
    """Time the same answers of dev in every mode, interleaved; compare what they say."""
    requests = [GenerationRequest(chat=chat.prompt, sampling=sampling) for chat in ctx.dev.chats]
    adapter = _adapter_of(fitted)
    with ExitStack() as stack:
        opened: dict[bool, Writer] = {}
        for drafted in {mode.draft for mode in modes.values()}:
            beside = Beside(adapter, _part_of(draft)[1] if drafted and draft is not None else None)
            opened[drafted] = load_writer(fitted.part, fitted.folder, threads=ctx.threads, beside=beside)
            stack.callback(opened[drafted].close)
        heard = {name: Heard(opened[mode.draft], mode.lookup_tokens) for name, mode in modes.items()}
        return compare_ways(heard, requests, effort=_EFFORT, seed=ctx.task.seed)


def _adapter_of(fitted: FittedWriter) -> Path | None:
    if "adapter" not in fitted.beside:
        return None
    part, folder = fitted.beside["adapter"]
    return folder / str(part.params["file"])
