"""Find held-out texts inside rows: every text of a test or dev part, compared by lower-case letters and digits.

A text of up to 260 letters and digits is looked for whole, a longer one by its first, middle and last 160. Texts under
40 are too short to tell a copy from a common phrase inside a longer one: they count only as a whole message or line.
The search hashes every window of 40 letters (Rabin and Karp) and compares the words only where a hash agrees.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instructions.sentences import plain

_WINDOW, _WHOLE, _PART, _SHORTEST = 40, 260, 160, 20
_BASE = np.uint64(1_099_511_628_211)
# What identifies, labels or repeats, and is no text of a test.
_NOT_TEXT = {
    "id",
    "label",
    "labels",
    "title",
    "source",
    "category",
    "tags",
    "template",
    "theme",
    "type",
    "licence",
    "task_id",
    "table_id",
    "sous_theme",
    "fine",
    "answer",
    "entry_point",
    "subject",
    "file",
    "name",
    "command",
    "sql",
}


class Held:
    """Every held-out text, ready to be looked for."""

    def __init__(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        self.short: dict[str, str] = {}
        self.count = 0
        parts: list[tuple[str, str]] = []
        for where, row in rows:
            for text in map(plain, _texts(row)):
                self.count += len(text) >= _SHORTEST
                if len(text) >= _WINDOW:
                    parts += [(part, where) for part in _parts(text)]
                elif len(text) >= _SHORTEST:
                    self.short[text] = where
        self.long: dict[int, list[tuple[str, str]]] = defaultdict(list)
        # All beginnings as one text: their windows are those at every `_WINDOW`-th place.
        found = _windows("".join(part[:_WINDOW] for part, _ in parts))[::_WINDOW] if parts else []
        for key, part in zip(found, parts, strict=True):
            self.long[int(key)].append(part)
        self.hashes = np.array(sorted(self.long), dtype=np.uint64)

    def inside(self, texts: Sequence[str]) -> str | None:
        """Return the set and part whose text is in one of `texts`, None when none is."""
        for text in texts:
            for line in text.split("\n"):
                where = self.short.get(plain(line)) if len(line) < 8 * _WINDOW else None
                if where is not None:
                    return where
            where = self._within(plain(text))
            if where is not None:
                return where
        return None

    def _within(self, text: str) -> str | None:
        if len(text) < _WINDOW or not len(self.hashes):
            return None
        found = _windows(text)
        places = np.minimum(np.searchsorted(self.hashes, found), len(self.hashes) - 1)
        for at in np.flatnonzero(self.hashes[places] == found):
            for part, where in self.long[int(found[at])]:
                if text.startswith(part, int(at)):
                    return where
        return None


def _parts(text: str) -> list[str]:
    if len(text) <= _WHOLE:
        return [text]
    middle = len(text) // 2 - _PART // 2
    return [text[:_PART], text[middle : middle + _PART], text[-_PART:]]


def _windows(text: str) -> NDArray[np.uint64]:
    """Return the hash of each window of `_WINDOW` letters: a polynomial in `_BASE`, modulo 2**64."""
    letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    # By doubling: 1, 2, 4 ... 32 letters, then 32 and 8 make 40.
    sizes: dict[int, NDArray[np.uint64]] = {1: letters}
    for size in (1, 2, 4, 8, 16):
        sizes[2 * size] = _joined(sizes[size], sizes[size], size, size)
    return _joined(sizes[32], sizes[8], 32, 8)


def _joined(left: NDArray[np.uint64], right: NDArray[np.uint64], before: int, after: int) -> NDArray[np.uint64]:
    """Return the hashes of windows of `before` letters followed by `after`, from those of each."""
    power = np.uint64(pow(int(_BASE), after, 1 << 64))
    count = len(right) - before
    return left[:count] * power + right[before:]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NOT_TEXT:
                yield from _texts(inner)
    elif isinstance(value, list):
        if value and all(isinstance(one, str) for one in value):
            yield " ".join(value)
        else:
            for one in value:
                yield from _texts(one)


def counted(found: Iterable[str]) -> dict[str, int]:
    """Return how many rows each set and part cost, most first."""
    return dict(Counter(found).most_common())
