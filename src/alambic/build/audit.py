"""The label audit of a task: which rows to review, what that should bring, and what more rows would.

Kept as stages of the run folder, beside those of a build: the packed base and the embeddings serve both. Rows of test
are not audited: correcting them by a model's opinion would flatter every model that shares it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.build.context import ENGINE_LIBRARIES, Context
from alambic.build.ladder import embed
from alambic.build.packing import pack_base
from alambic.build.prepare import find_base, prepare
from alambic.build.trial import Trial
from alambic.data.audit import pooled
from alambic.data.audit_rows import Ranking, rank
from alambic.data.dataset import Dataset, Example
from alambic.data.split import assign
from alambic.events import Note, Work
from alambic.measure.learning_curve import Curve, fit_curve
from alambic.task import Task
from alambic.workspace import StageSpec, Workspace

_LIBRARIES = ("scikit-learn", "scipy", "numpy", "rensa")
_FOLDS = 5
_SURE = 0.5  # labels doubted more than this are changed when the effect of the suggestions is estimated
_SHARES = (0.1, 0.2, 0.4, 0.7, 1.0)  # of the rows to fit on, where the learning curve is measured
_CURVE_FOLDS = 3  # folds answered for it
_DRAWS = 1000
_CLOSE = 0.03  # a build's candidates this close to the best one have a say in its audit
_PAGE = 25


@dataclass(frozen=True)
class Effect:
    """Out-of-fold accuracy on the rows whose labels are not doubted, before and after the suggestions.

    Attributes:
        candidate: what was fitted.
        changed: labels changed to the suggestion.
        n: rows answered.
        before: accuracy.
        after: accuracy.
        low: lower bound of the difference, 95%, in points.
        high: upper bound.
    """

    candidate: str
    changed: int
    n: int
    before: float
    after: float
    low: float
    high: float


@dataclass(frozen=True)
class LabelAudit:
    """What `audit_labels` found.

    Attributes:
        rows: what was audited.
        ranking: the rows by expected gain.
        accuracy: out of fold, by candidate, against the labels as they are.
        effect: what the suggestions would bring; None when none is likelier than not.
        curve: what more rows would bring; None with several labels a row, or too few rows.
    """

    rows: Dataset
    ranking: Ranking
    accuracy: dict[str, float]
    effect: Effect | None
    curve: Curve | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "labels": self.ranking.to_dict(),
            "accuracy": self.accuracy,
            "effect": vars(self.effect) if self.effect else None,
            "curve": self.curve.to_dict() if self.curve else None,
        }


def audit_labels(task: Task, run: Path) -> Work[LabelAudit]:
    """Audit the labels that `task` learns from; `run` keeps the stages.

    Raises:
        TaskError, DataError, BaseModelError, TrainError: each says what and where.
        WorkspaceError: the run folder cannot be used, or a build is running there.
    """
    base = find_base(task)
    workspace = Workspace(run)
    with workspace.locked():
        ctx = yield from prepare(task, base, workspace)
        found = yield from audit_context(ctx)
    return found


def audit_context(ctx: Context) -> Work[LabelAudit]:
    """Audit the labels of the rows of `ctx` that come from the training file."""
    from alambic.train.audit import Material, auditors

    rows = _audited(ctx)
    if len(rows) < len(ctx.train) + len(ctx.test):
        yield Note(f"labels of {len(rows):,} rows are audited; rows of dev and test files, or set aside, are not")
    material = Material(rows, (yield from _vectors(ctx, rows)))
    folds = folds_for(rows, seed=ctx.task.seed)
    answers = {}
    for name in auditors(material):
        answers[name] = yield from _answers(ctx, name, material, folds)
    accuracy = {name: _accuracy(p, rows) for name, p in answers.items()}
    best = max(accuracy, key=lambda name: accuracy[name])
    ranking = rank(
        rows,
        pooled(list(answers.values()), multi_label=rows.multi_label),
        said_by=tuple(answers),
        macro=ctx.task.metrics[0] == "macro_f1",
        vectors=material.vectors,
        seed=ctx.task.seed,
    )
    effect = yield from _effect(ctx, best, material, folds, ranking, answers[best])
    curve = yield from _curve(ctx, best, material, folds)
    return LabelAudit(rows, ranking, accuracy, effect, curve)


def audit_trials(ctx: Context, trials: Sequence[Trial], rows: Dataset) -> dict[str, Any]:
    """Audit the labels of the rows that decided a build, from what its candidates answered there; fits nothing.

    The best candidate and those that come close to it are pooled.
    """
    metric = ctx.task.metrics[0]
    best = max(trial.point.quality[metric].value for trial in trials)
    used = [trial for trial in trials if trial.point.quality[metric].value >= best - _CLOSE]
    probabilities = pooled([trial.probabilities for trial in used], multi_label=rows.multi_label)
    names = tuple(trial.name for trial in used)
    ranking = rank(rows, probabilities, said_by=names, macro=metric == "macro_f1", seed=ctx.task.seed)
    return ranking.to_dict(most=_PAGE)


def folds_for(rows: Dataset, *, seed: int) -> tuple[tuple[int, ...], ...]:
    """Return five folds, near-duplicates and rows of one group together, stratified by label."""
    places, _ = assign(rows, seed=seed, lock=None, test_share=None)
    folds = [tuple(i for i, place in enumerate(places) if int(place) % _FOLDS == k) for k in range(_FOLDS)]
    return tuple(fold for fold in folds if 0 < len(fold) < len(rows))


def _audited(ctx: Context) -> Dataset:
    own_dev = ctx.task.data.dev is not None and ctx.splits.dev is not None
    if not own_dev:
        return ctx.train
    assert ctx.splits.dev is not None
    theirs = {example.where for example in ctx.splits.dev}
    return ctx.train.take([i for i, example in enumerate(ctx.train) if example.where not in theirs])


def _vectors(ctx: Context, rows: Dataset) -> Work[NDArray[np.float32] | None]:
    if ctx.base is None:
        return None
    encoder = yield from pack_base(ctx)
    vectors = yield from embed(ctx, encoder, ctx.train)
    known = {example.digest: vector for example, vector in zip(ctx.train, vectors, strict=True)}
    return np.stack([known[example.digest] for example in rows])


def _answers(ctx: Context, name: str, material: Any, folds: Sequence[Sequence[int]]) -> Work[NDArray[np.float32]]:
    from alambic.train.audit import out_of_fold

    spec = StageSpec(
        f"audit.{name}",
        {"seed": ctx.task.seed, "folds": [list(fold) for fold in folds]},
        _inputs(ctx, material),
        libraries=_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        found = yield from out_of_fold(name, material, folds, scratch=folder / "fit", seed=ctx.task.seed)
        np.save(folder / "probabilities.npy", found, allow_pickle=False)
        return {"rows": len(found)}

    stage = yield from ctx.workspace.run(spec, work)
    probabilities: NDArray[np.float32] = np.load(stage.folder / "probabilities.npy", allow_pickle=False)
    return probabilities


def _inputs(ctx: Context, material: Any) -> dict[str, str]:
    base = ctx.base.digest if ctx.base is not None else "none"
    return {"rows": material.rows.digest, "base": base, "machine": ctx.machine_digest}


def _accuracy(probabilities: NDArray[np.floating], rows: Dataset) -> float:
    return round(float(_right(probabilities, rows).mean()), 4)


def _right(probabilities: NDArray[np.floating], rows: Dataset) -> NDArray[np.bool_]:
    if not rows.multi_label:
        return np.asarray(probabilities.argmax(axis=1) == np.array([target[0] for target in rows.targets()]))
    guesses = [tuple(name for name, p in zip(rows.labels, row, strict=True) if p >= 0.5) for row in probabilities]
    return np.array([guess == example.labels for guess, example in zip(guesses, rows, strict=True)])


def corrected(rows: Dataset, changes: Mapping[tuple[str, tuple[str, ...]], tuple[str, ...]]) -> Dataset:
    """Return `rows` with other labels where `changes` has the text and its labels."""
    examples = [
        Example(e.text, changes.get((e.text, e.labels), e.labels), e.where, e.group) for e in rows
    ]  # fmt: skip
    return Dataset(tuple(examples), rows.labels, rows.multi_label)


def _effect(
    ctx: Context,
    name: str,
    material: Any,
    folds: Sequence[Sequence[int]],
    ranking: Ranking,
    before: NDArray[np.float32],
) -> Work[Effect | None]:
    """Fit again with the labels that are likelier wrong than right changed; score both on the other rows."""
    from alambic.train.audit import Material

    changes = {(s.text, s.labels): s.suggested for s in ranking.suspects if s.wrong > _SURE}
    if not changes:
        return None
    changed = corrected(material.rows, changes)
    after = yield from _answers(ctx, name, Material(changed, material.vectors), folds)
    kept = np.array([(e.text, e.labels) not in changes for e in material.rows])
    right = np.stack([_right(before, material.rows)[kept], _right(after, changed)[kept]]).astype(np.float64)
    rng = np.random.default_rng(ctx.task.seed)
    n = int(kept.sum())
    draws = rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS) @ (right[1] - right[0]) / n
    low, high = 100.0 * np.percentile(draws, [2.5, 97.5])
    was, is_now = (round(float(m), 4) for m in right.mean(axis=1))
    return Effect(name, int((~kept).sum()), n, was, is_now, round(float(low), 2), round(float(high), 2))


def _curve(ctx: Context, name: str, material: Any, folds: Sequence[Sequence[int]]) -> Work[Curve | None]:
    """Fit on growing shares of the other folds' rows, answer the fold, and draw the curve."""
    rows = material.rows
    fitted = len(rows) - max(len(fold) for fold in folds)
    if rows.multi_label or _SHARES[0] * fitted < 2 * len(rows.labels):
        yield Note("learning curve: none, for there are too few rows a label, or several labels a row")
        return None
    spec = StageSpec(
        "audit.curve",
        {"candidate": name, "seed": ctx.task.seed, "folds": [list(f) for f in folds], "shares": list(_SHARES)},
        _inputs(ctx, material),
        libraries=(*_LIBRARIES, *ENGINE_LIBRARIES),
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.train.audit import by_size

        sizes, right, shares, asked = yield from by_size(
            name, material, folds[:_CURVE_FOLDS], _SHARES, scratch=folder / "fit", seed=ctx.task.seed
        )
        np.savez(folder / "curve.npz", sizes=sizes, right=right, shares=shares, asked=asked)
        return {"answers": len(asked)}

    stage = yield from ctx.workspace.run(spec, work)
    with np.load(stage.folder / "curve.npz", allow_pickle=False) as kept:
        truths = np.array([target[0] for target in rows.targets()], dtype=np.intp)[kept["asked"]]
        counts = [rows.counts[label] for label in rows.labels]
        return fit_curve(
            kept["sizes"].tolist(), kept["right"], truths, kept["shares"], rows.labels, rows=len(rows), counts=counts,
            seed=ctx.task.seed,
        )  # fmt: skip
