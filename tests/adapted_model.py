"""Tiny base models with LoRA adapters of random matrices, and bundles that keep one beside the other."""

from pathlib import Path

from alambic.bundle import seal
from alambic.manifest import Manifest, WriterSpec
from genai_model import part_params


def make_adapter(base: Path, out: Path, *, seed: int, rank=4) -> Path:
    """Write an adapter of `base` as training would leave it."""
    import torch

    from alambic.model.adapter import model_digest, save_adapter
    from alambic.model.seq2seq import load_writer
    from alambic.train.lora import add_lora

    writer = load_writer(base, dtype=torch.float32)
    wrapped = add_lora(writer.model, method="lora", rank=rank, alpha=2.0 * rank, seed=seed, head=writer.head)
    generator = torch.Generator().manual_seed(seed)
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.3, generator=generator)
    record = {"name": "tiny", "digest": model_digest(base)}
    return save_adapter(wrapped, out, base=record, method="lora").folder


def beside_bundle(
    folder: Path, name: str, base: tuple[Path, Path], adapter: Path | None, *, digest=None, params=None, shares=True
):
    """Seal a bundle of the packed base (Hugging Face folder, part folder) and one adapter, or of the base alone."""
    from dataclasses import replace

    from alambic.build.assemble import copy_files
    from alambic.manifest import PartSpec
    from alambic.model.adapter import model_digest
    from alambic.pack.writer_hf import write_adapter

    plain, part = base
    copy_files(part, folder / "writer")
    known = {"model_digest": model_digest(plain)} if shares else {}
    parts = [PartSpec("writer", "openvino-genai", "writer", {**(params or part_params()), **known})]
    if adapter is not None:
        made = write_adapter(adapter, plain, folder / "adapter")
        parts.append(replace(made, params={**made.params, "base": {**made.params["base"], **(digest or {})}}))
    manifest = Manifest(
        alambic="0.1.0", name=name, kind="chat", created="2026-11-21T00:00:00Z", entry="writer", parts=tuple(parts),
        writer=WriterSpec(sampling={"max_tokens": 16}, adapter="adapter" if adapter else None),
    )  # fmt: skip
    return seal(folder, manifest)
