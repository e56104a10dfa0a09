"""What an encoder in training answers to the rows that decide, and the score of it: shared by all ways of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from alambic.data.dataset import Dataset
from alambic.model.encoder import Encoder, by_length, pad
from alambic.train.batches import Row, target_tensor
from alambic.train.head_start import predict
from alambic.train.precision import autocast


def pooled(rows: Sequence[Row], encoder: Encoder, *, batch_tokens: int = 2048) -> Iterator[tuple[list[int], Tensor]]:
    """Yield row numbers and their pooled embeddings [B, H], in batches of like length."""
    for numbers in by_length([len(row.ids) for row in rows], batch_tokens=batch_tokens):
        ids, mask = pad([rows[i].ids for i in numbers], pad_id=encoder.pad_id)
        yield numbers, encoder.pool(ids, mask).float()


def score(encoder: Encoder, rows: Sequence[Row], dev: Dataset, *, metric: str) -> float:
    """Return `metric` of the encoder's answers to `dev`, whose windows are `rows`."""
    multi = dev.multi_label
    shares = torch.zeros(len(dev), len(dev.labels))
    with autocast():
        for numbers, vectors in pooled(rows, encoder):
            logits = encoder.classify(vectors)
            each = logits.sigmoid() if multi else logits.softmax(dim=1)
            weights = torch.tensor([rows[i].weight for i in numbers])
            shares.index_add_(0, torch.tensor([rows[i].text for i in numbers]), each * weights[:, None])
    return score_shares(shares, dev, metric=metric)


def score_shares(shares: Tensor, dev: Dataset, *, metric: str) -> float:
    """Return `metric` of label shares [N, L] on `dev`."""
    chosen = predict(shares - 0.5 if dev.multi_label else shares, multi_label=dev.multi_label)
    truth = target_tensor(dev.targets(), len(dev.labels), multi_label=dev.multi_label)
    return metric_of(truth, chosen, metric=metric)


def metric_of(truth: Tensor, chosen: Tensor, *, metric: str) -> float:
    """Return `metric` as a share."""
    if metric in ("accuracy", "subset_accuracy"):
        return float(accuracy_score(truth.numpy(), chosen.numpy()))
    average = metric.removesuffix("_f1")
    return float(f1_score(truth.numpy(), chosen.numpy(), average=average, zero_division=0))
