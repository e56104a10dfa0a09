"""The encoder that is pre-trained: transformers' ModernBERT, guessing masked tokens (Devlin et al. 2019).

As is done today: no next-sentence task, windows of whole documents kept apart by the attention, 30 % of the tokens to
be guessed and every one of them shown as the mask (Wettig et al. 2023, https://arxiv.org/abs/2202.08005), only those go
through the head (Warner et al. 2024, https://arxiv.org/abs/2412.13663). All layers attend to the whole document.

Which tokens of a window are masked follows from (seed, number of the window).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from alambic.train.pretrain_attention import Bounds, attend, bounds_of, rotation, turn
from alambic.train.pretrain_data import Ids
from alambic.train.pretrain_model import Enter, Run, compiles, draw_weights, product_dtype
from alambic.train.pretrain_params import PretrainParams
from alambic.train.sft_loss import Head, streamed_parts, token_losses

_EPS = 1e-5


def new_encoder(params: PretrainParams, *, vocabulary: int, special: dict[str, int | None]) -> nn.Module:
    """Return a ModernBERT with random weights, drawn from `params.seed` as those of `new_decoder`."""
    rope = {"rope_type": "default", "rope_theta": params.rope_theta}
    config = transformers.ModernBertConfig(
        vocab_size=vocabulary, hidden_size=params.hidden, intermediate_size=params.ffn_width,
        num_hidden_layers=params.layers, num_attention_heads=params.heads, max_position_embeddings=params.context,
        # transformers refuses a ModernBERT without sliding layers (the check of rope_parameters); a window of twice the
        # context makes them the same as the others.
        local_attention=2 * params.context, norm_eps=_EPS, tie_word_embeddings=True,
        rope_parameters={"full_attention": rope, "sliding_attention": dict(rope)},
        cls_token_id=special.get("bos_token_id"), sep_token_id=special.get("eos_token_id"), **special,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.ModernBertForMaskedLM(config)
    draw_weights(model, params.seed, table="tok_embeddings", zero=("Wo.weight",))
    return model


def encoder_states(
    model: Any, ids: Tensor, bounds: Bounds, *, dtype: torch.dtype, block: Run | None = None, enter: Enter | None = None
) -> Tensor:
    """Return the last hidden states [B, T, D] in float32.

    Args:
        model: a ModernBertForMaskedLM of `new_encoder`.
        ids: [B, T].
        bounds: of `bounds_of`, not causal.
        dtype: of products.
        block: `encoder_block`, or what torch.compile made of it.
        enter: see `hidden_states`.
    """
    config, body = model.config, model.model
    run, width = block or encoder_block, config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["full_attention"]["rope_theta"]

    def through(layer: Any, x: Tensor) -> Tensor:
        before = getattr(layer.attn_norm, "weight", None)  # the first layer has none
        weights = (layer.attn.Wqkv.weight, layer.attn.Wo.weight, layer.mlp_norm.weight, layer.mlp.Wi.weight,
                   layer.mlp.Wo.weight)  # fmt: skip
        return run(x, before, weights, cos, sin, bounds.mask, bounds.ends, dtype, width)

    cos, sin = rotation(ids.shape[1], width, theta, ids.device)
    x = F.embedding(ids, body.embeddings.tok_embeddings.weight)  # B, T, D
    x = _norm(x, body.embeddings.norm.weight, x.dtype)
    for layer in body.layers:
        x = through(layer, x) if enter is None else enter(layer, through, x)
    return _norm(x, body.final_norm.weight, x.dtype)


def encoder_block(
    x: Tensor, before: Tensor | None, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, mask: Tensor | None,
    ends: Tensor | None, dtype: torch.dtype, width: int,
) -> Tensor:  # fmt: skip
    """Return x [B, T, D] after one block: attention, then GeGLU, each added to the residual stream."""
    into, out, after, up, down = weights
    h = x.to(dtype) if before is None else _norm(x, before, dtype)
    q, k, v = F.linear(h, into.to(dtype)).unflatten(-1, (3, -1, width)).unbind(-3)  # B, T, H, W each
    seen = attend(turn(q, cos, sin), turn(k, cos, sin), v, mask, ends, causal=False)
    x = x + F.linear(seen.flatten(-2), out.to(dtype))
    value, gate = F.linear(_norm(x, after, dtype), up.to(dtype)).chunk(2, dim=-1)
    return x + F.linear(F.gelu(value) * gate, down.to(dtype))


def choose_masked(ids: Ids, numbers: Sequence[int], *, share: float, end_id: int, seed: int) -> NDArray[np.bool_]:
    """Return which tokens of windows [N, T] are to be guessed: `share` of each window, never an end token."""
    chosen = np.zeros(ids.shape, dtype=bool)
    for row, (window, number) in enumerate(zip(ids, numbers, strict=True)):
        able = np.flatnonzero((window != end_id) & (window >= 0))
        count = min(len(able), max(1, round(share * len(window))))
        chosen[row, np.random.default_rng((seed, 2, number)).permutation(able)[:count]] = True
    return chosen


class Masked:
    """An encoder and how it learns."""

    extra = 0

    def __init__(self, model: Any, params: PretrainParams, *, end_id: int, mask_id: int, device: torch.device) -> None:
        self.model, self.params, self.device = model.to(device), params, device
        self.end_id, self.mask_id = end_id, mask_id
        self.dtype = product_dtype(params, device)
        self.block: Run = torch.compile(encoder_block) if compiles(params, device) else encoder_block
        self.enter: Enter | None = None

    @property
    def multiplied(self) -> int:
        """Weights that a forward pass multiplies, by token: blocks, and the head as often as it is used."""
        head: int = sum(p.numel() for p in self.model.head.parameters()) + self.model.decoder.weight.numel()
        blocks: int = sum(p.numel() for p in self.model.model.layers.parameters())
        return blocks + round(self.params.mask_share * head)

    def counted(self, windows: Ids, numbers: Sequence[int]) -> int:
        """Return how many tokens of windows [N, T] are guessed."""
        return int(self._chosen(windows, numbers).sum())

    def loss(self, windows: Ids, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of windows [N, T], and its cross-entropy alone."""
        states, targets = self._guesses(windows, numbers)
        return streamed_parts(states, targets, self._head, z_loss=self.params.z_loss)

    def nats(self, windows: Ids, numbers: Sequence[int]) -> tuple[float, int]:
        """Return the summed cross-entropy of held-out windows [N, T + 1] and how many tokens were guessed."""
        with torch.no_grad():
            states, targets = self._guesses(windows[:, 1:], numbers)
            return float(token_losses(states, targets, self._head).double().sum()), targets.numel()

    def _chosen(self, windows: Ids, numbers: Sequence[int]) -> NDArray[np.bool_]:
        params = self.params
        return choose_masked(windows, numbers, share=params.mask_share, end_id=self.end_id, seed=params.seed)

    def _guesses(self, windows: Ids, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the states [M, D] that guess, and the tokens [M] that were there."""
        chosen = self._chosen(windows, numbers)
        shown = np.where(chosen, self.mask_id, np.where(windows < 0, self.end_id, windows))
        ids = torch.from_numpy(shown).to(self.device, non_blocking=True)
        at = torch.from_numpy(np.flatnonzero(chosen)).to(self.device, non_blocking=True)
        bounds = bounds_of(ids, end_id=self.end_id if self.params.document_mask else None, dtype=self.dtype,
                           causal=False)  # fmt: skip
        states = encoder_states(self.model, ids, bounds, dtype=self.dtype, block=self.block, enter=self.enter)
        states = states.flatten(0, 1).index_select(0, at)
        head = self.model.head
        states = F.gelu(F.linear(states.to(self.dtype), head.dense.weight.to(self.dtype)))
        targets = torch.from_numpy(windows[chosen]).to(self.device, non_blocking=True)
        return _norm(states, head.norm.weight, self.dtype), targets

    @property
    def _head(self) -> Head:
        return Head.of(self.model.decoder)


def _norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), weight, None, _EPS).to(dtype)
