"""Tagger: an encoder whose every token gets a BIO tag, and whose text gets its choices. Saved as a Model directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from alambic.errors import BaseModelError
from alambic.model.bases import Base, read_json
from alambic.model.encoder import Encoder, ModelSpec
from alambic.model.folder import whole_model

FORMAT = 1


class StatesEncoder(Encoder):
    """An encoder that gives the state of every token [B, T, H] instead of one vector a text."""

    def __init__(self, backbone: nn.Module, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        super().__init__(backbone, tokenizer, replace(spec, labels=None, pooling="states", normalize=False))

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the state of every token [B, T, H]."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def for_export(self) -> nn.Module:
        """Return a frozen copy whose forward takes (input_ids, attention_mask) and returns the states."""
        twin = Encoder(self.backbone, self.tokenizer, self.spec).for_export()
        return StatesEncoder(twin.backbone, self.tokenizer, self.spec).eval().requires_grad_(False)


class Tagger(nn.Module):  # type: ignore[misc]
    """ids and mask in; logits of tags for every token and of all choices for the text out.

    Args:
        encoder: the backbone with its tokenizer.
        labels: of spans.
        choices: for each chosen field, how many values it has.
        unit: ``word`` or ``token``, see `alambic.engines.tagging`.
        lines: it reads where lines end.
    """

    def __init__(
        self, encoder: Encoder, *, labels: Sequence[str], choices: dict[str, int], unit: str, lines: bool = False
    ) -> None:
        super().__init__()
        self.encoder = StatesEncoder(encoder.backbone, encoder.tokenizer, encoder.spec)
        self.labels, self.choices, self.unit, self.lines = tuple(labels), dict(choices), unit, lines
        self.tags = nn.Linear(encoder.spec.hidden, 1 + 2 * len(self.labels))
        self.chosen = nn.Linear(encoder.spec.hidden, sum(choices.values())) if choices else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits of tags [B, T, 1 + 2K] and of choices [B, C]."""
        states = self.encoder.pool(input_ids, attention_mask)  # B, T, H
        if self.chosen is None:
            return self.tags(states), None
        weights = attention_mask.unsqueeze(-1).to(states.dtype)  # B, T, 1
        pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return self.tags(states), self.chosen(pooled)

    @classmethod
    def load(cls, folder: Path, *, attention: str = "sdpa") -> Tagger:
        """Open a Model directory written by `save`.

        Raises:
            BaseModelError: a file is missing or damaged, or it is no tagger.
        """
        raw = read_json(folder / "tagger.json")
        if raw.get("format") != FORMAT:
            raise BaseModelError(f"{folder / 'tagger.json'}: format {raw.get('format')!r}; this version reads {FORMAT}")
        encoder = load_states(folder, attention=attention)
        tagger = cls(
            encoder, labels=raw["labels"], choices=raw["choices"], unit=raw["unit"], lines=raw.get("lines", False)
        )
        try:
            tagger.load_state_dict(load_file(folder / "heads.safetensors"), strict=False)
            missing = {name for name, _ in tagger.heads()} - set(load_file(folder / "heads.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise BaseModelError(f"{folder / 'heads.safetensors'}: cannot be loaded ({error})") from error
        if missing:
            raise BaseModelError(f"{folder / 'heads.safetensors'}: {sorted(missing)[0]!r} is missing")
        tagger.eval()
        return tagger

    def save(self, folder: Path) -> None:
        """Write the Model directory: beside first, then moved into place."""
        heads = {name: value.detach().to(torch.float32).contiguous() for name, value in self.heads()}
        described: dict[str, Any] = {
            "format": FORMAT, "labels": list(self.labels), "choices": self.choices, "unit": self.unit,
            "lines": self.lines,
        }  # fmt: skip
        with whole_model(folder) as beside:
            self.encoder.save(beside)
            (beside / "heads.safetensors").write_bytes(safetensors.torch.save(heads, metadata={"format": "pt"}))
            (beside / "tagger.json").write_text(json.dumps(described, ensure_ascii=False, indent=1), encoding="utf-8")

    def heads(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the encoder does not have."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("encoder.")]


def load_states(source: Path | Base, *, attention: str = "sdpa") -> StatesEncoder:
    """Open a base or a Model directory as an encoder of states.

    Raises:
        BaseModelError: a file is missing or damaged.
    """
    encoder = Encoder.load(source, attention=attention)
    return StatesEncoder(encoder.backbone, encoder.tokenizer, encoder.spec)
