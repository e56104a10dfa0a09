"""The decision of a bundle: temperature from dev, thresholds from the rows kept apart, all of it counted on test.

Which rows fit what: the temperature and the order in which thresholds are tested come from the rows that decide (dev or
out of fold); the thresholds from `keeping.Kept`, through the bundle that ships; test only counts.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.build.context import ENGINE_LIBRARIES, Context
from alambic.build.keeping import IN_SCOPE, LEAST_OUTSIDE, Kept
from alambic.build.trial import Trial
from alambic.data.dataset import Dataset
from alambic.engines import ClassifyEngine, open_engine
from alambic.events import Work
from alambic.kinds.classify import decide
from alambic.kinds.decision import SCOPES, Decision, Scope, tempered
from alambic.measure import selective
from alambic.measure.calibration import fit_temperature, reliability
from alambic.measure.metrics import METRICS
from alambic.task import Task
from alambic.workspace import Stage, StageSpec

_THRESHOLDS = np.arange(0.1, 0.91, 0.05)
# Where no text out of scope is given: docs/lab-notes.md.
_DEFAULT_SCOPES: tuple[Scope, ...] = ("nearest", "energy", "confidence")

Scores = dict[Scope, NDArray[np.float64]]


def calibrate(trial: Trial, task: Task) -> tuple[float, float]:
    """Fit on the deciding rows the temperature of one label, or the threshold of several."""
    truths = trial.quality.answers.truths
    if task.multi_label:
        metric = METRICS[task.metrics[0]]
        scores = [metric(truths, trial.probabilities >= t) for t in _THRESHOLDS]
        return 1.0, round(float(_THRESHOLDS[int(np.argmax(scores))]), 2)
    if trial.fitted.parts[-1][0].engine == "majority":
        return 1.0, 0.5
    return fit_temperature(trial.probabilities, truths), 0.5


def calibration_of(trial: Trial, temperature: float, *, seed: int) -> dict[str, Any]:
    """Return the calibration on the deciding rows before and after the temperature, as JSON."""
    correct = trial.quality.answers.correct
    after = tempered(trial.probabilities, temperature).max(axis=1)
    before = np.asarray(trial.probabilities, dtype=np.float64).max(axis=1)
    sides = {"before": before, "after": after}
    return {
        "temperature": temperature,
        **{k: reliability(v, correct, rng=np.random.default_rng(seed)).to_dict() for k, v in sides.items()},
    }


def decision_stage(ctx: Context, trial: Trial, draft: Stage, temperature: float) -> Work[Decision | None]:
    """Fit the thresholds that the task asks for on the rows kept apart; None when it asks for none.

    Args:
        ctx: the build.
        trial: the chosen candidate on the deciding rows.
        draft: the bundle that ships, without its decision, with its temperature.
        temperature: of that bundle.
    """
    kept, budget = ctx.kept, ctx.task.budget
    if kept is None:
        return None
    asked = {"precision": budget.precision, "coverage": budget.coverage, "in_scope": budget.in_scope}
    spec = StageSpec(
        f"decide.{trial.name}",
        {**asked, "scoped": scoped(ctx.task)},
        {"bundle": draft.key, "kept": kept.digest, "dev": trial_digest(trial), "machine": ctx.machine_digest},
        libraries=ENGINE_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        yield from ()
        sure = tempered(trial.probabilities, temperature).max(axis=1)
        with open_engine(draft.folder / "bundle", threads=ctx.threads) as engine:
            return asdict(fit_decision(engine, kept, ctx.task, tuning=(sure, trial.quality.answers.correct)))

    stage = yield from ctx.workspace.run(spec, work)
    return Decision(**stage.result)


def trial_digest(trial: Trial) -> str:
    """Return what identifies the answers of `trial`."""
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(trial.probabilities).tobytes()).hexdigest()


def scoped(task: Task) -> bool:
    """Tell whether texts out of scope are to be told from others."""
    return task.budget.in_scope is not None or task.data.out_of_scope is not None


def fit_decision(
    engine: ClassifyEngine,
    kept: Kept,
    task: Task,
    *,
    tuning: tuple[NDArray[np.float64], NDArray[np.bool_]],
) -> Decision:
    """Fit every threshold that the task asks for, as `engine` answers the rows kept apart.

    Args:
        engine: the bundle that ships, at its temperature.
        kept: the rows.
        task: what is asked.
        tuning: confidence [M] and rightness [M] of rows that may have fitted anything; they order the thresholds tried.
    """
    budget, facts = task.budget, dict[str, Any]()
    scope, least = None, None
    if scoped(task):
        scope, least, facts["in_scope"] = _fit_scope(engine, kept, budget.in_scope or IN_SCOPE)
    probabilities, scores = engine.scored(kept.promise.texts, label=kept.label)
    truths = np.array([row[0] for row in kept.promise.targets()])
    rule = Decision(scope=scope, scope_threshold=least, scope_label=kept.label)
    threshold, inside = 0.0, None
    if budget.precision is not None:
        confidence, correct = _answers(probabilities, scores, truths, rule, engine.labels)
        found = selective.select(tuning, (confidence, correct), precision=budget.precision)
        threshold, facts["precision"] = found.threshold, found.to_dict()
    if budget.coverage is not None:
        own = np.ones(len(truths), dtype=np.bool_)
        if kept.label is not None:
            own = truths != engine.labels.index(kept.label)
        truth = np.asarray(probabilities, dtype=np.float64)[np.arange(len(truths)), truths][own]
        inside = selective.set_threshold(truth, budget.coverage)
        facts["coverage"] = {"coverage": budget.coverage, "n": len(truth)}
    return Decision(threshold, scope, least, kept.label, inside, facts)


def _fit_scope(engine: ClassifyEngine, kept: Kept, share: float) -> tuple[Scope, float, dict[str, Any]]:
    rows = kept.scope
    own = [e.text for e in rows if e.labels[0] != kept.label]
    others = [*kept.outside, *(e.text for e in rows if e.labels[0] == kept.label)]
    _, inside = engine.scored(own, label=kept.label)
    facts: dict[str, Any] = {"in_scope": share, "n": len(own), "n_outside": len(others)}
    if len(others) >= LEAST_OUTSIDE:
        _, outside = engine.scored(others, label=kept.label)
        name, _ = selective.choose_scope(inside, outside, share)  # type: ignore[arg-type]
        scope = next(s for s in SCOPES if s == name)
        least = selective.scope_threshold(inside[scope], share)
        figures = {s: round(selective.auroc(inside[s], outside[s]), 4) for s in engine.scopes}
        facts |= {"auroc": figures, "caught": float((outside[scope] < (least or 0.0)).mean())}
    else:
        scope = next(s for s in _DEFAULT_SCOPES if s in engine.scopes)
        least = selective.scope_threshold(inside[scope], share)
    assert least is not None, "too few rows were refused before"
    return scope, least, facts


def _answers(
    probabilities: NDArray[np.float32], scores: Scores, truths: NDArray[Any], rule: Decision, labels: tuple[str, ...]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the confidence of each answer (minus infinity where the scope refuses) and whether it is right."""
    best = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1).astype(np.float64)
    scope = scores[rule.scope] if rule.scope is not None else None
    refused = rule.refuses(confidence, [labels[i] for i in best], scope)
    confidence[[why is not None for why in refused]] = -np.inf
    return confidence, np.asarray(best == truths)


