"""How far the hidden states of two encoders of one width are apart, token by token and layer by layer.

The comparison is TinyBERT's (Jiao et al. 2020, https://arxiv.org/abs/1909.10351) for a student as wide as its teacher:
the mean squared error of mapped layers, a student of n layers following every N / n-th of the teacher's N. Divided by
the mean square of the teacher's states, so that its weight means the same in all architectures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alambic.errors import TrainError
from alambic.model.encoder import Encoder
from alambic.model.student import layers_of


class States:
    """Keeps what each layer of `encoder` gave in its last forward pass; close it to take the hooks off."""

    def __init__(self, encoder: Encoder) -> None:
        layers = layers_of(encoder.backbone)
        self.kept: list[Tensor | None] = [None] * len(layers)
        self._hooks = [module.register_forward_hook(self._keep(i)) for i, module in enumerate(layers)]

    def _keep(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.kept[place] = output[0] if isinstance(output, tuple) else output  # B, T, H

        return hook

    def of(self, place: int) -> Tensor:
        """Return what layer `place` gave, [B, T, H]."""
        values = self.kept[place]
        assert values is not None, "the encoder was run before"
        return values.float()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def check_widths(student: Encoder, teacher: Encoder) -> None:
    """Refuse encoders whose states have other widths.

    Raises:
        TrainError: they have.
    """
    own, other = student.spec.hidden, teacher.spec.hidden
    if own != other:
        raise TrainError(
            f"states: the student is {own} wide and its teacher {other}; only states of one width can be compared",
            hint="states = 0 in the recipe leaves them out; relations compares encoders of any width",
        )


def mapped(layers: int, of: int) -> tuple[int, ...]:
    """Return which layer of the teacher's `of` each of the student's `layers` follows; the last follows the last."""
    return tuple(round((i + 1) * of / layers) - 1 for i in range(layers))


def state_loss(student: States, teacher: States, mask: Tensor) -> Tensor:
    """Return the squared distance of the student's states from the teacher's, relative, a mean over tokens and layers.

    Args:
        student: run on the same ids.
        teacher: of the same width.
        mask: 1 for tokens, 0 for padding [B, T].
    """
    weights = mask.float()  # B, T
    places = mapped(len(student.kept), len(teacher.kept))
    total = torch.zeros(())
    for own, theirs in enumerate(places):
        truth = teacher.of(theirs)
        each = (student.of(own) - truth).square().mean(dim=-1)  # B, T
        size = (truth.square().mean(dim=-1) * weights).sum()
        total = total + (each * weights).sum() / size.clamp(min=1e-9)
    return total / len(places)
