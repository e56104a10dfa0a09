"""The model as fine-tuning sees it: rows in, states that predict the learnt tokens out; where and how it computes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alambic.errors import TrainError
from alambic.model.adapter import merge_adapter, model_digest, save_adapter
from alambic.model.bases import read_json
from alambic.model.decoder import Decoder
from alambic.model.encoder import pad
from alambic.model.seq2seq import Seq2Seq, load_writer
from alambic.train.distributed import wait, world
from alambic.train.lora import Method, add_lora, check_method, load_in_4_bits
from alambic.train.packing import Batch, Sample, pack, padded, use_rows
from alambic.train.precision import autocast, has_bf16
from alambic.train.sft_loss import Head, each_loss, streamed_loss, token_losses

_SMALL = 150_000_000  # parameters up to which all of them are trained by default
_SHARE_OF_MEMORY = 0.4  # of what is free, for what a forward pass keeps
_DROPOUTS = ("attention_dropout", "dropout", "dropout_rate", "resid_pdrop", "residual_dropout", "hidden_dropout")
_KEPT_BYTES = 20  # a hidden unit, layer and token, when nothing is recomputed (bf16)


class Learner:
    """A writer under training.

    Args:
        writer: the model, on its device, with adapters in place if any.
        method: how it is trained.
        packed: rows share one sequence (decoders).
        smoothing: of the labels.
    """

    def __init__(
        self, writer: Decoder | Seq2Seq, *, method: Method, packed: bool, smoothing: float = 0.0, wrapped: Any = None
    ) -> None:
        self.writer, self.method, self.smoothing, self.wrapped = writer, method, smoothing, wrapped
        self.packed = packed and isinstance(writer, Decoder)
        self.model: nn.Module = writer.model
        if isinstance(writer, Decoder):
            use_rows(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def head(self) -> Head:
        """How states become logits."""
        writer = self.writer
        if isinstance(writer, Decoder):
            return Head.of(writer.head, cap=writer.logit_cap)
        return Head(writer.head.weight, writer.head_bias, writer.head_scale)

    def batch(self, rows: Sequence[Sample]) -> Batch:
        """Put rows into one batch, on the device."""
        made = pack(rows) if self.packed else padded(rows, pad_id=self.writer.pad_id)
        return made.to(self.device)

    def states(self, rows: Sequence[Sample]) -> tuple[Tensor, Batch]:
        """Return the states that predict the learnt tokens of `rows` [N, H], and the batch that names these tokens."""
        batch = self.batch(rows)
        if isinstance(self.writer, Decoder):
            out = self.writer.body(
                input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
            ).last_hidden_state
        else:
            source, mask = pad([row.source for row in rows], pad_id=self.writer.pad_id)
            out = self.writer.states(source.to(self.device), mask.to(self.device), batch.ids)
        return out.reshape(-1, out.shape[-1]).index_select(0, batch.at), batch

    def loss(self, rows: Sequence[Sample]) -> Tensor:
        """Return the summed cross-entropy of what the assistant says in `rows`, in nats."""
        with self.computing():
            states, batch = self.states(rows)
            return streamed_loss(states, batch.targets, self.head(), smoothing=self.smoothing)

    def row_losses(self, rows: Sequence[Sample]) -> Tensor:
        """Return the cross-entropy of each row [R], in nats, to go backward through."""
        with self.computing():
            states, batch = self.states(rows)
            each = each_loss(states, batch.targets, self.head())
        return torch.zeros(len(rows), device=each.device).index_add(0, batch.rows, each)

    def losses(self, rows: Sequence[Sample]) -> Tensor:
        """Return the same for each row [R], without smoothing and without a way back."""
        with torch.no_grad(), self.computing():
            states, batch = self.states(rows)
            each = token_losses(states, batch.targets, self.head())
        return torch.zeros(len(rows)).index_add_(0, batch.rows.cpu(), each)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in bf16 where the hardware has it; frozen weights are stored so, trained ones stay in float32."""
        if self.device.type == "cuda":
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_bf16_supported()):
                yield
        elif self.method != "full":
            yield
        elif isinstance(self.writer, Decoder):  # chooses its own way of attention
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16()):
                yield
        else:
            with autocast():
                yield

    def checkpointing(self, on: bool) -> None:
        """Recompute each layer on the way back instead of keeping what it made."""
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def set_dropout(self, share: float) -> None:
        """Drop this share everywhere that the model drops any."""
        for name in _DROPOUTS:
            if hasattr(self.model.config, name):
                setattr(self.model.config, name, share)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            for name in ("dropout", "attention_dropout", "residual_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, share)


@dataclass(frozen=True)
class Setting:
    """How a learner is made; see `SftParams` for the meaning of each."""

    method: str
    rank: int
    alpha: float
    dropout: float
    smoothing: float
    packing: str
    device: str
    seed: int


def open_learner(base: Path, setting: Setting) -> Learner:
    """Load `base` for training.

    Raises:
        BaseModelError: it cannot be loaded.
        TrainError: the method does not run on this machine.
    """
    device = pick_device(setting.device)
    method = pick_method(setting.method, base)
    check_method(method, device=device)
    bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_bf16()
    writer: Decoder | Seq2Seq
    if method == "qlora":
        writer = load_in_4_bits(base, compute=torch.bfloat16 if bf16 else torch.float16)
    else:
        writer = load_writer(base, dtype=torch.bfloat16 if bf16 and method != "full" else torch.float32)
        writer.model.to(device)
    writer.model.config.use_cache = False
    wrapped = None
    if method != "full":
        wrapped = add_lora(
            writer.model, method=method, rank=setting.rank, alpha=setting.alpha, dropout=setting.dropout,
            head=writer.head, seed=setting.seed, seq2seq=isinstance(writer, Seq2Seq),
        )  # fmt: skip
    return Learner(writer, method=method, packed=setting.packing != "off", smoothing=setting.smoothing, wrapped=wrapped)


def pick_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        TrainError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise TrainError(f"device {name!r} is not here; allowed: auto, cpu" + ", cuda" * torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def pick_method(name: str, base: Path) -> Method:
    """Return the method that ``auto`` means: all weights of a small or new model, LoRA on a large one."""
    if name != "auto":
        return name  # type: ignore[return-value]  # `check_method` refuses what is none
    size = sum(path.stat().st_size for path in base.glob("model*.safetensors"))
    stored = 2 if read_json(base / "config.json").get("dtype") in ("bfloat16", "float16") else 4
    return "full" if is_new(base) or size / stored <= _SMALL else "lora"


def is_new(base: Path) -> bool:
    """Tell whether `base` was made from nothing: it has everything to learn."""
    path = base / "alambic.json"
    return path.is_file() and (read_json(path).get("base") or {}).get("source") == "scratch"


def needs_checkpointing(learner: Learner, *, tokens: int) -> bool:
    """Tell whether what a forward pass over `tokens` keeps would not fit in the memory that is free."""
    config = learner.model.config
    layers = int(getattr(config, "num_hidden_layers", 0) or 1)
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * width)
    kept = tokens * layers * (width + inner) * _KEPT_BYTES
    return kept > _SHARE_OF_MEMORY * free_bytes(learner.device)


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def base_record(learner: Learner, base: Path) -> dict[str, str]:
    """Return what a result says of its base; with an adapter its digest too."""
    known = {key: str(value) for key, value in learner.writer.spec.base.items()}
    record = {"name": base.name, **known}
    if learner.wrapped is not None:
        record["digest"] = model_digest(base)
    return record


def write_result(learner: Learner, base: Path, out: Path) -> Path | None:
    """Write the Model directory `out`, adapter merged, and the adapter in a folder of it; return that folder.

    The adapter is merged into the base as it is stored, not into the rounded copy that was trained on.
    """
    learner.checkpointing(False)
    if not world().writes:
        wait()
        return None
    writer, wrapped = learner.writer, learner.wrapped
    record = base_record(learner, base)
    if wrapped is None:
        writer.model.config.use_cache = True
        writer.spec = replace(writer.spec, base=record)
        writer.save(out)
        wait()
        return None
    beside = out.with_name(f"{out.name}.adapter")
    save_adapter(wrapped, beside, base=record, method=learner.method)
    writer.model.to("cpu")
    merge_adapter(beside, base, out)
    wait()
    return beside.rename(out / "adapter")
