"""From a dataset to batches of ids: what to do with long texts; batches of like length in an order fixed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from alambic.data.dataset import Dataset
from alambic.errors import TrainError
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
    """Tokenize `dataset`; a text longer than the encoder reads follows `long`.

    Raises:
        TrainError: a text is too long and `long` is ``error``.
    """
    prefix, suffix = encoder.special_ids()
    rows = []
    pairs = zip(encoder.tokenize(dataset.texts), dataset.targets(), strict=True)
    for number, (ids, targets) in enumerate(pairs):
        if len(ids) > encoder.spec.max_tokens and long == "error":
            where = dataset.examples[number].where or f"row {number + 1}"
            raise TrainError(
                f"{where}: the text has {len(ids)} tokens, the base reads {encoder.spec.max_tokens}",
                hint='set data.long to "windows", "head" or "head_tail", or a larger base.max_tokens',
            )
        pieces = cut(ids, limit=encoder.spec.max_tokens, long=long, prefix=prefix, suffix=suffix)
        rows += [Row(tuple(piece), tuple(targets), 1.0 / len(pieces), number) for piece in pieces]
    return rows


def cut(ids: list[int], *, limit: int, long: str, prefix: Sequence[int], suffix: Sequence[int]) -> list[list[int]]:
    """Cut `ids` (specials included) into pieces of at most `limit` tokens, each with its own specials."""
    if len(ids) <= limit:
        return [ids]
    body = ids[len(prefix) : len(ids) - len(suffix)]
    room = limit - len(prefix) - len(suffix)
    if long == "head":
        parts = [body[:room]]
    elif long == "head_tail":
        parts = [body[: room - room // 2] + body[len(body) - room // 2 :]]
    else:
        parts = [body[i : i + room] for i in range(0, len(body), room)]
    return [[*prefix, *part, *suffix] for part in parts]


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
