"""Chains of candidates that were tried already: composed from what they answered and cost, packed and measured as one.

Composing costs arithmetic only: each stage's probabilities of the rows that decide come from its own packed bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from alambic.build.context import Context, Fitted, Fold
from alambic.build.ladder import fit
from alambic.build.trial import Trial, bundle_stage, costs_stage, deciding_rows
from alambic.data.dataset import Dataset
from alambic.errors import DataError, TaskError
from alambic.events import Note, Work
from alambic.kinds.cascade import MOST_STAGES, Cascade, is_cascade
from alambic.kinds.classify import decide
from alambic.measure.cascade import TOLERANCE, FittedChain, Member, fit_cascade, probabilities_of, too_few
from alambic.measure.quality import quality_of
from alambic.pack.cascade import join
from alambic.task import CandidateSpec, Task

_QUICKER = 0.5  # a stage before the full model takes at most this share of its time
_WORTH = 0.9  # a chain composed unasked is tried when it should take at most this share of the full model's time


def check_chain(name: str, recipe: Mapping[str, Any]) -> None:
    """Refuse unknown options of a chain, and a tolerance that is no share.

    Raises:
        TaskError: naming the option and what is allowed.
    """
    for key, value in recipe.items():
        if key != "tolerance":
            raise TaskError(f"candidate {name!r}: {key!r}; a cascade has one option", hint="tolerance")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 0.5:
            said = f"candidate {name!r}: tolerance is {value!r}, not a share of answers between 0 and 0.5"
            raise TaskError(said, hint="0.01 lets one answer of a hundred be lost against the full model")


def check_rows(task: Task, folds: Sequence[Fold]) -> None:
    """Refuse, before anything slow, chains that the user wrote and that the rows that decide are too few for.

    Raises:
        DataError: with the number of rows it takes.
    """
    n = sum(len(fold.dev) for fold in folds)
    for spec in task.candidates:
        why = too_few(n, _tolerance(spec)) if is_cascade(spec.name) and spec.chain is not None else None
        if why is not None:
            raise DataError(
                f"candidate {spec.name!r}: {why}", hint="give more rows, or a larger tolerance in its recipe"
            )


def try_chains(
    ctx: Context, candidates: Sequence[CandidateSpec], folds: tuple[Fold, ...], singles: Sequence[Trial]
) -> Work[list[Trial]]:
    """Return the chains among `candidates` that the rows support, measured like any other candidate.

    Args:
        ctx: the build.
        candidates: all of them; those that are no chain were tried before.
        folds: that the others were fitted on.
        singles: the others.
    """
    trials = []
    for spec in candidates:
        if not is_cascade(spec.name):
            continue
        members = _members(spec, singles, ctx.task.metrics[0])
        if isinstance(members, str):
            yield Note(f"{spec.name}: {members}")
            continue
        found = _thresholds(ctx, spec, members, deciding_rows(folds))
        worth = spec.chain is not None or found.ms <= _WORTH * found.full_ms
        if not found.stages or not worth:
            yield Note(f"{spec.name}: {found.why or _no_gain(found)}")
            continue
        trial = yield from _try(ctx, spec.name, found, members, folds)
        yield Note(f"{spec.name}: {fitted_sentence(found.facts(), found.stages[-1].name)}")
        trials.append(trial)
    return trials


def _members(spec: CandidateSpec, singles: Sequence[Trial], metric: str) -> list[Trial] | str:
    """Return the trials that the chain is made of, the best by `metric` last, or why there is none."""
    known = {trial.name: trial for trial in singles}
    if spec.chain is not None:
        missing = [name for name in spec.chain if name not in known]
        return f"left out, as {missing[0]} is" if missing else [known[name] for name in spec.chain]
    full = max(singles, key=lambda trial: (trial.quality.scores[metric].value, -_ms(trial)))
    quick = [
        t for t in singles
        if _ms(t) <= _QUICKER * _ms(full) and t.fitted.parts[-1][0].engine != "majority"
    ]  # fmt: skip
    if not quick:
        return f"no candidate takes less than half the time of {full.name}, the best: there is no chain to make"
    best = sorted(quick, key=lambda trial: -trial.quality.scores[metric].value)[: MOST_STAGES - 1]
    return [*sorted(best, key=_ms), full]


def _ms(trial: Trial) -> float:
    # The median: one interruption by another program would make a mean of a hundred texts.
    return float(trial.costs["speed"]["p50_ms"])


def _tolerance(spec: CandidateSpec) -> float:
    return float(spec.recipe.get("tolerance", TOLERANCE))


def _thresholds(ctx: Context, spec: CandidateSpec, members: Sequence[Trial], rows: Dataset) -> FittedChain:
    given = [Member(trial.name, trial.probabilities, _ms(trial)) for trial in members]
    # What an early stage keeps, the full model never sees: under a promise of precision it must be that sure too.
    least = ctx.task.budget.precision or 0.0
    truths = members[0].quality.answers.truths
    assert len(truths) == len(rows), "all candidates answered the same rows"
    return fit_cascade(given, truths, tolerance=_tolerance(spec), least=least, skip=spec.chain is None)


def _no_gain(found: FittedChain) -> str:
    return (
        f"the best supported chain should take {found.ms:.3g} ms a text on average, {found.full_ms:.3g} ms without: "
        "not worth its size"
    )


def _try(ctx: Context, name: str, found: FittedChain, members: Sequence[Trial], folds: tuple[Fold, ...]) -> Work[Trial]:
    used = [next(trial for trial in members if trial.name == stage.name) for stage in found.stages]
    cascade = Cascade(found.stages, found.facts())
    fitted = _joined(cascade, [trial.fitted for trial in used])
    fitted = replace(fitted, refit={"stages": [[trial.name, trial.fitted.refit] for trial in used]})
    rows = deciding_rows(folds)
    probabilities = probabilities_of(found, [Member(t.name, t.probabilities, 0.0) for t in used])
    said = decide(probabilities, rows.labels, multi_label=False)
    quality = quality_of(rows, said, split="dev", seed=ctx.task.seed)
    bundle = yield from bundle_stage(ctx, name, fitted, tag=folds[0].tag)
    # The bundle of the first fold has learnt the other folds' rows: on them it would be sure too often, and quick.
    # Its mean hangs on how many texts go all the way, so it takes more texts than one model does.
    point, costs = yield from costs_stage(ctx, name, bundle, folds[0].dev, quality, repeats=400, seconds=6.0)
    return Trial(name, point, quality, costs, probabilities, fitted, name)


def _joined(cascade: Cascade, fits: Sequence[Fitted]) -> Fitted:
    stages, parts = join(cascade.stages, [fitted.parts for fitted in fits])
    cascade = replace(cascade, stages=stages)
    told = json.dumps(asdict(cascade), sort_keys=True).encode()
    key = "+".join([*(fitted.key for fitted in fits), hashlib.sha256(told).hexdigest()])
    return Fitted(parts, key, details={"cascade": cascade.facts}, cascade=cascade)


def refit(ctx: Context, trial: Trial) -> Work[Fitted]:
    """Fit the candidate of `trial` on all rows; of a chain each stage, its thresholds as they are."""
    cascade = trial.fitted.cascade
    if cascade is None:
        fitted = yield from fit(ctx, trial.step, trial.fitted.refit, ctx.train, dev=None, tag="all")
        return fitted
    fits = []
    for name, recipe in trial.fitted.refit["stages"]:
        fits.append((yield from fit(ctx, name, recipe, ctx.train, dev=None, tag="all")))
    return _joined(cascade, fits)


def fitted_sentence(facts: dict[str, Any], full: str) -> str:
    """Say what the rows that decide support, from the facts of a chain and the name of its full model."""
    return (
        f"on {facts['n']:,} rows that decide {facts['lost']:,} answers are lost and {facts['gained']:,} gained against "
        f"{full}: at most {100 * facts['bound']:.2f} points are lost at {facts['confidence']:.0%} confidence "
        f"({100 * facts['tolerance']:g} allowed)"
    )


def chain_sentences(cascade: Cascade | None, answered: dict[str, int], mean_ms: float | None) -> tuple[str, ...]:
    """Say how the chain that ships answers, and what its thresholds rest on; empty where one model answers alone."""
    if cascade is None:
        return ()
    n = sum(answered.values())
    shares = ", ".join(
        f"{stage.name} {100 * answered[stage.name] / n:.1f} %"
        + (f" (from confidence {stage.threshold:.4f})" if stage.threshold > 0 else "")
        for stage in cascade.stages
    )
    time = "" if mean_ms is None else f"; mean {mean_ms:.3g} ms a text, one at a time"
    return (
        f"cascade: of the {n:,} test texts are answered by {shares}{time}",
        f"cascade: {fitted_sentence(cascade.facts, cascade.stages[-1].name)}",
    )
