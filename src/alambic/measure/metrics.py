"""Scores of a classifier, each with its direction and a bootstrap interval; numpy only.

A score is computed from sums of per-row counts, so that one resample of the rows is one matrix product and a thousand
of them take a fraction of a second. `truths` and `predictions` are label indices [N], or, when a text may carry several
labels, indicators [N, L]. It measures nothing and reads no file: quality.py does, through a packed bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.errors import AlambicError, nearest
from alambic.kinds import writing

Array = NDArray[Any]
Floats = NDArray[np.float64]
_DRAWS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile bootstrap interval.

    Attributes:
        value: the point estimate on all rows.
        low: lower end at `level`.
        high: upper end at `level`.
        n: rows behind the figure.
        level: probability covered between `low` and `high`.
        low_90: lower end of the 90% interval, what "surely met" compares with a floor.
        high_90: upper end of the 90% interval, the same for a ceiling.
    """

    value: float
    low: float
    high: float
    n: int
    level: float
    low_90: float
    high_90: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields as plain numbers."""
        return asdict(self)

    @classmethod
    def of(cls, value: float, samples: Floats, *, n: int, level: float = 0.95) -> Interval:
        """Take the interval from bootstrap `samples` of the figure."""
        tail = 50.0 * (1.0 - level)
        low, high, low_90, high_90 = np.percentile(samples, [tail, 100.0 - tail, 5.0, 95.0])
        return cls(float(value), float(low), float(high), n, level, float(low_90), float(high_90))


@dataclass(frozen=True)
class Metric:
    """A named score.

    Attributes:
        name: the key in task files, measurements and reports.
        title: how a report writes it.
        higher_is_better: its direction.
        multi_label: whether it applies to indicators [N, L] (True), indices [N] (False) or both (None).
        rows: per-row counts [N, M] from truths and predictions as indicators [N, L].
        finish: scores [R] from sums of those counts [R, M] over `n` rows.
    """

    name: str
    title: str
    higher_is_better: bool
    multi_label: bool | None
    rows: Callable[[Array, Array], Floats]
    finish: Callable[[Floats, int], Floats]

    def __call__(self, truths: Array, predictions: Array) -> float:
        """Score all rows once."""
        hot = _indicators(truths, predictions)
        return float(self.finish(self.rows(*hot).sum(axis=0, keepdims=True), len(truths))[0])


@dataclass(frozen=True)
class Paired:
    """The difference of one metric between two sets of predictions of the same rows.

    Attributes:
        difference: first minus second, with its interval.
        p_value: two-sided bootstrap p-value of "no difference".
    """

    difference: Interval
    p_value: float

    @property
    def tied(self) -> bool:
        """Whether zero lies inside the interval."""
        return self.difference.low <= 0.0 <= self.difference.high


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one label, with its number of true rows and of predictions."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True)
class Confused:
    """Texts of label `truth` that were given the label `predicted`."""

    truth: str
    predicted: str
    count: int
    share: float


def _exact(truth: Array, prediction: Array) -> Floats:
    return np.asarray((truth == prediction).all(axis=1, keepdims=True), dtype=np.float64)


def _mean(sums: Floats, n: int) -> Floats:
    return sums[:, 0] / max(n, 1)


def _micro_counts(truth: Array, prediction: Array) -> Floats:
    both = (truth & prediction).sum(axis=1)
    return np.stack([both, truth.sum(axis=1), prediction.sum(axis=1)], axis=1).astype(np.float64)


def _class_counts(truth: Array, prediction: Array) -> Floats:
    return np.concatenate([truth & prediction, truth, prediction], axis=1).astype(np.float64)  # [N, 3L]


def _f1(both: Floats, true: Floats, predicted: Floats) -> Floats:
    total = true + predicted
    return np.divide(2.0 * both, total, out=np.zeros_like(both), where=total > 0)


def _micro(sums: Floats, n: int) -> Floats:
    return _f1(sums[:, 0], sums[:, 1], sums[:, 2])


def _macro(sums: Floats, n: int) -> Floats:
    both, true, predicted = np.split(sums, 3, axis=1)
    # A label neither true nor predicted in these rows has no F1: leaving it out is what scikit-learn does.
    present = ((true + predicted) > 0).sum(axis=1)
    return np.asarray(_f1(both, true, predicted).sum(axis=1) / np.maximum(present, 1), dtype=np.float64)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", True, False, _exact, _mean),
        Metric("macro_f1", "macro F1", True, None, _class_counts, _macro),
        Metric("micro_f1", "micro F1", True, None, _micro_counts, _micro),
        Metric("subset_accuracy", "exact-set accuracy", True, True, _exact, _mean),
    )
}


def metric(name: str) -> Metric:
    """Return the metric called `name`.

    Raises:
        AlambicError: there is none; the nearest name is given.
    """
    if name not in METRICS:
        raise AlambicError(f"unknown metric {name!r}", hint=nearest(name, METRICS))
    return METRICS[name]


def accuracy(truths: Array, predictions: Array) -> float:
    """Share of rows given their label."""
    return METRICS["accuracy"](truths, predictions)


def macro_f1(truths: Array, predictions: Array) -> float:
    """Mean F1 of the labels that are true or predicted somewhere."""
    return METRICS["macro_f1"](truths, predictions)


def micro_f1(truths: Array, predictions: Array) -> float:
    """F1 of all decisions pooled."""
    return METRICS["micro_f1"](truths, predictions)


def subset_accuracy(truths: Array, predictions: Array) -> float:
    """Share of rows whose set of labels is exactly right."""
    return METRICS["subset_accuracy"](truths, predictions)


def indicators(targets: Sequence[Sequence[int]], n_labels: int) -> NDArray[np.bool_]:
    """Turn lists of label indices into indicators [N, L]."""
    hot = np.zeros((len(targets), n_labels), dtype=np.bool_)
    for row, target in enumerate(targets):
        hot[row, list(target)] = True
    return hot


def per_class_f1(truths: Array, predictions: Array, labels: Sequence[str]) -> tuple[ClassScore, ...]:
    """Score every label, in label order; a label without a row scores 0 with support 0."""
    truth, prediction = _indicators(truths, predictions, len(labels))
    both, true, predicted = np.split(_class_counts(truth, prediction).sum(axis=0), 3)
    f1 = _f1(both, true, predicted)
    precision = np.divide(both, predicted, out=np.zeros_like(both), where=predicted > 0)
    recall = np.divide(both, true, out=np.zeros_like(both), where=true > 0)
    return tuple(
        ClassScore(label, float(precision[i]), float(recall[i]), float(f1[i]), int(true[i]), int(predicted[i]))
        for i, label in enumerate(labels)
    )


def confusion(truths: Array, predictions: Array, n_labels: int) -> NDArray[np.int64]:
    """Count rows by true label (lines) and predicted label (columns), for one label per row."""
    codes = np.asarray(truths, dtype=np.int64) * n_labels + np.asarray(predictions, dtype=np.int64)
    return np.bincount(codes, minlength=n_labels * n_labels).reshape(n_labels, n_labels).astype(np.int64)


def most_confused(counts: NDArray[np.int64], labels: Sequence[str], *, top: int = 10) -> tuple[Confused, ...]:
    """List the pairs of labels confused most often; `share` is of the rows of the true label."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:top]
    pairs = []
    for truth, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        count = int(wrong[truth, predicted])
        if count:
            pairs.append(Confused(labels[truth], labels[predicted], count, count / int(counts[truth].sum())))
    return tuple(pairs)


