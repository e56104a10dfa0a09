"""Abstention: texts out of scope on CLINC150 by one threshold, and a promised precision over random splits."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import tuned

MINUTES = 110
WHAT = "Texts out of scope told by one threshold (CLINC150), and a promised precision of 0.98 over 20 random splits"
PROMISED = ("clinc150", "hwu64")
PRECISION, SPLITS, COVERAGE = 0.98, 20, 0.9
MORE_SPLITS = 200  # 20 splits tell a rate of 5 % badly: one broken promise is 5 %
IN_SCOPE_BAR, CAUGHT_BAR, FREE_BAR = 95.5, 75.0, 96.5
# ALAMBIC_BENCH_FORMS=tfidf-svm runs the linear model only, in a few minutes.
FORMS = os.environ.get("ALAMBIC_BENCH_FORMS", ",".join(tuned.FORMS)).split(",")


def run(store: Any) -> str:
    """Fit what is not kept yet, and write the tables."""
    lines = [
        "## CLINC150: texts out of scope",
        "",
        "| model | threshold fitted for | score (chosen on dev) | n test in, out | in scope, no threshold % | "
        "in scope % | out of scope caught % | AUROC of each score on test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        lines += _scope_lines(form)
    lines += [
        "",
        f"Bars: {IN_SCOPE_BAR} / {CAUGHT_BAR:g} with one threshold, {FREE_BAR} without any. In scope: share of the "
        "task's texts answered rightly; one that is taken for out of scope counts as wrong. Score and "
        "threshold are fitted on dev (3,000 rows, 100 out of scope); the model learnt 100 others as a label. The third "
        "threshold is the least that dev shows to catch the bar's share of other texts at 95 % confidence; this rule "
        "was added once the results of the first two were known.",
        "",
        f"## Precision {PRECISION:g}, promised at 95 % confidence",
        "",
        f"| set | model | rows kept apart | rows counted | promises made, of {SPLITS} | kept | "
        f"broken, of {MORE_SPLITS} | "
        f"answered %, mean [least, most] | precision %, mean [least] | "
        f"label sets {COVERAGE:g}: truth inside %, labels |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_promise_line(name, form) for name in PROMISED for form in FORMS),
        "",
        "A split draws at random, from test and the half of dev that nothing else used, as many rows as that half to "
        "fit the threshold; the rest counts. The temperature and the order of the thresholds come from the other half "
        "of dev. Where no threshold is supported, no promise is made. A promise "
        "counts as broken when the precision counted is under it; chance in the rows counted adds to that.",
    ]
    return "\n".join(lines)


def _scope_lines(form: str) -> list[str]:
    from alambic.measure import selective

    answered = tuned.answers("clinc150", form)
    dev, test = answered["choose"] + answered["kept"], answered["test"]
    inside, outside = _sides(dev), _sides(dev, outside=True)
    lines = []
    goals = {
        "in_scope = 0.98": 0.98,
        f"{IN_SCOPE_BAR} % in scope on dev": _share_for(dev),
        f"{CAUGHT_BAR:g} % out of scope surely caught, by dev": _share_catching(dev),
    }
    for goal, share in goals.items():
        if share is None:
            lines.append(f"| {form} | {goal} | no threshold reaches it on dev | | | | | |")
            continue
        name, _ = selective.choose_scope(inside, outside, share)
        least = selective.scope_threshold(inside[name], share)
        own, right = test.own, _right(test)
        passed = test.scopes[name] >= least
        figures = ", ".join(
            f"{key} {selective.auroc(values[own], values[~own]):.4f}" for key, values in test.scopes.items()
        )
        lines.append(
            f"| {form} | {goal} | {name} | {int(own.sum()):,}, {int((~own).sum()):,} | {_percent(right[own])} | "
            f"{_percent((right & passed)[own])} | {_percent(~passed[~own])} | {figures} |"
        )
    return lines


def _share_for(dev: tuned.Answers) -> float | None:
    """Return the least share of the task's own texts that must pass, for the bar to be met on dev; None without."""
    from alambic.measure import selective

    own, right = dev.own, _right(dev)
    for share in np.arange(0.90, 0.9996, 0.0005):
        name, _ = selective.choose_scope(_sides(dev), _sides(dev, outside=True), float(share))
        least = selective.scope_threshold(_sides(dev)[name], float(share))
        if 100 * (right & (dev.scopes[name] >= least))[own].mean() >= IN_SCOPE_BAR:
            return float(share)
    return None


