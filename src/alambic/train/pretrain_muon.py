"""Muon of matrices that are cut over the processes; alone in its file because older releases of torch have no Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alambic.train.pretrain_sharding import cut


class ShardedMuon(torch.optim.Muon):  # type: ignore[misc]
    """Muon of matrices of which each process holds some rows.

    The momentum stays cut. What it moves the matrix by is put together, made orthogonal in every process (as without
    sharding), and each process moves its rows.
    """

    def step(self, closure: None = None) -> None:
        """Update every matrix."""
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._move(weight, group)

    def _move(self, weight: Any, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        # The same operations as torch.optim.Muon's; DTensor has no lerp, so they are done on the rows.
        grad, momentum = weight.grad.to_local(), state["momentum_buffer"].to_local()
        momentum.lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        moved = cut(_orthogonal(_like(ahead, weight).full_tensor(), group), weight).to_local()
        weight.to_local().mul_(1 - group["lr"] * group["weight_decay"]).add_(moved)


def _like(rows: Tensor, like: Any) -> Any:
    """Return `rows` of this process as a part of what is cut as `like` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())  # fmt: skip


def _orthogonal(ahead: Tensor, group: dict[str, Any]) -> Tensor:
    """Return what Muon adds to a whole matrix, decay left out: a step of torch's own from zero without momentum."""
    moved = nn.Parameter(torch.zeros_like(ahead))
    moved.grad = ahead
    names = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    torch.optim.Muon([moved], weight_decay=0.0, momentum=0.0, nesterov=False, **{n: group[n] for n in names}).step()
    return moved.detach()
