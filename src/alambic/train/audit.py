"""Out-of-fold probabilities of cheap strong candidates: what the label audit and the learning curve stand on.

Each row is answered by a model that saw neither it nor its near-duplicates. The parts are those of the ladder, run by
the engines that would ship them; the encoder is frozen, so its vectors are computed once by the caller.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alambic.data.dataset import Dataset
from alambic.engines import load_part
from alambic.engines.classify import activate
from alambic.events import Progress, Work
from alambic.train import heads, linear

Probabilities = NDArray[np.float32]

ON_FROZEN = ("logreg",)
ON_TEXTS = ("tfidf-svm",)


@dataclass(frozen=True)
class Material:
    """Rows with what the frozen encoder gave for them, [N, H]; None when there is no base."""

    rows: Dataset
    vectors: NDArray[np.float32] | None = None

    def take(self, indices: Sequence[int]) -> Material:
        """Return some of the rows."""
        kept = None if self.vectors is None else self.vectors[np.asarray(indices, dtype=np.intp)]
        return Material(self.rows.take(indices), kept)


def auditors(material: Material) -> tuple[str, ...]:
    """Return the candidates that can answer for these rows."""
    return ON_TEXTS if material.vectors is None else (*ON_FROZEN, *ON_TEXTS)


def answer(name: str, train: Material, asked: Material, *, scratch: Path, seed: int = 0) -> Probabilities:
    """Fit candidate `name` on `train` and return its probabilities [N, L] for `asked`.

    Args:
        name: one of `auditors(train)`.
        train: rows to fit on.
        asked: rows to answer.
        scratch: a folder to write the part into; removed afterwards.
        seed: of the fit.

    Raises:
        TrainError: the rows of `train` all have one answer.
    """
    frozen = name in ON_FROZEN
    try:
        if frozen:
            assert train.vectors is not None
            part = heads.fit_logreg_head(train.vectors, train.rows, scratch, seed=seed)
        else:
            part = linear.fit_tfidf_svm(train.rows, scratch, seed=seed)
        runner = load_part(part, scratch)
        values = runner.run(asked.vectors if frozen else asked.rows.texts)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return activate(values, multi_label=train.rows.multi_label, temperature=1.0)


def out_of_fold(
    name: str, material: Material, folds: Sequence[Sequence[int]], *, scratch: Path, seed: int = 0
) -> Work[Probabilities]:
    """Return the probabilities [N, L] of each row by candidate `name` fitted on the other folds.

    Args:
        name: one of `auditors(material)`.
        material: the rows.
        folds: the rows held out together; each row is in one of them.
        scratch: a folder to write to; removed afterwards.
        seed: of the fits.

    Raises:
        TrainError: the rows all have one answer.
    """
    n = len(material.rows)
    found = np.zeros((n, len(material.rows.labels)), dtype=np.float32)
    for i, held in enumerate(folds):
        out = set(held)
        rest = [row for row in range(n) if row not in out]
        found[list(held)] = answer(name, material.take(rest), material.take(held), scratch=scratch, seed=seed)
        yield Progress(f"audit.{name}", done=i + 1, total=len(folds))
    return found


def by_size(
    name: str,
    material: Material,
    folds: Sequence[Sequence[int]],
    shares: Sequence[float],
    *,
    scratch: Path,
    seed: int = 0,
) -> Work[tuple[NDArray[np.intp], NDArray[np.bool_], NDArray[np.float64], NDArray[np.intp]]]:
    """Answer each fold by candidate `name` fitted on growing shares of the other rows.

    Args:
        name: one of `auditors(material)`.
        material: rows with one label each.
        folds: the rows held out together.
        shares: of the rows to fit on, ascending.
        scratch: a folder to write to; removed afterwards.
        seed: draws the rows, a smaller share being part of a larger one.

    Returns:
        rows fitted on [S] (mean over folds), right answers [S, N], rows of each label fitted on [S, L], rows asked [N].
    """
    n, n_labels = len(material.rows), len(material.rows.labels)
    truths = np.array([target[0] for target in material.rows.targets()], dtype=np.intp)
    blocks, counts = [], np.zeros((len(shares), n_labels))
    for k, held in enumerate(folds):
        out = set(held)
        rest = _spread(truths, [row for row in range(n) if row not in out], np.random.default_rng((seed, k)))
        right = []
        for i, share in enumerate(shares):
            chosen = rest[: round(share * len(rest))]
            counts[i] += np.bincount(truths[chosen], minlength=n_labels) / len(folds)
            p = answer(name, material.take(chosen.tolist()), material.take(held), scratch=scratch, seed=seed)
            right.append(p.argmax(axis=1) == truths[list(held)])
            yield Progress("audit.curve", done=k * len(shares) + i + 1, total=len(folds) * len(shares))
        blocks.append(np.stack(right))
    asked = np.concatenate([np.asarray(held, dtype=np.intp) for held in folds])
    return np.rint(counts.sum(axis=1)).astype(np.intp), np.concatenate(blocks, axis=1), counts, asked


def _spread(truths: NDArray[np.intp], rows: Sequence[int], rng: np.random.Generator) -> NDArray[np.intp]:
    """Order rows at random so that every beginning has nearly the shares of labels of the whole, each label early."""
    shuffled = rng.permutation(np.asarray(rows, dtype=np.intp))
    ranks = np.zeros(len(shuffled))
    for label in np.unique(truths[shuffled]):
        mine = np.flatnonzero(truths[shuffled] == label)
        ranks[mine] = (np.arange(len(mine)) + rng.random()) / len(mine)
        ranks[mine[0]] = -1.0  # a label must be seen once to be answered at all
    ordered: NDArray[np.intp] = shuffled[np.argsort(ranks, kind="stable")]
    return ordered
