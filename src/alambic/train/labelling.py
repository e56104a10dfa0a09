"""Guess labels from few answers, and choose which texts to ask about next, on vectors of a frozen encoder.

    learner = Learner(vectors, descriptions, multi_label=False)
    guesses = learner.fit(rows, matrix)              # probabilities of every label for every text
    order = next_texts(guesses, learner, rows, candidates, counts, n=20)

**Guesses.** A multinomial logistic regression on vectors of length 1. The vector of each label's own name or
description is one more example of it, so that there is a guess before the first answer (as in zero-shot classification
by label embeddings, Yin et al. 2019, https://arxiv.org/abs/1909.00161), and its weight fades as answers come.
Probabilities are scaled by one factor found on held-out answers, from 20 answers on.

**Order.** Texts are taken one by one by the product of: margin uncertainty, 1 - (p1 - p2) (Scheffer et al. 2001);
density, the mean likeness to the nearest texts, so that oddities come late (information density, Settles and Craven
2008, https://aclanthology.org/D08-1112); novelty, the distance to what is chosen already in the same round (the role of
diversity in BADGE, Ash et al. 2020, https://arxiv.org/abs/1906.03671); and rarity, more for texts that may belong to a
label with few answers. The last three fade as answers come: with few, typical texts teach most, with many, doubtful
ones (Hacohen et al. 2022, https://arxiv.org/abs/2202.02794). The figures were set on held-out rows of
BANKING77's train part (docs/lab-notes.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.heads import normalised
from alambic.train.targets import Floats, Indices, Targets, calibrate, folds

Vectors = NDArray[np.float32]

LEAST_TO_CALIBRATE = 20
_C = 30.0
_TEMPERATURE = 0.05  # of likeness to a label's description, before there is any answer
_FOLDS = 3
_STEPS = 60
_NEIGHBOURS = 10
_MOST_NEIGHBOURS_OF = 5_000  # texts against which density is taken; more would not change the order
_SHORTLIST = 8  # texts looked at for each one taken


@dataclass(frozen=True)
class Weights:
    """Exponents of what makes a text useful; 0 leaves a part out.

    Attributes:
        density: of the likeness to other texts.
        novelty: of the distance to texts just chosen.
        rarity: of how much its likely labels are wanted.
        answers_a_label: mean number of answers a label from which the exponents shrink, as one over that number.
    """

    density: float = 1.0
    novelty: float = 1.0
    rarity: float = 0.5
    answers_a_label: float = 4.0

    def faded(self, counts: Sequence[int]) -> Weights:
        """Return the weights after as many answers of each label."""
        mean = sum(counts) / max(len(counts), 1)
        part = min(1.0, self.answers_a_label / mean) if mean > 0 else 1.0
        return replace(self, density=self.density * part, novelty=self.novelty * part, rarity=self.rarity * part)


@dataclass(frozen=True)
class Guesses:
    """What every label's probability is for every text.

    Attributes:
        probabilities: [N, L], to be shown.
        calibrated: whether held-out answers have scaled them.
        raw: [N, L] before that, which the order goes by: the factor moves from one fit to the next.
    """

    probabilities: NDArray[np.float32]
    calibrated: bool
    raw: NDArray[np.float32]


class Learner:
    """The vectors of N texts and L labels, and a classifier that is fitted again and again."""

    def __init__(
        self, vectors: Vectors, descriptions: Vectors | None, *, n_labels: int, multi_label: bool, c: float = _C
    ) -> None:
        """Take vectors [N, H] of texts and [L, H] of label descriptions (None: no guess before the first answers).

        `c` is the inverse strength of the regularisation.
        """
        self.vectors = normalised(vectors)
        self.descriptions = None if descriptions is None else normalised(descriptions)
        self.n_labels = n_labels
        self.multi_label = multi_label
        self._density: NDArray[np.float32] | None = None
        self._c = c
        self._models: dict[str, Any] = {}

    @property
    def density(self) -> NDArray[np.float32]:
        """Mean likeness of each text to its nearest texts [N], 0 to 1."""
        if self._density is None:
            self._density = _density(self.vectors)
        return self._density

    def fit(
        self,
        rows: Indices,
        matrix: NDArray[np.bool_],
        *,
        seed: int = 0,
        calibrated: bool = True,
        also: Vectors | None = None,
    ) -> Guesses:
        """Fit on the texts `rows` whose labels are `matrix` [n, L], and guess every text.

        Args:
            rows: indices of the texts answered.
            matrix: which labels each has.
            seed: of the folds that calibrate.
            calibrated: scale the probabilities where there are answers enough; False saves that time.
            also: vectors [M, H] of texts of another kind (to score on), guessed in rows N to N + M.
        """
        wanted = self.vectors if also is None else np.concatenate((self.vectors, normalised(also)))
        if not len(rows):
            first = self._from_descriptions(wanted)
            return Guesses(first, calibrated=False, raw=first)
        known, targets = self.vectors[rows], Targets(matrix, np.arange(len(rows)), self.multi_label)
        logits = self._logits(known, targets, wanted, "all")
        raw = _activate(logits, self.multi_label)
        if calibrated and len(rows) >= LEAST_TO_CALIBRATE:
            held = np.zeros((len(rows), self.n_labels))
            for k, (fit, out) in enumerate(folds(targets, _FOLDS, np.random.default_rng(seed))):
                held[out] = self._logits(known[fit], targets.take(fit), known[out], f"fold{k}")
            scaled = _activate(logits * calibrate(held, targets), self.multi_label)
            return Guesses(scaled, calibrated=True, raw=raw)
        return Guesses(raw, calibrated=False, raw=raw)

    def _logits(self, x: Vectors, targets: Targets, wanted: Vectors, name: str) -> Floats:
        """Fit on `x` and return logits of `wanted` [M, L]; labels that nothing tells of get the lowest."""
        matrix = targets.matrix
        if self.descriptions is not None:
            x = np.concatenate((x, self.descriptions))
            matrix = np.concatenate((matrix, np.eye(self.n_labels, dtype=bool)))
        if self.multi_label:
            columns = [self._binary(x, matrix[:, j], wanted, f"{name}.{j}") for j in range(self.n_labels)]
            return np.stack(columns, axis=1)
        rows, columns_of = np.nonzero(matrix)
        seen = np.unique(columns_of)
        logits = np.full((len(wanted), self.n_labels), -20.0)
        if len(seen) == 1:
            logits[:, seen[0]] = 0.0
            return logits
        found = self._regression(x[rows], columns_of, name).decision_function(wanted)
        # Of two classes scikit-learn gives one column; half of it each way gives the same probabilities.
        logits[:, seen] = np.stack((-found / 2, found / 2), axis=1) if found.ndim == 1 else found
        return logits

    def _binary(self, x: Vectors, y: NDArray[np.bool_], wanted: Vectors, name: str) -> Floats:
        if y.all() or not y.any():
            return np.full(len(wanted), 3.0 if y.all() else -3.0)
        found: Floats = self._regression(x, y.astype(np.intp), name).decision_function(wanted)
        return found

    def _regression(self, x: Vectors, y: Indices, name: str) -> Any:
        """Fit, from where the last fit with the same labels ended."""
        classes = np.unique(y)
        model = self._models.get(name)
        if model is None or not np.array_equal(model.classes_, classes):
            model = _extras.load("sklearn.linear_model").LogisticRegression(
                C=self._c, max_iter=_STEPS, tol=1e-3, warm_start=True
            )
            self._models[name] = model
        with warnings.catch_warnings():
            # A fit that stopped early is gone on with by the next, and many labels of few texts are as it should be.
            warnings.simplefilter("ignore", _extras.load("sklearn.exceptions").ConvergenceWarning)
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            model.fit(x, y)
        return model

    def _from_descriptions(self, wanted: Vectors) -> NDArray[np.float32]:
        if self.descriptions is None:
            return np.full((len(wanted), self.n_labels), 1.0 / self.n_labels, dtype=np.float32)
        likeness = wanted @ self.descriptions.T  # N, L
        if self.multi_label:
            likeness = likeness - likeness.mean(axis=0)
        # Of several labels each is a yes or no of its own: likeness says less of that than of which is nearest.
        softer = 4.0 if self.multi_label else 1.0
        return _activate((likeness / (softer * _TEMPERATURE)).astype(np.float64), self.multi_label)


def next_texts(
    guesses: Guesses,
    learner: Learner,
    candidates: Indices,
    counts: Sequence[int],
    *,
    n: int,
    weights: Weights | None = None,
) -> list[tuple[int, str]]:
    """Return the `n` texts of `candidates` most useful to ask about, best first, each with why.

    Args:
        guesses: of every text.
        learner: the vectors.
        candidates: texts nobody answered.
        counts: answers so far, by label.
        n: how many.
        weights: of the parts.

    Why is `rare` (its likeliest label has few answers), `unsure` (two labels are near each other) or `typical`.
    """
    weights = (weights or Weights()).faded(counts)
    if not len(candidates):
        return []
    p = guesses.raw[candidates].astype(np.float64)
    unsure = _uncertainty(p, learner.multi_label)
    want = _want(counts)
    share = p / np.maximum(p.sum(axis=1, keepdims=True), 1e-9)
    rare = share @ want
    static = unsure * rare**weights.rarity * learner.density[candidates] ** weights.density
    short = np.argsort(-static, kind="stable")[: _SHORTLIST * n]
    vectors, usefulness = learner.vectors[candidates[short]], static[short].copy()
    far = np.ones(len(short), dtype=np.float32)
    taken: list[tuple[int, str]] = []
    for _ in range(min(n, len(short))):
        best = int(np.argmax(usefulness * np.maximum(far, 1e-3) ** weights.novelty))
        row = int(short[best])
        top = int(p[row].argmax())
        why = (
            "rare" if want[top] >= 0.99 and max(counts, default=0) > 0 else "unsure" if unsure[row] > 0.5 else "typical"
        )
        taken.append((int(candidates[row]), why))
        far = np.minimum(far, 1.0 - vectors @ vectors[best])
        usefulness[best] = -1.0
    return taken


def _uncertainty(p: Floats, multi_label: bool) -> Floats:
    """Return 1 - margin between the two likeliest labels; of several labels, of the least sure decision."""
    if multi_label:
        least: Floats = 1.0 - np.abs(2.0 * p - 1.0).min(axis=1)
        return least
    if p.shape[1] < 2:
        return np.ones(len(p))
    top = np.partition(p, -2, axis=1)[:, -2:]
    margin: Floats = 1.0 - (top[:, 1] - top[:, 0])
    return margin


def _want(counts: Sequence[int]) -> Floats:
    """Return how much more of each label is wanted: 1 for the rarest, less as it has been answered more often."""
    have = np.asarray(counts, dtype=np.float64) + 1.0
    wanted: Floats = have.min() / have
    return wanted


def _activate(logits: Floats, multi_label: bool) -> NDArray[np.float32]:
    if multi_label:
        each: NDArray[np.float32] = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
        return each
    scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def _density(vectors: Vectors) -> NDArray[np.float32]:
    step = max(1, len(vectors) // _MOST_NEIGHBOURS_OF)
    others = vectors[::step]
    k = min(_NEIGHBOURS + 1, len(others))
    found = np.empty(len(vectors), dtype=np.float32)
    for i in range(0, len(vectors), 1024):
        likeness = vectors[i : i + 1024] @ others.T
        found[i : i + 1024] = np.partition(likeness, -k, axis=1)[:, -k:].mean(axis=1)
    clipped: NDArray[np.float32] = np.clip(found, 0.01, 1.0)
    return clipped
