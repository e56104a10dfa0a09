"""How long a training step takes on this machine, from a few real ones."""

from __future__ import annotations

import time

import torch

from alambic.data.dataset import Dataset
from alambic.model.bases import Base
from alambic.model.encoder import Encoder, pad
from alambic.train.precision import autocast
from alambic.train.precision import threads as using
from alambic.train.schedule import freeze, groups

_ROWS = 16
_QUANTILES = (0.5, 0.2, 0.5, 0.8, 0.95)  # of length; the first step only warms up


def time_training(base: Base, rows: Dataset, *, threads: int | None, seed: int) -> float:
    """Return the seconds that a training step takes per token: forward, backward and update, on texts of `rows`.

    Batches are rows of like length, as in training, from short to long.
    """
    with using(threads):
        return _time_steps(base, rows, seed)


def _time_steps(base: Base, rows: Dataset, seed: int) -> float:
    torch.manual_seed(seed)
    encoder = Encoder.load(base).with_head(rows.labels, multi_label=rows.multi_label)
    freeze(encoder, embeddings="frozen")
    encoder.train()
    trained = groups(encoder, rate=1e-6, head_rate=1e-6, layer_decay=1.0, weight_decay=0.0)
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    ids = sorted((row[: base.max_tokens] for row in encoder.tokenize(rows.texts)), key=len)
    seconds, tokens = 0.0, 0
    for step, quantile in enumerate(_QUANTILES):
        first = min(int(quantile * len(ids)), max(0, len(ids) - _ROWS))
        batch = ids[first : first + _ROWS]
        began = time.perf_counter()
        with autocast():
            pooled = encoder.pool(*pad(batch, pad_id=encoder.pad_id))
        encoder.classify(pooled.float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step > 0:
            seconds += time.perf_counter() - began
            tokens += sum(map(len, batch))
    return seconds / tokens
