"""Model -> part folder of the engine `openvino`: model.xml, model.bin, the tokenizer and the engine's properties.

    spec = drain(pack(model, out, precision="fp16"))

Precisions: `fp16` stores half-precision weights and computes in float32; `int8-weights` stores 8-bit weights and
computes in float32; `int8` quantises weights and activations, calibrated on the task's own texts.
"""

from __future__ import annotations

import io
import logging
import tempfile
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.errors import PackError
from alambic.events import Finished, Note, Progress, Started, Work
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.manifest import PartSpec
from alambic.model.encoder import Encoder
from alambic.pack import graph
from alambic.pack.proof import check_part
from alambic.pack.scratch import whole_folder
from alambic.pack.tokenizer import write_graph, write_json

Precision = Literal["fp16", "int8-weights", "int8"]
PRECISIONS = ("fp16", "int8-weights", "int8")
# The engine's own defaults change with the CPU, so every bundle states them.
PROPERTIES: dict[str, str | int | bool] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
CALIBRATION_TEXTS = 300


def pack(
    model: Path,
    out: Path,
    *,
    precision: Precision,
    calibration: Sequence[str] = (),
    cache: Path | None = None,
    properties: Mapping[str, str | int | bool] = PROPERTIES,
) -> Work[PartSpec]:
    """Write the part folder `out` from a Model directory (or a base), proven against it.

    Args:
        model: directory that `Encoder.load` opens.
        out: folder to make; nothing is left there on failure.
        precision: of the weights and of the computation.
        calibration: texts of the task, needed for `int8`.
        cache: folder where traced graphs are kept between packs; None traces anew.
        properties: settings of the engine that the bundle states.

    Raises:
        PackError: the model cannot be packed, or the packed form does not agree with it.
        WorkspaceError: `out` cannot be written.
    """
    if precision not in PRECISIONS:
        raise PackError(f"precision {precision!r} is not known", hint="allowed: " + ", ".join(PRECISIONS))
    if precision == "int8" and not calibration:
        raise PackError("precision 'int8' needs texts to calibrate on, got none", hint="give texts of the task")
    stage = f"pack.openvino.{precision}"
    yield Started(stage)
    encoder = graph.load_plain(model)
    with whole_folder(out) as folder:
        params = {**part_params(encoder, precision, properties), **graph.wide(encoder)}
        yield Progress(stage, 0, 3)
        converted = quantise(to_openvino(encoder, cache=cache, vectors=True), encoder, precision, calibration)
        yield Progress(stage, 1, 3)
        _extras.load("openvino").save_model(converted, str(folder / "model.xml"), compress_to_fp16=True)
        yield from _write_tokenizers(encoder, folder)
        yield Progress(stage, 2, 3)
        proof = check_part(encoder, PartSpec("encoder", "openvino", "encoder", params), folder)
    yield Finished(stage, proof.seconds)
    return PartSpec("encoder", "openvino", "encoder", params)


def part_params(encoder: Encoder, precision: str, properties: Mapping[str, str | int | bool]) -> dict[str, Any]:
    """Return what the engine needs to know of the model besides its files."""
    prefix, suffix = encoder.special_ids()
    return {
        "output": "embedding" if encoder.head is None else "logits",
        "prefix_ids": prefix,
        "suffix_ids": suffix,
        "pad_id": encoder.pad_id,
        "max_tokens": encoder.spec.max_tokens,
        "precision": precision,
        "tokenizer": "tokenizer.json",
        "properties": dict(properties),
    }


def to_openvino(encoder: Encoder, *, cache: Path | None, vectors: bool = False) -> Any:
    """Return `encoder` as an OpenVINO model with float32 weights, inputs int64 [B, T], output float32.

    With `vectors`, a model with a head gives the vector that its head takes too, as a second output.
    """
    key = graph.key_of(encoder, "openvino")
    kept = graph.load_kept(cache, key)
    if kept is not None:
        xml, blank = (kept / "graph.xml").read_bytes(), zlib.decompress((kept / "graph.bin.z").read_bytes())
        holes = graph.read_holes(kept)
    else:
        program, weights = graph.trace(encoder)
        xml, full = _serialised(_convert(program))
        holes = _find_holes(xml, full, weights)
        if not graph.complete(holes, weights):
            return _with_head(_convert(graph.trace(encoder, own_weights=True)[0]), encoder, vectors=vectors)
        blank = _emptied(full, holes, weights)
        graph.keep(cache, key, {"graph.xml": xml, "graph.bin.z": zlib.compress(blank, 1)}, holes)
    return _with_head(_fill(xml, blank, holes, graph.weights_of(encoder)), encoder, vectors=vectors)


