"""Tagger -> part folder of the engine `tagger`: the encoder for ONNX Runtime or OpenVINO, and the heads as arrays.

    spec = drain(pack_tagger(model, out, runtime="onnx", precision="int8", answers=answers, schema=schema))

Precisions are those of `alambic.pack.onnx` and `alambic.pack.openvino`. Every pack ends with a proof on the golden
texts: the same tokens, and the scores of the model itself (float forms), or their shape (8-bit forms).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.parts import TokenParams
from alambic.engines.tagger import TaggerPart, TaggerSpec
from alambic.engines.tagging import best_tags
from alambic.errors import PackError
from alambic.events import Finished, Note, Progress, Started, Work
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.manifest import PartSpec
from alambic.model.encoder import pad
from alambic.model.tagger import StatesEncoder, Tagger
from alambic.pack import onnx, openvino
from alambic.pack.graph import HALF_FROM, rounded
from alambic.pack.proof import LOWEST_COSINE, TOLERANCE
from alambic.pack.scratch import whole_folder
from alambic.pack.tokenizer import first_difference, write_graph, write_json

Floats = NDArray[np.float32]
PRECISIONS: dict[str, tuple[str, ...]] = {"onnx": onnx.PRECISIONS, "openvino": openvino.PRECISIONS}


@dataclass(frozen=True)
class TaggerProof:
    """What the proof found; it exists only when it passed.

    Attributes:
        n: number of texts.
        precision: of the packed form.
        largest_difference: between a log-probability of the packed form and the model's.
        same_tags: share of units with the same tag.
        cosine: of all scores, centred.
        seconds: what the proof took.
    """

    n: int
    precision: str
    largest_difference: float
    same_tags: float
    cosine: float
    seconds: float


def pack_tagger(
    model: Path,
    out: Path,
    *,
    runtime: Literal["onnx", "openvino"],
    precision: str,
    choices: Mapping[str, Sequence[Any]] | None = None,
    schema: Mapping[str, Any] | None = None,
    long: str = "windows",
    overlap: int = 64,
    calibration: Sequence[str] = (),
    cache: Path | None = None,
) -> Work[PartSpec]:
    """Write the part folder `out` from a Model directory that `train_tagger` made, proven against it.

    Args:
        model: the Model directory.
        out: folder to make; nothing is left there on failure.
        runtime: what runs the encoder.
        precision: of the runtime's own precisions.
        choices: values of each field that is chosen for the whole text, in the order of training.
        schema: JSON Schema of the answers; None gives spans and choices only.
        long: how long texts are read.
        overlap: tokens that neighbouring windows share.
        calibration: texts of the task, needed for OpenVINO's `int8`.
        cache: folder where traced graphs are kept between packs.

    Raises:
        PackError: the model cannot be packed, or the packed form does not agree with it.
        WorkspaceError: `out` cannot be written.
    """
    if runtime not in PRECISIONS or precision not in PRECISIONS[runtime]:
        allowed = ", ".join(f"{name} {one}" for name, all_ in PRECISIONS.items() for one in all_)
        raise PackError(f"runtime {runtime!r} with precision {precision!r} is not known", hint=f"allowed: {allowed}")
    if (runtime, precision) == ("openvino", "int8") and not calibration:
        raise PackError("precision 'int8' needs texts to calibrate on, got none", hint="give texts of the task")
    stage = f"pack.tagger.{runtime}.{precision}"
    yield Started(stage)
    tagger = Tagger.load(model, attention="eager")
    spec = _spec(tagger, choices or {}, schema, long, overlap)
    encoder = tagger.encoder
    properties = openvino.PROPERTIES if runtime == "openvino" else {}
    params = {"runtime": runtime, "encoder": openvino.part_params(encoder, precision, properties),
              "tagger": spec.to_dict()}  # fmt: skip
    with whole_folder(out) as folder:
        yield Progress(stage, 0, 2)
        if runtime == "onnx":
            _write_onnx(encoder, folder, precision, cache)
        else:
            yield from _write_openvino(encoder, folder, precision, calibration, cache)
        write_json(encoder, folder)
        _write_head(folder, "tags", tagger.tags)
        if tagger.chosen is not None:
            _write_head(folder, "choices", tagger.chosen)
        yield Progress(stage, 1, 2)
        proof = prove(tagger, params, folder, texts=[*GOLDEN_TEXTS, *calibration[:100]])
        (folder / "proof.json").write_text(json.dumps({**vars(proof), "seconds": None}, indent=1), encoding="utf-8")
    yield Finished(stage, proof.seconds)
    return PartSpec("tagger", "tagger", "tagger", params)


def prove(
    tagger: Tagger, params: Mapping[str, Any], folder: Path, *, texts: Sequence[str] = GOLDEN_TEXTS
) -> TaggerProof:
    """Compare the packed part in `folder` with the model it was made from.

    Raises:
        PackError: a token differs (the first is named with its input), or the scores do.
        EngineError: the engine cannot run the part.
    """
    start = time.perf_counter()
    packed = TaggerPart(folder, params)
    difference = first_difference(tagger.encoder, packed.token_ids(texts), texts)
    if difference is not None:
        raise PackError(f"{folder / 'tokenizer.json'}: the packed tokenizer is not the model's: {difference}")
    precision = str(params["encoder"]["precision"])
    reference = TaggerPart(folder, params, encoder=_TorchStates(tagger.encoder, params, precision))
    expected, got = reference.scores(texts), packed.scores(texts)
    theirs, ours = (np.concatenate([one.tags for one in scores]) for scores in (got, expected))
    if not np.isfinite(theirs).all():
        raise PackError("the packed form gives scores that are not finite", hint="pack it at a higher precision")
    apart = float(np.abs(theirs - ours).max(initial=0.0))
    # Tags that the model all but excludes have log-probabilities of any size: those say nothing of a form.
    cosine = _cosine(np.maximum(theirs, -10.0), np.maximum(ours, -10.0))
    allowed = TOLERANCE * max(1.0, float(np.abs(ours).max(initial=0.0)))
    if precision.startswith("int8"):
        if cosine < LOWEST_COSINE:
            raise PackError(
                f"the scores of the {precision} form have a cosine of {cosine:.2f} with the model's; below "
                f"{LOWEST_COSINE} it is another model",
                hint="use another 8-bit form, or the float one",
            )
    elif apart > allowed:
        raise PackError(
            f"a score of the {precision} form differs by {apart:.2g} from the model's; "
            f"at most {allowed:.2g} is rounding"
        )
    pairs = [(best_tags(a.tags), best_tags(b.tags)) for a, b in zip(got, expected, strict=True) if len(a.tags)]
    same = float(np.concatenate([a == b for a, b in pairs]).mean())
    return TaggerProof(len(texts), precision, apart, same, cosine, round(time.perf_counter() - start, 3))


class _TorchStates:
    """The model itself where the packed encoder would be, its weights rounded as the form stores them."""

    def __init__(self, encoder: StatesEncoder, params: Mapping[str, Any], precision: str) -> None:
        smallest = HALF_FROM if params["runtime"] == "onnx" else 0
        self._encoder = rounded(encoder, smallest=smallest) if precision == "fp16" else encoder
        self.params = TokenParams.of(params["encoder"], Path())

    def infer(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> Floats:
        """Return states [B, T, H]."""
        with torch.inference_mode():
            states: Floats = self._encoder.pool(*pad(windows, pad_id=self.params.pad_id)).float().numpy()
        return states

    def describe(self) -> dict[str, Any]:
        """Say what runs."""
        return {"engine": "torch", "version": torch.__version__}


def _spec(
    tagger: Tagger, choices: Mapping[str, Sequence[Any]], schema: Mapping[str, Any] | None, long: str, overlap: int
) -> TaggerSpec:
    sizes = {name: len(values) for name, values in choices.items()}
    if sizes != tagger.choices or list(sizes) != list(tagger.choices):
        raise PackError(f"choices {sizes} were given, and the model was trained with {tagger.choices}")
    prefix, suffix = tagger.encoder.special_ids()
    room = tagger.encoder.spec.max_tokens - len(prefix) - len(suffix)
    fixed = {name: tuple(values) for name, values in choices.items()}
    return TaggerSpec(tagger.labels, fixed, tagger.unit, min(overlap, room // 2), long, schema, tagger.lines)


def _write_onnx(encoder: StatesEncoder, folder: Path, precision: str, cache: Path | None) -> None:
    converted = onnx.to_onnx(encoder, cache=cache)
    if precision == "fp16":
        onnx.store_half(converted)
    whole = not precision.startswith("int8")
    signed = precision == "int8-signed"
    content = converted.SerializeToString() if whole else onnx.quantise(converted, signed=signed)
    (folder / "model.onnx").write_bytes(content)


def _write_openvino(
    encoder: StatesEncoder, folder: Path, precision: str, calibration: Sequence[str], cache: Path | None
) -> Work[None]:
    model = openvino.to_openvino(encoder, cache=cache)
    model = openvino.quantise(model, encoder, precision, calibration)  # type: ignore[arg-type]
    _extras.load("openvino").save_model(model, str(folder / "model.xml"), compress_to_fp16=True)
    why = write_graph(encoder, folder, GOLDEN_TEXTS)
    if why is not None:
        yield Note(f"tokenizer.xml is left out, tokenizer.json is used: {why}", "warning")


def _write_head(folder: Path, name: str, head: Any) -> None:
    np.save(folder / f"{name}_weight.npy", head.weight.detach().float().numpy())
    np.save(folder / f"{name}_bias.npy", head.bias.detach().float().numpy())


def _cosine(first: Floats, second: Floats) -> float:
    a, b = first - first.mean(axis=0), second - second.mean(axis=0)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum() / norm) if norm > 0 else 1.0
