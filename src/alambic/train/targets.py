"""What the linear candidates share: targets as a matrix, out-of-fold splits, and the scale that calibrates logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.data.dataset import Dataset
from alambic.errors import TrainError

# Finite, so that no softmax or average ever meets inf - inf, and lower than any logit of a label that was seen.
ABSENT_LOGIT = -1e4
_UNBALANCED = 3.0  # most frequent label over rarest, from which balanced weights are worth a try

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Targets:
    """The labels of N examples.

    Attributes:
        matrix: [N, L], True where the example has the label.
        groups: [N], equal numbers for examples that must stay on the same side of a split.
        multi_label: whether an example has zero or more labels rather than one.
    """

    matrix: NDArray[np.bool_]
    groups: Indices
    multi_label: bool

    @property
    def first(self) -> Indices:
        """Index of the (first) label of each example [N]; L when it has none."""
        found: Indices = np.argmax(self.matrix, axis=1)
        found[~self.matrix.any(axis=1)] = self.matrix.shape[1]
        return found

    @property
    def unbalanced(self) -> bool:
        """Whether the most frequent label is over three times the rarest."""
        counts = self.matrix.sum(axis=0)
        seen = counts[counts > 0]
        return bool(len(seen) and seen.max() > _UNBALANCED * seen.min())

    def take(self, rows: Indices) -> Targets:
        """Return the targets of `rows`."""
        return Targets(self.matrix[rows], self.groups[rows], self.multi_label)


def targets_of(train: Dataset) -> Targets:
    """Return the targets of `train`.

    Raises:
        TrainError: it is empty, or has fewer than two different answers to learn.
    """
    if not len(train):
        raise TrainError(
            "there is nothing to train on: 0 examples", hint="alambic check TASK shows how the data was read"
        )
    matrix = np.zeros((len(train), len(train.labels)), dtype=bool)
    for row, labels in enumerate(train.targets()):
        matrix[row, labels] = True
    answers = [label for label, n in train.counts.items() if n]
    constant = bool((matrix == matrix[0]).all()) if train.multi_label else len(answers) < 2
    if constant:
        names = ", ".join(repr(label) for label in sorted(answers)) or "no label at all"
        raise TrainError(
            f"all {len(train)} training examples have the same answer ({names}); a classifier needs two or more",
            hint="add examples of the other labels, or name the right label column in [data]",
        )
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(f"g{e.group}" if e.group is not None else f"r{i}", i) for i, e in enumerate(train)]
    return Targets(matrix, np.array(groups, dtype=np.intp), train.multi_label)


def folds(targets: Targets, n_folds: int, rng: np.random.Generator) -> Iterator[tuple[Indices, Indices]]:
    """Yield (fit, held-out) rows of `n_folds` stratified folds; a group stays whole, any label count is accepted."""
    _, leaders = np.unique(targets.groups, return_index=True)
    shuffled = rng.permutation(leaders)
    # Dealing groups round-robin in label order spreads each label over the folds, however rare.
    dealt = shuffled[np.argsort(targets.first[shuffled], kind="stable")]
    fold_of_group = np.zeros(int(targets.groups.max()) + 1, dtype=np.intp)
    fold_of_group[targets.groups[dealt]] = np.arange(len(dealt)) % n_folds
    fold = fold_of_group[targets.groups]
    for k in range(n_folds):
        fit, held = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if len(fit) and len(held):
            yield fit, held


def score(logits: Floats, targets: Targets) -> float:
    """Return the figure that hyper-parameters are chosen by: the mean of accuracy (subset accuracy) and macro F1."""
    truth = targets.matrix
    if targets.multi_label:
        guess = logits > 0
        accuracy = float((guess == truth).all(axis=1).mean())
    else:
        guess = np.zeros_like(truth)
        guess[np.arange(len(truth)), logits.argmax(axis=1)] = True
        accuracy = float((guess & truth).any(axis=1).mean())
    hits = (guess & truth).sum(axis=0)
    counted = truth.sum(axis=0) + guess.sum(axis=0)
    used = counted > 0
    macro = float((2.0 * hits[used] / counted[used]).mean()) if used.any() else 0.0
    return (accuracy + macro) / 2


def loss(logits: Floats, targets: Targets) -> float:
    """Return the mean log loss of `logits`; answers that the fold could not know are left out."""
    truth = targets.matrix
    known = logits > ABSENT_LOGIT / 2
    if targets.multi_label:
        signed = np.where(truth, logits, -logits)
        return float(np.logaddexp(0.0, -signed)[known].mean())
    rows = (truth & known).any(axis=1)
    if not rows.any():
        return 0.0
    total = np.logaddexp.reduce(logits[rows], axis=1)
    return float((total - logits[rows, targets.first[rows]]).mean())


def calibrate(logits: Floats, targets: Targets) -> float:
    """Return the factor, between 1/50 and 50, by which out-of-fold `logits` give the least log loss."""
    optimize = _extras.load("scipy.optimize")
    known = logits > ABSENT_LOGIT / 2

    def cost(log_factor: float) -> float:
        return loss(np.where(known, logits * np.exp(log_factor), ABSENT_LOGIT), targets)

    found = optimize.minimize_scalar(cost, bounds=(-np.log(50), np.log(50)), method="bounded")
    return float(np.exp(found.x))
