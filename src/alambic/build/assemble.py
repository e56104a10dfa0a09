"""Put the parts of a fitted candidate into a sealed bundle."""

from __future__ import annotations

import datetime
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alambic import __version__
from alambic.build.context import Context, Fitted
from alambic.bundle import Bundle, seal
from alambic.kinds.decision import Decision
from alambic.kinds.remote_stage import RemoteStage
from alambic.manifest import Manifest, PartSpec
from alambic.measure.machine import versions
from alambic.report.card import render_card
from alambic.task import Task

# A model made from these rows and this base; what the bundle may be used for follows from both.
_OWN_LICENCE = "follows the licences of base and data"


@dataclass(frozen=True)
class Extras:
    """What a final bundle holds beyond a trial one; `index` is that of the training rows."""

    scores: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    threshold: float = 0.5
    decision: Decision | None = None
    index: tuple[PartSpec, Path] | None = None

    @property
    def computes(self) -> dict[str, Any]:
        """What of it changes answers, as JSON; the rows of the index are those of the fit."""
        decision = None if self.decision is None else asdict(self.decision)
        index = None if self.index is None else self.index[0].params
        known = {"temperature": self.temperature, "decision": decision, "index": index}
        return {key: value for key, value in known.items() if value is not None}


def assemble(ctx: Context, name: str, fitted: Fitted, out: Path, extras: Extras | None = None) -> Bundle:
    """Copy the parts of `fitted` under `out`, write the card and seal.

    Args:
        ctx: the build.
        name: of the candidate.
        fitted: its parts.
        out: an empty or absent folder.
        extras: scores and calibration of a final bundle.
    """
    extras = extras or Extras()
    out.mkdir(parents=True, exist_ok=True)
    for part, source in (*fitted.parts, *_beside(extras)):
        copy_files(source, out / part.folder)
    manifest = _manifest(ctx, name, fitted, extras)
    (out / "README.md").write_text(render_card(manifest.model_dump(mode="json")), "utf-8")
    return seal(out, manifest)


def _beside(extras: Extras) -> tuple[tuple[PartSpec, Path], ...]:
    return () if extras.index is None else (extras.index,)


def copy_files(source: Path, target: Path) -> None:
    """Hard-link where the file system can: a stage's files are never written again."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            to = target / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, to)
            except OSError:
                shutil.copy2(path, to)


def _manifest(ctx: Context, name: str, fitted: Fitted, extras: Extras) -> Manifest:
    task = ctx.task
    base = (
        ctx.base.to_dict()
        if ctx.base is not None and any(p.engine != "tfidf-linear" for p, _ in fitted.parts)
        else None
    )
    parts = tuple(part for part, _ in fitted.parts)
    if len(parts) == 1 and parts[0].engine == "majority":
        base = None
    data = {
        "train": {"digest": ctx.train.digest, "rows": len(ctx.train)},
        "test": {"digest": ctx.test.digest, "rows": len(ctx.test)},
        "licence": task.data.licence or "not stated",
    }
    return Manifest(
        **provenance(
            task,
            name,
            parts=(*parts, *(p for p, _ in _beside(extras))),
            base=base,
            data=data,
            scores=extras.scores,
            machine=ctx.machine,
        ),
        labels=ctx.train.labels,
        multi_label=task.multi_label,
        threshold=extras.threshold,
        long=task.data.long,  # type: ignore[arg-type]  # leave_out is refused for classifiers
        entry=parts[-1].name,
        temperature=extras.temperature,
        decision=extras.decision,
        cascade=fitted.cascade,
        remote=_remote_stage(task),
    )


def _remote_stage(task: Task) -> RemoteStage | None:
    if task.remote is None:
        return None
    return RemoteStage(**task.remote.model_dump(), description=task.task.description, described=dict(task.labels))


def provenance(
    task: Task,
    name: str,
    *,
    parts: tuple[PartSpec, ...],
    base: dict[str, Any] | None,
    data: dict[str, Any],
    scores: dict[str, Any],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of a manifest that say what a bundle is and where it comes from, whatever its kind."""
    return {
        "alambic": __version__,
        "name": task.name,
        "kind": task.task.kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parts": parts,
        "task": {"source": task.source, "digest": task.digest, "description": task.task.description},
        "candidate": name,
        "base": base,
        "data": data,
        "scores": scores,
        "machine": machine,
        "versions": versions(),
        "seed": task.seed,
        "licences": {"bundle": _OWN_LICENCE, "base": base["licence"] if base else "none", "data": data["licence"]},
    }
