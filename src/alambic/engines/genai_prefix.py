"""Ends of earlier requests that the prefix cache keeps half a block of, and who may start from one.

OpenVINO GenAI 2026.4 lets several requests that begin in the same step share such a half block, and then all but the
last of them write into one another's keys: follow-ups of one conversation that come together get other answers. Alone,
or once the one before has its first token, each is right. So the core asks here who has to wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Tail = tuple[int, int]  # length, hash


class Tails:
    """The half blocks that the cache may hold; old ones are forgotten as the engine overwrites them."""

    def __init__(self, *, block: int, most: int) -> None:
        """Start empty.

        Args:
            block: tokens of a block.
            most: ends to remember.
        """
        self._block = block
        self._most = most
        self._kept: OrderedDict[Tail, None] = OrderedDict()

    def end(self, ids: Sequence[int], *, known: int) -> None:
        """Note that a request ended after `ids`: somewhere from `known` tokens on its last block was given back."""
        for tail in self._prefixes(ids):
            if tail[0] >= known and tail[0] % self._block:
                self._keep(tail)

    def within(self, ids: Sequence[int]) -> frozenset[Tail]:
        """Return the ends that `ids` goes on from."""
        found = frozenset(tail for tail in self._prefixes(ids) if tail in self._kept) if self._kept else frozenset()
        for tail in found:
            self._keep(tail)
        return found

    def _keep(self, tail: Tail) -> None:
        self._kept[tail] = None
        self._kept.move_to_end(tail)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _prefixes(self, ids: Sequence[int]) -> list[Tail]:
        prefixes, value = [], 0
        for length, id in enumerate(ids, 1):
            value = hash((value, id))
            prefixes.append((length, value))
        return prefixes
