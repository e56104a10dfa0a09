"""Candidates that need no encoder: the majority answer, and TF-IDF n-grams with a linear SVM.

Each `fit_*` writes the folder of one part and returns its specification; the parts run in numpy, without scikit-learn.
Logits leave here calibrated: the factor found on out-of-fold decision values is folded into the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alambic import _extras
from alambic.data.dataset import Dataset
from alambic.engines.tfidf_features import NORMALISATION, TOKEN_PATTERN, normalise
from alambic.errors import TrainError, nearest
from alambic.manifest import PartSpec
from alambic.train.targets import ABSENT_LOGIT, Floats, Indices, Targets, calibrate, folds, score, targets_of

_C_GRID = (0.25, 1.0, 4.0)
_FOLDS = 5
_TOLERANCE = 0.1  # of the solver: 1e-4 takes two to three times as long and no accuracy was seen to depend on it
# With this many rows one held-out fifth is enough to choose C and the scale, at a third of the time of five folds.
_ONE_FOLD_FROM = 3000
_EXTRA_BYTES = 12.0  # of one feature besides its weights: idf and its line in the vocabulary


@dataclass(frozen=True)
class TfidfParams:
    """What a recipe may set for `tfidf-svm`.

    Attributes:
        words: shortest and longest run of words.
        chars: shortest and longest run of characters inside a word.
        min_df: an n-gram of fewer texts than this is left out.
        c: strength of the fit; None lets held-out data choose.
        max_mb: the least useful n-grams go until the part is no larger.
    """

    words: tuple[int, int] = (1, 2)
    chars: tuple[int, int] = (2, 5)
    min_df: int = 1
    c: float | None = None
    max_mb: float = 8.0

    @classmethod
    def read(cls, params: Mapping[str, Any]) -> TfidfParams:
        """Check `params` of a recipe.

        Raises:
            TrainError: a key is unknown or a value is outside what is allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in params:
            if name not in known:
                raise TrainError(f"recipe of tfidf-svm: unknown key {name!r}", hint=nearest(name, known))
        for name in ("words", "chars"):
            _check(name, params.get(name, (1, 1)), _is_range, "two whole numbers [low, high] of 1 or more")
        _check("min_df", params.get("min_df", 1), _is_count, "a whole number of 1 or more")
        _check("max_mb", params.get("max_mb", 1.0), _is_positive, "a number above 0")
        _check("c", params.get("c", 1.0), lambda v: v is None or _is_positive(v), "a number above 0")
        ranges = {name: tuple(params[name]) for name in ("words", "chars") if name in params}
        return cls(**{**params, **ranges})


def _check(name: str, value: object, allowed: Any, wanted: str) -> None:
    if not allowed(value):
        raise TrainError(f"recipe of tfidf-svm: {name} is {value!r}, expected {wanted}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_range(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value)) and value[0] <= value[1]


@dataclass(frozen=True)
class _Linear:
    """Weights [V, L] and bias [L] over all labels of the task."""

    weight: Floats
    bias: Floats

    def logits(self, x: Any) -> Floats:
        out: Floats = x @ self.weight + self.bias
        return out


def fit_majority(train: Dataset, out: Path, *, seed: int = 0) -> PartSpec:
    """Write the part that always answers with the shares of the labels in `train`. `seed` changes nothing."""
    shares = np.clip(targets_of(train).matrix.mean(axis=0), 1e-9, 1 - 1e-9)
    # Logits whose softmax, or sigmoid where several labels may hold, are the shares.
    bias = np.log(shares) - np.log1p(-shares) if train.multi_label else np.log(shares)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "bias.npy", bias.astype(np.float32))
    return PartSpec(name="classifier", engine="majority", folder=out.name)


def fit_tfidf_svm(train: Dataset, out: Path, *, seed: int = 0, params: Mapping[str, Any] | None = None) -> PartSpec:
    """Fit a linear SVM on word and character n-grams of `train`, and write it as a `tfidf-linear` part into `out`.

    Raises:
        TrainError: `params` are wrong, the examples all have one answer, or no n-gram is left.
    """
    settings = TfidfParams.read(params or {})
    targets = targets_of(train)
    texts = train.texts
    features, x = _Features.fit(texts, settings)
    c, balanced, factor = _choose(texts, targets, settings, seed)
    model = _fit_svm(x, targets, c=c, balanced=balanced, seed=seed)
    room = int(settings.max_mb * 1e6 / (2 * len(train.labels) + _EXTRA_BYTES))
    pruned = x.shape[1] - room
    if pruned > 0:
        kept = np.sort(np.argsort(-np.square(model.weight).sum(axis=1), kind="stable")[:room])
        # What is left was frequent enough in the full vocabulary: min_df has done its work.
        features, x = _Features.fit(texts, settings, features.grams(kept))
        model = _fit_svm(x, targets, c=c, balanced=balanced, seed=seed)
    known = targets.matrix.any(axis=0)
    scaled = _Linear(model.weight * factor, np.where(known, model.bias * factor, ABSENT_LOGIT))
    _write(out, features, scaled)
    return PartSpec(
        name="classifier",
        engine="tfidf-linear",
        folder=out.name,
        params={
            "normalisation": NORMALISATION,
            "words": list(settings.words),
            "chars": list(settings.chars),
            "c": c,
            "balanced": balanced,
            "factor": factor,
            "features": x.shape[1],
            "pruned": max(pruned, 0),
        },
    )