def _share_catching(dev: tuned.Answers) -> float | None:
    """Return the largest share of the task's own texts that may pass while the bar's share of others is surely caught.

    Surely: the 95 % Clopper-Pearson lower bound of what dev shows is not below the bar; None where no share is so.
    """
    from alambic.measure import selective

    inside, outside = _sides(dev), _sides(dev, outside=True)
    for share in np.arange(0.9995, 0.8995, -0.0005):
        name, _ = selective.choose_scope(inside, outside, float(share))
        passed = outside[name] >= selective.scope_threshold(inside[name], float(share))
        if 1.0 - selective.upper_bound(int(passed.sum()), len(passed)) >= CAUGHT_BAR / 100:
            return float(share)
    return None


def _sides(answers: tuned.Answers, *, outside: bool = False) -> dict[str, Any]:
    rows = ~answers.own if outside else answers.own
    return {name: values[rows] for name, values in answers.scopes.items()}


def _right(answers: tuned.Answers) -> Any:
    """Whether the likeliest label of the task is the true one, [N]."""
    probabilities = answers.probabilities.copy()
    if tuned.OUTSIDE in answers.labels:
        probabilities[:, answers.labels.index(tuned.OUTSIDE)] = -1.0
    return probabilities.argmax(axis=1) == answers.truths


def _promise_line(name: str, form: str) -> str:
    from alambic.measure import selective

    answered = {part: rows.take(rows.own) for part, rows in tuned.answers(name, form).items()}
    pool = answered["kept"] + answered["test"]
    factor, tuning = _tuned(answered["choose"])
    confidence, right = _confidence(pool, factor)
    truth = _tempered(pool, factor)[np.arange(len(pool.truths)), pool.truths]
    n = len(answered["kept"].truths)
    made, broken, shares, precisions, held, sizes = 0, 0, [], [], [], []
    for seed in range(MORE_SPLITS):
        order = np.random.default_rng(seed).permutation(len(pool.truths))
        fit, count = order[:n], order[n:]
        found = selective.select(tuning, (confidence[fit], right[fit]), precision=PRECISION)
        given = confidence[count] >= found.threshold
        precision = float(right[count][given].mean()) if given.any() else 1.0
        broken += found.kept and precision < PRECISION
        if seed >= SPLITS:
            continue
        least = selective.set_threshold(truth[fit], COVERAGE)
        inside = _tempered(pool, factor)[count] >= least
        held.append(float((truth[count] >= least).mean()))
        sizes.append(float(np.maximum(inside.sum(axis=1), 1).mean()))
        if found.kept:
            made += 1
            shares.append(float(given.mean()))
            precisions.append(precision)
    kept = sum(p >= PRECISION for p in precisions)
    share = f"{100 * np.mean(shares):.1f} [{100 * min(shares):.1f}, {100 * max(shares):.1f}]" if shares else "–"
    reached = f"{100 * np.mean(precisions):.2f} [{100 * min(precisions):.2f}]" if shares else "–"
    return (
        f"| {name} | {form} | {n:,} | {len(pool.truths) - n:,} | {made} | {kept} | {broken} | {share} | {reached} | "
        f"{100 * np.mean(held):.1f}, {np.mean(sizes):.2f} |"
    )


def _tuned(choose: tuned.Answers) -> tuple[float, tuple[Any, Any]]:
    from alambic.measure.calibration import fit_temperature

    factor = fit_temperature(choose.probabilities, choose.truths)
    return factor, _confidence(choose, factor)


def _tempered(answers: tuned.Answers, factor: float) -> Any:
    from alambic.kinds.decision import tempered

    return tempered(answers.probabilities, factor)


def _confidence(answers: tuned.Answers, factor: float) -> tuple[Any, Any]:
    """Return the confidence of each answer (minus infinity where the label for other texts wins) and its rightness."""
    probabilities = _tempered(answers, factor)
    best = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    if tuned.OUTSIDE in answers.labels:
        confidence[best == answers.labels.index(tuned.OUTSIDE)] = -np.inf
    return confidence, best == answers.truths


def _percent(flags: Any) -> str:
    """Write a share with its exact 95% interval."""
    from alambic.measure import selective

    k, n = int(flags.sum()), len(flags)
    low, high = 1 - selective.upper_bound(n - k, n, confidence=0.975), selective.upper_bound(k, n, confidence=0.975)
    return f"{100 * k / n:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
