"""The decoder that is pre-trained: transformers' Llama for its weights and files, a forward pass of our own for speed.

The residual stream is in float32 and every product in bf16 (where the hardware has it), weights are cast once a
micro-batch. Attention stays within a document. Rotary positions are relative, so that counting them from the window's
beginning or from the document's is the same thing.

tests/test_pretrain_model.py holds the forward pass to transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from alambic.train.precision import has_bf16
from alambic.train.pretrain_attention import Bounds, attend, bounds_of, rotation, turn
from alambic.train.pretrain_data import Ids
from alambic.train.pretrain_params import PretrainParams
from alambic.train.pretrain_score import counted
from alambic.train.sft_loss import Head, streamed_parts, token_losses

_EPS = 1e-5

Run = Callable[..., Tensor]
Enter = Callable[[Any, Callable[[Any, Tensor], Tensor], Tensor], Tensor]


def new_decoder(params: PretrainParams, *, vocabulary: int, special: dict[str, int | None]) -> nn.Module:
    """Return a Llama with random weights, drawn from `params.seed`.

    Matrices are normal with standard deviation 1 / sqrt(inputs), those that write to the residual stream zero, so that
    every block begins as the identity (Zhang et al. 2019, https://arxiv.org/abs/1901.09321); embeddings 0.02.

    Args:
        params: its shape.
        vocabulary: rows of the table of embeddings.
        special: ids named ``bos_token_id``, ``eos_token_id``, ``pad_token_id``.
    """
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=params.hidden, intermediate_size=params.ffn_width,
        num_hidden_layers=params.layers, num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads or params.heads, head_dim=params.hidden // params.heads,
        max_position_embeddings=params.context, rms_norm_eps=_EPS, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta}, **special,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config)
    draw_weights(model, params.seed, table="embed_tokens", zero=("o_proj.weight", "down_proj.weight"))
    return model


def draw_weights(model: nn.Module, seed: int, *, table: str, zero: tuple[str, ...]) -> None:
    """Draw the weights of `model` as `new_decoder` says.

    Args:
        model: whose weights are overwritten.
        seed: of the draw.
        table: part of the name of the embeddings.
        zero: ends of the names of the matrices that write to the residual stream.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            elif table in name:
                weight.normal_(0.0, 0.02, generator=generator)
            elif name.endswith(zero):
                weight.zero_()
            else:
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)


def hidden_states(
    model: Any, ids: Tensor, bounds: Bounds, *, dtype: torch.dtype, block: Run | None = None, enter: Enter | None = None
) -> Tensor:
    """Return the last hidden states [B T, D] in `dtype`, before the head.

    Args:
        model: a LlamaForCausalLM.
        ids: [B, T].
        bounds: of `bounds_of`.
        dtype: of products.
        block: `decoder_block`, or what torch.compile made of it.
        enter: given a layer, what computes it and x, returns its x; None: it is computed as it is.
    """
    config, body = model.config, model.model
    run = block or decoder_block

    def through(layer: Any, x: Tensor) -> Tensor:
        return run(x, weights_of(layer), cos, sin, bounds.mask, bounds.ends, dtype, config.head_dim)

    cos, sin = rotation(ids.shape[1], config.head_dim, config.rope_parameters["rope_theta"], ids.device)
    x = F.embedding(ids, body.embed_tokens.weight)  # B, T, D
    for layer in body.layers:
        x = through(layer, x) if enter is None else enter(layer, through, x)
    return _norm(x, body.norm.weight, dtype).flatten(0, 1)


