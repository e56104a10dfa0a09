"""Model -> part folder of the engine `onnx`: model.onnx and tokenizer.json.

    spec = drain(pack(model, out, precision="int8"))

Precisions: `fp32`; `fp16` stores half-precision weights that the runtime widens when it loads them; `int8` has 8-bit
weights and quantises activations as they come, so it needs no calibration; `int8-signed` too, with signed weights in 7
bits: CPUs with VNNI or AMX have faster products for them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.errors import PackError
from alambic.events import Finished, Progress, Started, Work
from alambic.manifest import PartSpec
from alambic.model.encoder import Encoder
from alambic.pack import graph
from alambic.pack.openvino import part_params
from alambic.pack.proof import check_part
from alambic.pack.scratch import whole_folder
from alambic.pack.tokenizer import write_json

Precision = Literal["fp32", "fp16", "int8", "int8-signed"]
PRECISIONS = ("fp32", "fp16", "int8", "int8-signed")


def pack(model: Path, out: Path, *, precision: Precision, cache: Path | None = None) -> Work[PartSpec]:
    """Write the part folder `out` from a Model directory (or a base), proven against it.

    Args:
        model: directory that `Encoder.load` opens.
        out: folder to make; nothing is left there on failure.
        precision: of the weights and of the computation.
        cache: folder where traced graphs are kept between packs; None traces anew.

    Raises:
        PackError: the model cannot be packed, or the packed form does not agree with it.
        WorkspaceError: `out` cannot be written.
    """
    if precision not in PRECISIONS:
        raise PackError(f"precision {precision!r} is not known", hint="allowed: " + ", ".join(PRECISIONS))
    stage = f"pack.onnx.{precision}"
    yield Started(stage)
    encoder = graph.load_plain(model)
    with whole_folder(out) as folder:
        params = {**part_params(encoder, precision, {}), **graph.wide(encoder)}
        part = PartSpec("encoder", "onnx", "encoder", params)
        yield Progress(stage, 0, 2)
        converted = to_onnx(encoder, cache=cache, vectors=True)
        if precision == "fp16":
            store_half(converted)
        whole = not precision.startswith("int8")
        content = converted.SerializeToString() if whole else quantise(converted, signed=precision == "int8-signed")
        (folder / "model.onnx").write_bytes(content)
        write_json(encoder, folder)
        yield Progress(stage, 1, 2)
        proof = check_part(encoder, part, folder)
    yield Finished(stage, proof.seconds)
    return part


def export(model: Path, out: Path, *, cache: Path | None = None) -> Path:
    """Write `model` as a folder for other programs: model.onnx in float32, tokenizer.json, labels and a README.

    Raises:
        PackError: `out` exists, the model cannot be converted, or the packed form does not agree with it.
        WorkspaceError: `out` cannot be written.
    """
    encoder = graph.load_plain(model)
    with whole_folder(out) as folder:
        part = PartSpec("encoder", "onnx", "encoder", part_params(encoder, "fp32", {}))
        (folder / "model.onnx").write_bytes(to_onnx(encoder, cache=cache).SerializeToString())
        write_json(encoder, folder)
        check_part(encoder, part, folder)
        labels = list(encoder.spec.labels or ())
        (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False, indent=1), encoding="utf-8")
        (folder / "README.md").write_text(_readme(encoder), encoding="utf-8")
    return out


def to_onnx(encoder: Encoder, *, cache: Path | None, vectors: bool = False) -> Any:
    """Return `encoder` as an ONNX model in float32, inputs int64 [B, T], output `logits` or `embedding`.

    With `vectors`, a model with a head gives both: the vector is what its head takes.
    """
    onnx = _extras.load("onnx")
    key = graph.key_of(encoder, "onnx")
    kept = graph.load_kept(cache, key)
    if kept is not None:
        model = onnx.load_from_string((kept / "graph.onnx").read_bytes())
        holes = graph.read_holes(kept)
    else:
        program, weights = graph.trace(encoder)
        model = _convert(program)
        holes = _find_holes(model, weights)
        if not graph.complete(holes, weights):
            return _with_head(_convert(graph.trace(encoder, own_weights=True)[0]), encoder, vectors=vectors)
        _fill(model, holes, None)
        graph.keep(cache, key, {"graph.onnx": model.SerializeToString()}, holes)
    _fill(model, holes, graph.weights_of(encoder))
    return _with_head(model, encoder, vectors=vectors)


def quantise(model: Any, *, signed: bool) -> bytes:
    """Return `model` with 8-bit weights and activations quantised as they come.

    CPUs without VNNI add pairs of products with signed weights in 16 bits, which overflow: signed weights keep to 7
    bits, and unsigned ones use all 8.
    """
    onnx = _extras.load("onnx")
    quantization = _extras.load("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as scratch, graph.quiet():
        before, after = Path(scratch, "float.onnx"), Path(scratch, "int8.onnx")
        # The runtime's own preparation merges nodes that it merges again when it loads the model; its absence is only
        # worth a warning, which this mark silences.
        quantization.quant_utils.add_pre_process_metadata(model)
        onnx.save(model, str(before))
        kind = quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8
        quantization.quantize_dynamic(str(before), str(after), weight_type=kind, per_channel=True, reduce_range=signed)
        return after.read_bytes()


def store_half(model: Any) -> None:
    """Store the large weights of `model` in half precision; the runtime widens them once, when it loads them."""
    onnx = _extras.load("onnx")
    nodes = []
    for entry in model.graph.initializer:
        if entry.data_type != onnx.TensorProto.FLOAT or int(np.prod(entry.dims)) < graph.HALF_FROM:
            continue
        name, values = entry.name, onnx.numpy_helper.to_array(entry)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        entry.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        nodes.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def _readme(encoder: Encoder) -> str:
    prefix, suffix = encoder.special_ids()
    width = encoder.spec.hidden if encoder.head is None else len(encoder.spec.labels or ())
    name, rule = "embedding", "the pooled vector of the text"
    if encoder.head is not None:
        name, rule = "logits", "one a label, in the order of labels.json; softmax gives probabilities"
        if encoder.spec.multi_label:
            rule = "one a label, in the order of labels.json; a sigmoid of each gives its probability"
    return (
        "# model.onnx\n\n"
        "| | name | type | shape | what |\n|---|---|---|---|---|\n"
        "| in | `input_ids` | int64 | [B, T] | ids that tokenizer.json gives, special tokens included |\n"
        "| in | `attention_mask` | int64 | [B, T] | 1 for ids, 0 for padding |\n"
        f"| out | `{name}` | float32 | [B, {width}] | {rule} |\n\n"
        f"At most {encoder.spec.max_tokens} ids a text. A text begins with {prefix} and ends with {suffix}; "
        f"pad with {encoder.pad_id}.\n"
    )


def _convert(program: Any) -> Any:
    torch = _extras.load("torch")
    with graph.quiet():
        exported = torch.onnx.export(program, (), dynamo=True, external_data=False, verbose=False, optimize=True)
    model = exported.model_proto
    # Shapes noted while tracing contradict the quantiser's own shape inference.
    del model.graph.value_info[:]
    for entry, name in zip(model.graph.input, ("input_ids", "attention_mask"), strict=True):
        _rename(model, entry.name, name)
    return model


def _rename(model: Any, old: str, new: str) -> None:
    for port in (*model.graph.input, *model.graph.output):
        if port.name == old:
            port.name = new
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def _find_holes(model: Any, weights: graph.Weights) -> list[graph.Hole]:
    onnx = _extras.load("onnx")
    names = graph.fingerprints(weights)
    holes = []
    for entry in model.graph.initializer:
        if entry.data_type == onnx.TensorProto.FLOAT:
            known = names.get(graph.digest(onnx.numpy_helper.to_array(entry)))
            if known is not None:
                holes.append(graph.Hole(known[0], entry.name, known[1]))
    return holes


def _fill(model: Any, holes: Sequence[graph.Hole], weights: graph.Weights | None) -> None:
    """Put `weights` into the holes, or nothing at all."""
    entries = {entry.name: entry for entry in model.graph.initializer}
    for hole in holes:
        entry = entries[str(hole.at)]
        entry.ClearField("float_data")
        entry.raw_data = b"" if weights is None else graph.filled(hole, weights)


def _with_head(model: Any, encoder: Encoder, *, vectors: bool) -> Any:
    """Put the head after the pooled embedding, and name the outputs."""
    onnx = _extras.load("onnx")
    head = graph.head_of(encoder)
    pooled = model.graph.output[0]
    if pooled.name != "embedding":
        _rename(model, "embedding", "embedding.inner")  # tracing names the word table's rows so
        _rename(model, pooled.name, "embedding")
    if head is None:
        return model
    weight, bias = head
    _add_initializer(model, "head.weight", np.ascontiguousarray(weight.T))  # H, L: the quantiser knows MatMul
    _add_initializer(model, "head.bias", bias)
    model.graph.node.append(onnx.helper.make_node("MatMul", [pooled.name, "head.weight"], ["head.product"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["head.product", "head.bias"], ["logits"]))
    rows = pooled.type.tensor_type.shape.dim[0].dim_param or "B"
    shape = [rows, len(bias)]
    outputs = [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)]
    if vectors:
        outputs.append(onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, [rows, weight.shape[1]]))
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def _add_initializer(model: Any, name: str, value: NDArray[np.float32]) -> None:
    model.graph.initializer.append(_extras.load("onnx").numpy_helper.from_array(value, name))
