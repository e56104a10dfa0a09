"""Few examples a class: pull texts of one class together before fitting the head.

Supervised contrastive loss over the batch (Khosla et al. 2020, https://arxiv.org/abs/2004.11362), as SetFit does with
pairs (Tunstall et al. 2022, https://arxiv.org/abs/2209.11055): ten texts a class make hundreds of pairs.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from alambic.data.dataset import Dataset, Example

_NOT_WORDS = re.compile(r"[\W_]+")


def supcon(embeddings: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Return the mean loss over rows that have a partner of their class in the batch.

    Args:
        embeddings: [B, H], L2-normalised.
        targets: [B] class numbers.
        temperature: lower is stricter.
    """
    n = len(targets)
    itself = torch.eye(n, dtype=torch.bool)
    similar = (embeddings @ embeddings.T / temperature).masked_fill(itself, float("-inf"))  # B, B
    log_share = similar - similar.logsumexp(dim=1, keepdim=True)
    partners = (targets[:, None] == targets[None, :]) & ~itself
    count = partners.sum(dim=1)
    losses = -log_share.masked_fill(~partners, 0.0).sum(dim=1) / count.clamp(min=1)
    return losses.sum() / (count > 0).sum().clamp(min=1)


def with_label_names(dataset: Dataset) -> Dataset:
    """Add each label's name, read as words, as one more text of its class; names without words add nothing."""
    named = [(label, _NOT_WORDS.sub(" ", label).strip().lower()) for label in dataset.labels]
    extra = tuple(Example(words, (label,), where="label name") for label, words in named if words.strip("0123456789 "))
    return Dataset(dataset.examples + extra, dataset.labels, dataset.multi_label)
