"""From a dataset to batches of ids: what to do with long texts; batches of like length in an order fixed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alambic.data.dataset import Dataset
from alambic.engines.windows import Cutter
from alambic.errors import InputTooLong, TrainError
from alambic.model.encoder import Encoder, pad

# Rows are sorted by length inside chunks of this many batches: little padding, and batches still differ each epoch.
_CHUNK = 50


@dataclass(frozen=True)
class Row:
    """One window of one text: its ids, its targets, and what share of its text it stands for."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    weight: float = 1.0
    text: int = 0


@dataclass(frozen=True)
class Batch:
    """Padded ids [B, T], mask [B, T], targets ([B] class numbers, or [B, L] zeros and ones), weights [B]."""

    ids: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor


def rows_of(encoder: Encoder, dataset: Dataset, *, long: str) -> list[Row]:
    """Tokenize `dataset`; a text longer than the encoder reads is cut as the engines cut it.

    Raises:
        TrainError: a text is too long and `long` is ``error``.
    """
    prefix, suffix = encoder.special_ids()
    cutter = Cutter(long, encoder.spec.max_tokens, tuple(prefix), tuple(suffix), encoder.pad_id)
    rows = []
    pairs = zip(encoder.tokenize(dataset.texts), dataset.targets(), strict=True)
    for number, (ids, targets) in enumerate(pairs):
        try:
            pieces = cutter.cut(ids)
        except InputTooLong as error:
            where = dataset.examples[number].where or f"row {number + 1}"
            hint = 'set data.long to "windows", "head" or "head_tail", or a larger base.max_tokens'
            raise TrainError(f"{where}: {error.message}", hint=hint) from error
        total = sum(map(len, pieces))
        rows += [Row(tuple(piece), tuple(targets), len(piece) / total, number) for piece in pieces]
    return rows


def epoch_order(rows: Sequence[Row], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the row numbers of each batch of one epoch; the same for the same seed and epoch."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(rows))
    size = batch_size * _CHUNK
    batches = []
    for start in range(0, len(order), size):
        chunk = sorted(order[start : start + size].tolist(), key=lambda i: len(rows[i].ids))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(rows: Sequence[Row], *, pad_id: int, n_labels: int, multi_label: bool) -> Batch:
    """Pad `rows` to the longest of them."""
    ids, mask = pad([row.ids for row in rows], pad_id=pad_id)
    weights = torch.tensor([row.weight for row in rows])
    return Batch(ids, mask, target_tensor([row.targets for row in rows], n_labels, multi_label=multi_label), weights)


def target_tensor(targets: Sequence[Sequence[int]], n_labels: int, *, multi_label: bool) -> Tensor:
    """Return class numbers [N], or zeros and ones [N, L] when several labels may hold."""
    if not multi_label:
        return torch.tensor([t[0] for t in targets])
    matrix = torch.zeros(len(targets), n_labels)
    for i, chosen in enumerate(targets):
        matrix[i, list(chosen)] = 1.0
    return matrix


def class_order(rows: Sequence[Row], *, classes: int, each: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the row numbers of each batch of one epoch: `each` rows of up to `classes` different classes a batch."""
    rng = np.random.default_rng((seed, epoch))
    members: dict[int, list[int]] = {}
    for i in rng.permutation(len(rows)).tolist():
        members.setdefault(rows[i].targets[0], []).append(i)
    batches = []
    while members:  # one group of each class a turn, so that no class is twice in a batch
        names = [list(members)[i] for i in rng.permutation(len(members))]
        for start in range(0, len(names), classes):
            batches.append([i for name in names[start : start + classes] for i in members[name][:each]])
        members = {name: rest[each:] for name, rest in members.items() if len(rest) > each}
    return batches


def batch_at(epoch: Callable[[int], list[list[int]]], *, per_epoch: int) -> Callable[[int], list[int]]:
    """Turn `epoch number -> its batches` into `step -> its batch`, keeping one epoch at a time."""
    cached = lru_cache(maxsize=1)(epoch)

    def at(step: int) -> list[int]:
        number, offset = divmod(step, per_epoch)
        return cached(number)[offset]

    return at


class ByWidth:
    """Batches of units of like width, each at most `budget` tokens wide (or one unit).

    Every epoch has the same widths in the same places, so its batches are cut at the same bounds and only the company
    changes: the number of steps is known beforehand, and a step's batch follows from (seed, step).

    Args:
        widths: tokens of the widest row of each unit.
        rows: rows of each unit.
        budget: tokens of a batch, padding included.
        seed: of the company.
    """

    def __init__(self, widths: NDArray[np.int64], rows: NDArray[np.int64], *, budget: int, seed: int) -> None:
        self.widths, self.rows, self.seed = widths, rows, seed
        order = np.lexsort((rows, widths))
        self.bounds = list(_bounds(widths[order], rows[order], budget=budget))

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return len(self.bounds)

    def epoch(self, number: int) -> list[list[int]]:
        """Return the units of each batch of epoch `number`."""
        rng = np.random.default_rng((self.seed, number))
        mixed = rng.permutation(len(self.widths))
        order = mixed[np.lexsort((self.rows[mixed], self.widths[mixed]))]
        batches = [order[start:stop].tolist() for start, stop in self.bounds]
        return [batches[i] for i in rng.permutation(len(batches))]

    def tokens(self, steps: int, sizes: NDArray[np.int64]) -> int:
        """Count the tokens of the first `steps` steps, `sizes` being those of each unit, without padding."""
        whole, rest = divmod(steps, len(self))
        part = [i for batch in self.epoch(whole)[:rest] for i in batch]
        return int(whole * sizes.sum() + sizes[part].sum())


def _bounds(widths: NDArray[np.int64], rows: NDArray[np.int64], *, budget: int) -> Iterator[tuple[int, int]]:
    """Cut units, sorted by width, into batches of at most `budget` tokens (or one unit)."""
    start = held = 0
    for i, (width, own) in enumerate(zip(widths.tolist(), rows.tolist(), strict=True)):
        if i > start and width * (held + own) > budget:
            yield start, i
            start, held = i, 0
        held += own
    yield start, len(widths)
