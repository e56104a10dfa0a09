"""Candidates on a frozen encoder: logistic regression and nearest neighbours over the embeddings of the texts.

Each `fit_*` takes embeddings [N, H] in the order of `train`, writes the folder of one part that comes after the
encoder, and returns its specification. Embeddings are scaled to length 1 first, here and in the part. The encoder stays
as it is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.data.dataset import Dataset
from alambic.engines.heads import normalised
from alambic.errors import TrainError
from alambic.manifest import PartSpec
from alambic.train.targets import ABSENT_LOGIT, Floats, Targets, calibrate, folds, loss, score, targets_of

# Ascending, so that each fit starts from the one before.
_C_GRID = (0.003, 0.01, 0.03, 0.1)
_FOLDS = 5
_ONE_FOLD_FROM = 3000
_LBFGS_STEPS = 200
# Products this small cost less than waking the threads of the matrix library, many times less on a busy machine.
_ONE_THREAD_BELOW = 1_000_000
_NEIGHBOURS = (1, 3, 5, 10, 20)
_TEMPERATURES = (0.2, 0.1, 0.05, 0.025, 0.0125)
_MOST_QUERIES = 2000  # rows asked when k is chosen; more would not change the choice
_LEAST = 1e-3  # a share of votes is a coarse probability: none of them should cost more than this
_ENCODER = "encoder"

Embeddings = NDArray[np.floating]


def fit_logreg_head(embeddings: Embeddings, train: Dataset, out: Path, *, seed: int = 0) -> PartSpec:
    """Fit a logistic regression on `embeddings`, C and calibration chosen on held-out rows, as a `linear-head` part.

    Raises:
        TrainError: the embeddings do not fit `train`, or the examples all have one answer.
    """
    targets = targets_of(train)
    x = _checked(embeddings, train)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread < 1e-6] = 1.0  # a dimension that never moves tells nothing, and must not be blown up
    x = (x - mean) / spread
    c, factor = _choose_c(x, targets, seed)
    weight, bias = _fit_path(x, targets, (c,))[0]
    known = targets.matrix.any(axis=0)
    weight = weight * factor / spread  # [L, H]
    bias = np.where(known, bias * factor - weight @ mean, ABSENT_LOGIT)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "weight.npy", weight.astype(np.float32))
    np.save(out / "bias.npy", bias.astype(np.float32))
    (out / "fit.json").write_text(json.dumps({"c": c, "factor": factor, "seed": seed}) + "\n", encoding="utf-8")
    params = {"normalize": True, "output": "logits"}
    return PartSpec(name="classifier", engine="linear-head", folder=out.name, params=params, after=_ENCODER)


def fit_knn_head(embeddings: Embeddings, train: Dataset, out: Path, *, seed: int = 0) -> PartSpec:
    """Keep `embeddings` as neighbours, k and temperature chosen by leaving each one out, as a `knn-head` part.

    Raises:
        TrainError: the embeddings do not fit `train`, or the examples all have one answer.
    """
    targets = targets_of(train)
    vectors = _checked(embeddings, train).astype(np.float16)
    k, temperature = _choose_k(vectors.astype(np.float32), targets, np.random.default_rng(seed))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "vectors.npy", vectors)
    np.save(out / "labels.npy", targets.matrix.astype(np.uint8))
    params = {"k": k, "temperature": temperature, "labels": len(train.labels), "output": "probabilities"}
    return PartSpec(name="classifier", engine="knn-head", folder=out.name, params=params, after=_ENCODER)


def _checked(embeddings: Embeddings, train: Dataset) -> NDArray[np.float32]:
    """Return the embeddings scaled to length 1."""
    if embeddings.ndim != 2 or len(embeddings) != len(train):
        raise TrainError(f"embeddings have shape {embeddings.shape}, expected [{len(train)}, H]: one row per example")
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        where = train.examples[bad[0]].where or f"example {bad[0]}"
        raise TrainError(f"{where}: its embedding is not finite ({len(bad)} of {len(train)} examples)")
    return normalised(embeddings)


def _choose_c(x: NDArray[np.float32], targets: Targets, seed: int) -> tuple[float, float]:
    """Return C and the calibrating factor, from held-out rows."""
    parts = list(folds(targets, _FOLDS, np.random.default_rng(seed)))
    if len(x) >= _ONE_FOLD_FROM:
        parts = parts[:1]
    if not parts:
        return _C_GRID[2], 1.0
    truth = targets.take(np.concatenate([held for _, held in parts]))
    paths = [_fit_path(x[fit], targets.take(fit), _C_GRID) for fit, _ in parts]
    logits = [
        np.concatenate([x[held] @ path[i][0].T + path[i][1] for path, (_, held) in zip(paths, parts, strict=True)])
        for i in range(len(_C_GRID))
    ]
    best = max(range(len(_C_GRID)), key=lambda i: score(logits[i], truth))
    return _C_GRID[best], calibrate(logits[best], truth)


def _fit_path(x: NDArray[np.float32], targets: Targets, grid: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """Return weight [L, H] and bias [L] for each C of the ascending `grid`."""
    n_labels = targets.matrix.shape[1]
    path = [(np.zeros((n_labels, x.shape[1])), np.full(n_labels, ABSENT_LOGIT)) for _ in grid]
    counts = targets.matrix.sum(axis=0)
    seen = np.flatnonzero(counts)
    if targets.multi_label:
        for label in seen:
            if counts[label] == len(x):
                for _, bias in path:
                    bias[label] = np.log(len(x) + 1.0)  # never seen without: as sure as that many rows allow
                continue
            fits = _logistic_path(x, targets.matrix[:, label], grid)
            for (weight, bias), (coef, intercept) in zip(path, fits, strict=True):
                weight[label], bias[label] = coef[0], intercept[0]
        return path
    if len(seen) == 1:
        for _, bias in path:
            bias[seen] = 0.0
        return path
    for (weight, bias), (coef, intercept) in zip(path, _logistic_path(x, targets.first, grid), strict=True):
        if len(seen) == 2:  # one logit for two labels: half of it each way gives the same difference
            coef, intercept = np.concatenate((-coef, coef)) / 2, np.concatenate((-intercept, intercept)) / 2
        weight[seen], bias[seen] = coef, intercept
    return path


def _logistic_path(x: NDArray[np.float32], y: NDArray[Any], grid: Sequence[float]) -> list[tuple[Floats, Floats]]:
    model = _extras.load("sklearn.linear_model").LogisticRegression(tol=1e-3, max_iter=_LBFGS_STEPS, warm_start=True)
    not_converged = _extras.load("sklearn.exceptions").ConvergenceWarning
    limits = _extras.load("threadpoolctl").threadpool_limits
    threads = 1 if x.size < _ONE_THREAD_BELOW else None
    fits = []
    for c in grid:
        model.set_params(C=c)
        with warnings.catch_warnings(), limits(limits=threads, user_api="blas"):
            # Stopping short of the optimum is only one more way to regularise; held-out rows judge the result.
            warnings.simplefilter("ignore", not_converged)
            model.fit(x, y)
        fits.append((model.coef_.astype(np.float64), model.intercept_.astype(np.float64)))
    return fits


def _choose_k(vectors: NDArray[np.float32], targets: Targets, rng: np.random.Generator) -> tuple[int, float]:
    """Return k, then the temperature of least log loss for it, leaving out each asked row and its group."""
    asked = np.sort(rng.permutation(len(vectors))[:_MOST_QUERIES])
    similarities = vectors[asked] @ vectors.T  # [A, M]
    similarities[targets.groups[asked][:, None] == targets.groups[None, :]] = -1e3
    most = min(max(_NEIGHBOURS), len(vectors) - 1)
    near = np.argsort(-similarities, axis=1, kind="stable")[:, :most]  # [A, most]
    gaps = np.take_along_axis(similarities, near, axis=1)
    gaps -= gaps[:, :1]
    votes, truth = targets.matrix[near].astype(np.float32), targets.take(asked)  # [A, most, L]
    tried = {}
    for k in (k for k in _NEIGHBOURS if k <= most):
        for temperature in _TEMPERATURES:
            weights = np.exp(gaps[:, :k] / temperature)
            weights /= weights.sum(axis=1, keepdims=True)
            p = np.einsum("ak,akl->al", weights, votes[:, :k])
            p = np.clip(p.astype(np.float64), _LEAST, 1 - _LEAST)
            logits = np.log(p / (1 - p)) if targets.multi_label else np.log(p)
            tried[k, temperature] = (score(logits, truth), -loss(logits, truth))
    # Scores within one row of each other are a tie, which the log loss settles.
    top = max(figure for figure, _ in tried.values())
    best = max((key for key in tried if tried[key][0] >= top - 0.005), key=lambda key: tried[key][1])
    return best
