"""Encoder: a BERT-like model, its tokenizer and, once trained, its classification head. Saved as a Model directory."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from alambic.errors import BaseModelError
from alambic.model.bases import ARCHITECTURES, Base, read_json, resolve, weight_files
from alambic.model.folder import whole_model

FORMAT = 1
# Their pooler is trained for next-sentence prediction and never used here.
_WITH_POOLER = ("bert", "camembert", "roberta", "xlm-roberta")
_ONLY_EAGER = ("deberta-v2",)


@dataclass(frozen=True)
class ModelSpec:
    """What alambic.json says.

    Attributes:
        architecture: `model_type` of config.json.
        pooling: ``mean`` or ``cls``.
        normalize: the pooled vector is L2-normalised (and multiplied by `scale` before the head).
        scale: multiplier of a normalised vector before the head.
        max_tokens: longest input, special tokens included.
        hidden: width of the pooled vector.
        labels: label names in output order; None for a bare encoder.
        multi_label: several labels may hold at once.
        base: name, digest, licence and source of the base.
    """

    architecture: str
    pooling: str
    normalize: bool
    max_tokens: int
    hidden: int
    scale: float = 1.0
    labels: tuple[str, ...] | None = None
    multi_label: bool = False
    base: dict[str, str] = field(default_factory=dict)


class Encoder(nn.Module):  # type: ignore[misc]
    """ids and mask in, one vector a text out: logits when it has a head, else the pooled embedding."""

    def __init__(self, backbone: nn.Module, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.spec = spec
        self.head = None if spec.labels is None else nn.Linear(spec.hidden, len(spec.labels))

    @classmethod
    def load(cls, source: Path | Base, *, attention: str = "sdpa") -> Encoder:
        """Open a Model directory, a base in Hugging Face layout, or what `bases.resolve` returned.

        Raises:
            BaseModelError: a file is missing or damaged, or the weights do not fit the configuration.
        """
        folder = source if isinstance(source, Path) else source.folder
        spec = _read_spec(folder) if isinstance(source, Path) else _spec_of(source)
        backbone = _load_backbone(folder, spec.architecture, attention=attention)
        encoder = cls(backbone, load_tokenizer(folder), spec)
        if encoder.head is not None:
            try:
                encoder.head.load_state_dict(load_file(folder / "head.safetensors"))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise BaseModelError(f"{folder / 'head.safetensors'}: cannot be loaded ({error})") from error
        encoder.eval()
        return encoder

    def save(self, folder: Path) -> None:
        """Write the Model directory: beside first, then moved into place, so that `folder` is never half-written."""
        with whole_model(folder) as beside:
            config = copy.deepcopy(self.backbone.config)
            config.save_pretrained(beside)
            _write_weights(beside / "model.safetensors", dict(self.backbone.state_dict()))
            if self.head is not None:
                _write_weights(beside / "head.safetensors", dict(self.head.state_dict()))
            self.tokenizer.save(str(beside / "tokenizer.json"))
            _write_json(beside / "tokenizer_config.json", self._tokenizer_config())
            _write_json(beside / "alambic.json", self._manifest())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, L] with a head, else embeddings [B, H]."""
        pooled = self.pool(input_ids, attention_mask)
        return pooled if self.head is None else self.classify(pooled)

    def classify(self, pooled: Tensor) -> Tensor:
        """Apply the head to pooled embeddings [B, H]; logits [B, L]."""
        assert self.head is not None, "classify() on an encoder without a head"
        return self.head(pooled * self.spec.scale if self.spec.normalize else pooled)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the pooled embeddings [B, H], normalised if the spec says so, never scaled."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # B, T, H
        if self.spec.pooling == "cls":
            pooled = states[:, 0]
        else:
            weights = attention_mask.unsqueeze(-1).to(states.dtype)  # B, T, 1
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return nn.functional.normalize(pooled, dim=-1) if self.spec.normalize else pooled

    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Copy `weight` [L, H] and `bias` [L] into the head."""
        assert self.head is not None, "set_head() on an encoder without a head"
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, neither cut nor padded."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def special_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids put before and after every text."""
        probe = self.tokenizer.encode("a")
        inner = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        if not inner:
            raise BaseModelError("the tokenizer gives no token for 'a'; is its tokenizer.json complete?")
        return probe.ids[: inner[0]], probe.ids[inner[-1] + 1 :]

    @property
    def pad_id(self) -> int:
        """Id used to pad a batch (masked out, so any valid id does when the base names none)."""
        return int(self.backbone.config.pad_token_id or 0)

    def with_head(self, labels: Sequence[str], *, multi_label: bool, scale: float = 1.0) -> Encoder:
        """Return an encoder on the same backbone with a new, untrained head for `labels`."""
        spec = replace(self.spec, labels=tuple(labels), multi_label=multi_label, scale=scale)
        return Encoder(self.backbone, self.tokenizer, spec)

    def embed(self, texts: Sequence[str], *, batch_tokens: int = 2048) -> NDArray[np.float32]:
        """Return the pooled embeddings [N, H] of `texts`, in order; texts over `max_tokens` are cut at the head."""
        ids = [self._cut(row) for row in self.tokenize(texts)]
        out = np.zeros((len(ids), self.spec.hidden), dtype=np.float32)
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            for rows in by_length([len(row) for row in ids], batch_tokens=batch_tokens):
                out[rows] = self.pool(*pad([ids[i] for i in rows], pad_id=self.pad_id)).float().numpy()
        self.train(was_training)
        return out

    def for_export(self) -> nn.Module:
        """Return a frozen copy whose forward takes (input_ids, attention_mask) and returns one float32 tensor."""
        twin = Encoder(copy.deepcopy(self.backbone), self.tokenizer, self.spec)
        if self.spec.architecture not in _ONLY_EAGER:
            twin.backbone.set_attn_implementation("eager")  # the graph both converters were proven on
        if self.head is not None and twin.head is not None:
            twin.head.load_state_dict(self.head.state_dict())
        return twin.eval().requires_grad_(False)

    def _cut(self, ids: list[int]) -> list[int]:
        limit = self.spec.max_tokens
        if len(ids) <= limit:
            return ids
        _, suffix = self.special_ids()
        return ids[: limit - len(suffix)] + suffix

    def _manifest(self) -> dict[str, Any]:
        head = None if self.head is None else "head.safetensors"
        kind = "encoder" if self.head is None else "encoder-classifier"
        return {"format": FORMAT, "type": kind, "head": head, **asdict(self.spec)}

    def _tokenizer_config(self) -> dict[str, Any]:
        special = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        pad = self.tokenizer.id_to_token(self.pad_id)
        # The generic class reads tokenizer.json as it is; the per-family ones rebuild parts of it from options.
        return {**special, "pad_token": pad, "model_max_length": self.spec.max_tokens,
                "model_input_names": ["input_ids", "attention_mask"]}  # fmt: skip


