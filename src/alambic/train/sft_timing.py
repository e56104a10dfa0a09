"""How long a fine-tuning will take, told before it begins from what this machine computes in a second."""

from __future__ import annotations

import time

import torch

from alambic.train.precision import autocast, threads

_SIDE = 1536
_SECONDS = 0.4
# Share of a plain product's rate that a training step reaches here; measured at 8 M to 500 M parameters (lab notes).
_EFFICIENCY = 0.45


def training_seconds(parameters: int, tokens: float, *, adapter: bool, number_of_threads: int | None = None) -> float:
    """Predict the seconds of training on `tokens` tokens, passes counted.

    A pass forward takes 2 products a weight and token, backward 4, or 2 where only an adapter learns (Kaplan et al.
    2020, section 2.1).
    """
    with threads(number_of_threads):
        rate = _operations_a_second()
    return (4.0 if adapter else 6.0) * parameters * tokens / (rate * _EFFICIENCY)


def _operations_a_second() -> float:
    """Return the floating-point operations a second of a square product as a training step computes it."""
    a, b = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    with torch.no_grad(), autocast():
        torch.mm(a, b)
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < _SECONDS:
            torch.mm(a, b)
            done += 1
        return float(2.0 * _SIDE**3 * done / (time.perf_counter() - begun))
