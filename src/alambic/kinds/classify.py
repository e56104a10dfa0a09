"""The kind `classify`: a text in, one label out (or several with `multi_label`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alambic.kinds.decision import Decision

METRICS = ("accuracy", "macro_f1")
MULTI_LABEL_METRICS = ("micro_f1", "macro_f1", "subset_accuracy")

# The honest ladder, cheapest first, then a chain of those before. Names of candidates; build knows how to make them.
DEFAULT_CANDIDATES = ("majority", "tfidf-svm", "knn", "logreg", "finetune", "finetune-int8", "cascade")
# Students of the fine-tuned encoder: tried unasked only where the budget speaks of what they save.
DISTILLED = ("distil", "distil-int8", "distil-static")


@dataclass(frozen=True)
class Reason:
    """A training row near a text.

    Attributes:
        labels: of that row.
        similarity: cosine, 1 for the same words (or the same vector).
        where: ``file:line`` of origin.
        digest: SHA-256 (hex) of its text and labels.
        text: the row's text; None where the task does not keep texts in the bundle.
    """

    labels: tuple[str, ...]
    similarity: float
    where: str
    digest: str
    text: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The labels chosen for one input.

    Attributes:
        labels: one label, or zero or more in label order when the task is multi-label.
        confidence: probability of the chosen label; multi-label: probability of the least sure decision.
        scores: probability of every label, in label order.
        because: why the bundle does not stand by the labels: ``unsure`` or ``out_of_scope``; None when it does.
        label_set: labels that the truth is among as often as the task asked, likeliest first; None when not asked.
        answered_by: of a cascade, the stage that answered; None where one model answers alone.
    """

    labels: tuple[str, ...]
    confidence: float
    scores: dict[str, float]
    because: str | None = None
    label_set: tuple[str, ...] | None = None
    answered_by: str | None = None

    @property
    def abstained(self) -> bool:
        """Whether the labels are only a guess: the task's thresholds say not to answer."""
        return self.because is not None

    @property
    def label(self) -> str | None:
        """The only label, or the first of several; None when none was chosen."""
        return self.labels[0] if self.labels else None


def decide(
    probabilities: NDArray[np.float32],
    labels: Sequence[str],
    *,
    multi_label: bool,
    threshold: float = 0.5,
    decision: Decision | None = None,
    scope: NDArray[np.float64] | None = None,
) -> list[Prediction]:
    """Turn probabilities [N, L] into predictions.

    Args:
        probabilities: [N, L].
        labels: label order.
        multi_label: every label from `threshold` is given; otherwise the likeliest.
        threshold: multi-label only.
        decision: when to abstain, and label sets; one label per text only.
        scope: how surely each text belongs to the task [N], where `decision` looks at it.
    """
    rows = np.asarray(probabilities, dtype=np.float64)
    if multi_label:
        return [_several(row, labels, threshold) for row in rows]
    best = rows.argmax(axis=1) if len(rows) else np.zeros(0, dtype=np.intp)
    chosen = [labels[i] for i in best]
    confidence = rows.max(axis=1, initial=0.0)
    because = (decision or Decision()).refuses(confidence, chosen, scope)
    predictions = []
    for row, name, sure, why in zip(rows, chosen, confidence, because, strict=True):
        scores = {label: float(p) for label, p in zip(labels, row, strict=True)}
        inside = decision.label_set(scores, name) if decision is not None else None
        predictions.append(Prediction((name,), float(sure), scores, why, inside))
    return predictions


def _several(row: NDArray[np.float64], labels: Sequence[str], threshold: float) -> Prediction:
    scores = {name: float(p) for name, p in zip(labels, row, strict=True)}
    confidence = float(np.maximum(row, 1.0 - row).min()) if len(row) else 0.0
    return Prediction(tuple(name for name, p in scores.items() if p >= threshold), confidence, scores)
