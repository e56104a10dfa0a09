"""The round-trip proof: a packed part sees the tokens that training saw, and computes what the model computes.

Every `pack` ends with it. The texts are the golden ones: accents, French typography, emoji, right-to-left, code, URLs,
digits, empty, white space, very long, control characters. Float forms must give the model's output; of an 8-bit form
the difference is stated, and one that has lost the model is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alambic.engines import load_part
from alambic.errors import PackError
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.manifest import PartSpec
from alambic.model.encoder import Encoder, by_length, pad
from alambic.pack.graph import HALF_FROM, rounded
from alambic.pack.tokenizer import first_difference, read_ids

# Of a float form, relative to the largest output (at least 1): rounding only.
TOLERANCE = 1e-3
# Of an 8-bit form, cosine of its outputs with the model's: below, it is another model. Real ones are over 0.9, less on
# texts unlike the task's, which the golden ones are.
LOWEST_COSINE = 0.5
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


@dataclass(frozen=True)
class Proof:
    """What the proof found; it exists only when it passed.

    Attributes:
        n: number of texts.
        tokenizers: files that gave the model's ids on every text.
        precision: of the packed form.
        largest_difference: between an output of the packed form and the model's.
        same_label: share of texts with the same largest output (1.0 for embeddings).
        cosine: mean cosine of the outputs.
        seconds: what the proof took.
    """

    n: int
    tokenizers: tuple[str, ...]
    precision: str
    largest_difference: float
    same_label: float
    cosine: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "tokenizers": list(self.tokenizers)}


def prove(model: Path, part: PartSpec, folder: Path, *, texts: Sequence[str] = GOLDEN_TEXTS) -> Proof:
    """Compare the packed part in `folder` with the Model directory it was made from.

    Raises:
        PackError: a token differs (the first is named with its input), or the outputs do.
        EngineError: the engine cannot run the part.
    """
    return check_part(Encoder.load(model), part, folder, texts=texts)


def check_part(encoder: Encoder, part: PartSpec, folder: Path, *, texts: Sequence[str] = GOLDEN_TEXTS) -> Proof:
    """Do what `prove` does, with a model that is open already, and leave proof.json in `folder`."""
    start = time.perf_counter()
    tokenizers = _check_tokens(encoder, folder, texts)
    precision = str(part.params.get("precision"))
    ids = [_cut(encoder, row) for row in encoder.tokenize(texts)]
    smallest = HALF_FROM if part.engine == "onnx" else 0
    reference = rounded(encoder, smallest=smallest) if precision == "fp16" else encoder
    expected, pooled = _reference(reference, ids)
    wide = bool(part.params.get("vectors"))
    got = _packed(part, folder, ids, wide=wide)
    vectors, got = got[:, expected.shape[1] :], got[:, : expected.shape[1]]
    _check_shape(expected, got)
    difference = np.abs(got - expected).max(axis=1)
    cosine = _cosine(expected, got)
    if precision.startswith("int8"):
        _check_cosine(cosine, precision)
    else:
        _check_difference(difference, expected, texts, precision)
    if wide:
        _check_vectors(pooled, vectors, precision)
    same = 1.0 if encoder.head is None else float((got.argmax(1) == expected.argmax(1)).mean())
    seconds = time.perf_counter() - start
    proof = Proof(len(texts), tokenizers, precision, float(difference.max()), same, cosine, round(seconds, 3))
    (folder / "proof.json").write_text(json.dumps({**proof.to_dict(), "seconds": None}, indent=1), encoding="utf-8")
    return proof


def _check_tokens(encoder: Encoder, folder: Path, texts: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name for name in ("tokenizer.json", "tokenizer.xml") if (folder / name).is_file())
    if not names:
        raise PackError(f"{folder}: no tokenizer was packed")
    for name in names:
        difference = first_difference(encoder, read_ids(folder, name, texts), texts)
        if difference is not None:
            raise PackError(
                f"{folder / name}: the packed tokenizer is not the model's: {difference}",
                hint="the text would be read otherwise than in training; pack the model with its own tokenizer",
            )
    return names


def _reference(encoder: Encoder, ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the model's outputs and its vectors; of a model without a head these are the same."""
    rows: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    with torch.inference_mode():
        for batch in by_length([len(row) for row in ids], batch_tokens=2048):
            pooled = encoder.pool(*pad([ids[i] for i in batch], pad_id=encoder.pad_id))
            values = pooled if encoder.head is None else encoder.classify(pooled)
            both = zip(values.float().numpy(), pooled.float().numpy(), strict=True)
            rows.update(zip(batch, both, strict=True))
    order = range(len(ids))
    return np.stack([rows[i][0] for i in order]), np.stack([rows[i][1] for i in order])


def _packed(part: PartSpec, folder: Path, ids: Sequence[Sequence[int]], *, wide: bool) -> NDArray[np.float32]:
    """Run the part, a few inputs one by one and the others in padded batches; `wide` asks for vectors too."""
    params = part.params if part.engine != "openvino" else {**part.params, "properties": _EXACT}
    runner = load_part(PartSpec(part.name, part.engine, part.folder, params), folder)
    infer = runner.infer_wide if wide else runner.infer
    alone = [infer([row]) for row in ids[:5]]
    return np.concatenate([*alone, infer(ids[5:])] if len(ids) > 5 else alone)


def _cut(encoder: Encoder, ids: list[int]) -> list[int]:
    suffix = encoder.special_ids()[1]
    limit = encoder.spec.max_tokens
    return ids if len(ids) <= limit else [*ids[: limit - len(suffix)], *suffix]


def _check_shape(expected: NDArray[np.float32], got: NDArray[np.float32]) -> None:
    if got.shape != expected.shape:
        raise PackError(f"the packed form gives outputs of shape {got.shape}, the model {expected.shape}")
    if not np.isfinite(got).all():
        raise PackError("the packed form gives outputs that are not finite", hint="pack it at a higher precision")


def _check_vectors(expected: NDArray[np.float32], got: NDArray[np.float32], precision: str) -> None:
    _check_shape(expected, got)
    least = LOWEST_COSINE if precision.startswith("int8") else 1.0 - TOLERANCE
    cosine = _cosine(expected, got)
    if cosine < least:
        raise PackError(
            f"the vectors of the {precision} form have a mean cosine of {cosine:.4f} with the model's; "
            f"{least:g} is the least that is the same model",
            hint="use another form",
        )


def _check_difference(
    difference: NDArray[np.float32], expected: NDArray[np.float32], texts: Sequence[str], precision: str
) -> None:
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    worst = int(difference.argmax())
    if difference[worst] > allowed:
        raise PackError(
            f"input {texts[worst][:60]!r}: an output of the {precision} form differs by {difference[worst]:.2g} "
            f"from the model's; at most {allowed:.2g} is rounding"
        )


def _check_cosine(cosine: float, precision: str) -> None:
    if cosine < LOWEST_COSINE:
        raise PackError(
            f"the outputs of the {precision} form have a mean cosine of {cosine:.2f} with the model's; "
            f"below {LOWEST_COSINE} it is another model",
            hint="use another 8-bit form, or the float one",
        )


def _cosine(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    # Outputs share a large common part, which would hide differences.
    middle = first.mean(axis=0)
    a, b = first - middle, second - middle
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    # A text whose output is the mean itself has no direction to compare.
    kept = norms > 1e-9
    return float(((a * b).sum(axis=1)[kept] / norms[kept]).mean()) if kept.any() else 1.0
