"""Model that writes -> a folder for the Hugging Face libraries, vLLM and others; and LoRA adapters for OpenVINO GenAI.

    export_hf(model, out)                  # AutoModelForCausalLM.from_pretrained(out), vllm serve out
    write_adapter(adapter, base, out)      # openvino_genai.Adapter(out / "adapter.safetensors"), over the base's part

An adapter is either merged (`alambic.model.adapter.merge_adapter`, then packed as any model) or kept beside a base that
several tasks share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_safetensors

from alambic import _extras
from alambic.errors import PackError
from alambic.kinds.golden_chats import GOLDEN_CHATS
from alambic.manifest import PartSpec
from alambic.model.adapter import Adapter
from alambic.model.bases import read_json
from alambic.model.decoder import Decoder
from alambic.model.encoder import _quiet as quiet
from alambic.model.seq2seq import Seq2Seq, load_writer
from alambic.pack.scratch import whole_folder
from alambic.pack.writer_openvino import engine_of

ADAPTER = "adapter.safetensors"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_hf(model: Path, out: Path, *, precision: str | None = None) -> Path:
    """Write the Model directory `model` as folder `out` in Hugging Face layout, and return `out`.

    config.json, safetensors, tokenizer.json, tokenizer_config.json (the chat template is in it, and in
    chat_template.jinja, where newer versions look), generation_config.json with every end id, and a card.

    Args:
        model: what `load_writer` opens.
        out: folder to make.
        precision: ``fp32``, ``fp16`` or ``bf16``; None: as stored.

    Raises:
        BaseModelError: the model cannot be opened.
        PackError: `out` exists, the precision is unknown, or transformers reads other ids from it.
        WorkspaceError: `out` cannot be written.
    """
    if precision is not None and precision not in _DTYPES:
        raise PackError(f"precision {precision!r} is not known", hint="allowed: " + ", ".join(_DTYPES))
    writer = load_writer(model, dtype=None if precision is None else _DTYPES[precision])
    with whole_folder(out) as folder:
        inside = folder / "model"
        writer.save(inside)
        for path in inside.iterdir():
            path.rename(folder / path.name)
        inside.rmdir()
        if isinstance(writer, Decoder):
            _name_template(folder, writer)
        _check_ids(folder, writer)
        (folder / "README.md").write_text(_card(writer), encoding="utf-8")
    return out


def write_adapter(adapter: Path, base: Path, out: Path) -> PartSpec:
    """Write a LoRA adapter as OpenVINO GenAI reads it, beside the packed form of `base`.

    PEFT keeps the scale (alpha / rank) apart from the matrices, in a file that the engine does not read, so it is
    multiplied into B here: W + B A.

    Args:
        adapter: folder that `Adapter.load` opens.
        base: the Model directory that it was trained on.
        out: part folder to make.

    Raises:
        BaseModelError: the adapter is of another base.
        PackError: it changes more than the engine can add (DoRA, whole layers), which must be merged.
        WorkspaceError: `out` cannot be written.
    """
    read = Adapter.load(adapter)
    read.check(base)
    config = read_json(adapter / "adapter_config.json")
    why = _unfit(config) or _unfit_base(base)
    if why is not None:
        raise PackError(f"{adapter}: {why}, which the engine cannot add to a base", hint="merge the adapter instead")
    scale = _scale(config)
    tensors: dict[str, Any] = {}
    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            value = file.get_tensor(name).float()
            tensors[name] = (value * scale if "lora_B" in name else value).contiguous()
    with whole_folder(out) as folder:
        (folder / ADAPTER).write_bytes(save_safetensors(tensors, metadata={"format": "pt"}))
    params = {"rank": read.rank, "method": read.method, "base": dict(read.base), "file": ADAPTER}
    return PartSpec("adapter", "openvino-genai", "adapter", params)


def _unfit(config: dict[str, Any]) -> str | None:
    if config.get("use_dora"):
        return "a DoRA adapter rescales whole columns"
    if config.get("modules_to_save"):
        return f"the adapter holds whole layers ({', '.join(config['modules_to_save'])})"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "its layers have different ranks or scales"
    if config.get("bias", "none") != "none":
        return "it changes biases"
    return None


def _unfit_base(base: Path) -> str | None:
    with quiet():
        writer = load_writer(base)
    return None if engine_of(writer) == "openvino-genai" else f"its base ({writer.architecture}) runs elsewhere"


def _scale(config: dict[str, Any]) -> float:
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return float(alpha / rank**0.5) if config.get("use_rslora") else alpha / rank


def _name_template(folder: Path, writer: Decoder) -> None:
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text("utf-8")), "chat_template": writer.template.source}
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")


def _check_ids(folder: Path, writer: Decoder | Seq2Seq) -> None:
    """Ask transformers what it reads from the folder: prompts of the golden conversations must have our ids."""
    if isinstance(writer, Seq2Seq):
        return
    try:
        with quiet():
            theirs = _extras.load("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
            chat = GOLDEN_CHATS["turns-answered"].prompt
            got = theirs.apply_chat_template(
                chat.to_dict()["messages"], add_generation_prompt=True, return_dict=True
            )["input_ids"]  # fmt: skip
    except (OSError, ValueError) as error:
        raise PackError(f"{folder}: transformers cannot open what was written ({error})") from error
    ours = writer.prompt_ids(chat)
    if list(got) != ours:
        at = next((i for i, (a, b) in enumerate(zip(got, ours, strict=False)) if a != b), min(len(got), len(ours)))
        raise PackError(f"{folder}: transformers reads other ids than training saw, from token {at} on")


def _card(writer: Decoder | Seq2Seq) -> str:
    licence = writer.spec.base.get("licence", "unknown")
    kind = "AutoModelForCausalLM" if isinstance(writer, Decoder) else "AutoModelForSeq2SeqLM"
    serve = "\nvLLM: `vllm serve this-folder`.\n" if isinstance(writer, Decoder) else ""
    return (
        f"---\nlibrary_name: transformers\nlicense: {licence}\n---\n\n"
        f"```python\nfrom transformers import {kind}, AutoTokenizer\n"
        f'model = {kind}.from_pretrained("this-folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this-folder")\n```\n'
        f"{serve}\nIt reads at most {writer.context_tokens:,} tokens.\n"
    )
