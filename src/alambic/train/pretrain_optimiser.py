"""Optimisers of pre-training: AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the update of a matrix orthogonal; scaled as
by Liu et al. 2025 (Moonlight, https://arxiv.org/abs/2502.16982, section 2.2) its rate and decay are on AdamW's scale.
Tables of embeddings, heads, norms and biases stay with AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alambic.train.pretrain_params import PretrainParams

_MOMENTUM = 0.95
_EPS = 1e-10  # embeddings have gradients far below 1e-8


class Optimisers:
    """One optimiser or two, used as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Update every weight."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each part."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def make_optimisers(
    model: nn.Module, params: PretrainParams, *, muon: type[torch.optim.Optimizer] | None = None
) -> Optimisers:
    """Return the optimisers of `model`'s weights, with a ``peak`` rate in each group.

    Args:
        model: with its weights where they are to stay.
        params: which, and their rates.
        muon: what stands for torch's Muon, with the same arguments; None: nothing.
    """
    matrices: list[Tensor] = []
    tables: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, weight in model.named_parameters():
        kind = vectors if weight.ndim < 2 else matrices if ".layers." in name else tables
        kind.append(weight)
    rate, decay = params.learning_rate, params.weight_decay
    plain = [_group(tables, rate, 0.0), _group(vectors, rate, 0.0)]
    if params.optimizer == "adamw":
        plain.insert(0, _group(matrices, rate, decay))
    adamw = torch.optim.AdamW([g for g in plain if g["params"]], betas=params.betas, eps=_EPS, fused=True)
    if params.optimizer == "adamw":
        return Optimisers(adamw)
    made = (muon or torch.optim.Muon)(
        [_group(matrices, params.muon_rate, decay)], momentum=_MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    return Optimisers(made, adamw)


def _group(weights: list[Tensor], rate: float, decay: float) -> dict[str, Any]:
    return {"params": weights, "lr": rate, "peak": rate, "weight_decay": decay}
