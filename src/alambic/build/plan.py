"""How long a build will take, told before the slow part, and how much of it fits the budget.

Fine-tuning dominates: its time is tokens x epochs x the time of a token, which a few real training steps on this
machine tell. With `build_minutes`, fewer folds are run, then fewer epochs, and then the fine-tuned candidates are left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alambic.build.context import Context, Fold
from alambic.build.teaching import student_seconds
from alambic.data.dataset import Dataset
from alambic.events import Work
from alambic.kinds.classify import DISTILLED
from alambic.task import CandidateSpec
from alambic.workspace import StageSpec

TRAINED = ("finetune", "finetune-int8")
# Seconds around training that do not grow with it, measured on two slow cores: export, int8, proof, measuring.
_PACK_SECONDS = 12.0  # of one fitted encoder, its graph traced already
_FIRST_SECONDS = 75.0  # tracing for both engines, embedding, choosing the 8-bit form
_LEAST_EPOCHS = 2.0


@dataclass(frozen=True)
class Plan:
    """What will be run.

    Attributes:
        folds: those that every candidate is fitted on.
        candidates: those that are tried, with the epochs that fit.
        seconds: predicted wall time of the whole build.
        notes: what was cut, and why.
    """

    folds: tuple[Fold, ...]
    candidates: tuple[CandidateSpec, ...]
    seconds: float
    notes: tuple[str, ...]


def plan(ctx: Context) -> Work[Plan]:
    """Predict the time of the build and fit it into `build_minutes`."""
    candidates = ctx.task.candidates
    if not any(c.made_by in (*TRAINED, *DISTILLED) for c in candidates):
        return Plan(ctx.folds, candidates, _linear_seconds(ctx, len(ctx.folds)), ())
    per_token = yield from _seconds_per_token(ctx)
    tokens = _tokens(ctx, ctx.train)
    epochs, ways = _epochs(ctx), _ways(ctx)

    def total(folds: int, n_epochs: float) -> float:
        share = sum(len(f.train) for f in ctx.folds[:folds]) / len(ctx.train)
        # With few rows a class each fold is trained both ways, and the better one is refitted.
        training = per_token * tokens * n_epochs * (share * ways + 1.0)
        return _FIRST_SECONDS + training + _PACK_SECONDS * (folds + 1) + _linear_seconds(ctx, folds)

    limit = None if ctx.task.budget.build_minutes is None else ctx.task.budget.build_minutes * 60
    students = student_seconds(ctx, per_token * tokens)
    candidates, cut = _without_students(candidates, total(len(ctx.folds), epochs), students, limit)
    if cut and not any(c.made_by in TRAINED for c in candidates):
        return Plan(ctx.folds, candidates, _linear_seconds(ctx, len(ctx.folds)), cut)
    folds, epochs, trains, notes = _fit_budget(ctx, total, epochs, limit)
    notes = (*cut, *notes)
    if not trains:
        kept = tuple(c for c in candidates if c.made_by not in TRAINED)
        return Plan(ctx.folds, kept, _FIRST_SECONDS + _linear_seconds(ctx, len(ctx.folds)), notes)
    chosen = tuple(_with_epochs(c, epochs) for c in candidates)
    return Plan(ctx.folds[:folds], chosen, total(folds, epochs) + (0.0 if cut else students), notes)


def _without_students(
    candidates: tuple[CandidateSpec, ...], others: float, students: float, limit: float | None
) -> tuple[tuple[CandidateSpec, ...], tuple[str, ...]]:
    """Leave the students out where `limit` does not allow them beside the `others`: their teacher comes first."""
    if limit is None or not students or others + students <= limit:
        return candidates, ()
    kept = tuple(c for c in candidates if c.made_by not in DISTILLED)
    names = ", ".join(c.name for c in candidates if c.made_by in DISTILLED)
    said = f"with {names} the build would take {_minutes(others + students)}; build_minutes does not allow them"
    return kept, (said,)


def _epochs(ctx: Context) -> float:
    """Epochs that the trained candidates ask for, at most."""
    from alambic.train.finetune import default_epochs

    asked = [c.recipe.get("epochs") for c in ctx.task.candidates if c.made_by in TRAINED]
    asked += [c.recipe.get("teacher_epochs") for c in ctx.task.candidates if c.made_by in DISTILLED and not asked]
    return max(float(e) if isinstance(e, int | float) else default_epochs(len(ctx.train)) for e in asked)


def _ways(ctx: Context) -> int:
    from alambic.train.finetune import few_shot

    return 2 if few_shot(ctx.train) else 1


def _with_epochs(candidate: CandidateSpec, epochs: float) -> CandidateSpec:
    if candidate.made_by not in (*TRAINED, *DISTILLED) or "steps" in candidate.recipe:
        return candidate
    key = "epochs" if candidate.made_by in TRAINED else "teacher_epochs"
    return candidate.model_copy(update={"recipe": {**candidate.recipe, key: epochs}})


Total = Callable[[int, float], float]


def _fit_budget(
    ctx: Context, total: Total, asked: float, limit: float | None
) -> tuple[int, float, bool, tuple[str, ...]]:
    """Return folds, epochs and whether to train at all, the most that `limit` seconds allow, with what was cut."""
    most = len(ctx.folds)
    if limit is None or total(most, asked) <= limit:
        return most, asked, True, ()
    wanted = f"fine-tuning on {most} folds for {asked:g} epochs would take {_minutes(total(most, asked))}"
    for epochs in (asked, *[e for e in (8.0, 6.0, 5.0, 4.0, 3.0, _LEAST_EPOCHS) if e < asked]):
        folds = max((k for k in range(1, most + 1) if total(k, epochs) <= limit), default=0)
        if folds >= (min(2, most) if epochs > _LEAST_EPOCHS else 1):
            n = sum(len(f.dev) for f in ctx.folds[:folds])
            note = f"{wanted}; build_minutes allows {folds} of {most} folds (n = {n:,}) and {epochs:g} epochs"
            return folds, epochs, True, (note,)
    note = f"{wanted}; build_minutes does not allow one fold: the fine-tuned candidates are left out"
    return most, asked, False, (note,)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def _linear_seconds(ctx: Context, folds: int) -> float:
    """Predicted time of the candidates that are not trained by gradient, embedding and measuring included."""
    characters = sum(map(len, ctx.train.texts))
    return 20.0 + folds * characters * 3e-5


def _tokens(ctx: Context, rows: Dataset) -> int:
    """Count the tokens of `rows` as the base reads them, no more than it reads at once."""
    from alambic.model.encoder import load_tokenizer

    assert ctx.base is not None
    tokenizer = load_tokenizer(ctx.base.folder)
    return sum(min(len(e.ids), ctx.base.max_tokens) for e in tokenizer.encode_batch(rows.texts))


def _seconds_per_token(ctx: Context) -> Work[float]:
    """Time training steps on real rows; kept in the run folder."""
    assert ctx.base is not None
    base = ctx.base
    spec = StageSpec(
        "timing",
        {"threads": ctx.threads},
        {"base": base.digest, "rows": ctx.train.digest, "machine": ctx.machine_digest},
        libraries=("torch", "transformers"),
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.train.timing import time_training

        yield from ()
        return {"seconds_per_token": time_training(base, ctx.train, threads=ctx.threads, seed=ctx.task.seed)}

    stage = yield from ctx.workspace.run(spec, work)
    return float(stage.result["seconds_per_token"])
