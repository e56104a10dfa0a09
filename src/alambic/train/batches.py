"""From a dataset to batches of ids: what to do with long texts; batches of like length in an order fixed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
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
