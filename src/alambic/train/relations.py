"""How the last layers of two encoders relate the tokens of a text to each other, and how far apart they are.

The relations are those of MiniLMv2 (Wang et al. 2021, https://arxiv.org/abs/2012.15828): the similarities among the
queries, among the keys and among the values of the last layer. They are compared token by token, so both encoders must
read the same ids; their widths may differ, as each is cut into as many heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alambic.errors import TrainError
from alambic.model.encoder import Encoder

# How the families call their projections to queries, keys and values.
_NAMES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"))


class Relations:
    """Keeps what the last layer of `encoder` computed in its last forward pass; close it to take the hooks off."""

    def __init__(self, encoder: Encoder) -> None:
        self.kept: dict[int, Tensor] = {}
        projections = _projections(encoder)
        self.width = int(projections[0].out_features)
        self._hooks = [module.register_forward_hook(self._keep(i)) for i, module in enumerate(projections)]

    def _keep(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.kept[place] = output

        return hook

    def of(self, heads: int) -> Iterator[Tensor]:
        """Yield the similarities [B, heads, T, T] among queries, keys and values, scaled, before the softmax."""
        for place in range(3):
            values = self.kept[place].float()
            B, T, D = values.shape
            split = values.view(B, T, heads, D // heads).transpose(1, 2)  # B, heads, T, D / heads
            yield split @ split.transpose(2, 3) / (D // heads) ** 0.5

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def heads_of(student: Relations, teacher: Relations, wanted: int) -> int:
    """Return into how many heads both are cut.

    Raises:
        TrainError: a width cannot be cut so.
    """
    for relations in (student, teacher):
        if relations.width % wanted:
            raise TrainError(
                f"relations: a width of {relations.width} cannot be cut into the teacher's {wanted} heads",
                hint="relations = 0 in the recipe leaves them out",
            )
    return wanted


def relation_loss(student: Relations, teacher: Relations, mask: Tensor, *, heads: int) -> Tensor:
    """Return the divergence of the student's relations from the teacher's, a mean over tokens, heads and kinds."""
    hidden = (mask == 0)[:, None, None, :]  # B, 1, 1, T
    weights = mask[:, None, :].float()  # B, 1, T
    total = torch.zeros(())
    for own, other in zip(student.of(heads), teacher.of(heads), strict=True):
        log_own = own.masked_fill(hidden, -1e4).log_softmax(dim=-1)
        truth = other.masked_fill(hidden, -1e4).softmax(dim=-1)
        each = (truth * (truth.clamp(min=1e-9).log() - log_own)).sum(dim=-1)  # B, heads, T
        total = total + (each * weights).sum() / (weights.sum() * heads)
    return total / 3


def _projections(encoder: Encoder) -> list[nn.Linear]:
    """Find the three projections of the last layer.

    Raises:
        TrainError: they are not apart in this architecture.
    """
    named = dict(encoder.backbone.named_modules())
    for triple in _NAMES:
        found = [[m for n, m in named.items() if n.rpartition(".")[2] == part] for part in triple]
        if all(found):
            return [each[-1] for each in found]
    raise TrainError(
        f"relations: {encoder.spec.architecture} has no queries, keys and values of its own to compare",
        hint="relations = 0 in the recipe leaves them out",
    )
