"""The kind `classify`: a text in, one label out (or several with `multi_label`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

METRICS = ("accuracy", "macro_f1")
MULTI_LABEL_METRICS = ("micro_f1", "macro_f1", "subset_accuracy")

# The honest ladder, cheapest first. Names of candidates; build.py knows how to make them.
DEFAULT_CANDIDATES = ("majority", "tfidf-svm", "knn", "logreg", "finetune", "finetune-int8")


@dataclass(frozen=True)
class Prediction:
    """The labels chosen for one input.

    Attributes:
        labels: one label, or zero or more in label order when the task is multi-label.
        confidence: probability of the chosen label; multi-label: probability of the least sure decision.
        scores: probability of every label, in label order.
    """

    labels: tuple[str, ...]
    confidence: float
    scores: dict[str, float]

    @property
    def label(self) -> str | None:
        """The only label, or the first of several; None when none was chosen."""
        return self.labels[0] if self.labels else None


def decide(
    probabilities: NDArray[np.float32], labels: Sequence[str], *, multi_label: bool, threshold: float = 0.5
) -> list[Prediction]:
    """Turn probabilities [N, L] into predictions (argmax, or every label over `threshold`)."""
    predictions = []
    for row in np.asarray(probabilities, dtype=np.float64):
        scores = {name: float(p) for name, p in zip(labels, row, strict=True)}
        if multi_label:
            chosen = tuple(name for name, p in scores.items() if p >= threshold)
            confidence = float(np.maximum(row, 1.0 - row).min()) if len(row) else 0.0
        else:
            best = int(row.argmax())
            chosen, confidence = (labels[best],), float(row[best])
        predictions.append(Prediction(chosen, confidence, scores))
    return predictions
