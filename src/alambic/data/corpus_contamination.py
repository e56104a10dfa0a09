"""Test texts that must not be learnt: an index of their n-grams of words, and which documents hold one.

A document is contaminated when 13 words in a row (after Brown et al. 2020, https://arxiv.org/abs/2005.14165, app. C)
are also in a test text, whatever the punctuation and case. A test text of fewer words is looked for as a whole, from 8
words on; shorter ones ("what is my balance") are common speech: they are counted, not looked for. Rows of numbers are
no sign of a text. A rewording is not found.
"""

from __future__ import annotations

import csv
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.data.corpus_read import open_text
from alambic.data.corpus_words import Hashes, Words, cut
from alambic.errors import DataError
from alambic.events import Progress, Work

_READ = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")
_PACKED = (".xz", ".gz", ".bz2", ".zst")
_TABLE_BITS = 24  # of the first, quick look: 16 MB
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class TestIndex:
    """N-grams of test texts.

    Attributes:
        names: of the test sets (files).
        lengths: of the n-grams, in words.
        grams: sorted hashes by length.
        owners: index into `names` of each hash, by length.
        texts: test texts that are looked for.
        not_searched: test texts that are not: too short, or rows of numbers.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    grams: tuple[Hashes, ...]
    owners: tuple[NDArray[np.uint16], ...]
    texts: int
    not_searched: int

    def find(self, words: Words) -> tuple[str, int, int] | None:
        """Return the test set of an n-gram of a document, the word where it begins and its length; None when clean."""
        for grams, owners, length, table in zip(self.grams, self.owners, self.lengths, self._tables, strict=True):
            found = words.ngrams(length)
            maybe = np.flatnonzero(table[found >> np.uint64(64 - _TABLE_BITS)])
            if not len(maybe):
                continue
            at = np.minimum(np.searchsorted(grams, found[maybe]), len(grams) - 1)
            hits = np.flatnonzero(grams[at] == found[maybe])
            if len(hits):
                return self.names[owners[at[hits[0]]]], int(maybe[hits[0]]), length
        return None

    @cached_property
    def _tables(self) -> list[NDArray[np.bool_]]:
        """Which high bits occur: they spare most searches."""
        tables = []
        for grams in self.grams:
            table = np.zeros(1 << _TABLE_BITS, np.bool_)
            table[grams >> np.uint64(64 - _TABLE_BITS)] = True
            tables.append(table)
        return tables

    def save(self, path: Path) -> None:
        """Write the index as one .npz file."""
        arrays: dict[str, Any] = {f"grams{n}": g for n, g in zip(self.lengths, self.grams, strict=True)}
        arrays |= {f"owners{n}": o for n, o in zip(self.lengths, self.owners, strict=True)}
        record = {"names": self.names, "lengths": self.lengths, "texts": self.texts, "not_searched": self.not_searched}
        np.savez(path, record=np.array(json.dumps(record)), **arrays)

    @classmethod
    def load(cls, path: Path) -> TestIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            record = json.loads(str(file["record"]))
            lengths = tuple(record["lengths"])
            return cls(
                tuple(record["names"]), lengths, tuple(file[f"grams{n}"] for n in lengths),
                tuple(file[f"owners{n}"] for n in lengths), record["texts"], record["not_searched"],
            )  # fmt: skip


def test_files(folders: Sequence[Path], patterns: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the test files of `folders` with their names; a file named by itself is always read.

    Raises:
        DataError: a folder is missing, or none of its files is of a form that is read.
    """
    found: list[tuple[str, Path]] = []
    for folder in folders:
        if folder.is_file():
            found.append((folder.name, folder))
            continue
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of test sets", hint="correct contamination.folders")
        files = [
            (path.relative_to(folder).as_posix(), path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and any(fnmatch.fnmatch(path.name, p) for p in patterns) and _form(path) in _READ
        ]
        if not files:
            allowed = ", ".join(patterns)
            raise DataError(f"{folder}: no test file named {allowed} ({', '.join(_READ)})",
                            hint="correct contamination.patterns")  # fmt: skip
        found += files
    return found


test_files.__test__ = False  # type: ignore[attr-defined]


def build_index(files: Sequence[tuple[str, Path]], *, ngram: int, short: int) -> Work[TestIndex]:
    """Index every text (any string of any field) of test files.

    Args:
        files: names and paths, see `test_files`.
        ngram: words of an n-gram.
        short: fewest words of a test text that is looked for as a whole.

    Raises:
        DataError: a file cannot be read.
    """
    lengths = tuple(range(ngram, short - 1, -1))
    found: dict[int, list[Hashes]] = {n: [] for n in lengths}
    owner: dict[int, list[NDArray[np.uint16]]] = {n: [] for n in lengths}
    texts = not_searched = 0
    for i, (_, path) in enumerate(files):
        for text in set(_strings(path)):
            words = cut(text)
            size = min(len(words), ngram)
            grams = words.ngrams(size)[_worded(words, size)] if size >= short else words.hashes[:0]
            if not len(grams):
                not_searched += 1
                continue
            texts += 1
            found[size].append(grams)
            owner[size].append(np.full(len(grams), i, np.uint16))
        yield Progress("test-sets", i + 1, len(files))
    joined = {n: _unique(found[n], owner[n]) for n in lengths if found[n]}
    return TestIndex(
        tuple(name for name, _ in files), tuple(joined), tuple(grams for grams, _ in joined.values()),
        tuple(owners for _, owners in joined.values()), texts, not_searched,
    )  # fmt: skip


def excerpt(text: str, word: int, length: int) -> str:
    """Return `length` words of `text` from number `word` on, to be shown."""
    found = [match.start() for match in islice(_WORD.finditer(text), word, word + length + 1)]
    return " ".join(text[found[0] : found[-1] if len(found) > length else None].split())


def _worded(words: Words, n: int) -> NDArray[np.bool_]:
    """Return which n-grams have a letter in half of their words at least: a row of numbers is no sign of a text."""
    lettered = np.concatenate(([0], np.cumsum(words.has_letter)))
    enough: NDArray[np.bool_] = 2 * (lettered[n:] - lettered[: len(words) - n + 1]) >= n
    return enough


def _unique(grams: list[Hashes], owners: list[NDArray[np.uint16]]) -> tuple[Hashes, NDArray[np.uint16]]:
    hashes, first = np.unique(np.concatenate(grams), return_index=True)
    return hashes, np.concatenate(owners)[first]


def _form(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix


def _strings(path: Path) -> Iterator[str]:
    form = _form(path)
    with open_text(path) as file:
        try:
            if form == ".jsonl":
                for line in file:
                    yield from _inner(json.loads(line)) if line.strip() else ()
            elif form == ".json":
                yield from _inner(json.load(file))
            elif form in (".csv", ".tsv"):
                for cells in csv.reader(file, delimiter="\t" if form == ".tsv" else ","):
                    yield from cells
            else:
                yield from file.read().split("\n\n")
        except (ValueError, OSError, EOFError, csv.Error) as error:
            hint = "leave it out with contamination.patterns"
            raise DataError(f"{path}: cannot be read as {form} ({error})", hint=hint) from error


def _inner(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _inner(inner)
    elif isinstance(value, list):
        if value and all(isinstance(item, str) for item in value) and max(map(len, value)) < 40:
            yield " ".join(value)  # tokens of one sentence
        for inner in value:
            yield from _inner(inner)
