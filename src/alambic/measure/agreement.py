"""How well annotators agree beyond chance: Krippendorff's alpha, and Cohen's kappa of two of them.

Values are nominal: two answers are the same or not (of texts with several labels, the whole set). An annotator need not
have answered every text. Both are 1 for perfect agreement, 0 for what chance gives, negative below that. Intervals
resample texts (percentile bootstrap).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_LEAST_FOR_INTERVAL = 5  # texts; the resamples of fewer say nothing


@dataclass(frozen=True)
class Agreement:
    """A coefficient over `n` texts that two or more annotated; the 95% interval is None under 5 texts.

    `value` is None where it is not defined: fewer than two answers to compare, or one answer for everything.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None


def krippendorff_alpha(units: Sequence[Sequence[Hashable]], *, seed: int = 0) -> Agreement:
    """Return alpha for nominal data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections C, D).

    alpha = 1 - D_o / D_e, with D_o the disagreement within texts and D_e that of all answers shuffled.

    Args:
        units: the answers to each text, one for each annotator who gave one; texts with one answer do not count.
        seed: of the resamples of the interval.
    """
    paired = [unit for unit in units if len(unit) > 1]
    counts = _counts(paired)  # [texts, values]
    return _with_interval(len(paired), lambda rows: _alpha(counts[rows]), seed)


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]], *, seed: int = 0) -> Agreement:
    """Return kappa of two annotators (Cohen 1960, "A coefficient of agreement for nominal scales").

    kappa = (p_o - p_e) / (1 - p_e), with p_o the share of equal answers and p_e what their own frequencies would give.
    """
    index: dict[Hashable, int] = {}
    codes = np.array([[index.setdefault(v, len(index)) for v in pair] for pair in pairs], dtype=np.intp).reshape(-1, 2)
    return _with_interval(len(pairs), lambda rows: _kappa(codes[rows], len(index)), seed)


def pairwise_kappa(answers: Mapping[str, Mapping[str, Hashable]]) -> dict[tuple[str, str], Agreement]:
    """Return kappa of every two annotators with a text in common; `answers` is annotator -> text -> answer."""
    found = {}
    for one, other in combinations(sorted(answers), 2):
        shared = sorted(answers[one].keys() & answers[other].keys())
        if shared:
            found[one, other] = cohen_kappa([(answers[one][text], answers[other][text]) for text in shared])
    return found


def _counts(units: Sequence[Sequence[Hashable]]) -> NDArray[np.float64]:
    index: dict[Hashable, int] = {}
    coded = [[index.setdefault(value, len(index)) for value in unit] for unit in units]
    counts = np.zeros((len(units), len(index)))
    for row, codes in enumerate(coded):
        np.add.at(counts[row], codes, 1.0)
    return counts


def _alpha(counts: NDArray[np.float64]) -> float | None:
    answers = counts.sum(axis=1)  # of each text
    total = answers.sum()
    values = counts.sum(axis=0)  # of each value
    by_chance = (total**2 - (values**2).sum()) / (total - 1.0) if total > 1 else 0.0
    if by_chance <= 0:
        return None
    seen = ((answers**2 - (counts**2).sum(axis=1)) / (answers - 1.0)).sum()
    return float(1.0 - seen / by_chance)


def _kappa(codes: NDArray[np.intp], n_values: int) -> float | None:
    if not len(codes):
        return None
    equal = float((codes[:, 0] == codes[:, 1]).mean())
    shares = [np.bincount(codes[:, side], minlength=n_values) / len(codes) for side in (0, 1)]
    by_chance = float(shares[0] @ shares[1])
    return None if by_chance >= 1.0 else (equal - by_chance) / (1.0 - by_chance)


def _with_interval(n: int, coefficient: object, seed: int) -> Agreement:
    assert callable(coefficient)
    value = coefficient(np.arange(n))
    if value is None or n < _LEAST_FOR_INTERVAL:
        return Agreement(value, n)
    rng = np.random.default_rng(seed)
    drawn = [coefficient(rng.integers(0, n, n)) for _ in range(_RESAMPLES)]
    low, high = np.percentile([one for one in drawn if one is not None], (2.5, 97.5))
    return Agreement(value, n, float(low), float(high))