def bootstrap(
    name: str,
    truths: Array,
    predictions: Array,
    *,
    n: int = 1000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Score the rows with a percentile interval from `n` resamples of them.

    Raises:
        AlambicError: the metric is unknown, or there is no row.
    """
    rule = metric(name)
    _need_rows(len(truths))
    counts = rule.rows(*_indicators(truths, predictions))
    samples = np.concatenate([rule.finish(sums, len(truths)) for sums in _resampled(counts, n, rng)])
    return Interval.of(rule(truths, predictions), samples, n=len(truths), level=level)


def title_of(name: str) -> str:
    """Write the name of a metric of any kind for people."""
    return METRICS[name].title if name in METRICS else writing.TITLES.get(name, name)


def paired_bootstrap(
    name: str,
    truths: Array,
    first: Array,
    second: Array,
    *,
    n: int = 1000,
    rng: np.random.Generator,
) -> Paired:
    """Compare two sets of predictions of the same rows: `first` minus `second`, resampled together (95% interval).

    Raises:
        AlambicError: the metric is unknown, or there is no row.
    """
    rule = metric(name)
    _need_rows(len(truths))
    width = _width(truths, first, second)
    left = rule.rows(*_indicators(truths, first, width))
    right = rule.rows(*_indicators(truths, second, width))
    both, rows = np.concatenate([left, right], axis=1), len(truths)
    samples = np.concatenate(
        [
            rule.finish(sums[:, : left.shape[1]], rows) - rule.finish(sums[:, left.shape[1] :], rows)
            for sums in _resampled(both, n, rng)
        ]
    )
    difference = Interval.of(rule(truths, first) - rule(truths, second), samples, n=rows)
    tail = min(float((samples <= 0.0).mean()), float((samples >= 0.0).mean()))
    return Paired(difference, min(1.0, 2.0 * max(tail, 1.0 / n)))


def paired_rows(first: Array, second: Array, *, n: int = 1000, rng: np.random.Generator) -> Paired:
    """Compare two scores of the same rows [N], higher is better: mean of `first` minus mean of `second`, resampled.

    Raises:
        AlambicError: there is no row.
    """
    _need_rows(len(first))
    gain = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    samples = np.array([gain[rng.integers(len(gain), size=len(gain))].mean() for _ in range(n)])
    tail = min(float((samples <= 0.0).mean()), float((samples >= 0.0).mean()))
    return Paired(Interval.of(float(gain.mean()), samples, n=len(gain)), min(1.0, 2.0 * max(tail, 1.0 / n)))


def quantile_interval(
    values: Array, quantile: float, *, n: int = 1000, level: float = 0.95, rng: np.random.Generator
) -> Interval:
    """Return a quantile (0..1) of `values` with its percentile bootstrap interval.

    Raises:
        AlambicError: there is no value.
    """
    _need_rows(len(values))
    values = np.asarray(values, dtype=np.float64)
    step = max(1, _DRAWS_AT_ONCE // len(values))
    samples = [
        np.quantile(values[rng.integers(len(values), size=(min(step, n - start), len(values)))], quantile, axis=1)
        for start in range(0, n, step)
    ]
    return Interval.of(float(np.quantile(values, quantile)), np.concatenate(samples), n=len(values), level=level)


def mean_interval(values: Array, *, n: int = 1000, rng: np.random.Generator) -> Interval:
    """Return the mean of `values` with its 95% percentile bootstrap interval.

    Raises:
        AlambicError: there is no value.
    """
    _need_rows(len(values))
    values = np.asarray(values, dtype=np.float64)
    samples = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(n)])
    return Interval.of(float(values.mean()), samples, n=len(values))


def _need_rows(n: int) -> None:
    if n == 0:
        raise AlambicError("no row to score", hint="give a data set with at least one usable row")


def _width(*arrays: Array) -> int:
    return max(int(a.shape[1]) if a.ndim == 2 else int(a.max(initial=0)) + 1 for a in map(np.asarray, arrays))


def _indicators(truths: Array, predictions: Array, width: int | None = None) -> tuple[Array, Array]:
    truths, predictions = np.asarray(truths), np.asarray(predictions)
    assert truths.shape == predictions.shape, "truths and predictions describe the same rows"
    width = _width(truths, predictions) if width is None else width
    return _hot(truths, width), _hot(predictions, width)


def _hot(values: Array, width: int) -> NDArray[np.bool_]:
    if values.ndim == 2:
        return values.astype(np.bool_)
    hot = np.zeros((len(values), width), dtype=np.bool_)
    hot[np.arange(len(values)), values.astype(np.int64)] = True
    return hot


def _resampled(counts: Floats, n: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield sums [r, M] of `counts` over resampled rows, `n` in all, a bounded number at a time."""
    patterns, code = _distinct(counts)
    rows, kinds = len(counts), len(patterns)
    step = max(1, _DRAWS_AT_ONCE // rows)
    for start in range(0, n, step):
        r = min(step, n - start)
        drawn = code[rng.integers(rows, size=(r, rows))] + np.arange(r)[:, None] * kinds
        weights = np.bincount(drawn.reshape(-1), minlength=r * kinds).reshape(r, kinds)
        yield weights.astype(np.float64) @ patterns


def _distinct(counts: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return the distinct rows and each row's place among them: rows that count alike are drawn together."""
    # A random 64-bit key per column, summed with wrap-around: equal rows share a key, and numpy sorts one column
    # twenty times faster than whole rows. Two different rows collide with probability below 1e-7 at a million rows.
    keys = np.random.default_rng(0).integers(1, 2**63, size=counts.shape[1], dtype=np.uint64)
    _, first, code = np.unique(counts.astype(np.uint64) @ keys, return_index=True, return_inverse=True)
    return counts[first], code.reshape(-1).astype(np.int64)
