"""Guess tokens and check them together: from the prompt (lookup) or with a draft model, kept where it is faster.

Answers to rows of dev are timed without guesses, with lookup and with the draft, in turn. The greedy answer is the same
in exact arithmetic; where the engine rounds, checking several tokens at once rounds otherwise than one by one, so the
answers are compared and the difference is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from alambic.build.writing.context import ENGINE_LIBRARIES, FittedWriter, WritingContext
from alambic.bundle import Bundle, open_bundle
from alambic.engines.bundle_writer import TAKES_PARTS, Beside, load_writer
from alambic.engines.genai import check_draft
from alambic.engines.writer import Writer
from alambic.errors import EngineError, TaskError
from alambic.events import Note, Work
from alambic.kinds.generation import Chunk, GenerationRequest, Sampling
from alambic.manifest import PartSpec
from alambic.measure.generation_speed import Timed, compare_generation_speed
from alambic.model.bases import Base
from alambic.task import Task
from alambic.workspace import StageSpec

USUAL, _TRIED = 4, (3, 6)  # tokens guessed from the prompt: of `lookup = true`, and those that "auto" tries
_REPEATS, _SECONDS = 40, 15.0
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
        libraries=ENGINE_LIBRARIES,
    )  # fmt: skip

    def work(_: Path) -> Work[dict[str, Any]]:
        yield from ()
        found = _measure(ctx, fitted, sampling, modes, draft)
        fixed = answer.lookup is not False and answer.lookup != "auto"
        return {"modes": found, "chosen": next(mode for mode in modes if mode != _PLAIN) if fixed else _fastest(found)}

    stage = yield from ctx.workspace.run(spec, work)
    chosen = str(stage.result["chosen"])
    for line in _said(name, stage.result["modes"], chosen):
        yield Note(line)
    kept = replace(sampling, lookup_tokens=modes[chosen].lookup_tokens)
    details = {**fitted.details, "guessing": stage.result}
    if not modes[chosen].draft or draft is None:
        return replace(fitted, details=details), kept
    part, folder = _part_of(draft)
    key = f"{fitted.key}-{draft.manifest.seal[:16]}"
    return replace(fitted, key=key, details=details, beside={**fitted.beside, "draft": (part, folder)}), kept


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
    """Time the same answers in every mode, interleaved; compare what they say."""
    requests = [GenerationRequest(chat=chat.prompt, sampling=sampling) for chat in ctx.dev.chats]
    adapter = _adapter_of(fitted)
    with ExitStack() as stack:
        opened: dict[bool, Writer] = {}
        for drafted in {mode.draft for mode in modes.values()}:
            beside = Beside(adapter, _part_of(draft)[1] if drafted and draft is not None else None)
            opened[drafted] = load_writer(fitted.part, fitted.folder, threads=ctx.threads, beside=beside)
            stack.callback(opened[drafted].close)
        heard = {name: _Heard(opened[mode.draft], mode.lookup_tokens) for name, mode in modes.items()}
        writers = {name: cast(Writer, each) for name, each in heard.items()}
        speeds = compare_generation_speed(writers, requests, repeats=_REPEATS, seconds=_SECONDS, seed=ctx.task.seed)
    rng = np.random.default_rng(ctx.task.seed)
    plain = heard[_PLAIN].said
    found: dict[str, dict[str, Any]] = {}
    for name, speed in speeds.items():
        found[name] = {
            "p50_ms": speed.p50_ms.to_dict(),
            "n": speed.n,
            "share_of_plain": _share(speed.timed, speeds[_PLAIN].timed, rng),
            "answers": len(plain),
            "same_answers": sum(text == plain.get(key) for key, text in heard[name].said.items()),
        }
    return found


def _adapter_of(fitted: FittedWriter) -> Path | None:
    if "adapter" not in fitted.beside:
        return None
    part, folder = fitted.beside["adapter"]
    return folder / str(part.params["file"])


class _Heard:
    """A writer that guesses in one way, and what it said."""

    def __init__(self, writer: Writer, lookup_tokens: int) -> None:
        self._writer = writer
        self._lookup_tokens = lookup_tokens
        self.said: dict[int, str] = {}

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Write one answer."""
        pieces = []
        sampling = replace(request.sampling, lookup_tokens=self._lookup_tokens)
        for chunk in self._writer.stream(replace(request, sampling=sampling)):
            pieces.append(chunk.text)
            yield chunk
        self.said[id(request)] = "".join(pieces)


def _share(timed: Sequence[Timed], plain: Sequence[Timed], rng: np.random.Generator) -> dict[str, float]:
    """Return the time of all answers as a share of the plain ones', with a 90% interval over answers."""
    mine, theirs = (np.array([one.total_ms for one in times]) for times in (timed, plain))
    draws = rng.integers(len(mine), size=(1000, len(mine)))
    shares = mine[draws].sum(axis=1) / theirs[draws].sum(axis=1)
    low, high = np.quantile(shares, (0.05, 0.95))
    return {"value": float(mine.sum() / theirs.sum()), "low": float(low), "high": float(high)}


def _fastest(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the mode that took the least time, among those surely faster than plain."""
    sure = [name for name in found if name != _PLAIN and found[name]["share_of_plain"]["high"] < 1]
    return min(sure, key=lambda name: float(found[name]["share_of_plain"]["value"]), default=_PLAIN)


def _said(name: str, found: Mapping[str, Mapping[str, Any]], chosen: str) -> Iterator[str]:
    for mode, figures in found.items():
        if mode == _PLAIN:
            continue
        share, n = figures["share_of_plain"], figures["n"]
        kept = "kept" if mode == chosen else "not kept"
        other = figures["answers"] - figures["same_answers"]
        differing = f"; {other} of {figures['answers']} answers differ" if other else ""
        yield (
            f"{name}: {mode} takes {share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}] of the time without "
            f"guesses (n = {n} answers of dev){differing}: {kept}"
        )
