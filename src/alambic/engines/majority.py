"""The floor of the ladder: the shares of the labels in training, whatever the text says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.engines.parts import check_keys, read_array


class Majority:
    """Logits that do not depend on the text. File: bias.npy [L]."""

    output = "logits"

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        check_keys(params, ("output",), folder)
        self._bias: NDArray[np.float32] = read_array(folder / "bias.npy", dims=1).astype(np.float32)

    def run(self, items: Sequence[str]) -> NDArray[np.float32]:
        """Return the logits [N, L], once per text."""
        return np.tile(self._bias, (len(items), 1))

    def describe(self) -> dict[str, Any]:
        """Return what this part is."""
        return {"engine": "majority", "version": np.__version__}
