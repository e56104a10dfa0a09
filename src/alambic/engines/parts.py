"""What an engine's parts have in common: the protocols, parameters of token models, and safe reading of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from alambic.engines.windows import batches
from alambic.errors import EngineError, nearest

Array = NDArray[Any]
OUTPUTS = ("logits", "probabilities", "embedding")
MAX_CELLS = 2048  # ids in one batch, padding included: more costs 60 MB and is no faster on a CPU


class Part(Protocol):
    """A part of a bundle, ready to run."""

    output: str

    def run(self, items: Any) -> Array:
        """Return one row per item; items are texts, or the rows of the part before."""

    def describe(self) -> dict[str, Any]:
        """Return engine, library version, properties and threads, as JSON values."""


@runtime_checkable
class TokenPart(Protocol):
    """A part that reads token ids, so that long texts can be cut into windows."""

    output: str
    params: TokenParams

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, neither cut nor padded."""

    def infer(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> Array:
        """Return one row per window of ids."""

    def run(self, items: Sequence[str]) -> Array:
        """Return one row per text; a text too long for one window is an error here."""

    def describe(self) -> dict[str, Any]:
        """Return engine, library version, properties and threads, as JSON values."""


@runtime_checkable
class VectorPart(Protocol):
    """A token part whose model may end in scores and give the vector that they are computed from, too."""

    params: TokenParams

    def infer_wide(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> Array:
        """Return one row per window of ids: the scores, and behind them the vector [N, L + H]."""


@dataclass(frozen=True)
class TokenParams:
    """Parameters of a part that reads tokens, as `bundle.json` gives them.

    Attributes:
        output: what the model's first output is: `logits`, `probabilities` or `embedding`.
        vectors: whether a second output holds the vector that the scores are computed from.
        prefix_ids: ids that the tokenizer puts before every text.
        suffix_ids: ids that the tokenizer puts after every text.
        pad_id: id for padding; its mask is 0, so any valid id does.
        max_tokens: most ids the model reads, special tokens included.
        precision: of the weights, for people (`fp32`, `fp16`, `int8`).
        tokenizer: `tokenizer.json` or `tokenizer.xml` when the part has both.
        properties: settings of the engine, from a closed table, stated so that results do not depend on its defaults.
    """

    output: str = "logits"
    vectors: bool = False
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    pad_id: int = 0
    max_tokens: int | None = None
    precision: str | None = None
    tokenizer: str | None = None
    properties: dict[str, str | int | bool] = field(default_factory=dict)

    @classmethod
    def of(cls, params: Mapping[str, Any], where: Path) -> TokenParams:
        """Check `params` of the part in folder `where`.

        Raises:
            EngineError: a key is unknown or a value has the wrong type.
        """
        check_keys(params, cls.__dataclass_fields__, where)
        values = dict(params)
        for name in ("prefix_ids", "suffix_ids"):
            ids = values.get(name, ())
            if not isinstance(ids, list | tuple) or not all(_is_id(i) for i in ids):
                raise EngineError(f"{where}: {name} is {ids!r}, not a list of token ids")
            values[name] = tuple(ids)
        if not _is_id(values.get("pad_id", 0)):
            raise EngineError(f"{where}: pad_id is {values['pad_id']!r}, not a token id")
        limit = values.get("max_tokens")
        if limit is not None and (not _is_id(limit) or limit < 1):
            raise EngineError(f"{where}: max_tokens is {limit!r}, not a positive number")
        for name, known in (("output", OUTPUTS), ("tokenizer", (None, "tokenizer.json", "tokenizer.xml"))):
            if name in values and values[name] not in known:
                raise EngineError(f"{where}: {name} is {values[name]!r}", hint=f"allowed: {', '.join(map(str, known))}")
        if not isinstance(values.get("vectors", False), bool):
            raise EngineError(f"{where}: vectors is {values['vectors']!r}, not true or false")
        if not isinstance(values.get("properties", {}), dict):
            raise EngineError(f"{where}: properties is {values['properties']!r}, not an object")
        return cls(**values)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def check_keys(params: Mapping[str, Any], known: Mapping[str, Any] | Sequence[str], where: Path) -> None:
    """Raise EngineError when `params` of the part in folder `where` has a key that is not `known`."""
    for key in params:
        if key not in known:
            raise EngineError(f"{where}: unknown parameter {key!r}", hint=nearest(key, known))


def read_array(path: Path, *, dims: int | None) -> Array:
    """Read a plain array of numbers with `dims` dimensions (None: 1 or more); nothing in it is ever executed.

    Raises:
        EngineError: it is missing, damaged, pickled, of another shape or not finite.
    """
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise EngineError(f"{path}: cannot be read as an array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != (dims or max(array.ndim, 1)):
        raise EngineError(f"{path}: not an array of numbers with {dims or '1 or more'} dimensions")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise EngineError(f"{path}: holds values that are not finite")
    return array


def padded(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Array, Array]:
    """Return ids and mask, int64 [B, T], padded to the longest row only."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def infer_windows(
    windows: Sequence[Sequence[int]], run: Callable[[Array, Array], Array], *, pad_id: int, batch_size: int
) -> NDArray[np.float32]:
    """Return one row per window: `run(ids, mask)` on batches of like length, put back in order."""
    if len(windows) == 1:  # the path of one text at a time: no sorting, no padding, no copy
        ids = np.array(windows, dtype=np.int64)
        return np.asarray(run(ids, np.ones_like(ids)), dtype=np.float32)
    out: NDArray[np.float32] | None = None
    for rows in batches([len(w) for w in windows], max_rows=batch_size, max_cells=MAX_CELLS):
        values = run(*padded([windows[i] for i in rows], pad_id=pad_id))
        if out is None:
            out = np.empty((len(windows), *values.shape[1:]), dtype=np.float32)
        out[rows] = values
    return np.zeros((0, 0), dtype=np.float32) if out is None else out
