"""Decoder -> model.onnx with its cache as inputs and outputs, for Java, .NET and browsers (ONNX Runtime).

    export_onnx(model, out)                       # float32
    export_onnx(model, out, precision="int8")     # 8-bit weights, activations quantised as they come

The names are those that Optimum gave such models (`past_key_values.0.key`, `present.0.key`), so what runs theirs runs
these. Encoder-decoders are not exported here: `optimum-cli export onnx` takes the folder that `export_hf` writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alambic import _extras
from alambic.errors import PackError
from alambic.kinds.golden_chats import GOLDEN_CHATS
from alambic.model.decoder import Decoder, save_tokenizer
from alambic.model.encoder import _quiet as quiet
from alambic.model.seq2seq import load_writer
from alambic.pack.openvino import _silent as silent
from alambic.pack.scratch import whole_folder
from alambic.pack.writer_compare import compare_greedy

MODEL, _FLOAT = "model.onnx", "float.onnx"
PRECISIONS = ("fp32", "int8")
_OPSET = 18
_CHECKED = ("plain", "french", "code", "turns", "emoji")  # golden conversations decoded by both
_IN_ONE_FILE = 1_900_000_000  # bytes; a protobuf holds 2 GB, larger weights lie beside it


def export_onnx(model: Path, out: Path, *, precision: str = "fp32") -> Path:
    """Write a decoder as folder `out`: model.onnx, tokenizer.json, chat template, end ids and a README.

    Args:
        model: what `load_writer` opens.
        out: folder to make.
        precision: ``fp32`` or ``int8``.

    Raises:
        BaseModelError: the model cannot be opened.
        PackError: it is an encoder-decoder, it cannot be traced, or the float32 form writes other tokens.
        WorkspaceError: `out` cannot be written.
    """
    if precision not in PRECISIONS:
        raise PackError(f"precision {precision!r} is not known", hint="allowed: " + ", ".join(PRECISIONS))
    decoder = load_writer(model, dtype=torch.float32)
    if not isinstance(decoder, Decoder):
        raise PackError(
            f"{decoder.architecture}: encoder-decoders are not exported to ONNX here",
            hint="alambic export --to hf, then optimum-cli export onnx with optimum-onnx",
        )
    prompts = [decoder.prompt_ids(GOLDEN_CHATS[name].prompt) for name in _CHECKED]
    with whole_folder(out) as folder:
        traced = folder / (MODEL if precision == "fp32" else _FLOAT)
        trace(decoder, traced)
        agreement = compare_greedy(decoder, OnnxDecoder(traced, decoder), prompts)
        if agreement.difference is not None:
            raise PackError(f"the ONNX form is not the model: {agreement.difference}")
        if precision == "int8":
            _quantise(folder, large=decoder.spec.parameters * 4 > _IN_ONE_FILE)
            OnnxDecoder(folder / MODEL, decoder).greedy(prompts[0], max_tokens=4)
        save_tokenizer(decoder.tokenizer, folder, decoder._tokenizer_config())
        (folder / "chat_template.jinja").write_text(decoder.template.source, encoding="utf-8")
        settings = {"eos_token_id": list(decoder.ends), "pad_token_id": decoder.pad_id, "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        (folder / "README.md").write_text(_readme(decoder, precision), encoding="utf-8")
    return out


def trace(decoder: Decoder, path: Path) -> None:
    """Write the graph of `decoder`, float32, beside its weights where these are over 2 GB.

    Raises:
        PackError: torch cannot trace this kind.
    """
    layers, heads, width = cache_shape(decoder)
    rows, new, old = 2, 3, 4  # any sizes but 0 and 1, which tracing takes for constants
    past = [torch.zeros(rows, heads, old, width) for _ in range(2 * layers)]
    example = (
        torch.ones(rows, new, dtype=torch.long),
        torch.ones(rows, new + old, dtype=torch.long),
        torch.arange(old, new + old).repeat(rows, 1),
        *past,
    )
    free = torch.export.Dim.DYNAMIC
    shapes = (*[{0: free, 1: free}] * 3, tuple({0: free, 2: free} for _ in past))
    try:
        with torch.no_grad(), silent(), quiet():
            program = torch.onnx.export(
                _WithCache(decoder.model), example, dynamo=True, dynamic_shapes=shapes, input_names=input_names(layers),
                output_names=["logits", *_cache_names("present", layers)], opset_version=_OPSET, verbose=False,
            )  # fmt: skip
            assert program is not None, "given with dynamo=True"
            program.save(str(path), external_data=decoder.spec.parameters * 4 > _IN_ONE_FILE)
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise PackError(f"{decoder.architecture}: torch cannot write this model as ONNX: {last}") from error


def cache_shape(decoder: Decoder) -> tuple[int, int, int]:
    """Return layers, heads of keys and values, and their width."""
    config = decoder.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads or config.num_attention_heads, int(width)


def input_names(layers: int) -> list[str]:
    """Return the inputs of the graph, in order."""
    return ["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", layers)]


class OnnxDecoder:
    """The exported graph in ONNX Runtime, read token by token."""

    def __init__(self, path: Path, decoder: Decoder) -> None:
        runtime = _extras.load("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._taken = {port.name for port in self._session.get_inputs()}
        self._layers, self._heads, self._width = cache_shape(decoder)

    def greedy(self, ids: Sequence[int], *, max_tokens: int, ends: Sequence[int] = ()) -> list[int]:
        """Return the likeliest next tokens, up to and with one of `ends`."""
        past: list[NDArray[Any]] = [np.zeros((1, self._heads, 0, self._width), np.float32)] * (2 * self._layers)
        written: list[int] = []
        step, length = list(ids), 0
        while True:
            total = length + len(step)
            values = [np.array([step]), np.ones((1, total), np.int64), np.arange(length, total)[None], *past]
            feed = dict(zip(input_names(self._layers), values, strict=True))
            logits, *past = self._session.run(None, {k: v for k, v in feed.items() if k in self._taken})
            written.append(int(logits[0, -1].argmax()))
            if written[-1] in ends or len(written) >= max_tokens:
                return written
            step, length = written[-1:], total


class _WithCache(nn.Module):  # type: ignore[misc]
    """The model with its cache as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        pairs = [(past[i], past[i + 1]) for i in range(0, len(past), 2)]
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=True,
            past_key_values=_extras.load("transformers").DynamicCache(pairs),
        )  # fmt: skip
        flat = [value for layer in out.past_key_values.layers for value in (layer.keys, layer.values)]
        return (out.logits, *flat)


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{i}.{which}" for i in range(layers) for which in ("key", "value")]


