"""The start of a classification head: a linear model fitted on frozen embeddings.

Fine-tuning from a random head first distorts good features; from a fitted one it does not, and most of the work is
done before the first step (LP-FT, Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """weight [L, H] and bias [L]."""

    weight: Tensor
    bias: Tensor


def fit_head(
    features: Tensor, targets: Tensor, *, n_labels: int, penalty: float, weights: Tensor | None = None, rounds: int = 60
) -> Head:
    """Fit a logistic regression by L-BFGS, with an L2 `penalty` on the weights; same inputs, same head.

    Args:
        features: [N, H], as the head will see them (scaled).
        targets: [N] class numbers, or [N, L] zeros and ones (one logistic regression a label).
        n_labels: number of labels.
        penalty: L2 strength relative to the mean loss.
        weights: [L] class weights.
        rounds: L-BFGS iterations at most.
    """
    weight = torch.zeros(n_labels, features.shape[1], requires_grad=True)
    bias = torch.zeros(n_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=rounds, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = features @ weight.T + bias  # N, L
        loss = objective(logits, targets, weights=weights).mean() + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():  # dev scores are taken under no_grad, and may refit
        optimizer.step(closure)
    return Head(weight.detach(), bias.detach())


def objective(logits: Tensor, targets: Tensor, *, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Return the loss of each row [N]: cross-entropy, or the mean binary cross-entropy over labels."""
    if targets.ndim == 1:
        return nn.functional.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing, reduction="none")
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
    return losses.mean(dim=1)


def predict(logits: Tensor, *, multi_label: bool) -> Tensor:
    """Return class numbers [N], or zeros and ones [N, L] at probability one half."""
    return (logits > 0).to(torch.float32) if multi_label else logits.argmax(dim=1)
