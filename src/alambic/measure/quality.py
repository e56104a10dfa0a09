"""How right a classifier is on labelled texts: scores with intervals, per-class F1, confusion, worst errors.

`measure_quality` asks an engine; `quality_of` scores predictions made elsewhere (the out-of-fold ones of a build).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alambic.data.dataset import Dataset
from alambic.kinds.classify import METRICS, MULTI_LABEL_METRICS, Prediction
from alambic.measure import metrics
from alambic.measure.metrics import ClassScore, Confused, Interval


class Predictor(Protocol):
    """Anything that predicts texts: an engine, or a stand-in of a test or a benchmark."""

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> list[Prediction]:
        """Return one prediction per text."""


@dataclass(frozen=True)
class Answers:
    """What was true and what was said, row by row: what a paired test needs.

    Attributes:
        truths: label indices [N], or indicators [N, L] of a multi-label task.
        predictions: the same shape.
    """

    truths: NDArray[Any]
    predictions: NDArray[Any]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each row is exactly right."""
        same = np.asarray(self.truths == self.predictions, dtype=np.bool_).reshape(len(self.truths), -1)
        return np.asarray(same.all(axis=1), dtype=np.bool_)

    def to_dict(self) -> dict[str, Any]:
        """Return both arrays as lists."""
        return {"truths": self.truths.tolist(), "predictions": self.predictions.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answers:
        """Read back `to_dict`."""
        return cls(np.array(data["truths"]), np.array(data["predictions"]))


@dataclass(frozen=True)
class Mistake:
    """A text given the wrong label(s) with this confidence."""

    text: str
    truth: tuple[str, ...]
    predicted: tuple[str, ...]
    confidence: float
    where: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Mistake:
        """Read back what `asdict` gave, also after a trip through JSON."""
        return cls(**{**data, "truth": tuple(data["truth"]), "predicted": tuple(data["predicted"])})


@dataclass(frozen=True)
class Quality:
    """Everything known of the quality of one classifier on one set of rows.

    Attributes:
        split: which rows these are: ``dev``, ``test``, or a file's name.
        n: number of rows.
        labels: label order of `confusion` and `per_class`.
        scores: interval of each metric of the task.
        per_class: one line per label.
        confusion: counts [L, L] by truth and prediction; None for a multi-label task.
        confused: the pairs of labels confused most often.
        mistakes: the most confident errors, most confident first.
        answers: row by row, for paired tests.
    """

    split: str
    n: int
    labels: tuple[str, ...]
    scores: dict[str, Interval]
    per_class: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    confused: tuple[Confused, ...]
    mistakes: tuple[Mistake, ...]
    answers: Answers

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Return the figures, ready for JSON; with `rows`, the mistakes' texts and the answers too."""
        figures = asdict(replace(self, answers=Answers(np.zeros(0), np.zeros(0))))
        del figures["answers"]
        if rows:
            return {**figures, "answers": self.answers.to_dict()}
        del figures["mistakes"]
        return figures

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Quality:
        """Read back `to_dict(rows=True)`, also after a trip through JSON."""
        counts = data["confusion"]
        return cls(
            split=data["split"],
            n=data["n"],
            labels=tuple(data["labels"]),
            scores={name: Interval(**score) for name, score in data["scores"].items()},
            per_class=tuple(ClassScore(**line) for line in data["per_class"]),
            confusion=None if counts is None else tuple(tuple(line) for line in counts),
            confused=tuple(Confused(**pair) for pair in data["confused"]),
            mistakes=tuple(Mistake.from_dict(mistake) for mistake in data["mistakes"]),
            answers=Answers.from_dict(data["answers"]),
        )


def measure_quality(engine: Predictor, dataset: Dataset, *, split: str = "test", seed: int = 0) -> Quality:
    """Predict every text of `dataset` through `engine` and score the answers.

    Raises:
        AlambicError: the data set has no row.
    """
    return quality_of(dataset, engine.predict(dataset.texts), split=split, seed=seed)


def quality_of(
    dataset: Dataset,
    predictions: Sequence[Prediction],
    *,
    split: str,
    seed: int = 0,
    worst: int = 50,
) -> Quality:
    """Score `predictions`, one per row of `dataset` and in its order.

    Raises:
        AlambicError: the data set has no row.
    """
    labels = _all_labels(dataset, predictions)
    answers = _answers(dataset, predictions, labels)
    names = MULTI_LABEL_METRICS if dataset.multi_label else METRICS
    scores = {
        name: metrics.bootstrap(name, answers.truths, answers.predictions, rng=np.random.default_rng(seed))
        for name in names
    }
    counts = None if dataset.multi_label else metrics.confusion(answers.truths, answers.predictions, len(labels))
    return Quality(
        split=split,
        n=len(dataset),
        labels=labels,
        scores=scores,
        per_class=metrics.per_class_f1(answers.truths, answers.predictions, labels),
        confusion=None if counts is None else tuple(tuple(map(int, line)) for line in counts),
        confused=() if counts is None else metrics.most_confused(counts, labels, top=20),
        mistakes=_mistakes(dataset, predictions, answers, worst),
        answers=answers,
    )


def _all_labels(dataset: Dataset, predictions: Sequence[Prediction]) -> tuple[str, ...]:
    # A bundle may know labels that this file does not hold: they come after the file's own, and count as errors.
    known = set(dataset.labels)
    extra = {label for prediction in predictions for label in prediction.labels} - known
    return (*dataset.labels, *sorted(extra))


def _answers(dataset: Dataset, predictions: Sequence[Prediction], labels: tuple[str, ...]) -> Answers:
    index = {label: i for i, label in enumerate(labels)}
    truths = dataset.targets()
    said = [[index[label] for label in prediction.labels] for prediction in predictions]
    assert len(truths) == len(said), "one prediction per row"
    if dataset.multi_label:
        return Answers(metrics.indicators(truths, len(labels)), metrics.indicators(said, len(labels)))
    return Answers(
        np.array([row[0] for row in truths], dtype=np.int64), np.array([row[0] for row in said], dtype=np.int64)
    )


def _mistakes(dataset: Dataset, predictions: Sequence[Prediction], answers: Answers, worst: int) -> tuple[Mistake, ...]:
    wrong = [int(i) for i in np.flatnonzero(~answers.correct)]
    wrong.sort(key=lambda i: (-predictions[i].confidence, i))
    return tuple(
        Mistake(
            text=dataset.examples[i].text,
            truth=dataset.examples[i].labels,
            predicted=predictions[i].labels,
            confidence=predictions[i].confidence,
            where=dataset.examples[i].where,
        )
        for i in wrong[:worst]
    )
