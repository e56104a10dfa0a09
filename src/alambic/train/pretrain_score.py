"""Held-out documents in bits per byte, by source: comparable across tokenizers and with models of another kind.

Every token of a document counts, and its end token too; the bytes are those of the text. A window begins with no more
context than its first token, so long documents are scored a little worse than a reader with memory would do. For an
encoder it is the bits of the tokens that it guesses from both sides, not to be compared with a decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alambic.data.shards import Shards
from alambic.train.distributed import total, world
from alambic.train.pretrain_data import Ids, held_out

Nats = Callable[[Ids, Sequence[int]], tuple[float, int]]
_FIRST = 1 << 40  # number of the first held-out window, beyond any of training


@dataclass(frozen=True)
class SourceScore:
    """A source's held-out text.

    Attributes:
        bits_per_byte: cross-entropy in bits, by UTF-8 byte of text.
        nats_per_token: the same by token.
        tokens: scored.
        utf8_bytes: of them; by the source's mean bytes a token where only a part was read.
        whole: all of the source's held-out text was read.
    """

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    utf8_bytes: float
    whole: bool


@dataclass(frozen=True)
class Score:
    """Bits per byte by source, and over the bytes of all."""

    sources: dict[str, SourceScore]

    @property
    def bits_per_byte(self) -> float:
        """Bits of all sources by the bytes of all."""
        bits = sum(s.bits_per_byte * s.utf8_bytes for s in self.sources.values())
        return bits / sum(s.utf8_bytes for s in self.sources.values())


def score_shards(
    shards: Shards, nats: Nats, *, length: int, most: int | None, rows: int, in_step: bool = False
) -> Score | None:
    """Score the held-out text of every source that has some; None when none has.

    Args:
        shards: where it is.
        nats: windows [N, length + 1] and their numbers to the summed cross-entropy and how many tokens it is of (those
            that an encoder guesses stand for all); -1 does not count.
        length: tokens of a window.
        most: tokens of each source, evenly spread; None: all.
        rows: windows at once.
        in_step: every process calls `nats` as often as the others.
    """
    found = {}
    place = world()
    for source in shards.sources:
        windows = held_out(shards, source.name, length=length, most=most)
        if len(windows) == 0:
            continue
        batches = [range(i, min(i + rows, len(windows))) for i in range(0, len(windows), rows)]
        parts = [nats(windows[batch], [_FIRST + i for i in batch]) for batch in place.share(batches)]
        if in_step and len(parts) < -(-len(batches) // place.size):
            nats(windows[batches[0]], [_FIRST + i for i in batches[0]])
        summed, count = total([sum(part[0] for part in parts), sum(part[1] for part in parts)])
        mean, tokens = summed / count, int((windows[:, 1:] >= 0).sum())
        size = source.valid.utf8_bytes * tokens / source.valid.tokens
        found[source.name] = SourceScore(
            bits_per_byte=mean * tokens / math.log(2) / size,
            nats_per_token=mean,
            tokens=tokens,
            utf8_bytes=size,
            whole=tokens == source.valid.tokens,
        )
    return Score(found) if found else None


def counted(windows: Ids, *, end_id: int) -> tuple[Ids, Ids, NDArray[np.bool_]]:
    """Split windows [N, T + 1] into inputs, targets and which targets count, each [N, T]."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    known = targets >= 0
    return np.where(inputs < 0, end_id, inputs), np.where(known, targets, end_id), known
