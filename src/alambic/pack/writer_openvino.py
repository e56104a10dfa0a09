"""Model that writes -> part folder of an OpenVINO engine: stateful graphs, tokenizer, template, generation settings.

    part = drain(pack_openvino(model, out, precision="int4", calibration=conversations))

Decoders are parts of the engine `openvino-genai`. What its paged attention cannot express is a part of the engine
`openvino-graph`, which runs the graphs one request at a time: encoder-decoders, and Gemma 2, whose attention caps its
scores (left out, it would be another model).

Precisions: `fp32` (for proofs), `fp16`, `int8`, `int4`; the two last have several forms
(`alambic.pack.writer_quantise.FORMS`). The part folder holds the weights once, and so does the disk afterwards: the
floating-point form that a quantised one is made from lies beside it only while it is needed.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from alambic import _extras
from alambic.errors import PackError, TemplateError, WorkspaceError
from alambic.events import Finished, Note, Progress, Started, Work
from alambic.kinds.chat import Chat
from alambic.kinds.golden_chats import GOLDEN_CHATS
from alambic.manifest import PartSpec
from alambic.measure.machine import fingerprint
from alambic.model.bases import read_json
from alambic.model.bases_weights import count_stored, weight_files
from alambic.model.decoder import Decoder, save_tokenizer
from alambic.model.encoder import _quiet as quiet
from alambic.model.seq2seq import FAMILIES as SEQ2SEQ
from alambic.model.seq2seq import Seq2Seq, load_writer
from alambic.pack import ministral
from alambic.pack.openvino import _silent as silent
from alambic.pack.scratch import whole_folder
from alambic.pack.writer_quantise import WeightForm, calibration_rows, choose_form, quantise
from alambic.pack.writer_tokenizer import write_graphs

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS = ("fp32", "fp16", "int8", "int4")
Properties = Mapping[str, str | int | bool]

# The engine's own defaults change with the CPU, so every bundle states them. The quantised forms compute in float32
# with 8-bit products over groups of 128 (of a weight's own group in 4 bits): where the CPU has bf16, a token is written
# in 0.7 to 0.8 of the time that bf16 takes, and a prompt read in 1.4 times of it (docs/lab-notes.md, 2026-11-21).
# A build puts bf16 in its place where that is faster at the task's lengths (`alambic.build.writing.arithmetic`).
EXACT: Properties = {
    "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}  # fmt: skip
_HALF: Properties = {**EXACT, "KV_CACHE_PRECISION": "f16"}
_GROUP = 128
_FAST: Properties = {
    "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "u8", "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP,
}  # fmt: skip
PROPERTIES: Mapping[str, Properties] = {"fp32": EXACT, "fp16": _HALF, "int8": _FAST, "int4": _FAST}

MODEL, ENCODER, DECODER = "openvino_model.xml", "openvino_encoder_model.xml", "openvino_decoder_model.xml"
_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.1, "int4": 0.7}  # of a weight on disk, scales included
_SMALL = 300_000_000  # weights: up to here the float form of a quantised one lies in full, so nothing is rounded twice
_MEMORY_SHARE = 0.35  # of the machine's memory that the weights may take; tracing holds them about twice


def usual_properties(precision: Precision, weights: WeightForm | None) -> Properties:
    """Return the settings of the engine for a precision and form: no group of products is wider than one of weights."""
    usual = PROPERTIES[precision]
    if weights is None or weights.group_size is None:
        return usual
    return {**usual, "DYNAMIC_QUANTIZATION_GROUP_SIZE": min(_GROUP, weights.group_size)}


def pack_openvino(
    model: Path,
    out: Path,
    *,
    precision: Precision,
    form: str | None = None,
    calibration: Sequence[Chat] = (),
    properties: Properties | None = None,
) -> Work[PartSpec]:
    """Write the part folder `out` from a model in Hugging Face layout, a decoder or an encoder-decoder.

    Args:
        model: what `alambic.model.seq2seq.load_writer` opens.
        out: folder to make; nothing is left there on failure.
        precision: of the weights.
        form: name in `FORMS` of how 8 or 4 bits are stored; None: the usual one, calibrated where conversations are
            given.
        calibration: conversations of the task.
        properties: settings of the engine that the bundle states; None: `usual_properties`.

    Raises:
        BaseModelError: the model cannot be opened.
        PackError: it cannot be packed so.
        WorkspaceError: `out` cannot be written, or the disk has no room for it.
    """
    if precision not in PRECISIONS:
        raise PackError(f"precision {precision!r} is not known", hint="allowed: " + ", ".join(PRECISIONS))
    parameters = count_stored(weight_files(model))
    name, weights = None, None
    if precision in ("int8", "int4"):
        if read_json(model / "config.json").get("model_type") in SEQ2SEQ:
            calibration = ()  # the inputs of its decoder are states of the encoder, so its forms go without
        name, weights = choose_form(precision, form, calibrated=bool(calibration), parameters=parameters)
    elif form is not None:
        raise PackError(f"form {form!r} is one of quantised weights, and precision {precision!r} has none")
    stage, start = f"pack.openvino.{name or precision}", time.perf_counter()
    yield Started(stage)
    _check_room(out, parameters, precision)
    writer = load_writer(model, dtype=_loaded_dtype(parameters))
    if not isinstance(writer.tokenizer, Tokenizer):
        raise PackError(
            f"{model}: the tokenizer is Marian's pair of SentencePiece files, which no engine of ours reads",
            hint="take a base with a tokenizer.json, or let base = scratch make one",
        )
    rows = calibration_rows(rendered_ids(writer, calibration)) if weights is not None and calibration else []
    params = part_params(writer, precision, usual_properties(precision, weights) if properties is None else properties)
    engine = engine_of(writer)
    if weights is not None:
        params["form"] = {"name": name, **weights.to_dict(), "calibration_rows": len(rows)}
    with whole_folder(out) as folder:
        yield Progress(stage, 0, 3)
        where = folder if weights is None else folder / ".float"
        export(writer, where, half=precision != "fp32" and not (weights is not None and parameters < _SMALL))
        yield Progress(stage, 1, 3)
        yield from _write_files(writer, folder)
        del writer
        gc.collect()
        yield Progress(stage, 2, 3)
        if weights is not None:
            _compress(where, folder, weights, rows)
            shutil.rmtree(where)
    yield Finished(stage, time.perf_counter() - start)
    return PartSpec("writer", engine, "writer", params)


def part_params(writer: Decoder | Seq2Seq, precision: str, properties: Properties) -> dict[str, Any]:
    """Return what the engine needs to know of the model besides its files."""
    special = {name: text for name, text in _special(writer).items() if text}
    params: dict[str, Any] = {
        "architecture": writer.architecture,
        "context_tokens": writer.context_tokens,
        "parameters": writer.spec.parameters,
        "precision": precision,
        "properties": dict(properties),
        "tokenizer": "tokenizer.json",
        "special": special,
        "ends": [text for end in writer.ends if (text := writer.tokenizer.id_to_token(end)) is not None],
        "end_ids": list(writer.ends),
        "bos_id": _id_of(writer, "bos_token"),
        "eos_id": _id_of(writer, "eos_token"),
        "pad_id": writer.pad_id,
    }
    if isinstance(writer, Seq2Seq):
        params |= {"shape": "encoder-decoder", "start_id": writer.start_id, "first_id": _forced_first(writer)}
    return params


def engine_of(writer: Decoder | Seq2Seq) -> str:
    """Return the engine that runs the graphs of `writer`; paged attention replaces a fused one only."""
    fused = isinstance(writer, Decoder) and writer.model.config._attn_implementation == "sdpa"
    return "openvino-genai" if fused else "openvino-graph"


def export(writer: Decoder | Seq2Seq, folder: Path, *, half: bool) -> None:
    """Write the graphs of the bare model, state inside, as `.xml` and `.bin`.

    A decoder is `openvino_model`: ids int64 [B, T] -> logits [B, T, V]. An encoder-decoder is `openvino_encoder_model`:
    ids [B, S] -> last_hidden_state [B, S, H], and `openvino_decoder_model`: these and ids [B, T] -> logits [B, T, V].

    Raises:
        PackError: the exporter does not know this kind, or fails on it.
    """
    folder.mkdir(exist_ok=True)
    ministral.register()
    exporter = _extras.load("optimum.exporters.openvino.convert")
    settings = _extras.load("optimum.intel.openvino.configuration").OVConfig(dtype="fp16" if half else "fp32")
    stored_16 = next(writer.model.parameters()).dtype != torch.float32
    task = "text-generation-with-past" if isinstance(writer, Decoder) else "text2text-generation-with-past"
    try:
        # The exporter switches logging on again, so transformers' own level counts too.
        with silent(), quiet():
            exporter.export_from_model(
                writer.model, folder, task=task, stateful=True, preprocessors=[], ov_config=settings,
                patch_16bit_model=stored_16,
            )  # fmt: skip
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _full(folder):
            raise
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise PackError(f"{writer.architecture}: OpenVINO cannot take this model: {last}") from error


def rendered_ids(decoder: Decoder | Seq2Seq, chats: Sequence[Chat]) -> list[list[int]]:
    """Return the ids of whole conversations, as training reads them."""
    assert isinstance(decoder, Decoder), "encoder-decoders are not calibrated"
    return [decoder.tokenize(decoder.template.render(chat))[0] for chat in chats]


def golden_texts(decoder: Decoder) -> list[str]:
    """Return the golden conversations as this template writes them; those that it refuses are left out."""
    texts = []
    for chat in GOLDEN_CHATS.values():
        try:
            texts.append(decoder.template.render(chat, reply=chat.completion is None))
        except TemplateError:
            continue
    return texts


def _compress(source: Path, folder: Path, weights: WeightForm, rows: Sequence[Sequence[int]]) -> None:
    openvino = _extras.load("openvino")
    for path in sorted(source.glob("*.xml")):
        packed = quantise(openvino.Core().read_model(str(path)), weights, rows)
        openvino.save_model(packed, str(folder / path.name), compress_to_fp16=True)
    # What the exporter writes beside the graphs; ours are there already.
    for path in source.glob("*.json"):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _write_files(writer: Decoder | Seq2Seq, folder: Path) -> Work[None]:
    generation = {"bos_token_id": _id_of(writer, "bos_token"), "eos_token_id": list(writer.ends),
                  "pad_token_id": writer.pad_id, "do_sample": False}  # fmt: skip
    if isinstance(writer, Seq2Seq):
        save_tokenizer(writer.tokenizer, folder, {k: v for k, v in writer.special.items() if v})
        generation |= {"decoder_start_token_id": writer.start_id, "forced_bos_token_id": _forced_first(writer)}
    else:
        save_tokenizer(writer.tokenizer, folder, writer._tokenizer_config())
        (folder / "chat_template.jinja").write_text(writer.template.source, encoding="utf-8")
        faults = write_graphs(writer.tokenizer, folder, golden_texts(writer), template=writer.template)
        for name, fault in faults.items():
            yield Note(f"{name}: {fault}; the engine reads and writes by tokenizer.json", "info")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1), encoding="utf-8")


def _special(writer: Decoder | Seq2Seq) -> Mapping[str, str]:
    return writer.template.special if isinstance(writer, Decoder) else writer.special


def _id_of(writer: Decoder | Seq2Seq, name: str) -> int | None:
    text = _special(writer).get(name)
    found = writer.tokenizer.token_to_id(text) if text else None
    return None if found is None else int(found)


def _forced_first(writer: Seq2Seq) -> int | None:
    """BART's first token is always the same one."""
    value = getattr(writer.model.generation_config, "forced_bos_token_id", None)
    return None if value is None else int(value)


def _loaded_dtype(parameters: int) -> torch.dtype | None:
    """Read weights as float32 where the memory has room, else as they are stored."""
    memory_gb = fingerprint().get("ram_gb", 16.0)
    return torch.float32 if parameters * 4e-9 < _MEMORY_SHARE * memory_gb else None


def _check_room(out: Path, parameters: int, precision: str) -> None:
    """Refuse to start what cannot end.

    Raises:
        WorkspaceError: the disk is too full.
    """
    each = _BYTES[precision]
    if precision in ("int8", "int4"):
        each += 4.0 if parameters < _SMALL else 2.0
    needed = parameters * each * 1.05
    there = next(parent for parent in (out, *out.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise WorkspaceError(
            f"{out}: packing takes {needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free",
            hint="free some space, or choose another folder",
        )


def _full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < 1_000_000
