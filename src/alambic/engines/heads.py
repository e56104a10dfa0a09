"""Small classifiers on the vector that another part computes, in numpy: `linear-head` and `knn-head`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.engines.parts import Array, check_keys, read_array
from alambic.errors import EngineError


class LinearHead:
    """Logits = standardised vector @ weight.T + bias.

    Files: weight.npy [L, H], bias.npy [L]; optional mean.npy [H] and scale.npy [H] (the vector becomes
    ``(x - mean) / scale``). Parameter `normalize`: the vector is first divided by its length.
    """

    output = "logits"

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        check_keys(params, ("normalize", "output"), folder)
        self._normalize = bool(params.get("normalize", False))
        weight = read_array(folder / "weight.npy", dims=2).astype(np.float32)
        bias = read_array(folder / "bias.npy", dims=1).astype(np.float32)
        width = weight.shape[1]
        mean = _optional(folder / "mean.npy", width, 0.0)
        scale = _optional(folder / "scale.npy", width, 1.0)
        if bias.shape != (len(weight),) or mean.shape != (width,) or scale.shape != (width,):
            raise EngineError(
                f"{folder}: shapes do not fit: weight {weight.shape}, bias {bias.shape}, mean {mean.shape}, "
                f"scale {scale.shape}"
            )
        if (scale == 0).any():
            raise EngineError(f"{folder / 'scale.npy'}: holds a zero")
        # Folded once, so that a prediction is a single product.
        self._weight = np.ascontiguousarray((weight / scale).T)  # H, L
        self._bias = bias - mean @ self._weight

    def run(self, items: Array) -> NDArray[np.float32]:
        """Return logits [N, L] of vectors [N, H]."""
        vectors = _vectors(items, len(self._weight))
        if self._normalize:
            vectors = normalised(vectors)
        logits: NDArray[np.float32] = vectors @ self._weight + self._bias
        return logits

    def describe(self) -> dict[str, Any]:
        """Return what this head is."""
        return {"engine": "linear-head", "version": np.__version__}


class KnnHead:
    """Probabilities from the `k` most similar training vectors.

    Files: vectors.npy [M, H], float16, each of length 1; labels.npy, label indices [M], or 0/1 [M, L] when several
    labels may hold. Parameters: `k`, `labels` (their number) and `temperature`: a neighbour weighs
    ``exp((similarity - best) / temperature)``, and a label's probability is its share of the weights.
    """

    output = "probabilities"

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        check_keys(params, ("k", "temperature", "labels", "output"), folder)
        stored = read_array(folder / "vectors.npy", dims=2)
        self._vectors = np.ascontiguousarray(stored.astype(np.float32).T)  # H, M
        self._votes = _votes(folder / "labels.npy", len(stored), params.get("labels"))
        self._temperature = _positive(params, "temperature", 0.05, folder)
        self._k = min(int(_positive(params, "k", 10, folder)), len(stored))
        if self._k < 1:
            raise EngineError(f"{folder}: no neighbours: {len(stored)} vectors, k = {params.get('k')!r}")

    def run(self, items: Array) -> NDArray[np.float32]:
        """Return probabilities [N, L] of vectors [N, H], a few rows at a time to bound the memory."""
        vectors = normalised(_vectors(items, len(self._vectors)))
        parts = [self._vote(vectors[i : i + 256]) for i in range(0, len(vectors), 256)]
        return np.concatenate(parts) if parts else np.zeros((0, self._votes.shape[1]), dtype=np.float32)

    def _vote(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        similarity = vectors @ self._vectors  # B, M
        near = np.argpartition(similarity, -self._k, axis=1)[:, -self._k :]  # B, k
        top = np.take_along_axis(similarity, near, axis=1)
        weights = np.exp((top - top.max(axis=1, keepdims=True)) / self._temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        shares: NDArray[np.float32] = np.einsum("bk,bkl->bl", weights, self._votes[near])
        return shares

    def describe(self) -> dict[str, Any]:
        """Return what this head is."""
        return {"engine": "knn-head", "version": np.__version__, "k": self._k, "vectors": self._vectors.shape[1]}


def normalised(vectors: Array) -> NDArray[np.float32]:
    """Divide each row by its length; a zero row stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: NDArray[np.float32] = (vectors / np.maximum(length, 1e-12)).astype(np.float32)
    return result


def _vectors(items: Array, width: int) -> NDArray[np.float32]:
    vectors = np.asarray(items, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise EngineError(f"the head takes vectors of width {width}, got an array of shape {vectors.shape}")
    return vectors


def _optional(path: Path, width: int, default: float) -> NDArray[np.float32]:
    if not path.is_file():
        return np.full(width, default, dtype=np.float32)
    values: NDArray[np.float32] = read_array(path, dims=1).astype(np.float32)
    return values


def _positive(params: Mapping[str, Any], name: str, default: float, where: Path) -> float:
    value = params.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise EngineError(f"{where}: {name} is {value!r}, not a positive number")
    return float(value)


def _votes(path: Path, count: int, labels: object) -> NDArray[np.float32]:
    """Return [M, L]: which labels each training vector votes for."""
    stored = read_array(path, dims=None)
    if len(stored) != count or stored.ndim > 2 or not np.issubdtype(stored.dtype, np.integer):
        raise EngineError(f"{path}: expected integers, one row for each of the {count} vectors")
    if stored.ndim == 2:
        return stored.astype(np.float32)
    width = labels if isinstance(labels, int) else int(stored.max(initial=0)) + 1
    if stored.size and (stored.min() < 0 or stored.max() >= width):
        raise EngineError(f"{path}: label index {int(stored.max())} is outside 0..{width - 1}")
    votes = np.zeros((count, width), dtype=np.float32)
    votes[np.arange(count), stored] = 1.0
    return votes
