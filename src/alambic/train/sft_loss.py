"""Cross-entropy of a language model at the learnt positions only, in blocks: the logits are never there all at once.

With 150,000 tokens in the vocabulary the logits of one long batch take gigabytes, and most are of the prompt, which
teaches nothing. Each block is multiplied, turned into its gradient in place, and multiplied back (as in Hsu et al.
2024, https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK_BYTES = 160 * 2**20  # of logits at once; the table is read from memory once a block
_CACHE_BYTES = 2**20  # of float32 logits whose softmax is computed together


@dataclass(frozen=True)
class Head:
    """How hidden states become logits.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: multiplies the hidden states first (T5 with tied embeddings).
        cap: logits are `cap * tanh(logits / cap)` (Gemma 2); None: as they are.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, linear: nn.Module, *, cap: float | None = None) -> Head:
        """Return the head of a linear layer."""
        return cls(linear.weight, getattr(linear, "bias", None), cap=cap)


def streamed_loss(hidden: Tensor, targets: Tensor, head: Head, *, smoothing: float = 0.0) -> Tensor:
    """Return the sum of the cross-entropies of `targets` [N] given `hidden` [N, H], in nats.

    Args:
        hidden: states that predict the targets.
        targets: ids.
        head: how states become logits.
        smoothing: share of each target spread evenly over the vocabulary (Szegedy et al. 2016).
    """
    if targets.numel() == 0:
        return hidden.sum() * 0.0
    if head.scale != 1.0:
        hidden = hidden * head.scale
    return streamed_parts(hidden, targets, head, smoothing=smoothing)[0]


