"""What a part of the engine `openvino-genai` says of itself, and how much memory its cache may take."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alambic import _extras
from alambic.engines.genai_core import BLOCK_TOKENS, first_line
from alambic.engines.parts import check_keys
from alambic.errors import EngineError

MODEL, TOKENIZER, TEMPLATE = "openvino_model.xml", "tokenizer.json", "chat_template.jinja"
# The engine's own defaults change with the CPU, so what a part leaves out is stated here.
DEFAULTS: dict[str, str | int | bool] = {
    "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "u8", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
}  # fmt: skip
_ALLOWED = (*DEFAULTS, "EXECUTION_MODE_HINT", "ENABLE_CPU_PINNING", "ENABLE_HYPER_THREADING", "KEY_CACHE_PRECISION",
            "VALUE_CACHE_PRECISION", "KEY_CACHE_GROUP_SIZE", "VALUE_CACHE_GROUP_SIZE")  # fmt: skip
_FORMS = frozenset(
    {"architecture", "parameters", "precision", "form", "tokenizer", "template", "model_digest"}
)  # for people and tools
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "u8": 1.0, "i8": 1.0, "u4": 0.5}
_FULL_CONTEXTS = 8  # that the cache holds where memory allows
_MEMORY_SHARE = 0.2  # of the machine's memory, for the cache


@dataclass(frozen=True)
class GenAIParams:
    """Parameters of a part, as `bundle.json` gives them.

    Attributes:
        context_tokens: most tokens of prompt and answer together.
        end_ids: ids that end an answer.
        bos_id, eos_id, pad_id: special ids; None where the tokenizer has none.
        special: texts of bos_token, eos_token and others, for the template.
        ends: texts of the tokens that end an answer.
        precision: of the weights, for people.
        properties: settings of the engine, stated so that results do not depend on its defaults.
    """

    context_tokens: int
    end_ids: tuple[int, ...]
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    precision: str | None = None
    properties: Mapping[str, str | int | bool] = field(default_factory=dict)

    @classmethod
    def of(cls, params: Mapping[str, Any], where: Path) -> GenAIParams:
        """Check `params` of the part in folder `where`.

        Raises:
            EngineError: a key is unknown, missing, or has a wrong value.
        """
        own = cls.__dataclass_fields__
        check_keys(params, [*own, *_FORMS], where)
        values = {name: value for name, value in params.items() if name in own}
        context = values.get("context_tokens")
        if not isinstance(context, int) or not _is_count(context) or context < 2:
            raise EngineError(f"{where}: context_tokens is {context!r}, not a number of 2 or more")
        ids = values.get("end_ids")
        if not isinstance(ids, list | tuple) or not all(map(_is_count, ids)):
            raise EngineError(f"{where}: end_ids is {ids!r}, not a list of token ids")
        for name in ("bos_id", "eos_id", "pad_id"):
            if values.get(name) is not None and not _is_count(values[name]):
                raise EngineError(f"{where}: {name} is {values[name]!r}, not a token id")
        for name in ("special", "properties"):
            if not isinstance(values.get(name, {}), Mapping):
                raise EngineError(f"{where}: {name} is {values[name]!r}, not an object")
        check_keys(values.get("properties", {}), _ALLOWED, where)
        values["end_ids"], values["ends"] = tuple(ids), tuple(values.get("ends", ()))
        return cls(**values)


def tokens_bytes(folder: Path, properties: Mapping[str, str | int | bool]) -> float:
    """Return the bytes of cache that one token takes in the model of `folder`.

    Raises:
        EngineError: the model is missing, or keeps no state.
    """
    openvino = _extras.load("openvino")
    path = folder / MODEL
    for file in (path, path.with_suffix(".bin")):
        if not file.is_file():
            raise EngineError(f"{file}: missing")
    try:
        model = openvino.Core().read_model(str(path))
    except RuntimeError as error:
        raise EngineError(f"{path}: OpenVINO cannot read this model: {first_line(error)}") from error
    total = 0.0
    for variable in model.get_variables():
        shape = variable.info.data_shape  # [batch, heads, tokens, width]
        if shape.rank.is_dynamic or len(shape) != 4 or shape[1].is_dynamic or shape[3].is_dynamic:
            continue
        heads, width = shape[1].get_length(), shape[3].get_length()
        size = _BYTES.get(str(properties.get("KV_CACHE_PRECISION", "f32")), 4.0)
        scales = 8.0 if size <= 1 else 0.0  # one scale and one zero point per head
        total += heads * (width * size + scales)
    if total == 0:
        raise EngineError(f"{path}: keeps no cache of keys and values; it was not exported for text generation")
    return total


def cache_blocks(per_token: float, *, context_tokens: int, cache_mb: float | None) -> int:
    """Return how many blocks the cache holds.

    Args:
        per_token: bytes of one token.
        context_tokens: of the model.
        cache_mb: most megabytes; None: eight full contexts, or a fifth of this machine's memory when that is less.

    Raises:
        EngineError: `cache_mb` does not hold a single block.
    """
    block = per_token * BLOCK_TOKENS
    if cache_mb is not None:
        count = int(cache_mb * 1e6 // block)
        if count < 2:
            raise EngineError(f"cache_mb is {cache_mb:g}; {2 * block / 1e6:.3g} is the least for this model")
        return count
    wanted = _FULL_CONTEXTS * math.ceil(context_tokens / BLOCK_TOKENS + 1)
    return max(2, min(wanted, int(_MEMORY_SHARE * _machine_bytes() // block)))


def _machine_bytes() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        return 8e9


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