def load_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer of a base or a model with its baked-in truncation and padding cleared.

    Raises:
        BaseModelError: no tokenizer can be read in `folder`.
    """
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            with _quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                ).backend_tokenizer
    except Exception as error:  # the Rust binding raises bare Exception
        raise BaseModelError(f"{folder}: the tokenizer cannot be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def pad(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] and mask [B, T] padded to the longest row only."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids, mask


def by_length(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of like length, each at most `batch_tokens` tokens wide (or one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _read_spec(folder: Path) -> ModelSpec:
    path = folder / "alambic.json"
    if not path.is_file():
        return _spec_of(replace(resolve(str(folder)), name=folder.name))
    raw = read_json(path)
    if raw.get("format") != FORMAT:
        raise BaseModelError(f"{path}: format {raw.get('format')!r}; this version of alambic reads format {FORMAT}")
    try:
        values = {k: raw[k] for k in ModelSpec.__dataclass_fields__}
    except KeyError as error:
        raise BaseModelError(f"{path}: the key {error} is missing") from error
    if values["architecture"] not in ARCHITECTURES:
        raise BaseModelError(f"{path}: architecture {values['architecture']!r} is not known",
                             hint="allowed: " + ", ".join(ARCHITECTURES))  # fmt: skip
    labels = values["labels"]
    return ModelSpec(**{**values, "labels": None if labels is None else tuple(labels)})


def _spec_of(base: Base) -> ModelSpec:
    config = read_json(base.folder / "config.json")
    return ModelSpec(
        architecture=config["model_type"],
        pooling=base.pooling,
        normalize=base.normalize,
        max_tokens=base.max_tokens,
        hidden=int(config.get("hidden_size") or config["dim"]),
        base=base.to_dict(),
    )


def _load_backbone(folder: Path, architecture: str, *, attention: str) -> nn.Module:
    weight_files(folder)
    options: dict[str, Any] = {"add_pooling_layer": False} if architecture in _WITH_POOLER else {}
    attention = "eager" if architecture in _ONLY_EAGER else attention
    try:
        with _quiet():
            backbone, info = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
                attn_implementation=attention, output_loading_info=True, **options,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"{folder}: the weights cannot be loaded ({error})") from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise BaseModelError(f"{folder}: {len(info['missing_keys'])} weights are missing, the first is {first!r}",
                             hint="the weights do not belong to this config.json")  # fmt: skip
    return backbone


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load report and progress bars; the library never prints."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    # save_file() would create files that only their owner can read.
    floats = {name: value.detach().to(torch.float32).contiguous() for name, value in weights.items()}
    path.write_bytes(safetensors.torch.save(floats, metadata={"format": "pt"}))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
