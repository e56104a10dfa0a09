"""Words that keep the same company: vectors of one language from its plain text, without any training.

Positive pointwise mutual information with smoothed contexts, reduced by a truncated singular value decomposition (Levy,
Goldberg and Dagan 2015, https://aclanthology.org/Q15-1016). It serves to find, for a word without a known translation,
words like it that have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

_WINDOW = 4
_WIDTH = 128
_WORDS = 40_000
_FEWEST = 4  # occurrences of a word that is placed at all
_SMOOTH = 0.75
_ALIKE = 5  # neighbours of a word
_SHARP = 8.0  # a neighbour weighs cosine ** _SHARP
_BLOCK = 1_000


def alike(sentences: Iterable[Sequence[str]], anchors: Iterable[str]) -> dict[str, list[tuple[str, float]]]:
    """Return, for each frequent word that is no anchor, the anchors most like it and their weights.

    Args:
        sentences: words of each sentence, in lower case.
        anchors: words that may be named as neighbours.
    """
    names, ids = _number(sentences)
    wanted = set(anchors)
    targets = [i for i, name in enumerate(names) if name not in wanted]
    sources = [i for i, name in enumerate(names) if name in wanted]
    if not targets or len(sources) <= _ALIKE or len(names) <= _WIDTH + 1:
        return {}
    vectors = _vectors(ids, len(names))
    among = vectors[sources]
    found: dict[str, list[tuple[str, float]]] = {}
    for start in range(0, len(targets), _BLOCK):
        block = targets[start : start + _BLOCK]
        near = vectors[block] @ among.T  # targets, anchors
        best = np.argpartition(-near, _ALIKE, axis=1)[:, :_ALIKE]
        for row, (target, columns) in enumerate(zip(block, best, strict=True)):
            found[names[target]] = [(names[sources[c]], float(max(near[row, c], 1e-3) ** _SHARP)) for c in columns]
    return found


def _number(sentences: Iterable[Sequence[str]]) -> tuple[list[str], NDArray[np.int32]]:
    """Return the frequent words, and the text as their numbers, -1 for other words and between sentences."""
    table: dict[str, int] = {}
    text: list[int] = []
    for sentence in sentences:
        text += [table.setdefault(word, len(table)) for word in sentence]
        text += [-1] * _WINDOW
    ids = np.array(text, dtype=np.int32)
    counts = np.bincount(ids[ids >= 0], minlength=len(table))
    kept = np.argsort(-counts, kind="stable")[:_WORDS]
    kept = kept[counts[kept] >= _FEWEST]
    renumbered = np.full(len(table) + 1, -1, dtype=np.int32)  # the last entry serves -1
    renumbered[kept] = np.arange(len(kept), dtype=np.int32)
    words = list(table)
    return [words[i] for i in kept], renumbered[ids]


def _vectors(ids: NDArray[np.int32], n: int) -> NDArray[np.float32]:
    """Return unit vectors [n, width] of the words."""
    pairs = sparse.csr_matrix((n, n), dtype=np.float32)
    for distance in range(1, _WINDOW + 1):
        left, right = ids[:-distance], ids[distance:]
        both = (left >= 0) & (right >= 0)
        weight = np.full(int(both.sum()), 1.0 / distance, dtype=np.float32)
        pairs = pairs + sparse.coo_matrix((weight, (left[both], right[both])), shape=(n, n)).tocsr()
    pairs = (pairs + pairs.T).tocoo()
    of_word = np.asarray(pairs.sum(axis=1)).ravel()
    of_context = of_word**_SMOOTH
    information = np.log(pairs.data * of_context.sum() / (of_word[pairs.row] * of_context[pairs.col]))
    positive = information > 0
    kept = (information[positive], (pairs.row[positive], pairs.col[positive]))
    left, values, _ = randomized_svd(
        sparse.csr_matrix(kept, shape=(n, n), dtype=np.float32), n_components=_WIDTH, n_iter=3, random_state=0
    )
    placed = left * np.sqrt(values)
    return np.asarray(placed / np.maximum(np.linalg.norm(placed, axis=1, keepdims=True), 1e-6), dtype=np.float32)
