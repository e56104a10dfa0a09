"""Which labels look wrong, how sure that is, and what each row read is expected to bring.

Confident learning (Northcutt, Jiang and Chuang 2021, https://arxiv.org/abs/1911.00068) counts the wrong labels from
out-of-fold probabilities. How likely one label is wrong is then read from a mixture: the scores seen are those of right
labels and of wrong ones, and what wrong ones look like is known, since a row's own label played no part in its
out-of-fold probabilities: give it another, and look. Nothing here trains or writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alambic import _extras

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_FLOOR = 1e-4  # no probability is taken for less: a pool must not be decided by one candidate's certainty
_DRAWS = 20  # imagined wrong labels for each row
_LEAST_ABOVE = 5.0  # rows that must be expected above a score before it says anything of the share
_HALF = 0.5  # share of them drawn among all labels alike; the others follow what the model confuses


@dataclass(frozen=True)
class Doubt:
    """What the probabilities say of the labels given to N rows.

    Attributes:
        wrong: probability that the given label is wrong [N].
        suggested: the likeliest other label [N].
        score: how little the given label is believed [N]: log-odds of all others against it.
        share: of all labels, how many are wrong: confident learning's count, no more than the scores allow.
        counted: confident learning's count alone, which a weak model makes too high.
    """

    wrong: Floats
    suggested: Indices
    score: Floats
    share: float
    counted: float


def pooled(answers: Sequence[NDArray[np.floating]], *, multi_label: bool = False) -> Floats:
    """Return the logarithmic opinion pool of several candidates' probabilities [N, L].

    What one of them is wrongly sure of, the others doubt. With `multi_label` each label stands for itself.
    """
    yes = np.mean([_log(a) for a in answers], axis=0)
    if multi_label:
        no = np.mean([_log(1.0 - a) for a in answers], axis=0)
        return np.asarray(1.0 / (1.0 + np.exp(no - yes)))
    p = np.exp(yes)
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def _log(p: NDArray[np.floating]) -> Floats:
    logs: Floats = np.log(np.clip(np.asarray(p, dtype=np.float64), _FLOOR, 1.0))
    return logs


def confident_joint(probabilities: Floats, given: Indices) -> Floats:
    """Count rows by given label and confidently predicted one [L, L], scaled to the number of rows of each label.

    A row counts where its probability of a label reaches the mean one of the rows that have it (Northcutt et al. 2021,
    equation 1); of several such labels, the likeliest. A label that no row has gets a line of zeros.
    """
    n, n_labels = probabilities.shape
    counts = np.bincount(given, minlength=n_labels)
    sums = np.bincount(given, weights=probabilities[np.arange(n), given], minlength=n_labels)
    # The mean of a few floats may exceed each of them by rounding: cleanlab leaves the same room.
    least = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf) - 1e-6
    confident = probabilities >= least
    told = confident.any(axis=1)
    best = np.where(confident, probabilities, -1.0).argmax(axis=1)
    joint = np.zeros((n_labels, n_labels))
    np.add.at(joint, (given[told], best[told]), 1.0)
    bare = joint.sum(axis=1) == 0
    joint[bare, bare] = 1.0  # nothing is told of these labels: they are taken as right
    scaled: Floats = joint / joint.sum(axis=1, keepdims=True) * counts[:, None]
    return scaled


def doubt(probabilities: Floats, given: Indices, *, rng: np.random.Generator) -> Doubt:
    """Return how doubtful the label of each row is.

    Args:
        probabilities: of each label [N, L], out of fold.
        given: the label that each row has [N].
        rng: draws the imagined wrong labels.
    """
    n = len(probabilities)
    others = probabilities.copy()
    others[np.arange(n), given] = -1.0
    score = _score(probabilities, given)
    joint = confident_joint(probabilities, given)
    imagined = _imagine(joint, given, rng)  # D, N
    wrong_scores = np.stack([_score(probabilities, labels) for labels in imagined])
    counted = 1.0 - float(np.trace(joint)) / n
    share = min(counted, _most(score, wrong_scores.ravel(), counted))
    return Doubt(_mixture(score, wrong_scores, share), others.argmax(axis=1), score, share, counted)


def doubt_each(probabilities: Floats, given: NDArray[np.bool_], *, rng: np.random.Generator) -> tuple[Doubt, ...]:
    """Return the doubts of each label by itself, for rows that may have several; `given` is [N, L]."""
    return tuple(
        doubt(np.stack([1.0 - p, p], axis=1), held.astype(np.intp), rng=rng)
        for p, held in zip(probabilities.T, given.T, strict=True)
    )


def _score(probabilities: Floats, labels: Indices) -> Floats:
    p = np.clip(probabilities[np.arange(len(probabilities)), labels], 1e-9, 1.0 - 1e-9)
    score: Floats = np.log1p(-p) - np.log(p)
    return score


def _imagine(joint: Floats, given: Indices, rng: np.random.Generator) -> Indices:
    """Draw wrong labels [D, N]: half at random, half as often as the model takes the given label for them."""
    n_labels = len(joint)
    confused = joint.T * (1.0 - np.eye(n_labels))  # a true label (line) is taken down as another (column)
    alike = (1.0 - np.eye(n_labels)) / max(1, n_labels - 1)
    total = confused.sum(axis=1, keepdims=True)
    chances = np.where(total > 0, _HALF * alike + (1 - _HALF) * confused / np.maximum(total, 1e-12), alike)
    steps = np.cumsum(chances, axis=1)[given]  # N, L
    drawn = [(rng.random(len(given))[:, None] > steps).sum(axis=1) for _ in range(_DRAWS)]
    found: Indices = np.minimum(np.stack(drawn), n_labels - 1)
    return found


def _most(scores: Floats, wrong: Floats, counted: float) -> float:
    """Return the greatest share of wrong labels that the scores allow, given the share counted.

    However right labels score, about as many rows lie above a score as wrong ones do, or more. Levels that too few
    wrong labels would reach are passed over, and one row more is allowed for.
    """
    levels = np.quantile(wrong, np.linspace(0.05, 0.75, 29))
    above = np.array([(scores >= level).sum() for level in levels])
    expected = np.array([(wrong >= level).mean() for level in levels])
    told = len(scores) * counted * expected >= _LEAST_ABOVE
    if not told.any():
        return counted
    return float(min(1.0, ((above + 1.0) / (len(scores) * expected))[told].min()))


def _mixture(scores: Floats, wrong: Floats, share: float) -> Floats:
    """Return the probability that each label is wrong: the density of wrong scores, times their share, over all.

    The ratio is fitted as one that never falls as the score rises (isotonic regression of imagined against seen rows).
    """
    if share <= 0:
        return np.zeros(len(scores))
    draws, n = wrong.shape
    values = np.concatenate([scores, wrong.ravel()])
    imagined = np.concatenate([np.zeros(n), np.ones(draws * n)])
    weights = np.concatenate([np.ones(n), np.full(draws * n, share / draws)])
    order = np.argsort(values, kind="stable")
    fitted = _extras.load("scipy.optimize").isotonic_regression(imagined[order], weights=weights[order]).x
    odds = np.empty(len(values))
    odds[order] = fitted / np.maximum(1.0 - fitted, 1e-9)
    return np.clip(odds[:n], 0.0, 1.0)
