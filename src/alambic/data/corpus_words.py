"""The words of a text as numbers, all at once in numpy: what the rules, the duplicates and the test sets are found by.

A word is a run of letters and digits in lower case; punctuation, white space and case do not count. The hash of a word
is the polynomial of its characters modulo 2^64 (Karp and Rabin 1987), taken as a difference of two prefix sums, so that
no loop runs over words; n-grams are hashed from word hashes in the same way. Hashes are the same in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_PRIME = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2^64
_PLANE = 1 << 16
LETTER, DIGIT, SPACE, PUNCTUATION, SYMBOL = 0, 1, 2, 3, 4
_PUNCTUATION = ".,;:!?'\"’‘“”«»()-–—…"


@dataclass(frozen=True)
class Words:
    """A text cut into words.

    Attributes:
        hashes: of the words, [W].
        lengths: of the words in characters, [W].
        has_letter: which words have a letter, [W].
        kinds: characters of the text that are letters, digits, spaces, punctuation and symbols, [5].
    """

    hashes: Hashes
    lengths: NDArray[np.int64]
    has_letter: NDArray[np.bool_]
    kinds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def characters(self) -> int:
        """Characters of the text."""
        return int(self.kinds.sum())

    @cached_property
    def _sums(self) -> Hashes:
        powers, _ = _powers(len(self.hashes))
        return _prefix_sums(self.hashes * powers[: len(self.hashes)])

    def ngrams(self, n: int) -> Hashes:
        """Return the hashes of all runs of `n` words, [max(0, W - n + 1)]."""
        count = len(self.hashes) - n + 1
        if count <= 0:
            return np.zeros(0, np.uint64)
        _, inverse = _powers(len(self.hashes))
        return mix((self._sums[n:] - self._sums[:count]) * inverse[:count])


def cut(text: str) -> Words:
    """Cut `text` into words."""
    points = np.minimum(np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32), _PLANE - 1)
    folded, kinds = _tables()
    letters = folded[points]  # 0 outside of words
    inside = letters > 0
    edges = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False]))))
    starts, ends = edges[::2], edges[1::2]
    powers, inverse = _powers(len(letters))
    sums = _prefix_sums(letters * powers[: len(letters)])
    hashes = mix((sums[ends] - sums[starts]) * inverse[starts])
    kind = kinds[points]
    lettered = np.concatenate(([0], np.cumsum(kind == LETTER)))
    return Words(hashes, ends - starts, lettered[ends] > lettered[starts], np.bincount(kind, minlength=5))


def mix(hashes: Hashes) -> Hashes:
    """Spread the bits of hashes (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = hashes ^ (hashes >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def word_hash(word: str) -> int:
    """Return the hash of one word."""
    hashes = cut(word).hashes
    assert len(hashes) == 1, word
    return int(hashes[0])


def _prefix_sums(values: Hashes) -> Hashes:
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=sums[1:])
    return sums


@lru_cache(maxsize=1)
def _tables() -> tuple[Hashes, NDArray[np.uint8]]:
    """Return for each character of the first plane its lower case (0 when no part of a word) and its kind."""
    folded = np.zeros(_PLANE, np.uint64)
    kinds = np.full(_PLANE, SYMBOL, np.uint8)
    for point in range(_PLANE):
        char = chr(point)
        if char.isalnum():
            folded[point] = ord(char.lower()[0])
            kinds[point] = LETTER if char.isalpha() else DIGIT
        elif char.isspace():
            kinds[point] = SPACE
    kinds[[ord(char) for char in _PUNCTUATION]] = PUNCTUATION
    return folded, kinds


_cache: list[tuple[Hashes, Hashes]] = []


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Return the powers of the prime and of its inverse, at least `count` of each."""
    if not _cache or len(_cache[0][0]) < count:
        size = max(1 << 16, 1 << (count - 1).bit_length()) if count > 1 else 1 << 16
        grown = tuple(_row(base, size) for base in (_PRIME, pow(_PRIME, -1, 1 << 64)))
        _cache[:] = [(grown[0], grown[1])]
    return _cache[0]


def _row(base: int, size: int) -> Hashes:
    row = np.full(size, base, np.uint64)
    row[0] = 1
    powers: Hashes = np.cumprod(row, dtype=np.uint64)
    return powers
