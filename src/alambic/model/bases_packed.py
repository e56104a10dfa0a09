"""Weights as they are shipped: matrices in 8 bits with one scale a row, a quarter of their size; unpacked on first use.

A matrix W [R, C] is stored as round(W / s) in int8 with s = max|W| / 127 of each row, in float32 (symmetric, weights
only: Jacob et al. 2018, https://arxiv.org/abs/1712.05877); everything else is float32. Unpacked, the folder is in plain
Hugging Face layout, so nothing that loads, trains or exports a base needs to know. The unpacked copy is kept in the
user's cache; who uses it checks its SHA-256 (`alambic.model.bases`).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic._extras import load
from alambic.bundle_cache import writable_cache
from alambic.errors import BaseModelError
from alambic.model.bases_weights import PACKED

WEIGHTS = "model.safetensors"
_SCALE = ".scale"
_LAYOUT = "int8-rows.v1"
_temporary: dict[str, Path] = {}


def pack_folder(model: Path, out: Path) -> str:
    """Write the folder `model` (one model.safetensors) to `out` with its weights packed.

    Returns:
        SHA-256 (hex) of the model.safetensors that unpacking gives: what the catalogue states.

    Raises:
        BaseModelError: `model` has no single weight file, or it holds what is not a floating-point number.
    """
    tensors = _read(model / WEIGHTS)
    packed: dict[str, NDArray[Any]] = {}
    for name, value in sorted(tensors.items()):
        if value.dtype not in (np.float32, np.float16):
            raise BaseModelError(f"{model / WEIGHTS}: {name} is {value.dtype}; float32 or float16 is packed")
        if value.ndim == 2:
            packed[name], packed[name + _SCALE] = _rows_to_int8(value.astype(np.float32))
        else:
            packed[name] = value.astype(np.float32)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(model.iterdir()):
        if file.name != WEIGHTS:
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, out / file.name)
    (out / PACKED).write_bytes(load("safetensors.numpy").save(packed, metadata={"layout": _LAYOUT}))
    return hashlib.sha256(_unpacked(out / PACKED)).hexdigest()


def unpack_folder(folder: Path, *, sha256: str | None) -> Path:
    """Return a folder with the files of `folder` and its weights unpacked, from the cache when they are there.

    Without a cache that can be written, it is made for the life of this process.

    Args:
        folder: that holds `PACKED`.
        sha256: of the model.safetensors that must come out; a cached one that differs is made again.

    Raises:
        BaseModelError: the packed weights are damaged or of another layout, or do not give `sha256`.
    """
    made = _place(folder)
    if not ((made / WEIGHTS).is_file() and (sha256 is None or _sha256(made / WEIGHTS) == sha256)):
        content = _unpacked(folder / PACKED)
        found = hashlib.sha256(content).hexdigest()
        if sha256 is not None and found != sha256:
            raise BaseModelError(
                f"{folder / PACKED}: unpacks to SHA-256 {found}, the catalogue says {sha256}",
                hint="the file is damaged or not genuine: pip install --force-reinstall alambic-bases",
            )
        _fill(made, folder, content)
    return made


def _place(folder: Path) -> Path:
    """Return where `folder` is unpacked: named by its files, so that another version goes elsewhere."""
    stamps = {
        file.relative_to(folder).as_posix(): _sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()
    }
    name = f"{folder.name}-{hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()[:16]}"
    cache = writable_cache("bases")
    if cache is not None:
        return cache / name
    if name not in _temporary:
        _temporary[name] = Path(tempfile.mkdtemp(prefix="alambic-")) / name
        atexit.register(shutil.rmtree, _temporary[name].parent, ignore_errors=True)
    return _temporary[name]


def _fill(made: Path, folder: Path, content: bytes) -> None:
    beside = Path(tempfile.mkdtemp(dir=_parent(made), prefix=f".{made.name}-"))
    try:
        for file in sorted(folder.iterdir()):
            if file.name != PACKED:
                (shutil.copytree if file.is_dir() else shutil.copyfile)(file, beside / file.name)
        (beside / WEIGHTS).write_bytes(content)
        shutil.rmtree(made, ignore_errors=True)
        os.replace(beside, made)
    except OSError as error:
        if not (made / WEIGHTS).is_file():  # else another process was faster, with the same bytes
            raise BaseModelError(
                f"{made}: cannot be written ({error.strerror})",
                hint="free some space, or set XDG_CACHE_HOME to a folder with room",
            ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _parent(made: Path) -> Path:
    made.parent.mkdir(parents=True, exist_ok=True)
    return made.parent


def _rows_to_int8(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return whole numbers [R, C] and scales [R]; a row of zeros has the scale 1."""
    largest = np.abs(matrix).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(matrix / scale[:, None]), -127, 127).astype(np.int8), scale


def _unpacked(path: Path) -> bytes:
    """Return the bytes of the model.safetensors that `path` stands for; the same on every machine."""
    tensors = _read(path, layout=_LAYOUT)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, value in sorted(tensors.items()):
        if name.endswith(_SCALE):
            continue
        scale = tensors.get(name + _SCALE)
        if value.dtype == np.int8 and scale is not None and scale.shape == value.shape[:1]:
            weights[name] = value.astype(np.float32) * scale[:, None]
        elif value.dtype == np.float32:
            weights[name] = value
        else:
            raise BaseModelError(f"{path}: {name} is {value.dtype} without its scales", hint="reinstall alambic-bases")
    content: bytes = load("safetensors.numpy").save(weights, metadata={"format": "pt"})
    return content


def _read(path: Path, *, layout: str | None = None) -> dict[str, NDArray[Any]]:
    try:
        content = path.read_bytes()
        tensors: dict[str, NDArray[Any]] = load("safetensors.numpy").load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (OSError, load("safetensors").SafetensorError, ValueError, KeyError) as error:
        raise BaseModelError(f"{path}: cannot be read ({error})") from error
    found = header.get("__metadata__", {}).get("layout")
    if layout is not None and found != layout:
        raise BaseModelError(f"{path}: layout {found!r}; this version of alambic reads {layout!r}",
                             hint="install the alambic-bases of this release")  # fmt: skip
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
