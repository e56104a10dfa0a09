"""The weight files of a folder: safetensors only, all shards there, parameters counted from their headers.

A safetensors file begins with the length of a JSON header (8 bytes, little-endian) that gives type, shape and place of
each tensor (https://huggingface.co/docs/safetensors). Reading headers costs milliseconds whatever the model's size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alambic.errors import BaseModelError

INDEX = "model.safetensors.index.json"
PACKED = "packed.safetensors"  # a shipped base's weights in 8 bits, see bases_packed
_SHARD = re.compile(r"(model)-(\d{5})-of-(\d{5})\.safetensors")
_MAX_HEADER = 100_000_000  # the format's own limit
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of `folder`, every shard of them.

    Raises:
        BaseModelError: there are none, or a shard is missing; pickled ones are refused because opening them can run
            code.
    """
    names = _indexed(folder) if (folder / INDEX).is_file() else _numbered(folder)
    if names:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BaseModelError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}",
                hint="copy the missing files into the folder; a Hub id is completed by: alambic bases pull ID",
            )
        return [folder / name for name in names]
    _refuse(folder)
    raise BaseModelError(
        f"{folder}: no model.safetensors in this folder", hint="give the folder that holds config.json"
    )


def count_stored(files: Sequence[Path]) -> int:
    """Return the number of parameters in safetensors files: the values of their floating-point tensors.

    Raises:
        BaseModelError: a file is cut short or is not safetensors.
    """
    return sum(_count(path, _header(path)) for path in files)


def _indexed(folder: Path) -> list[str]:
    path = folder / INDEX
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(named.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{path}: cannot be read as an index of weight files ({error})") from error
    strange = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]
    if strange or not names:
        raise BaseModelError(
            f"{path}: names no weight files of this folder ({', '.join(map(repr, strange)) or 'empty'})"
        )
    return names


def _numbered(folder: Path) -> list[str]:
    """Return model*.safetensors; of numbered shards, all that their numbers promise."""
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    shards = [found for name in names if (found := _SHARD.fullmatch(name))]
    if not shards or len(shards) != len(names):
        return names
    return [f"model-{i:05d}-of-{shards[0][3]}.safetensors" for i in range(1, int(shards[0][3]) + 1)]


def _refuse(folder: Path) -> None:
    """Say why a folder without safetensors cannot be taken, when the reason is known."""
    pickled = sorted(path for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise BaseModelError(
            f"{folder}: the weights are pickled ({pickled[0].name}), and opening a pickle can run any code",
            hint="where you trust that file, convert it once with transformers: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and copy the tokenizer files along",
        )
    if sorted(folder.glob("*.gguf")):
        raise BaseModelError(
            f"{folder}: holds GGUF files only, which are packed for one engine and cannot be trained",
            hint="take the safetensors release of the same model",
        )
    if (folder / "adapter_config.json").is_file():
        raise BaseModelError(
            f"{folder}: is an adapter (LoRA), not a base", hint="name the base that it was made for as base.name"
        )


def _header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEADER, size - 8):
                raise BaseModelError(
                    f"{path}: is not a safetensors file, or only its beginning", hint="fetch or copy it again"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise BaseModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{path}: is not a safetensors file ({error})", hint="fetch or copy it again") from error
    if not isinstance(header, dict):
        raise BaseModelError(f"{path}: is not a safetensors file (its header is no object)")
    header.pop("__metadata__", None)
    _check_size(path, header, stored=size - 8 - length)
    return header


def _check_size(path: Path, header: dict[str, Any], *, stored: int) -> None:
    try:
        promised = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise BaseModelError(f"{path}: a tensor of its header has no place ({error})") from error
    if stored < promised:
        raise BaseModelError(
            f"{path}: holds {stored:,} bytes of tensors, its header promises {promised:,}: it was cut short",
            hint="fetch or copy it again",
        )


def _count(path: Path, header: dict[str, Any]) -> int:
    try:
        floats = [tensor["shape"] for tensor in header.values() if str(tensor["dtype"]).startswith(("F", "BF"))]
        return sum(math.prod(int(side) for side in shape) for shape in floats)
    except (TypeError, KeyError, ValueError) as error:
        raise BaseModelError(f"{path}: a tensor of its header has no shape ({error})") from error
