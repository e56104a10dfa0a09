"""What a pre-training is asked to do: the shape of the model, the optimiser, the length, the machine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from alambic.errors import TrainError

# What changes where and how fast a run computes, or how often it is looked at, but not what it learns.
_NOT_IDENTITY = (
    "threads", "device", "compile", "sharding", "checkpoint_minutes", "valid_every", "valid_tokens", "sitting_minutes",
)  # fmt: skip

_MICRO_TOKENS = {"cpu": 4_096, "cuda": 65_536}


@dataclass(frozen=True)
class PretrainParams:
    """How to pre-train.

    Attributes:
        hidden: width.
        layers: blocks.
        heads: of attention.
        kv_heads: heads of keys and values of a decoder; as many as `heads` when None.
        ffn: width of the feed-forward part; 8/3 of `hidden` in multiples of 64 when None.
        context: tokens of a window.
        rope_theta: base of the rotary positions.
        objective: ``causal`` (Llama) or ``masked`` (ModernBERT).
        mask_share: share of the tokens to be guessed by a masked model.
        document_mask: a token sees its own document only.
        tokens: to train on, all passes together; None: by `passes`.
        passes: over the training text, when `tokens` is None.
        batch_tokens: of one step of the optimiser, in whole windows.
        micro_tokens: that go through the model at once; by device when None.
        optimizer: ``adamw``, or ``muon`` for the matrices of the blocks and AdamW for the rest.
        learning_rate: peak of AdamW.
        muon_rate: peak of Muon, on the scale of AdamW (Liu et al. 2025).
        weight_decay: of matrices, not of the table of embeddings.
        betas: of AdamW.
        schedule: ``cosine`` or ``wsd``.
        warmup: share of the steps in which the rate rises.
        decay: share of the steps in which it falls (wsd).
        final_rate: rate at the end, as a share of the peak.
        z_loss: weight of the square of the logits' log-normaliser (Chowdhery et al. 2022).
        clip: largest norm of the gradient.
        precision: ``bf16``, ``f32``, or ``auto``: bf16 where the hardware multiplies it.
        compile: torch.compile; ``auto``: on CUDA.
        sharding: ``full``: weights, gradients and optimiser state are cut over the processes; ``none``: each has all.
        checkpoint_minutes: between two checkpoints.
        valid_every: tokens between two validations; a tenth of all when None.
        valid_tokens: held-out tokens a source that a validation on the way reads; the last one reads all.
        sitting_minutes: stop with a checkpoint after so long; None: to the end.
        seed: of weights, order and masks.
        threads: of torch; its own choice when None.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int | None = None
    ffn: int | None = None
    context: int = 512
    rope_theta: float = 10_000.0
    objective: Literal["causal", "masked"] = "causal"
    mask_share: float = 0.3
    document_mask: bool = True
    tokens: int | None = None
    passes: float | None = None
    batch_tokens: int = 32_768
    micro_tokens: int | None = None
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float = 3e-3
    muon_rate: float = 6e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "wsd"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.2
    final_rate: float = 0.0
    z_loss: float = 1e-4
    clip: float = 1.0
    precision: Literal["auto", "f32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    sharding: Literal["none", "full"] = "none"
    checkpoint_minutes: float = 10.0
    valid_every: int | None = None
    valid_tokens: int = 50_000
    sitting_minutes: float | None = None
    seed: int = 0
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward part."""
        return self.ffn or max(64, round(self.hidden * 8 / 3 / 64) * 64)

    @property
    def rows(self) -> int:
        """Windows a step."""
        return self.batch_tokens // self.context

    def rows_at_once(self, device: str) -> int:
        """Return how many windows go through the model at once on ``cpu`` or ``cuda``."""
        return max(1, (self.micro_tokens or _MICRO_TOKENS.get(device, 4_096)) // self.context)

    def steps(self, train_tokens: int) -> int:
        """Return the steps of the whole training on a corpus of `train_tokens`."""
        wanted = self.tokens if self.tokens is not None else (self.passes or 1.0) * train_tokens
        return max(1, math.ceil(wanted / (self.rows * self.context)))

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a run to go on from a checkpoint; `steps` is judged by itself."""
        values = asdict(self)
        return {k: v for k, v in values.items() if k not in (*_NOT_IDENTITY, "tokens", "passes")}

    def checked(self) -> PretrainParams:
        """Return itself once every value is possible.

        Raises:
            TrainError: naming the first that is not.
        """
        allowed = {
            "objective": ("causal", "masked"), "optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd"),
            "precision": ("auto", "f32", "bf16"), "compile": ("auto", "on", "off"), "device": ("auto", "cpu", "cuda"),
            "sharding": ("none", "full"),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise TrainError(f"{name} = {getattr(self, name)!r}; allowed: {', '.join(values)}")
        for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "context", "rope_theta", "tokens", "passes",
                     "batch_tokens", "micro_tokens", "learning_rate", "muon_rate", "clip", "checkpoint_minutes",
                     "valid_every", "valid_tokens", "sitting_minutes", "threads"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainError(f"{name} = {value}: expected more than 0")
        for name in ("warmup", "decay", "final_rate", "weight_decay", "z_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"{name} = {getattr(self, name)}: expected 0 to 1")
        self._check_shape()
        return self

    def _check_shape(self) -> None:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise TrainError(f"hidden = {self.hidden}, heads = {self.heads}: each head needs an even, whole width")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise TrainError(f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}")
        if self.objective == "masked" and self.layers < 2:
            raise TrainError(f"layers = {self.layers}: objective 'masked' needs at least 2 (ModernBERT)")
        if self.batch_tokens < self.context:
            raise TrainError(f"batch_tokens = {self.batch_tokens} is less than one window (context = {self.context})")
        if not 0 < self.mask_share < 1:
            raise TrainError(f"mask_share = {self.mask_share}: expected more than 0 and less than 1")
        if (self.tokens is None) == (self.passes is None):
            raise TrainError("give tokens or passes, one of the two")