def _choose(texts: Sequence[str], targets: Targets, settings: TfidfParams, seed: int) -> tuple[float, bool, float]:
    """Return C, whether labels are weighted, and the calibrating factor, all three from held-out rows."""
    parts = list(folds(targets, _FOLDS, np.random.default_rng(seed)))
    if len(texts) >= _ONE_FOLD_FROM:
        parts = parts[:1]
    if not parts:
        return settings.c or 1.0, False, 1.0
    prepared = []
    for fit, held in parts:
        features, x = _Features.fit([texts[i] for i in fit], settings)
        prepared.append((x, targets.take(fit), features.transform([texts[i] for i in held])))
    truth = targets.take(np.concatenate([held for _, held in parts]))

    def held_out(c: float, balanced: bool) -> Floats:
        return np.concatenate([_fit_svm(x, y, c=c, balanced=balanced, seed=seed).logits(z) for x, y, z in prepared])

    tried = {(c, False): held_out(c, False) for c in ((settings.c,) if settings.c else _C_GRID)}
    best = max(tried, key=lambda key: score(tried[key], truth))
    if targets.unbalanced:
        tried[best[0], True] = held_out(best[0], True)
        best = max(tried, key=lambda key: score(tried[key], truth))
    return best[0], best[1], calibrate(tried[best], truth)


class _Features:
    """The vectorisers of words and of characters, fitted; one of them is missing when it finds nothing."""

    def __init__(self, fitted: Mapping[str, Any]) -> None:
        self._fitted = fitted

    @classmethod
    def fit(
        cls, texts: Sequence[str], settings: TfidfParams, grams: Mapping[str, list[str]] | None = None
    ) -> tuple[_Features, Any]:
        """Fit on `texts` (over the vocabularies `grams` when given) and return the features and their rows [N, V].

        Raises:
            TrainError: no n-gram is left.
        """
        vectoriser = _extras.load("sklearn.feature_extraction.text").TfidfVectorizer
        own: dict[str, dict[str, Any]] = {
            "words": {"token_pattern": TOKEN_PATTERN, "ngram_range": settings.words},
            "chars": {"analyzer": "char_wb", "ngram_range": settings.chars},
        }
        fitted, blocks = {}, []
        for name, options in own.items():
            if grams is not None:
                options["vocabulary"] = grams[name]
            one = vectoriser(
                preprocessor=normalise, lowercase=False, sublinear_tf=True, min_df=settings.min_df, **options
            )
            try:
                blocks.append(one.fit_transform(texts))
            except ValueError:  # scikit-learn's way to say that the vocabulary is empty: texts of emoji have no word
                continue
            fitted[name] = one
        if not fitted:
            raise TrainError(
                f"none of the {len(texts)} training texts has an n-gram found in {settings.min_df} or more of them",
                hint="lower min_df in the recipe, or look at the texts",
            )
        return cls(fitted), _extras.load("scipy.sparse").hstack(blocks).tocsr()

    def transform(self, texts: Sequence[str]) -> Any:
        """Return the rows [N, V] of `texts`."""
        return _extras.load("scipy.sparse").hstack([one.transform(texts) for one in self._fitted.values()]).tocsr()

    @property
    def idf(self) -> Floats:
        """Inverse document frequencies [V]."""
        return np.concatenate([one.idf_ for one in self._fitted.values()])

    def grams(self, kept: Indices | None = None) -> dict[str, list[str]]:
        """Return the n-grams of each vectoriser in row order, of the sorted rows `kept` when given."""
        grams: dict[str, list[str]] = {"words": [], "chars": []}
        start = 0
        for name, one in self._fitted.items():
            names = one.get_feature_names_out()
            inside = slice(None) if kept is None else kept[(kept >= start) & (kept < start + len(names))] - start
            grams[name] = [str(gram) for gram in names[inside]]
            start += len(names)
        return grams


def _fit_svm(x: Any, targets: Targets, *, c: float, balanced: bool, seed: int) -> _Linear:
    """Fit one linear SVM per label against the rest."""
    svm = _extras.load("sklearn.svm")
    weight, bias = np.zeros((x.shape[1], targets.matrix.shape[1])), np.full(targets.matrix.shape[1], ABSENT_LOGIT)
    options: dict[str, Any] = {
        "C": c,
        "class_weight": "balanced" if balanced else None,
        "random_state": seed,
        "tol": _TOLERANCE,
    }
    counts = targets.matrix.sum(axis=0)
    if targets.multi_label:
        for label in np.flatnonzero(counts):
            if counts[label] == len(targets.matrix):
                bias[label] = np.log(len(targets.matrix) + 1.0)  # never seen without: as sure as that many rows allow
                continue
            one = svm.LinearSVC(**options).fit(x, targets.matrix[:, label])
            weight[:, label], bias[label] = one.coef_[0], one.intercept_[0]
        return _Linear(weight, bias)
    seen = np.flatnonzero(counts)
    if len(seen) == 1:
        bias[seen] = 0.0
        return _Linear(weight, bias)
    fitted = svm.LinearSVC(**options).fit(x, targets.first)
    if len(seen) == 2:  # one decision for two labels: half of it each way gives the same difference
        weight[:, seen] = np.concatenate((-fitted.coef_, fitted.coef_)).T / 2
        bias[seen] = np.concatenate((-fitted.intercept_, fitted.intercept_)) / 2
    else:
        weight[:, seen], bias[seen] = fitted.coef_.T, fitted.intercept_
    return _Linear(weight, bias)


def _write(out: Path, features: _Features, model: _Linear) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, grams in features.grams().items():
        (out / f"{name}.txt").write_bytes("".join(f"{gram}\n" for gram in grams).encode("utf-8", "surrogatepass"))
    np.save(out / "idf.npy", features.idf.astype(np.float32))
    np.save(out / "weight.npy", model.weight.astype(np.float16))
    np.save(out / "bias.npy", model.bias.astype(np.float32))
