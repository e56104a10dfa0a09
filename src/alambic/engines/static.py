"""The part `static`: tokens in, logits out, by the mean of one vector a token and two small products. Numpy only.

Its folder holds `tokenizer.json`, `table.npy` [V, D] in float16, `hidden_weight.npy` [D, H], `hidden_bias.npy` [H],
`weight.npy` [H, L] and `bias.npy` [L]. Nothing in it looks at the order of the tokens, which is what makes it fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.engines.parts import TokenParams, check_keys, read_array
from alambic.engines.tokens import choose_tokenizer, fast_tokenizer
from alambic.errors import EngineError

Floats = NDArray[np.float32]


class StaticPart:
    """Runs a folder written by `alambic.train.static`. Safe to share between threads."""

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        self.params = TokenParams.of(params, folder)
        self.output = self.params.output
        check_keys(self.params.properties, (), folder)
        self._tokenize = fast_tokenizer(choose_tokenizer(folder, "tokenizer.json"), threads=threads)
        self._table = read_array(folder / "table.npy", dims=2)
        self._hidden = _matrix(folder, "hidden_weight.npy"), _vector(folder, "hidden_bias.npy")
        self._out = _matrix(folder, "weight.npy"), _vector(folder, "bias.npy")
        (first, first_bias), (last, last_bias) = self._hidden, self._out
        inner = (self._table.shape[1], len(first_bias))
        if first.shape != inner or last.shape != (len(first_bias), len(last_bias)):
            raise EngineError(
                f"{folder}: shapes do not fit: table {self._table.shape}, hidden {first.shape} and "
                f"{first_bias.shape}, weight {last.shape}, bias {last_bias.shape}",
                hint="build the bundle again",
            )

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, neither cut nor padded."""
        return self._tokenize(texts)

    def infer(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> Floats:
        """Return the logits [N, L] of each window of ids; `batch_size` bounds nothing here, a row is small."""
        means = np.empty((len(windows), self._table.shape[1]), dtype=np.float32)
        for i, ids in enumerate(windows):
            means[i] = self._mean(ids)
        (first, first_bias), (last, last_bias) = self._hidden, self._out
        inner = np.maximum(means @ first + first_bias, 0.0)
        logits: Floats = inner @ last + last_bias
        return logits

    def run(self, items: Sequence[str]) -> Floats:
        """Return one row per text."""
        return self.infer(self.token_ids(items))

    def describe(self) -> dict[str, Any]:
        """Say what runs: engine, tokens and widths."""
        tokens, width = self._table.shape
        return {"engine": "static", "version": np.__version__, "tokens": tokens, "width": width, "threads": 1}

    def _mean(self, ids: Sequence[int]) -> Floats:
        if ids and max(ids) >= len(self._table):
            raise EngineError(f"token {max(ids)} has no vector: the table holds {len(self._table)}",
                              hint="the tokenizer is not the one of this part: build the bundle again")  # fmt: skip
        rows: Floats = self._table[list(ids)].astype(np.float32)
        mean: Floats = rows.sum(axis=0) / np.float32(max(1, len(ids)))
        return mean


def _matrix(folder: Path, name: str) -> Floats:
    return read_array(folder / name, dims=2).astype(np.float32)


def _vector(folder: Path, name: str) -> Floats:
    return read_array(folder / name, dims=1).astype(np.float32)
