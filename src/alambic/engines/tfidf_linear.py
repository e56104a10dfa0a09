"""The part `tfidf-linear`: texts in, logits out, by TF-IDF n-grams and one weight matrix. Numpy only.

Its folder holds `words.txt` and `chars.txt` (one n-gram per line, in row order, words first), `idf.npy` [V],
`weight.npy` [V, L] in float16 and `bias.npy` [L]. It agrees with scikit-learn's own vectorisers and linear model; it
fits nothing (`alambic.train.linear` does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.engines.parts import check_keys, read_array
from alambic.engines.tfidf_features import NORMALISATION, char_ngrams, normalise, word_ngrams
from alambic.errors import EngineError

# Words recur, and a word's characters are half of the work: its rows are remembered, unless it is absurdly long.
_REMEMBERED_WORDS = 8192
_LONGEST_REMEMBERED = 64
_REBUILD = "build the bundle again"
# What the part needs, then what only tells how it was made.
_PARAMS = ("normalisation", "words", "chars", "output", "c", "balanced", "factor", "features", "pruned")

Floats = NDArray[np.float32]


class TfidfLinear:
    """Runs a folder written by `alambic.train.linear.fit_tfidf_svm`. Safe to share between threads."""

    output = "logits"

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        check_keys(params, _PARAMS, folder)
        self._words, self._chars = _ranges(folder, params)
        grams = _read_lines(folder / "words.txt")
        self._n_words = len(grams)
        self._word_rows = {gram: row for row, gram in enumerate(grams)}
        self._char_rows = {gram: row for row, gram in enumerate(_read_lines(folder / "chars.txt"), start=len(grams))}
        self._idf, self._weight, self._bias = _read_arrays(folder, self._n_words + len(self._char_rows))
        self._rows_of_word = lru_cache(maxsize=_REMEMBERED_WORDS)(self._find_rows)

    def run(self, texts: Sequence[str]) -> Floats:
        """Return the logits [N, L] of `texts`; a text of unknown n-grams only gets the bias."""
        logits = np.empty((len(texts), len(self._bias)), dtype=np.float32)
        for i, text in enumerate(texts):
            logits[i] = self._run_one(normalise(text))
        return logits

    def describe(self) -> dict[str, Any]:
        """Say what runs: engine, number of features and labels, n-gram ranges."""
        return {
            "engine": "tfidf-linear",
            "features": len(self._idf),
            "labels": len(self._bias),
            "words": list(self._words),
            "chars": list(self._chars),
            "numpy": np.__version__,
            "threads": 1,
        }

    def _run_one(self, text: str) -> Floats:
        words = map(self._word_rows.get, word_ngrams(text, *self._words))
        chars: list[int] = []
        for word in text.split():
            chars.extend(self._rows_of_word(word) if len(word) <= _LONGEST_REMEMBERED else self._find_rows(word))
        row_w, value_w = self._weigh(row for row in words if row is not None)
        row_c, value_c = self._weigh(chars)
        rows = np.concatenate((row_w, row_c))
        values = np.concatenate((value_w, value_c))
        product: Floats = values @ self._weight[rows].astype(np.float32)  # [F] @ [F, L]
        return product + self._bias

    def _find_rows(self, word: str) -> tuple[int, ...]:
        rows = map(self._char_rows.get, char_ngrams(word, *self._chars))
        return tuple([row for row in rows if row is not None])

    def _weigh(self, found: Iterable[int]) -> tuple[NDArray[np.intp], Floats]:
        """Count rows and return them once each with their sublinear TF-IDF, scaled to length 1."""
        counts = Counter(found)
        rows = np.fromiter(counts.keys(), dtype=np.intp, count=len(counts))
        values = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
        weighed: Floats = (np.log(values) + np.float32(1.0)) * self._idf[rows]
        length = float(np.sqrt(weighed @ weighed))
        return rows, weighed / np.float32(length or 1.0)


def _ranges(folder: Path, params: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    if params.get("normalisation") != NORMALISATION:
        got = params.get("normalisation")
        raise EngineError(f"{folder}: normalisation is {got!r}, this version knows {NORMALISATION!r}", hint=_REBUILD)
    return _range(folder, params, "words"), _range(folder, params, "chars")


def _range(folder: Path, params: Mapping[str, Any], key: str) -> tuple[int, int]:
    match params.get(key):
        case [int(low), int(high)] if 1 <= low <= high:
            return low, high
        case value:
            raise EngineError(
                f"{folder}: {key} is {value!r}, expected two numbers [low, high] of 1 or more", hint=_REBUILD
            )


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise EngineError(f"{path}: missing", hint=_REBUILD)
    text = path.read_bytes().decode("utf-8", "surrogatepass")
    return text.split("\n")[:-1]


def _read_arrays(folder: Path, n_features: int) -> tuple[Floats, NDArray[np.float16], Floats]:
    """Read idf [V], weight [V, L] and bias [L], and check that they fit each other."""
    idf, bias = (read_array(folder / name, dims=1).astype(np.float32) for name in ("idf.npy", "bias.npy"))
    weight = read_array(folder / "weight.npy", dims=2)
    if idf.shape != (n_features,) or weight.shape != (n_features, len(bias)):
        got = f"idf {idf.shape}, weight {weight.shape}, bias {bias.shape}"
        raise EngineError(f"{folder}: {n_features} n-grams but {got}", hint=_REBUILD)
    return idf, weight, bias
