"""Learning rates: warm-up then decay, one rate a layer, and which weights are trained."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from torch import nn

from alambic.model.encoder import Encoder

_LAYER = re.compile(r"\blayers?\.(\d+)\.")


Shape = Literal["cosine", "wsd", "linear"]
_DECAY_SHARE = 0.2  # of a warm-up/stable/decay schedule
# Each time a row that is seldom seen is met, Adam moves it by rate / sqrt(1 - beta2) in all: 32 rates at the usual
# 0.999, 10 at 0.99. Rare words would be thrown far from where they start.
_TABLE_BETAS = (0.9, 0.99)


def factor(
    step: int, *, total: int, warmup: float, shape: Shape = "linear", decay: float = _DECAY_SHARE, final: float = 0.0
) -> float:
    """Return the share of the peak rate at `step`: linear up over `warmup` of `total`, then down to `final`.

    ``linear`` goes straight down, ``cosine`` along a half cosine, ``wsd`` stays at the peak and falls straight over the
    last `decay` of `total` (Hu et al. 2024, https://arxiv.org/abs/2404.06395).
    """
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    left = max(0.0, (total - step) / max(1, total - rise))
    if shape == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    elif shape == "wsd":
        left = min(1.0, max(0.0, (total - step) / max(1, total * decay)))
    return final + (1 - final) * left


def freeze(encoder: Encoder, *, embeddings: str) -> None:
    """Mark what is trained; the table of word embeddings (half of a small encoder) is left as it is when ``frozen``."""
    table = encoder.backbone.get_input_embeddings()
    table.weight.requires_grad_(embeddings == "trained")


def set_dropout(encoder: Encoder, share: float | None) -> None:
    """Drop `share` in all layers; None leaves each as it is."""
    if share is None:
        return
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


def groups(
    encoder: Encoder, *, rate: float, head_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW groups: the top layer learns at `rate`, each one below at `layer_decay` times the one above."""
    trained = [(name, p) for name, p in encoder.backbone.named_parameters() if p.requires_grad]
    numbers = [int(found[1]) for name, _ in trained if (found := _LAYER.search(name))]
    depth = 1 + max(numbers, default=0)
    table: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        found = _LAYER.search(name)
        level = depth - 1 - int(found[1]) if found else depth
        table.setdefault((level, parameter.ndim > 1), []).append(parameter)
    made = [_group(p, rate * layer_decay**level, weight_decay if matrix else 0.0)
            for (level, matrix), p in table.items()]  # fmt: skip
    if encoder.head is not None:
        made.append(_group(list(encoder.head.parameters()), head_rate, 0.0))
    return made


def table_groups(
    encoder: Encoder, *, train: Literal["embeddings", "all"], rate: float, table_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW groups with the word embeddings at a rate of their own, and mark what is trained.

    Args:
        encoder: its word embeddings always learn.
        train: ``embeddings`` leaves all else as it is.
        rate: peak rate of all else.
        table_rate: peak rate of the word embeddings.
        weight_decay: of matrices, not of biases and embeddings.
    """
    table = encoder.backbone.get_input_embeddings().weight
    for parameter in encoder.backbone.parameters():
        parameter.requires_grad_(train == "all")
    table.requires_grad_(True)
    rest = [p for p in encoder.backbone.parameters() if p.requires_grad and p is not table]
    made = [
        {"params": [table], "peak": table_rate, "weight_decay": 0.0, "betas": _TABLE_BETAS},
        {"params": [p for p in rest if p.ndim > 1], "peak": rate, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "peak": rate, "weight_decay": 0.0},
    ]
    return [group for group in made if group["params"]]


def _group(parameters: list[nn.Parameter], rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, "peak": rate, "weight_decay": weight_decay}


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
