"""The tutor: reads the texts, learns from each answer, and keeps ready what to ask next, in a thread of its own.

Nobody ever waits for it. Until it has something to say, texts come in the order of the file; if it fails, its error is
in `view` and annotation goes on without it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from alambic.build.labelling.encoder import VectorCache
from alambic.train.labelling import Guesses, Learner, next_texts

Embed = Callable[[Sequence[str]], NDArray[np.float32]]

_CHUNK = 128  # texts read at once
_QUEUE = 200  # texts ordered ahead
_SECONDS_BETWEEN = 3.0  # while it still reads


@dataclass(frozen=True)
class View:
    """What the tutor has found so far; replaced whole, so that a reader never sees half of it.

    Attributes:
        read: texts whose vectors are known.
        total: all texts.
        order: the next texts, most useful first, each with why.
        guesses: of the texts that were read when it last learned.
        answers: how many answers it has learned from.
        fits: how often it has learned.
        seconds: how long the last time took.
        error: why it stopped, if it did.
    """

    total: int
    read: int = 0
    order: tuple[tuple[int, str], ...] = ()
    guesses: Guesses | None = None
    answers: int = 0
    fits: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class _Answers:
    """Labels by text number, and the texts that need no answer any more."""

    labels: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    closed: frozenset[int] = frozenset()


class Tutor:
    """Learns in the background; `tell` it the answers, look at `view`, `close` it at the end."""

    def __init__(
        self, embed: Embed, texts: Sequence[str], labels: Mapping[str, str], *, multi_label: bool, cache: VectorCache
    ) -> None:
        """Begin to read `texts`.

        Args:
            embed: gives the vectors of texts.
            texts: all of them.
            labels: names with their descriptions (which may be empty: then the name speaks).
            multi_label: a text may have several labels.
            cache: vectors of an earlier run.
        """
        self._embed, self._texts, self._labels = embed, texts, dict(labels)
        self._multi_label, self._cache = multi_label, cache
        self._view = View(total=len(texts))
        self._told = _Answers()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tutor")
        self._work: Future[None] = self._pool.submit(self._run)

    @property
    def view(self) -> View:
        """What it has found so far."""
        failure = self._work.exception() if self._work.done() else None
        if failure is not None and self._view.error is None:
            self._view = replace(self._view, order=(), error=f"{type(failure).__name__}: {failure}")
        return self._view

    def tell(self, labels: Mapping[int, tuple[str, ...]], closed: frozenset[int]) -> None:
        """Give all answers so far, by text number, and which texts are not to be asked about; returns at once."""
        self._told = _Answers(dict(labels), closed)
        self._wake.set()

    def settle(self, seconds: float) -> View:
        """Wait until all that was told is learned, at most `seconds`; for tests and programs."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self._work.done():
            view = self._view
            if view.read == view.total and view.fits and not self._wake.is_set() and self._idle:
                break
            time.sleep(0.005)
        return self.view

    def close(self) -> None:
        """Stop; what it is doing is finished first."""
        self._stopped.set()
        self._wake.set()
        self._pool.shutdown(wait=True)

    _idle = False

    def _run(self) -> None:
        learner = self._read()
        while learner is not None and not self._stopped.is_set():
            self._idle = not self._wake.is_set()
            self._wake.wait()
            self._idle = False
            self._wake.clear()
            if not self._stopped.is_set():
                self._learn(learner)

    def _read(self) -> Learner | None:
        """Read every text, and learn from time to time meanwhile; None when stopped."""
        spoken = [description or name for name, description in self._labels.items()]
        descriptions = self._embed([text.replace("_", " ") for text in spoken])
        vectors = np.zeros((len(self._texts), descriptions.shape[1]), dtype=np.float32)
        known = [self._cache.get(text) for text in self._texts]
        learned = time.monotonic()
        fresh = False
        for i in range(0, len(self._texts), _CHUNK):
            if self._stopped.is_set():
                return None
            missing = [j for j in range(i, min(i + _CHUNK, len(self._texts))) if not _fits(known[j], vectors)]
            if missing:
                fresh = True
                vectors[missing] = self._embed([self._texts[j] for j in missing])
            for j in set(range(i, min(i + _CHUNK, len(self._texts)))) - set(missing):
                vectors[j] = known[j]
            done = min(i + _CHUNK, len(self._texts))
            self._view = replace(self._view, read=done)
            if done < len(self._texts) and (i == 0 or time.monotonic() - learned > _SECONDS_BETWEEN):
                self._learn(self._learner(vectors[:done], descriptions))
                learned = time.monotonic()
        if fresh:
            self._cache.keep(self._texts, vectors)
        learner = self._learner(vectors, descriptions)
        self._wake.clear()
        self._learn(learner)
        return learner

    def _learner(self, vectors: NDArray[np.float32], descriptions: NDArray[np.float32]) -> Learner:
        return Learner(vectors, descriptions, n_labels=len(self._labels), multi_label=self._multi_label)

    def _learn(self, learner: Learner) -> None:
        began = time.perf_counter()
        told, names = self._told, list(self._labels)
        index = {name: i for i, name in enumerate(names)}
        read = len(learner.vectors)
        rows = [row for row in told.labels if row < read]
        matrix = np.zeros((len(rows), len(names)), dtype=bool)
        for i, row in enumerate(rows):
            matrix[i, [index[name] for name in told.labels[row] if name in index]] = True
        guesses = learner.fit(np.array(rows, dtype=np.intp), matrix)
        asked = np.array([row for row in range(read) if row not in told.closed], dtype=np.intp)
        order = next_texts(guesses, learner, asked, matrix.sum(axis=0).tolist(), n=_QUEUE)
        self._view = replace(
            self._view, order=tuple(order), guesses=guesses, answers=len(rows), fits=self._view.fits + 1,
            seconds=time.perf_counter() - began,
        )  # fmt: skip


def _fits(vector: NDArray[np.float32] | None, vectors: NDArray[np.float32]) -> bool:
    return vector is not None and vector.shape == vectors.shape[1:]
