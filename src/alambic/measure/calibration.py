"""Whether a probability means what it says: expected calibration error, the reliability diagram, the temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.kinds.decision import FLOOR

Floats = NDArray[np.float64]
BINS = 15
_RANGE = (0.1, 4.0)  # factors looked at: where no row is wrong, the likeliest would be endless


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: rows of like confidence."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How confidence and accuracy agree on some rows.

    Attributes:
        ece: expected calibration error: mean over rows of the gap between confidence and accuracy of their bin.
        low: lower end of the 95% bootstrap interval of `ece`. Resampling adds noise, so it lies a little high.
        high: upper end.
        n: rows.
        bins: of equal mass, from the least confident.
    """

    ece: float
    low: float
    high: float
    n: int
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reliability:
        """Read back `to_dict`."""
        return cls(**{**data, "bins": tuple(Bin(**one) for one in data["bins"])})


def reliability(
    confidence: Floats, correct: NDArray[np.bool_], *, bins: int = BINS, rng: np.random.Generator, draws: int = 500
) -> Reliability:
    """Compare confidence and accuracy in bins of equal mass (Nixon and others 2019, arXiv:1904.01685).

    Args:
        confidence: probability of the chosen label [N], N at least 1.
        correct: whether it was right [N].
        bins: number of bins; fewer where there are fewer rows.
        rng: draws the bootstrap samples.
        draws: how many.
    """
    n = len(confidence)
    found = tuple(_bins(confidence, correct, bins))
    rows = (rng.integers(n, size=n) for _ in range(draws))
    samples = [_ece(_bins(confidence[at], correct[at], bins), n) for at in rows]
    low, high = np.percentile(samples, [2.5, 97.5])
    return Reliability(_ece(found, n), float(low), float(high), n, found)


def _bins(confidence: Floats, correct: NDArray[np.bool_], bins: int) -> list[Bin]:
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return [Bin(len(at), float(confidence[at].mean()), float(correct[at].mean())) for at in parts]


def _ece(bins: list[Bin] | tuple[Bin, ...], n: int) -> float:
    return sum(one.n * abs(one.confidence - one.accuracy) for one in bins) / n


def fit_temperature(probabilities: NDArray[Any], truths: NDArray[np.int64]) -> float:
    """Return the factor on the logits that makes the truths likeliest (Guo and others 2017, arXiv:1706.04599).

    It is the inverse of the paper's temperature, and never changes which label wins.

    Args:
        probabilities: [N, L] of rows that the model was not fitted on.
        truths: label indices [N].
    """
    logs = np.log(np.clip(np.asarray(probabilities, dtype=np.float64), FLOOR, 1.0))
    # The loss is convex in the factor, so it has one lowest point in its logarithm too.
    best = _lowest(lambda t: _loss(logs * math.exp(t), truths), math.log(_RANGE[0]), math.log(_RANGE[1]))
    return round(math.exp(best), 4)


def _loss(logits: Floats, truths: NDArray[np.int64]) -> float:
    top = logits.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((normaliser - logits[np.arange(len(truths)), truths]).mean())


def _lowest(loss: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-4:
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return (low + high) / 2
