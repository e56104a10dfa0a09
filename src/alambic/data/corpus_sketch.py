"""Near duplicates in a corpus of any size: MinHash sketches, and bands that bring like sketches together.

A document is the set of its runs of five words. Its sketch keeps the least value of 120 random functions over that set
(Broder 1997); the share of equal values estimates the Jaccard similarity within 0.04 (one standard deviation at 0.75).
Documents that agree on a whole band of 6 of the 20 bands are compared: 98 % of the pairs at 0.75 are. Unlike
`duplicates`, which proves each pair on the real sets for some thousands of rows, the estimate decides here: a sketch
takes 480 bytes a document, and the texts need not be kept.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from alambic.data.corpus_words import Hashes, Words, mix

BANDS, ROWS = 20, 6
SIZE = BANDS * ROWS
SHINGLE = 5
_BLOCK = 512  # shingles hashed at once: 512 x 120 x 8 bytes stay in the cache
Sketch = NDArray[np.uint32]


def sketch(words: Words) -> Sketch:
    """Return the sketch of a document, [120]; one of fewer than five words is a single shingle."""
    grams = words.ngrams(min(SHINGLE, max(1, len(words))))
    factors, addends = _functions()
    least = np.full(SIZE, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(grams), _BLOCK):
        values = grams[start : start + _BLOCK, None] * factors  # [block, 120]
        values += addends
        np.minimum(least, values.min(axis=0), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


def near_duplicates(sketches: Sketch, *, threshold: float, skip: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each document an earlier one that it is nearly the same as, -1 when there is none.

    What is itself a duplicate has no duplicates: a chain of small changes ends where it began.

    Args:
        sketches: [documents, 120].
        threshold: of the estimated similarity.
        skip: documents that take no part.
    """
    pairs = _candidates(sketches, np.flatnonzero(~skip))
    alike = _agreement(sketches, pairs) >= threshold
    pairs = pairs[alike]
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    found = np.full(len(sketches), -1, np.int64)
    for first, second in pairs.tolist():
        if found[second] < 0 and found[first] < 0:
            found[second] = first
    return found


def _candidates(sketches: Sketch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return pairs (earlier, later) that agree on a band: each document with the first and the previous of its band."""
    parts = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        keys = np.zeros(len(rows), np.uint64)
        for column in range(band * ROWS, (band + 1) * ROWS):
            keys = mix(keys ^ sketches[rows, column].astype(np.uint64) + np.uint64(column))
        order = np.argsort(keys, kind="stable")
        ordered = rows[order]
        new = np.concatenate(([True], keys[order][1:] != keys[order][:-1])) if len(rows) else np.zeros(0, np.bool_)
        first = ordered[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
        later = np.flatnonzero(~new)
        parts += [np.stack([before, ordered[later]], axis=1) for before in (first[later], ordered[later - 1])]
    return np.unique(np.concatenate(parts), axis=0)


def _agreement(sketches: Sketch, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    parts = [np.zeros(0)]
    for start in range(0, len(pairs), 1 << 14):
        block = pairs[start : start + (1 << 14)]
        parts.append((sketches[block[:, 0]] == sketches[block[:, 1]]).mean(axis=1))
    return np.concatenate(parts)


@lru_cache(maxsize=1)
def _functions() -> tuple[Hashes, Hashes]:
    """Return odd factors and addends: a multiply-add modulo 2^64 of well-mixed hashes, whose high bits are kept."""
    rng = np.random.default_rng(20_211_122)
    factors = rng.integers(0, 1 << 63, SIZE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return factors, rng.integers(0, 1 << 63, SIZE, dtype=np.uint64)