def quantise(model: Any, encoder: Encoder, precision: Precision, calibration: Sequence[str]) -> Any:
    """Return `model` at `precision`; `model` itself may be changed."""
    if precision == "fp16":
        return model
    nncf = _extras.load("nncf")
    with _silent():
        if precision == "int8":
            rows = calibration_rows(encoder, calibration)
            model = nncf.quantize(
                model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows),
                fast_bias_correction=True,
                # Weights in half the range: on CPUs without VNNI, full-range products overflow 16 bits.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=nncf.quantization.advanced_parameters.OverflowFix.ENABLE
                ),
            )  # fmt: skip
        # After static quantisation this reaches what it leaves in float: the embedding table, half of a small model.
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)


def calibration_rows(encoder: Encoder, texts: Sequence[str]) -> list[dict[str, NDArray[np.int64]]]:
    """Return model inputs of texts spread evenly over `texts`, cut to what the model reads."""
    step = max(1, len(texts) // CALIBRATION_TEXTS)
    suffix = encoder.special_ids()[1]
    limit, rows = encoder.spec.max_tokens, []
    for ids in encoder.tokenize(texts[::step][:CALIBRATION_TEXTS]):
        cut = ids if len(ids) <= limit else [*ids[: limit - len(suffix)], *suffix]
        row = np.array([cut], dtype=np.int64)
        rows.append({"input_ids": row, "attention_mask": np.ones_like(row)})
    return rows


def _write_tokenizers(encoder: Encoder, folder: Path) -> Work[None]:
    write_json(encoder, folder)
    why = write_graph(encoder, folder, GOLDEN_TEXTS)
    if why is not None:
        yield Note(f"tokenizer.xml is left out, tokenizer.json is used: {why}", "warning")


def _convert(program: Any) -> Any:
    openvino = _extras.load("openvino")
    try:
        with graph.quiet():
            model = openvino.convert_model(program)
    except RuntimeError as error:
        raise PackError(f"OpenVINO cannot convert this architecture: {str(error).strip().splitlines()[-1]}") from error
    for port, name in zip(model.inputs, ("input_ids", "attention_mask"), strict=True):
        port.get_tensor().set_names({name})
    return model


def _serialised(model: Any) -> tuple[bytes, bytes]:
    openvino = _extras.load("openvino")
    with tempfile.TemporaryDirectory() as scratch:
        xml, weights = Path(scratch, "graph.xml"), Path(scratch, "graph.bin")
        openvino.serialize(model, str(xml), str(weights))
        return xml.read_bytes(), weights.read_bytes()


def _find_holes(xml: bytes, full: bytes, weights: graph.Weights) -> list[graph.Hole]:
    names = graph.fingerprints(weights)
    holes = []
    for data in ElementTree.fromstring(xml).iter("data"):
        if data.get("element_type") != "f32" or data.get("offset") is None:
            continue
        at, size = int(data.attrib["offset"]), int(data.attrib["size"])
        known = names.get(graph.digest(np.frombuffer(full, np.float32, size // 4, at)))
        if known is not None:
            holes.append(graph.Hole(known[0], at, known[1]))
    return holes


def _emptied(full: bytes, holes: Sequence[graph.Hole], weights: graph.Weights) -> bytes:
    blank = bytearray(full)
    for hole in holes:
        assert isinstance(hole.at, int)
        size = weights[hole.name].nbytes
        blank[hole.at : hole.at + size] = bytes(size)
    return bytes(blank)


def _fill(xml: bytes, blank: bytes, holes: Sequence[graph.Hole], weights: graph.Weights) -> Any:
    openvino = _extras.load("openvino")
    full = np.frombuffer(blank, np.uint8).copy()
    for hole in holes:
        assert isinstance(hole.at, int)
        content = graph.filled(hole, weights)
        full[hole.at : hole.at + len(content)] = np.frombuffer(content, np.uint8)
    return openvino.Core().read_model(model=xml, weights=openvino.Tensor(full))


def _with_head(model: Any, encoder: Encoder, *, vectors: bool) -> Any:
    """Put the head after the pooled embedding, and name the outputs."""
    openvino = _extras.load("openvino")
    head = graph.head_of(encoder)
    pooled = model.get_results()[0]
    if head is None:
        model.output(0).get_tensor().set_names({"embedding"})
        return model
    ops = openvino.opset13
    product = ops.matmul(pooled.input_value(0), ops.constant(head[0]), False, True)  # B, L
    logits = ops.result(ops.add(product, ops.constant(head[1][None])))
    results = [logits, ops.result(pooled.input_value(0))] if vectors else [logits]
    model = openvino.Model(results, model.get_parameters(), "encoder")
    for port, name in zip(model.outputs, ("logits", "embedding"), strict=False):
        port.get_tensor().set_names({name})
    return model


@contextmanager
def _silent() -> Iterator[None]:
    """NNCF logs to the terminal and draws progress bars; the library never prints."""
    with graph.quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        was = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(was)