def judge(
    rows: Dataset, kept: Kept | None, decision: Decision | None, engine: ClassifyEngine, *, seed: int
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Answer the test rows once; return their probabilities and what calibration and decision came to, as JSON."""
    probabilities, scores = engine.scored(rows.texts, label=decision.scope_label if decision is not None else None)
    if rows.multi_label:
        return probabilities, {}
    truths = np.array([row[0] for row in rows.targets()])
    correct = probabilities.argmax(axis=1) == truths
    sure = probabilities.max(axis=1).astype(np.float64)
    told: dict[str, Any] = {"test": reliability(sure, correct, rng=np.random.default_rng(seed)).to_dict()}
    if decision is None or kept is None:
        return probabilities, told
    scope = scores[decision.scope] if decision.scope is not None else None
    said = decide(probabilities, rows.labels, multi_label=False, decision=decision, scope=scope)
    answered = np.array([not one.abstained for one in said])
    own = np.array([e.labels[0] != kept.label for e in rows])
    told["answered"] = share(int(answered.sum()), len(said))
    told["precision"] = share(int((answered & correct).sum()), int(answered.sum()))
    if decision.set_threshold is not None:
        sets = [one.label_set or () for one, mine in zip(said, own, strict=True) if mine]
        held = sum(
            e.labels[0] in s for e, s in zip((e for e, m in zip(rows, own, strict=True) if m), sets, strict=True)
        )
        told["coverage"] = share(held, len(sets))
        told["set_size"] = round(float(np.mean([len(s) for s in sets])), 3)
    if decision.scope is not None:
        refused = np.array([one.because == "out_of_scope" for one in said])
        told["in_scope"] = share(int((~refused & own).sum()), int(own.sum()))
        others = [why == "out_of_scope" for why in _outside(engine, kept, decision)]
        others += refused[~own].tolist()
        if others:
            told["caught"] = share(sum(others), len(others))
    return probabilities, told


def _outside(engine: ClassifyEngine, kept: Kept, decision: Decision) -> list[str | None]:
    if not kept.outside_test:
        return []
    probabilities, scores = engine.scored(kept.outside_test, label=decision.scope_label)
    scope = scores[decision.scope] if decision.scope is not None else None
    said = decide(probabilities, engine.labels, multi_label=False, decision=decision, scope=scope)
    return [one.because for one in said]


def share(k: int, n: int) -> dict[str, Any]:
    """Return `k` of `n` as a share with its exact 95% interval (Clopper and Pearson); nothing where n is 0."""
    if not n:
        return {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    high = selective.upper_bound(k, n, confidence=0.975)
    low = 1.0 - selective.upper_bound(n - k, n, confidence=0.975)
    return {"value": k / n, "low": low, "high": high, "n": n}
