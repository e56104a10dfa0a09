"""Calibration error on test before and after the temperature that a build fits on rows it did not train on."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import tuned

MINUTES = 100
WHAT = "Expected calibration error (15 bins of equal mass) on test, before and after temperature scaling"
SETS = ("banking77", "clinc150")
BAR = 0.02
# ALAMBIC_BENCH_FORMS=tfidf-svm runs the linear model only, in a few minutes.
FORMS = os.environ.get("ALAMBIC_BENCH_FORMS", ",".join(tuned.FORMS)).split(",")


def run(store: Any) -> str:
    """Fit what is not kept yet, and write the table."""
    lines = [
        "| set | model | n dev | n test | accuracy % | factor | ECE before [95 %] | ECE after [95 %] | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(name, form) for name in SETS for form in FORMS]
    note = (
        "The factor multiplies the logits (the inverse of a temperature) and is fitted on one half of dev, which also "
        "stopped the training. CLINC150: rows of the task only; the label of its rows out of scope is left out and the "
        "others share its probability. Intervals: bootstrap over test rows; resampling adds noise to this figure, so "
        "they lie a little high."
    )
    return "\n".join([*lines, "", note])


def _line(name: str, form: str) -> str:
    from alambic.kinds.decision import tempered
    from alambic.measure.calibration import fit_temperature, reliability

    answered = tuned.answers(name, form)
    (dev, dev_truths), (test, truths) = (_inside(answered[part]) for part in ("choose", "test"))
    factor = fit_temperature(dev, dev_truths)
    after = tempered(test, factor)
    correct = test.argmax(axis=1) == truths
    found = [reliability(p.max(axis=1), correct, rng=np.random.default_rng(0)) for p in (tempered(test, 1.0), after)]
    errors = " | ".join(f"{r.ece:.4f} [{r.low:.4f}, {r.high:.4f}]" for r in found)
    return (
        f"| {name} | {form} | {len(dev):,} | {len(test):,} | {100 * correct.mean():.2f} | {factor:.3f} | {errors} | "
        f"{BAR} |"
    )


def _inside(answers: tuned.Answers) -> tuple[Any, Any]:
    """Return probabilities and truths of the rows of the task, without the label of the others."""
    own = answers.take(answers.own)
    if tuned.OUTSIDE not in own.labels:
        return own.probabilities.astype(np.float64), own.truths
    out = own.labels.index(tuned.OUTSIDE)
    probabilities = np.delete(own.probabilities.astype(np.float64), out, axis=1)
    truths = np.where(own.truths > out, own.truths - 1, own.truths)
    return probabilities / probabilities.sum(axis=1, keepdims=True), truths