def weights_of(layer: Any) -> tuple[Tensor, ...]:
    """Return the weights of a Llama layer in the order in which `decoder_block` takes them."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
               layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj)  # fmt: skip
    return tuple(module.weight for module in modules)


def decoder_block(
    x: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, mask: Tensor | None, ends: Tensor | None,
    dtype: torch.dtype, width: int,
) -> Tensor:  # fmt: skip
    """Return x [B, T, D] after one block: attention, then SwiGLU, each added to the residual stream."""
    before, *matrices = weights[:5]
    query, key, value, out = (matrix.to(dtype) for matrix in matrices)
    after, gate, up, down = weights[5], *(matrix.to(dtype) for matrix in weights[6:])
    h = _norm(x, before, dtype)
    q = turn(F.linear(h, query).unflatten(-1, (-1, width)), cos, sin)  # B, T, Hq, W
    k = turn(F.linear(h, key).unflatten(-1, (-1, width)), cos, sin)
    v = F.linear(h, value).unflatten(-1, (-1, width))
    x = x + F.linear(attend(q, k, v, mask, ends, causal=True).flatten(-2), out)
    h = _norm(x, after, dtype)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def _norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, _EPS).to(dtype)


class Causal:
    """A decoder and how it learns: each token of a window is predicted from those before it in its document."""

    extra = 1  # tokens that a window has beyond what the model reads

    def __init__(self, model: Any, params: PretrainParams, *, end_id: int, device: torch.device) -> None:
        self.model, self.params, self.device = model.to(device), params, device
        self.end_id = end_id
        self.dtype = product_dtype(params, device)
        self.block: Run = torch.compile(decoder_block) if compiles(params, device) else decoder_block
        self.enter: Enter | None = None

    @property
    def head(self) -> Head:
        """The table of embeddings, multiplied as a head."""
        return Head(self.model.model.embed_tokens.weight)

    @property
    def multiplied(self) -> int:
        """Weights that a forward pass multiplies: blocks and head."""
        count: int = sum(p.numel() for p in self.model.parameters())
        return count

    def counted(self, windows: Ids, numbers: Sequence[int]) -> int:
        """Return how many tokens of windows [N, T + 1] are predicted."""
        return int(len(windows) * (windows.shape[1] - 1))

    def loss(self, windows: Ids, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of windows [N, T + 1], and its cross-entropy alone."""
        ids = self._put(windows)
        states = self._states(ids[:, :-1])
        return streamed_parts(states, ids[:, 1:].flatten(), self.head, z_loss=self.params.z_loss)

    def nats(self, windows: Ids, numbers: Sequence[int]) -> tuple[float, int]:
        """Return the summed cross-entropy of held-out windows [N, T + 1] and their tokens; -1 does not count."""
        known = windows[:, 1:] >= 0
        return float(self.losses(windows).double()[torch.from_numpy(known).flatten()].sum()), int(known.sum())

    def losses(self, windows: Ids) -> Tensor:
        """Return the cross-entropy of each token [N T] of held-out windows [N, T + 1]; anything where they have -1."""
        inputs, targets, _ = counted(windows, end_id=self.end_id)
        with torch.no_grad():
            return token_losses(self._states(self._put(inputs)), self._put(targets).flatten(), self.head)

    def _states(self, ids: Tensor) -> Tensor:
        end = self.end_id if self.params.document_mask else None
        bounds = bounds_of(ids, end_id=end, dtype=self.dtype)
        return hidden_states(self.model, ids, bounds, dtype=self.dtype, block=self.block, enter=self.enter)

    def _put(self, ids: Ids) -> Tensor:
        return torch.from_numpy(ids).to(self.device, non_blocking=True)


def product_dtype(params: PretrainParams, device: torch.device) -> torch.dtype:
    """Return the type of products: bf16 where the hardware has it and `params` does not say otherwise."""
    if params.precision == "auto":
        able = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_bf16()
        return torch.bfloat16 if able else torch.float32
    return torch.bfloat16 if params.precision == "bf16" else torch.float32


def compiles(params: PretrainParams, device: torch.device) -> bool:
    """Tell whether torch.compile is used; ``auto`` leaves the CPU without: it needs a C++ compiler and minutes."""
    return params.compile == "on" or (params.compile == "auto" and device.type == "cuda")
