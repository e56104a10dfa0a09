"""Adapter: what LoRA training changed, in PEFT's files, with the digest of the base that it belongs to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alambic._extras import load
from alambic.errors import BaseModelError
from alambic.model.bases import read_json, weight_files
from alambic.model.folder import whole_model

FORMAT = 1
_WHOLE = 1_500_000_000
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "source.spm", "target.spm", "vocab.json",
              "merges.txt")  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: adapter_config.json, adapter_model.safetensors and alambic.json.
        base: name, digest and, where known, licence and source of its base.
        rank: width.
        method: ``lora``, ``dora`` or ``qlora``.
    """

    folder: Path
    base: dict[str, str]
    rank: int
    method: str

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read what the adapter in `folder` is.

        Raises:
            BaseModelError: it is not an adapter of ours, or a file of it is missing.
        """
        config, raw = read_json(folder / "adapter_config.json"), read_json(folder / "alambic.json")
        if raw.get("format") != FORMAT or raw.get("type") != "adapter":
            raise BaseModelError(f"{folder / 'alambic.json'}: not an adapter of format {FORMAT}")
        if not (folder / "adapter_model.safetensors").is_file():
            raise BaseModelError(f"{folder}: adapter_model.safetensors is missing")
        return cls(folder, dict(raw["base"]), int(config["r"]), str(raw["method"]))

    def check(self, base: Path) -> None:
        """Refuse a base that the adapter was not trained on.

        Raises:
            BaseModelError: with both digests.
        """
        found = model_digest(base)
        if found != self.base["digest"]:
            raise BaseModelError(
                f"{self.folder}: this adapter belongs to base {self.base.get('name', '?')!r} (digest "
                f"{self.base['digest']}), and {base} has the digest {found}",
                hint="give the base that it was trained on; on another one its numbers mean nothing",
            )

    def put_on(self, model: Any) -> Any:
        """Return PEFT's model: `model` (of transformers, of the right base) with this adapter in place."""
        return load("peft").PeftModel.from_pretrained(model, str(self.folder), is_trainable=False)


def save_adapter(wrapped: Any, folder: Path, *, base: dict[str, str], method: str) -> Adapter:
    """Write the adapter of PEFT's model `wrapped`, beside first and then moved into place.

    Args:
        wrapped: what `add_lora` returned.
        folder: an existing one is replaced.
        base: with `name` and `digest` (of `model_digest`).
        method: ``lora``, ``dora`` or ``qlora``.
    """
    with whole_model(folder) as beside:
        wrapped.save_pretrained(str(beside), safe_serialization=True, save_embedding_layers=False)
        (beside / "README.md").unlink(missing_ok=True)  # a form to fill in
        config = read_json(beside / "adapter_config.json")
        config["base_model_name_or_path"] = base.get("name", "")
        config["target_modules"] = sorted(config["target_modules"])  # a set there: another order at each saving
        _write(beside / "adapter_config.json", config)
        _write(beside / "alambic.json", {"format": FORMAT, "type": "adapter", "method": method, "base": base})
        (beside / "adapter_model.safetensors").chmod(0o644)
    return Adapter.load(folder)


def merge_adapter(adapter: Path, base: Path, out: Path) -> Path:
    """Write the model that `base` with `adapter` is, as a Model directory `out`, and return `out`.

    The sum is made in float32. It is written so up to 1.5 billion parameters: rounded to the 8 bits of bf16 it would
    lose part of what was learnt. Larger ones are written in the type of their base.

    Raises:
        BaseModelError: the adapter is of another base, or one of the two cannot be read.
    """
    import torch

    from alambic.model.seq2seq import load_writer

    read = Adapter.load(adapter)
    read.check(base)
    writer = load_writer(base)
    stored = next(writer.model.parameters()).dtype
    writer.model = read.put_on(writer.model.float()).merge_and_unload()
    writer.spec = replace(writer.spec, base={**writer.spec.base, **read.base})
    writer.save(out, dtype=stored if writer.spec.parameters > _WHOLE else torch.float32)
    return out


def model_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) over weights, configuration and tokenizer of the model in `folder`.

    Raises:
        BaseModelError: there are no weights.
    """
    paths = [*weight_files(folder), folder / "config.json", *(folder / name for name in _TOKENIZER)]
    hashes = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True), encoding="utf-8")
