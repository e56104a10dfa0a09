"""Exact and near duplicates among texts.

Exact: the same text, ignoring case and white space. Near: 4-character shingles whose Jaccard similarity reaches the
threshold. MinHash with banding (rensa, in Rust) proposes the pairs, and each one is then verified on the real sets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from alambic import _extras

NEAR = 0.8
_PERMUTATIONS, _BANDS = 64, 16
_SEED = 1
_SHINGLE = 4
_LONG, _KEPT = 4000, 2000
_ENDS = 600
_CHUNK = 4096
_CROWD = 40
_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Pair:
    """Two rows, the lower index first, and the Jaccard similarity of their texts."""

    first: int
    second: int
    similarity: float


@dataclass(frozen=True)
class Duplicates:
    """What is alike among the texts.

    Attributes:
        exact: groups of two rows or more that hold the same text, in order.
        near: verified pairs of rows that are alike, without the exact ones; of equal texts, only the first is paired.
        groups: for each row the lowest row that it is tied to, directly or through others (itself when unique).
    """

    exact: tuple[tuple[int, ...], ...]
    near: tuple[Pair, ...]
    groups: tuple[int, ...]


def exact_key(text: str) -> str:
    """Return what two texts share when they are exact duplicates."""
    return " ".join(text.casefold().split())


def own_words(texts: Sequence[str]) -> list[str]:
    """Return what tells texts apart: without the beginning and the end that all share, and without their long middle.

    One instruction before every text would make near duplicates of them all.
    """
    head = _shared(texts)
    tail = _shared([text[head:][::-1] for text in texts])
    own = [text[head : len(text) - tail] or text for text in texts]
    return [text if len(text) <= 2 * _ENDS else f"{text[:_ENDS]} {text[-_ENDS:]}" for text in own]


def _shared(texts: Sequence[str]) -> int:
    """Return how many characters all texts begin with: those of the first and the last in order; 0 when all are one."""
    first, last = min(texts, default=""), max(texts, default="")
    if first == last:
        return 0
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def find_duplicates(texts: Sequence[str], *, threshold: float = NEAR) -> Duplicates:
    """Find the exact and near duplicates among `texts`.

    Raises:
        MissingExtra: rensa is not installed.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        rows_of[exact_key(text)].append(i)
    kept = [rows[0] for rows in rows_of.values()]
    folded = [_fold(key) for key in rows_of]
    near = tuple(Pair(kept[a], kept[b], round(s, 4)) for a, b, s in _near_pairs(folded, threshold))
    exact = tuple(tuple(rows) for rows in rows_of.values() if len(rows) > 1)
    ties = [(rows[0], row) for rows in exact for row in rows[1:]] + [(p.first, p.second) for p in near]
    return Duplicates(exact, near, tuple(_join(len(texts), ties)))


def shingles(folded: str) -> frozenset[str]:
    """Return the 4-character shingles of a folded text (the text itself when shorter)."""
    return frozenset(folded[i : i + _SHINGLE] for i in range(max(1, len(folded) - _SHINGLE + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the share of shingles that two sets have in common."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def _fold(key: str) -> str:
    """Return the words alone; both ends of a very long text stand for it."""
    words = _WORDS.sub(" ", key).strip() or key
    return words if len(words) <= _LONG else words[:_KEPT] + " " + words[-_KEPT:]


def _near_pairs(folded: list[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    if len(folded) < 2:
        return
    signatures = _signatures(folded)
    candidates = _candidates(signatures)
    if not len(candidates):
        return
    # The estimate from 64 hashes is within 0.2 of the truth but once in ten thousand: it spares most verifications.
    alike = np.concatenate(
        [_agreement(signatures, part) for part in np.array_split(candidates, len(candidates) // 50_000 + 1)]
    )
    cache: dict[int, frozenset[str]] = {}
    for a, b in candidates[alike >= threshold - 0.2].tolist():
        for row in (a, b):
            if row not in cache:
                cache[row] = shingles(folded[row])
        small, large = sorted((len(cache[a]), len(cache[b])))
        if small < threshold * large:
            continue
        similarity = jaccard(cache[a], cache[b])
        if similarity >= threshold:
            yield a, b, similarity


def _signatures(folded: list[str]) -> NDArray[np.uint32]:
    minhash = _extras.load("rensa").RMinHash
    parts = []
    for start in range(0, len(folded), _CHUNK):
        sets = [list(shingles(text)) for text in folded[start : start + _CHUNK]]
        matrix = minhash.digest_matrix_from_token_sets(sets, _PERMUTATIONS, _SEED)
        parts.append(np.array(matrix.to_rows(), dtype=np.uint32))
    return np.concatenate(parts)  # [N, 64]


def _candidates(signatures: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the pairs of rows that agree on a whole band, lower row first, in order."""
    width = _PERMUTATIONS // _BANDS
    found: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        part = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = part.view(f"V{4 * width}").ravel().tolist()
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for row, key in enumerate(keys):
            buckets[key].append(row)
        for bucket in buckets.values():
            if len(bucket) > 1:
                found.update(_pairs(bucket))
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)


def _pairs(bucket: list[int]) -> Iterator[tuple[int, int]]:
    """Yield all pairs of a small bucket; of a crowd, each row with the first and the previous one."""
    if len(bucket) <= _CROWD:
        yield from ((a, b) for j, b in enumerate(bucket) for a in bucket[:j])
        return
    for previous, row in pairwise(bucket):
        yield previous, row
        yield bucket[0], row


def _agreement(signatures: NDArray[np.uint32], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    share: NDArray[np.float64] = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
    return share


def _join(count: int, ties: Sequence[tuple[int, int]]) -> list[int]:
    """Return for each row the lowest row of its connected component."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in ties:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(row) for row in range(count)]