def _quantise(folder: Path, *, large: bool) -> None:
    quantization = _extras.load("onnxruntime.quantization")
    with silent():
        quantization.quantize_dynamic(
            str(folder / _FLOAT), str(folder / MODEL), weight_type=quantization.QuantType.QInt8, per_channel=True,
            reduce_range=True, use_external_data_format=large,
        )  # fmt: skip
    for path in folder.glob(f"{_FLOAT}*"):
        path.unlink()


def _readme(decoder: Decoder, precision: str) -> str:
    layers, heads, width = cache_shape(decoder)
    vocabulary = decoder.head.weight.shape[0]
    ends = ", ".join(f"{i} ({decoder.tokenizer.id_to_token(i)})" for i in decoder.ends)
    return (
        f"# model.onnx ({precision})\n\n"
        "| | name | type | shape | what |\n|---|---|---|---|---|\n"
        "| in | `input_ids` | int64 | [B, T] | new ids: the prompt first, then one at a time |\n"
        "| in | `attention_mask` | int64 | [B, P + T] | ones |\n"
        "| in | `position_ids` | int64 | [B, T] | P, P + 1, ... |\n"
        f"| in | `past_key_values.N.key`, `.value` (N to {layers - 1}) | float32 | [B, {heads}, P, {width}] | "
        "of the ids read before; P is 0 at first |\n"
        f"| out | `logits` | float32 | [B, T, {vocabulary}] | of the next id, after each |\n"
        f"| out | `present.N.key`, `.value` | float32 | [B, {heads}, P + T, {width}] | the next call's past |\n\n"
        "Prompts are written by chat_template.jinja and split by tokenizer.json without adding special tokens. "
        f"An answer ends at {ends}. At most {decoder.context_tokens:,} ids in all.\n"
    )
