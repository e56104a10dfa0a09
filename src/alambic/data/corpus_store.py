"""Kept documents on disk: one file of UTF-8 text with offsets, and what was computed of each document beside it.

    docs.bin       texts, one after the other
    docs.npz       offsets [n + 1], parents [n], exact [n] (hash of the text), sketches [n, 120]
    docs.json      whether the texts have the special tokens of the template

A store is written once, as a stream, and then read by number. It is closed before anybody opens it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alambic.data.corpus_sketch import SIZE, Sketch
from alambic.data.duplicates import exact_key


@dataclass(frozen=True)
class Store:
    """Documents of one source.

    Attributes:
        folder: where they are.
        offsets: of the texts in bytes, [n + 1].
        parents: document that each piece is of, [n].
        exact: equal for equal texts, whatever the case and white space, [n].
        sketches: [n, 120].
        chat: whether the texts have the template's special tokens.
    """

    folder: Path
    offsets: NDArray[np.int64]
    parents: NDArray[np.int64]
    exact: NDArray[np.uint64]
    sketches: Sketch
    chat: bool

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each document, [n]."""
        return np.diff(self.offsets)

    def texts(self, rows: Iterable[int]) -> Iterator[str]:
        """Yield the texts of `rows`, read from disk one by one."""
        if not len(self):
            return
        with open(self.folder / "docs.bin", "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                for row in rows:
                    yield data[int(self.offsets[row]) : int(self.offsets[row + 1])].decode("utf-8")
            finally:
                data.close()


class StoreWriter:
    """Writes a store; `close` makes it whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._out = open(folder / "docs.bin", "wb")  # noqa: SIM115 - closed by `close`
        self._offsets, self._parents, self._exact = [0], [0][:0], [0][:0]
        self._sketches: list[Sketch] = []
        self._chat = False

    def add(self, text: str, *, parent: int, sketch: Sketch, chat: bool) -> None:
        """Append a document."""
        data = text.encode()
        self._out.write(data)
        self._offsets.append(self._offsets[-1] + len(data))
        self._parents.append(parent)
        self._exact.append(int.from_bytes(hashlib.blake2b(exact_key(text).encode(), digest_size=8).digest(), "little"))
        self._sketches.append(sketch)
        self._chat = self._chat or chat

    def close(self) -> None:
        """Write what goes beside the texts."""
        self._out.close()
        sketches = np.stack(self._sketches) if self._sketches else np.zeros((0, SIZE), np.uint32)
        np.savez(
            self.folder / "docs.npz", offsets=np.array(self._offsets, np.int64), sketches=sketches,
            parents=np.array(self._parents, np.int64), exact=np.array(self._exact, np.uint64),
        )  # fmt: skip
        (self.folder / "docs.json").write_text(json.dumps({"chat": self._chat}), encoding="utf-8")


def open_store(folder: Path) -> Store:
    """Open a store that was closed."""
    chat = json.loads((folder / "docs.json").read_text("utf-8"))["chat"]
    with np.load(folder / "docs.npz") as file:
        return Store(folder, file["offsets"], file["parents"], file["exact"], file["sketches"], chat)
