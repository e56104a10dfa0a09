"""The computation of an encoder as an OpenVINO or ONNX graph, traced once per architecture.

Tracing takes 10 to 20 s; filling a traced graph with the weights of another model of the same architecture takes
less than one. So the traced graph is kept with holes where the weights go. The holes are found safely: the graph is
traced with random weights, all different, and each constant of the graph that holds exactly one of them (or its
transpose) is a hole. A graph in which a weight is not found whole is used once and not kept. Every pack then proves the
filled graph against the model itself (`alambic.pack.proof`), so a wrong filling cannot ship.

The traced part ends with the pooled embedding; the head is added here, so that the number of labels changes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alambic import _extras
from alambic.model.encoder import Encoder

VERSION = "graph.v1"
HALF_FROM = 1024  # values; the ONNX form keeps smaller weights in float32, where half precision would save nothing
_LIBRARIES = ("torch", "transformers", "openvino", "onnx", "onnxscript")
# Of no consequence for the traced part.
_NOT_ARCHITECTURE = (
    "_name_or_path",
    "id2label",
    "label2id",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
)


@dataclass(frozen=True)
class Hole:
    """Where weight `name` goes: a byte offset (OpenVINO) or an initializer (ONNX)."""

    name: str
    at: int | str
    transposed: bool


Weights = Mapping[str, NDArray[np.float32]]


def load_plain(model: Path) -> Encoder:
    """Open a model with plain attention, the one that both converters keep.

    The fused one gives NaN in OpenVINO for padding that sees no text, as in ModernBERT's local layers.
    """
    return Encoder.load(model, attention="eager")


def weights_of(encoder: Encoder) -> dict[str, NDArray[np.float32]]:
    """Return the weights of the traced part, by the name they have in it."""
    return {f"backbone.{k}": v.detach().float().numpy() for k, v in encoder.backbone.named_parameters()}


def head_of(encoder: Encoder) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return weight [L, H] and bias [L] of the head, the scale of normalised vectors multiplied in."""
    if encoder.head is None:
        return None
    scale = np.float32(encoder.spec.scale if encoder.spec.normalize else 1.0)
    return encoder.head.weight.detach().float().numpy() * scale, encoder.head.bias.detach().float().numpy()


def wide(encoder: Encoder) -> dict[str, bool]:
    """Return the parameter that says that a packed model gives its vectors beside its scores, where it does."""
    return {} if encoder.head is None else {"vectors": True}


def key_of(encoder: Encoder, form: str) -> str:
    """Name the traced graph that `encoder` needs: same architecture, same libraries, same name."""
    config = {k: v for k, v in encoder.backbone.config.to_dict().items() if k not in _NOT_ARCHITECTURE}
    spec = {k: v for k, v in asdict(encoder.spec).items() if k in ("architecture", "pooling", "normalize", "hidden")}
    shapes = {k: list(v.shape) for k, v in weights_of(encoder).items()}
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    body = json.dumps([VERSION, form, config, spec, shapes, versions], sort_keys=True, default=str)
    return f"{encoder.spec.architecture}-{form}-{hashlib.sha256(body.encode()).hexdigest()[:16]}"


def trace(encoder: Encoder, *, own_weights: bool = False) -> tuple[Any, Weights]:
    """Trace the encoder without its head; return the torch program and the weights (random, or its own) in it."""
    with quiet():
        # ModernBERT says that it cannot switch to plain attention, which `load_plain` chose already.
        bare = type(encoder)(encoder.backbone, encoder.tokenizer, replace(encoder.spec, labels=None)).for_export()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in () if own_weights else bare.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
    ids = torch.ones(2, 9, dtype=torch.long)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    rows, width = torch.export.Dim("B", min=1, max=65536), torch.export.Dim("T", min=1, max=_positions(encoder))
    shapes = ({0: rows, 1: width}, {0: rows, 1: width})
    with quiet():
        program = torch.export.export(bare, (ids, mask), dynamic_shapes=shapes, strict=False)
    return program, {k: v.detach().numpy() for k, v in bare.named_parameters()}


def fingerprints(weights: Weights) -> dict[str, tuple[str, bool]]:
    """Return the hash of each weight, and of its transpose if it is a matrix, with its name."""
    found: dict[str, tuple[str, bool]] = {}
    for name, value in weights.items():
        found[digest(value)] = (name, False)
        if value.ndim == 2:
            found.setdefault(digest(value.T), (name, True))
    return found


def digest(value: NDArray[Any]) -> str:
    """Hash the values of an array in row order, whatever its shape."""
    return hashlib.sha256(np.ascontiguousarray(value, dtype=np.float32).tobytes()).hexdigest()


def complete(holes: list[Hole], weights: Weights) -> bool:
    """Tell whether every weight was found in the graph."""
    return {hole.name for hole in holes} == set(weights)


def filled(hole: Hole, weights: Weights) -> bytes:
    """Return the bytes that go into `hole`."""
    value = weights[hole.name]
    return np.ascontiguousarray(value.T if hole.transposed else value, dtype="<f4").tobytes()


def load_kept(cache: Path | None, key: str) -> Path | None:
    """Return the folder of a traced graph kept in `cache`, or None."""
    folder = None if cache is None else cache / key
    return folder if folder is not None and (folder / "holes.json").is_file() else None


def keep(cache: Path | None, key: str, files: Mapping[str, bytes], holes: list[Hole]) -> None:
    """Keep a traced graph in `cache`; it only saves time, so a folder that cannot be written is no error."""
    if cache is None:
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
    except OSError:
        return
    try:
        for name, content in files.items():
            (beside / name).write_bytes(content)
        (beside / "holes.json").write_text(json.dumps([asdict(hole) for hole in holes]), encoding="utf-8")
        os.replace(beside, cache / key)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)


def read_holes(folder: Path) -> list[Hole]:
    """Read the holes of a kept graph."""
    return [Hole(**raw) for raw in json.loads((folder / "holes.json").read_text(encoding="utf-8"))]


def rounded(encoder: Encoder, *, smallest: int) -> Encoder:
    """Return a copy of `encoder` with the weights of `smallest` values or more rounded as float16 forms store them."""
    twin: Encoder = copy.deepcopy(encoder)
    with torch.no_grad():
        for value in twin.backbone.parameters():
            value.copy_(_rounded(value, smallest))
        head = head_of(encoder)
        if twin.head is not None and head is not None:
            # The head is stored with the scale multiplied in.
            scale = encoder.spec.scale if encoder.spec.normalize else 1.0
            weight, bias = (_rounded(torch.from_numpy(value), smallest) for value in head)
            twin.set_head(weight / scale, bias)
    twin.eval()
    return twin


def _rounded(value: torch.Tensor, smallest: int) -> torch.Tensor:
    return value.half().float() if value.numel() >= smallest else value


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters say about their own code; the library never prints."""
    _extras.hide_telemetry()
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(was)


def _positions(encoder: Encoder) -> int:
    """Longest input that the positions of the architecture allow."""
    return max(int(getattr(encoder.backbone.config, "max_position_embeddings", 0) or 0), encoder.spec.max_tokens, 16)
