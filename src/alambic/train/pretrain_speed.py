"""How fast a pre-training goes, and which share of what the device could compute it uses.

Floating-point operations of a step follow Chowdhery et al. 2022 (PaLM, appendix B): six for each weight and token, and
12 x layers x width x context for the products of attention, counted whole although half are not needed. The head counts
(it is multiplied), the lookup of embeddings does not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# Dense bf16 of the makers' data sheets, in operations a second, by a part of the device's name.
_PEAKS = (("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("A100", 312e12),
          ("L40S", 362e12), ("L4", 121e12), ("RTX 4090", 165e12))  # fmt: skip
_SIZE, _ROUNDS = 1024, 8


@dataclass(frozen=True)
class Peak:
    """What the device can compute at best.

    Attributes:
        flops: operations a second; None: unknown.
        source: ``data sheet``, ``measured`` (the fastest of some square products) or ``unknown``.
    """

    flops: float | None
    source: str


def flops_a_token(*, weights: int, layers: int, width: int, context: int) -> float:
    """Return the operations that training takes for one token.

    Args:
        weights: multiplied in a forward pass: blocks and head, without the lookup of embeddings.
        layers: of attention.
        width: of all heads together.
        context: tokens of a window.
    """
    return 6.0 * weights + 12.0 * layers * width * context


def peak_of(device: torch.device, *, dtype: torch.dtype) -> Peak:
    """Return the peak of `device`: by its name where a data sheet is known, measured on a CPU, else unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = next((flops for part, flops in _PEAKS if part in name), None)
        if found is None or dtype != torch.bfloat16:
            return Peak(None, "unknown")
        return Peak(found, "data sheet")
    if device.type != "cpu":
        return Peak(None, "unknown")
    return Peak(_measured(dtype), "measured")


def _measured(dtype: torch.dtype) -> float:
    left, right = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return 2.0 * _SIZE**3 / best
