"""What more labelled rows would bring: a power law through scores at several sizes, with a bootstrap interval.

The error falls as ``a + b * n ** -c`` (Hestness et al. 2017, https://arxiv.org/abs/1712.00409; Viering and Loog 2021,
https://arxiv.org/abs/2103.10948 on when it does not). The interval comes from drawing the answered rows again; it says
nothing of rows of another kind than those seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MORE = 100
_SLOPES = np.linspace(0.1, 1.5, 29)  # values of c tried
_DRAWS = 400
_LEAST_LABEL_ROWS = 10


@dataclass(frozen=True)
class Gain:
    """A gain in points of accuracy (of recall, for one label) with its 95% interval.

    Attributes:
        label: whose rows are added; None: rows as they come.
        rows: labelled rows there are now (of the label).
        now: accuracy (recall of the label) that the curve gives for them.
        points: percentage points that `MORE` rows more bring.
        low: lower bound.
        high: upper bound.
        overall: of the label, points of accuracy over all rows; equal to `points` when `label` is None.
    """

    label: str | None
    rows: int
    now: float
    points: float
    low: float
    high: float
    overall: float


@dataclass(frozen=True)
class Curve:
    """The sizes measured, and what more rows would bring.

    Attributes:
        sizes: rows fitted on.
        accuracy: at each size.
        answers: rows answered at each size.
        overall: of rows as they come.
        labels: of each label with ten rows or more, the greatest gain over all rows first.
    """

    sizes: tuple[int, ...]
    accuracy: tuple[float, ...]
    answers: int
    overall: Gain
    labels: tuple[Gain, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        plain = asdict(self)
        return {**plain, "sizes": list(self.sizes), "accuracy": list(self.accuracy), "labels": list(plain["labels"])}


def fit_curve(
    sizes: Sequence[int],
    correct: NDArray[np.bool_],
    truths: NDArray[np.intp],
    shares: NDArray[np.floating],
    labels: Sequence[str],
    *,
    rows: int,
    counts: Sequence[int],
    seed: int = 0,
) -> Curve:
    """Fit the curve of all rows and of each label.

    Args:
        sizes: S numbers of rows fitted on, ascending, three or more.
        correct: [S, N] whether each of the same N rows was answered rightly at each size.
        truths: label of each of them [N].
        shares: [S, L] rows of each label that were fitted on, mean over the fits.
        labels: names.
        rows: rows that there are now.
        counts: rows of each label that there are now.
        seed: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    n = correct.shape[1]
    draws = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS)])  # first: as seen
    overall = _gain(np.asarray(sizes, dtype=np.float64), correct, draws, rows)
    gains = []
    for label, name in enumerate(labels):
        mine = truths == label
        if counts[label] < _LEAST_LABEL_ROWS or mine.sum() < _LEAST_LABEL_ROWS or shares[0, label] <= 0:
            continue
        now, points, low, high = _gain(
            shares[:, label].astype(np.float64), correct[:, mine], draws[:, mine], counts[label]
        )
        over_all = points * float(mine.mean())
        gains.append(Gain(name, int(counts[label]), now, points, low, high, round(over_all, 3)))
    gains.sort(key=lambda gain: -gain.overall)
    total = Gain(None, rows, *overall, overall=overall[1])
    accuracy = tuple(round(float(a), 4) for a in correct.mean(axis=1))
    return Curve(tuple(int(s) for s in sizes), accuracy, n, total, tuple(gains))


def _gain(sizes: Floats, correct: NDArray[np.bool_], draws: Floats, rows: int) -> tuple[float, float, float, float]:
    """Return accuracy now, and the points that `MORE` rows bring with their interval."""
    weights = np.maximum(draws.sum(axis=1), 1e-9)
    errors = 1.0 - (draws @ correct.T) / weights[:, None]  # D, S
    law = fit_power_law(sizes, errors)
    now, then = law_at(law, rows), law_at(law, rows + MORE)
    points = 100.0 * (now - then)
    low, high = np.percentile(points[1:], [2.5, 97.5])
    # The bootstrap may leave out the very value that was seen; an interval must hold it.
    low, high = min(low, points[0]), max(high, points[0])
    return round(1.0 - float(now[0]), 4), round(float(points[0]), 3), round(float(low), 3), round(float(high), 3)


Law = tuple[Floats, Floats, Floats]


def fit_power_law(sizes: Floats, errors: Floats) -> Law:
    """Fit ``a + b * n ** -c`` with a, b >= 0 to each line of `errors` [D, S] by least squares; return a, b, c [D].

    c is tried from 0.1 to 1.5; for each, a and b have a closed form.
    """
    best = np.full(len(errors), np.inf)
    law = (np.zeros(len(errors)), np.zeros(len(errors)), np.ones(len(errors)))
    mean = errors.mean(axis=1)
    for c in _SLOPES:
        x = sizes ** -float(c)
        spread = x - x.mean()
        b = np.maximum((errors @ spread) / max(float(spread @ spread), 1e-18), 0.0)
        a = mean - b * x.mean()
        under = a < 0
        b = np.where(under, (errors @ x) / float(x @ x), b)
        a = np.where(under, 0.0, a)
        cost = np.square(errors - a[:, None] - b[:, None] * x).sum(axis=1)
        better = cost < best - 1e-15
        best = np.where(better, cost, best)
        law = tuple(np.where(better, new, old) for new, old in zip((a, b, np.full_like(a, c)), law, strict=True))  # type: ignore[assignment]
    return law


def law_at(law: Law, rows: float) -> Floats:
    """Return the error of each law at so many rows."""
    a, b, c = law
    return np.asarray(a + b * float(rows) ** -c)
