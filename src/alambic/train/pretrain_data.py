"""Which tokens a step of pre-training reads: a function of (seed, number of the window), so that a resumed run repeats.

A source is one long row of documents. A pass cuts it into windows from a random phase on and takes them in random
order. Windows of the sources are laid out so that every stretch of the training has each source's share, whatever its
length: the k-th window of a source with share w stands at (k + phase) / w (a low-discrepancy merge).

Each document is preceded by the end token of the one before, which the model thus learns as the beginning of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from alambic.data.shards import Part, Shards
from alambic.errors import TrainError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """The windows of a whole training, numbered.

    Attributes:
        shards: where the tokens are.
        length: tokens of a window.
        seed: of phases and orders.
        owner: which source each window is of, [windows].
        turn: which window of its source it is, all passes counted, [windows].
    """

    shards: Shards
    length: int
    seed: int
    owner: NDArray[np.int32]
    turn: NDArray[np.int64]

    def read(self, first: int, count: int) -> Ids:
        """Return windows `first` to `first + count` as ids [count, length]."""
        rows = np.empty((count, self.length), dtype=np.int64)
        for i in range(count):
            rows[i] = self._window(int(self.owner[first + i]), int(self.turn[first + i]))
        return rows

    def passes(self) -> dict[str, float]:
        """Return how often the whole training reads each source."""
        counts = np.bincount(self.owner, minlength=len(self.shards.sources))
        return {
            source.name: float(count) * self.length / source.train.tokens if source.train.tokens else 0.0
            for source, count in zip(self.shards.sources, counts, strict=True)
        }

    def _window(self, owner: int, turn: int) -> NDArray[np.unsignedinteger]:
        source = self.shards.sources[owner]
        per_pass = max(1, source.train.tokens // self.length - 1)
        number, place = divmod(turn, per_pass)
        phase, order = _order(self.seed, owner, number, per_pass, self.length)
        start = phase + int(order[place]) * self.length
        ids = _map(self.shards, "train", source.name)
        # A source of less than two windows is read round and round.
        return ids[start : start + self.length] if start + self.length <= len(ids) else ids.take(
            range(start, start + self.length), mode="wrap"
        )  # fmt: skip


def lay_out(shards: Shards, *, length: int, windows: int, seed: int) -> Windows:
    """Number the windows of a training.

    Args:
        shards: tokens and shares of the sources.
        length: tokens of a window.
        windows: of the whole training; more do not change the first ones.
        seed: of the order.

    Raises:
        TrainError: there is nothing to read.
    """
    shares = np.array([source.weight if source.train.tokens else 0.0 for source in shards.sources])
    if not shares.sum() > 0:
        raise TrainError(f"{shards.folder}: there are no tokens to train on")
    shares = shares / shares.sum()
    phases = np.random.default_rng((seed, 0)).random(len(shares))
    owners, turns, times = [], [], []
    for i, share in enumerate(shares):
        if share == 0:
            continue
        count = int(np.ceil(windows * share)) + 1
        owners.append(np.full(count, i, dtype=np.int32))
        turns.append(np.arange(count, dtype=np.int64))
        times.append((np.arange(count) + phases[i]) / share)
    order = np.argsort(np.concatenate(times), kind="stable")[:windows]
    return Windows(shards, length, seed, np.concatenate(owners)[order], np.concatenate(turns)[order])


def held_out(shards: Shards, name: str, *, length: int, most: int | None) -> Ids:
    """Return the held-out tokens of a source as windows [N, length + 1], each document after an end token.

    A window begins with the last token of the one before, so every token is predicted exactly once; the last window
    is filled up with end tokens, -1 marking in its place what does not count. With `most`, windows spread evenly over
    the source are taken, about so many tokens in all.
    """
    ids = _map(shards, "valid", name)
    if len(ids) == 0:
        return np.empty((0, length + 1), dtype=np.int64)
    number = -(-len(ids) // length)
    whole = np.full(number * length + 1, -1, dtype=np.int64)
    whole[0] = shards.end_id
    whole[1 : len(ids) + 1] = ids
    rows = np.stack([whole[i * length : (i + 1) * length + 1] for i in range(number)])
    wanted = number if most is None else max(1, min(number, most // length))
    spread: NDArray[np.int64] = rows[np.linspace(0, number - 1, wanted).round().astype(int)]
    return spread


@lru_cache(maxsize=64)
def _order(seed: int, owner: int, number: int, per_pass: int, length: int) -> tuple[int, NDArray[np.int64]]:
    rng = np.random.default_rng((seed, 1, owner, number))
    return int(rng.integers(length)), rng.permutation(per_pass)


@lru_cache(maxsize=64)
def _map(shards: Shards, part: Part, name: str) -> NDArray[np.unsignedinteger]:
    return shards.tokens(part, name)
