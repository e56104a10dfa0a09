"""How a training step computes on this CPU: bf16 where it multiplies bf16 in hardware, and on how many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def autocast() -> Iterator[None]:
    """Compute products in bf16 where that is faster than float32; weights and updates stay in float32."""
    if not has_bf16():
        yield
        return
    # On short texts the fused bf16 attention makes a step 1.7 times as long as plain products do (docs/lab-notes.md).
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def has_bf16() -> bool:
    """Tell whether torch has kernels that multiply bf16 in this CPU's hardware; emulated, it is slower than float32."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    probes: list[Callable[[], bool] | None] = [getattr(torch.cpu, name, None) for name in names]
    return any(probe is not None and bool(probe()) for probe in probes)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Run on `number` threads, then on as many as before; None changes nothing."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