def streamed_parts(
    hidden: Tensor, targets: Tensor, head: Head, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and the part of it that is cross-entropy, without a way back.

    Args:
        hidden: [N, H], scaled already.
        targets: [N].
        head: how states become logits.
        smoothing: see `streamed_loss`.
        z_loss: weight of the square of log Z, which keeps logits small (Chowdhery et al. 2022, PaLM, section 5).
    """
    loss, plain = _Streamed.apply(hidden, head.weight, head.bias, targets, head.cap, smoothing, z_loss)
    return loss, plain


def each_loss(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return the cross-entropy of each target [N], in nats, for losses that weigh rows (preferences)."""
    if head.scale != 1.0:
        hidden = hidden * head.scale
    losses: Tensor = _Each.apply(hidden, head.weight, head.bias, targets, head.cap)
    return losses


def token_losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return the cross-entropy of each target [N], in nats, in float32 on the CPU, without a way back."""
    losses = torch.empty(targets.numel())
    with torch.no_grad():
        weight = _cast(hidden, head.weight)
        states = (hidden * head.scale).to(weight.dtype)
        step = _block(weight)
        for start in range(0, targets.numel(), step):
            logits = _logits(states[start : start + step], weight, head.bias, head.cap)
            count = _rows_at_once(logits)
            for i in range(0, len(logits), count):
                rows = logits[i : i + count].float()
                place = slice(start + i, start + i + len(rows))
                at = rows.gather(1, targets[place, None])[:, 0]
                losses[place] = (rows.logsumexp(1) - at).cpu()
    return losses


class _Streamed(torch.autograd.Function):  # type: ignore[misc]
    """Loss forward; the gradients are computed there and then, since nothing follows a loss but a factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None,
        smoothing: float, z_loss: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the summed loss and its cross-entropy; the gradients are kept."""
        matrix = _cast(hidden, weight)
        states = hidden.to(matrix.dtype)
        needs = ctx.needs_input_grad
        to_states = torch.empty_like(states) if needs[0] else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        step = _block(matrix)
        for start in range(0, targets.numel(), step):
            rows = slice(start, min(start + step, targets.numel()))
            logits = _logits(states[rows], matrix, bias, None)
            totals += _to_gradient(logits, targets[rows], cap, smoothing, z_loss=z_loss)
            if to_states is not None:
                torch.mm(logits, matrix, out=to_states[rows])
            if to_weight is not None:
                to_weight += torch.mm(logits.T, states[rows])
            if to_bias is not None:
                to_bias += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(*(t for t in (to_states, to_weight, to_bias) if t is not None))
        ctx.given = (to_states is not None, to_weight is not None, to_bias is not None)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        loss, plain = totals.float().unbind()
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the kept gradients times that of the loss."""
        saved = list(ctx.saved_tensors)
        out: list[Tensor | None] = []
        for given, dtype in zip(ctx.given, ctx.dtypes, strict=True):
            out.append((saved.pop(0) * grads[0]).to(dtype) if given else None)
        return (*out, None, None, None, None)


class _Each(torch.autograd.Function):  # type: ignore[misc]
    """Losses one by one; the gradient of a trained table takes a second pass, once the losses have their weights."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None
    ) -> Tensor:
        """Return the losses [N]; the gradient to the states is kept."""
        matrix = _cast(hidden, weight)
        states = hidden.to(matrix.dtype)
        to_states = torch.empty_like(states)
        losses = torch.empty(targets.numel(), device=hidden.device)
        step = _block(matrix)
        for start in range(0, targets.numel(), step):
            rows = slice(start, min(start + step, targets.numel()))
            logits = _logits(states[rows], matrix, bias, None)
            _to_gradient(logits, targets[rows], cap, 0.0, losses=losses[rows])
            torch.mm(logits, matrix, out=to_states[rows])
        ctx.save_for_backward(to_states, states, matrix, targets, *([] if bias is None else [bias]))
        ctx.cap, ctx.dtypes = cap, (hidden.dtype, weight.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of states, weight and bias."""
        to_states, states, matrix, targets, *rest = ctx.saved_tensors
        bias = rest[0] if rest else None
        weights = grads[0][:, None]
        to_weight = torch.zeros_like(matrix, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        if to_weight is not None or to_bias is not None:
            step = _block(matrix)
            for start in range(0, targets.numel(), step):
                rows = slice(start, min(start + step, targets.numel()))
                logits = _logits(states[rows], matrix, bias, None)
                _to_gradient(logits, targets[rows], ctx.cap, 0.0)
                logits *= weights[rows].to(logits.dtype)
                if to_weight is not None:
                    to_weight += torch.mm(logits.T, states[rows])
                if to_bias is not None:
                    to_bias += logits.sum(0, dtype=torch.float32)
        hidden_dtype, weight_dtype = ctx.dtypes
        first = (to_states * weights).to(hidden_dtype)
        return first, None if to_weight is None else to_weight.to(weight_dtype), to_bias, None, None


def _to_gradient(
    logits: Tensor, targets: Tensor, cap: float | None, smoothing: float, losses: Tensor | None = None,
    *, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Replace `logits` [N, V] by the gradient of the summed loss to them; return its sums (float64, on their device).

    The sums [2] are with and without the z-loss. Each loss is written into `losses` [N] where it is given.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=logits.device)
    share = smoothing / logits.shape[1]
    # The softmax is taken in float32, a few rows at a time, so that they stay in the cache from one pass to the next.
    count = _rows_at_once(logits)
    for start in range(0, logits.shape[0], count):
        block = logits[start : start + count]
        wanted = targets[start : start + count, None]
        rows = block.float()  # a copy, unless the logits are in float32 already
        slope = None
        if cap is not None:
            bent = torch.tanh(rows / cap)
            rows, slope = bent * cap, 1 - bent * bent
        at = rows.gather(1, wanted)
        grad = rows.softmax(1)
        # The likeliest entry's share is exp(0) / Z: the normaliser comes without a second pass of exponentials.
        norm = rows.amax(1, keepdim=True) - grad.amax(1, keepdim=True).log()
        if losses is not None:
            losses[start : start + count] = (norm - at)[:, 0]
        plain = norm.sum() - (1 - smoothing) * at.sum()
        if smoothing:
            plain -= share * rows.sum()
        totals += torch.stack((plain + z_loss * norm.square().sum(), plain))
        if z_loss:
            grad *= 1 + 2 * z_loss * norm
        if smoothing:
            grad -= share
        grad.scatter_add_(1, wanted, torch.full_like(wanted, -(1 - smoothing), dtype=grad.dtype))
        block.copy_(grad if slope is None else grad * slope)
    return totals


def _logits(states: Tensor, matrix: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    logits = states @ matrix.T  # N, V
    if bias is not None:
        logits += bias
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _CACHE_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)


def _block(weight: Tensor) -> int:
    return max(16, _BLOCK_BYTES // (len(weight) * int(weight.element_size())))


def _cast(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the weight in the type that products are computed in: autocast's inside it, else the states' own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return weight.to(torch.get_autocast_dtype(device))
    return weight.to(hidden.dtype)
