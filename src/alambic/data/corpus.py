"""Prepare the text of pre-training: read, clean, filter, look for test texts; then drop duplicates and hold some out.

`prepare_source` turns the files of one source into a `Store` of kept documents and says what it dropped and why.
`decide` looks at all stores together: which documents are duplicates (the first source of the configuration keeps
them), and which are held out for validation (whole documents: two pieces of one novel never fall on both sides).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alambic.data.corpus_contamination import TestIndex, excerpt
from alambic.data.corpus_read import Document, Render, read_documents
from alambic.data.corpus_rules import fault_of
from alambic.data.corpus_sketch import near_duplicates, sketch
from alambic.data.corpus_store import Store, StoreWriter
from alambic.data.corpus_words import Words, cut, mix
from alambic.events import Progress, Work

if TYPE_CHECKING:
    from alambic.pretrain_config import CleanSpec, DedupSpec, SourceSpec, ValidSpec

_EXAMPLES = 3
_EXCERPT = 160
_TOLD_EVERY = 500
TEST_TEXT = "test_text"


@dataclass(frozen=True)
class Fault:
    """Why a document is dropped, what of it is shown, and the test set that it has a text of."""

    reason: str
    shown: str
    test_set: str | None = None


@dataclass
class Dropped:
    """Documents that one rule dropped."""

    documents: int = 0
    utf8_bytes: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, size: int, where: str, text: str) -> None:
        """Count one document, and keep the first ones as examples."""
        self.documents += 1
        self.utf8_bytes += size
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"where": where, "text": " ".join(text[: 4 * _EXCERPT].split())[:_EXCERPT]})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"documents": self.documents, "utf8_bytes": self.utf8_bytes, "examples": self.examples}


@dataclass
class SourceCounts:
    """What became of the documents of one source (pieces of long documents count one by one)."""

    documents: int = 0
    utf8_bytes: int = 0
    read_documents: int = 0
    read_bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    test_sets: dict[str, int] = field(default_factory=dict)

    def drop(self, fault: Fault, document: Document, size: int) -> None:
        """Count a dropped document."""
        self.dropped.setdefault(fault.reason, Dropped()).add(size, document.where, fault.shown)
        if fault.test_set is not None:
            self.test_sets[fault.test_set] = self.test_sets.get(fault.test_set, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        counts = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        return {**counts, "dropped": {key: d.to_dict() for key, d in self.dropped.items()}, "test_sets": self.test_sets}


@dataclass(frozen=True)
class Decision:
    """What becomes of the documents of all stores, in order.

    Attributes:
        train: rows to learn from, by store.
        valid: rows held out, by store.
        exact: rows whose text came before, by store.
        near: rows nearly the same as an earlier one, by store.
    """

    train: tuple[NDArray[np.int64], ...]
    valid: tuple[NDArray[np.int64], ...]
    exact: tuple[NDArray[np.int64], ...]
    near: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Sieve:
    """What decides on one document by itself.

    Attributes:
        language: that the source states.
        clean: thresholds of the rules.
        index: test texts, None when none are known.
    """

    language: str
    clean: CleanSpec
    index: TestIndex | None

    def fault_of(self, document: Document, words: Words) -> Fault | None:
        """Return why a document is dropped, None when it is kept."""
        if document.fault is not None:
            return Fault("unreadable", document.fault)
        rule = fault_of(document.words, words, self.language, self.clean)
        if rule is not None:
            return Fault(rule, document.words)
        found = self.index.find(words) if self.index is not None else None
        if found is None:
            return None
        name, start, length = found
        return Fault(TEST_TEXT, f"[{name}] {excerpt(document.words, start, length)}", name)


def prepare_source(
    source: SourceSpec, files: list[Path], sieve: Sieve, render: Render, *, seed: int, out: Path
) -> Work[SourceCounts]:
    """Write the documents of `source` that are worth learning as a store in `out`; return the counts.

    With `source.mb` the files are read twice: once for the lengths, then for the documents drawn.

    Args:
        source: what it is.
        files: see `files_of`.
        sieve: decides on each document.
        render: writes a conversation as text.
        seed: of what `source.mb` draws.
        out: folder.

    Raises:
        DataError: a file cannot be read; a bad row is counted as ``unreadable``.
    """
    counts = SourceCounts()
    chosen = None
    if source.mb is not None:
        chosen = yield from _draw(source, files, render, seed, counts)
    stage = f"corpus {source.name}"
    writer = StoreWriter(out)
    for number, document in enumerate(read_documents(files, render)):
        if number % _TOLD_EVERY == 0:
            yield Progress(stage, number, counts.documents, {"kept_mb": counts.kept_bytes / 1e6})
        if chosen is not None and not chosen[number]:
            continue
        size = len(document.text.encode())
        counts.read_documents += 1
        counts.read_bytes += size
        words = cut(document.words)
        fault = sieve.fault_of(document, words)
        if fault is not None:
            counts.drop(fault, document, size)
            continue
        counts.kept_documents += 1
        counts.kept_bytes += size
        writer.add(document.text, parent=document.parent, sketch=sketch(words), chat=document.chat)
    writer.close()
    if chosen is None:
        counts.documents, counts.utf8_bytes = counts.read_documents, counts.read_bytes
    return counts


def decide(stores: Sequence[tuple[str, Store]], dedup: DedupSpec, valid: ValidSpec, *, seed: int) -> Decision:
    """Find duplicates over all `stores` (names and stores) and hold documents out."""
    starts = np.cumsum([0] + [len(store) for _, store in stores])
    total = int(starts[-1])
    exact = np.zeros(total, np.bool_)
    if dedup.exact:
        _, first = np.unique(np.concatenate([store.exact for _, store in stores]), return_index=True)
        exact[:] = True
        exact[first] = False
    near = np.zeros(total, np.bool_)
    if dedup.near:
        sketches = np.concatenate([store.sketches for _, store in stores])
        near = near_duplicates(sketches, threshold=dedup.threshold, skip=exact) >= 0
    parts: list[list[NDArray[np.int64]]] = [[], [], [], []]
    for i, (name, store) in enumerate(stores):
        own = slice(int(starts[i]), int(starts[i + 1]))
        rows = np.flatnonzero(~exact[own] & ~near[own])
        held = _held_out(name, store, rows, valid, seed=seed)
        for part, found in zip(parts, (rows[~held], rows[held], np.flatnonzero(exact[own]), np.flatnonzero(near[own])),
                               strict=True):  # fmt: skip
            part.append(found)
    return Decision(tuple(parts[0]), tuple(parts[1]), tuple(parts[2]), tuple(parts[3]))


def draw_rows(
    sizes: NDArray[np.int64], rows: NDArray[np.int64], limit: float, *, name: str, seed: int
) -> Iterator[int]:
    """Yield random `rows` of a source until their `sizes` reach `limit` bytes, always at least one."""
    order = np.argsort(_priorities(name, rows, seed), kind="stable")
    taken = 0
    for row in rows[order].tolist():
        if taken >= limit:
            return
        taken += int(sizes[row])
        yield row


def _draw(
    source: SourceSpec, files: list[Path], render: Render, seed: int, counts: SourceCounts
) -> Work[NDArray[np.bool_]]:
    sizes: list[int] = []
    for number, document in enumerate(read_documents(files, render)):
        if number % _TOLD_EVERY == 0:
            yield Progress(f"lengths {source.name}", number, 0)
        sizes.append(len(document.text.encode()))
    counts.documents, counts.utf8_bytes = len(sizes), sum(sizes)
    chosen = np.zeros(len(sizes), np.bool_)
    limit = (source.mb or 0.0) * 1e6
    chosen[list(draw_rows(np.array(sizes), np.arange(len(sizes)), limit, name=source.name, seed=seed))] = True
    return chosen


def _held_out(name: str, store: Store, rows: NDArray[np.int64], valid: ValidSpec, *, seed: int) -> NDArray[np.bool_]:
    """Return which of `rows` are held out: whole documents in random order, as many as fit into the limit."""
    parents, index = np.unique(store.parents[rows], return_inverse=True)
    held = np.zeros(len(parents), np.bool_)
    if len(parents) < 2:
        return held[index]
    sizes = np.bincount(index, weights=store.sizes[rows])
    order = np.argsort(_priorities(name + "/valid", parents, seed), kind="stable")
    limit = min(valid.max_mb * 1e6, np.inf if valid.documents is not None else valid.share * float(sizes.sum()))
    most = min(valid.documents or len(parents), len(parents) // 2)
    taken = 0.0
    for parent in order.tolist():
        if np.count_nonzero(held) >= most:
            break
        if taken + sizes[parent] <= limit:
            held[parent] = True
            taken += sizes[parent]
    if not held.any():
        held[int(np.argmin(sizes))] = True
    return held[index]


def _priorities(name: str, numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Return a random number for each number, the same for the same name and seed on any machine."""
    start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    return mix(numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start))
