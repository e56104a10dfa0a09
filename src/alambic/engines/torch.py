"""The part `torch`: a Model directory run as it was trained. The reference that packed parts are compared with.

The one module of `engines` that may load torch; only the build opens it, and no bundle that ships names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.parts import Array, TokenParams, infer_windows


class TorchPart:
    """Runs a Model directory in float32; special tokens, limit and padding come from the model itself."""

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        self._torch = _extras.load("torch")
        if threads is not None:
            self._torch.set_num_threads(threads)
        # By name, because engines import nothing of the training side when they are read.
        self._encoder = _extras.load("alambic.model.encoder").Encoder.load(folder)
        prefix, suffix = self._encoder.special_ids()
        spec = self._encoder.spec
        own = {
            "output": "logits" if spec.labels is not None else "embedding",
            "prefix_ids": prefix,
            "suffix_ids": suffix,
            "pad_id": self._encoder.pad_id,
            "max_tokens": spec.max_tokens,
            "precision": "fp32",
        }
        self.params = TokenParams.of({**own, **params}, folder)
        self.output = self.params.output

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, neither cut nor padded."""
        ids: list[list[int]] = self._encoder.tokenize(texts)
        return ids

    def infer(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return one row per window of ids."""
        return infer_windows(windows, self._run, pad_id=self.params.pad_id, batch_size=batch_size)

    def run(self, items: Sequence[str]) -> NDArray[np.float32]:
        """Return one row per text; long texts are the business of `classify`."""
        return self.infer(self.token_ids(items))

    def describe(self) -> dict[str, Any]:
        """Return engine, version and threads."""
        return {
            "engine": "torch",
            "version": self._torch.__version__,
            "precision": "fp32",
            "properties": {},
            "threads": self._torch.get_num_threads(),
        }

    def _run(self, ids: Array, mask: Array) -> Array:
        with self._torch.inference_mode():
            values: Array = self._encoder(self._torch.from_numpy(ids), self._torch.from_numpy(mask)).float().numpy()
        return values
