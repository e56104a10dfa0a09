"""Attention within documents, and the rotation that tells positions: what decoder and encoder of pre-training share.

Windows hold several documents. On the CPU a mask keeps them apart, on CUDA the kernel is told where each begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128  # queries that attend together on the CPU: keys after them are not computed


@dataclass(frozen=True)
class Bounds:
    """What a token may see, ready for the device.

    Attributes:
        mask: [B, 1, T, T] zeros and -inf, on the CPU.
        ends: [R + 1] where documents begin in the flattened batch, on CUDA.
    """

    mask: Tensor | None = None
    ends: Tensor | None = None


def bounds_of(ids: Tensor, *, end_id: int | None, dtype: torch.dtype, causal: bool = True) -> Bounds:
    """Return what the tokens of `ids` [B, T] may see; a document begins at each end token.

    Args:
        ids: on the device.
        end_id: None: the whole window is one document.
        dtype: of products.
        causal: a token sees none after itself.
    """
    rows, length = ids.shape
    starts = torch.zeros_like(ids, dtype=torch.bool) if end_id is None else ids == end_id
    if ids.device.type == "cuda":
        starts = starts.clone()
        starts[:, 0] = True
        where = starts.flatten().nonzero()[:, 0].to(torch.int32)
        return Bounds(ends=F.pad(where, (0, 1), value=rows * length))
    shade = _shade(length, dtype, causal)
    if end_id is None or not bool(starts[:, 1:].any()):
        return Bounds(mask=shade)
    document = starts.cumsum(1)
    apart = document[:, None, :, None] != document[:, None, None, :]  # B, 1, T, T
    return Bounds(mask=shade.masked_fill(apart, float("-inf")))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ends: Tensor | None, *, causal: bool) -> Tensor:
    """Attend from q [B, T, Hq, W] to k, v [B, T, Hk, W] within `Bounds`; return [B, T, Hq, W]."""
    if ends is not None:
        from torch.nn.attention.varlen import varlen_attn

        flat, length = [t.flatten(0, 1) for t in (q, k, v)], q.shape[1]  # B T, H, W
        window = (-1, 0) if causal else (-1, -1)
        out = varlen_attn(*flat, ends, ends, length, length, window_size=window, enable_gqa=q.shape[2] != k.shape[2])
        return out.unflatten(0, q.shape[:2])
    assert mask is not None, "bounds_of gives one of the two"
    if k.shape[2] != q.shape[2]:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # B, H, T, W
    if q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    # Plain bf16 products take half the time of the fused kernel at these lengths (docs/lab-notes.md).
    scale, parts = q.shape[-1] ** -0.5, []
    for first in range(0, q.shape[2], _BLOCK):
        last = min(first + _BLOCK, q.shape[2])
        seen = last if causal else q.shape[2]
        scores = (q[:, :, first:last] * scale) @ k[:, :, :seen].transpose(-1, -2)
        shares = (scores + mask[:, :, first:last, :seen]).softmax(-1)
        parts.append(shares @ v[:, :, :seen])
    return torch.cat(parts, dim=2).transpose(1, 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [B, T, H, W], as Llama pairs them."""
    one, two = x.chunk(2, dim=-1)
    c, s = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((one * c - two * s, two * c + one * s), dim=-1)


@lru_cache(maxsize=4)
def rotation(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, 1, W / 2]."""
    rates = theta ** -(torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None, None] * rates
    return angles.cos(), angles.sin()


@lru_cache(maxsize=4)
def _shade(length: int, dtype: torch.dtype, causal: bool) -> Tensor:
    shade = torch.zeros(1, 1, length, length, dtype=dtype)
    return shade + torch.full_like(shade, float("-inf")).triu_(1) if causal else shade
