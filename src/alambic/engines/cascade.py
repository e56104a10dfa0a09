"""Run a chain of classifiers: the first answers what it is sure of, the next one the rest (`kinds.cascade`).

Texts are asked for in batches: all of them of the first stage, what is left of the second, and so on. Each stage is a
classifier of its own over some parts of the bundle, so any classifier that can be packed can be a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.bundle import Bundle
from alambic.kinds.cascade import Cascade, CascadeStage, relay

AskTexts = Callable[[list[str], int], NDArray[np.float32]]


class Relay:
    """The stages of an open bundle, asked in turn; safe to share between threads when the stages are."""

    def __init__(self, cascade: Cascade, asks: Sequence[AskTexts]) -> None:
        """Take for each stage what gives the probabilities [M, L] of cleaned texts at its temperature."""
        self.stages = cascade.stages
        self._asks = tuple(asks)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages by name, in turn."""
        return tuple(stage.name for stage in self.stages)

    def run(self, texts: Sequence[str], *, batch_size: int = 32) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Return the probabilities [N, L] of cleaned texts, one at least, and the place of who answered [N]."""
        asks = [partial(_ask, ask, texts, batch_size) for ask in self._asks]
        return relay(self.stages, asks, len(texts))


def _ask(ask: AskTexts, texts: Sequence[str], batch_size: int, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    return ask([texts[i] for i in rows], batch_size)


def stage_bundle(bundle: Bundle, stage: CascadeStage) -> Bundle:
    """Return the classifier that `stage` alone is: the parts that lead to its entry, at its temperature."""
    changed: dict[str, Any] = {
        "entry": stage.entry,
        "parts": tuple(bundle.manifest.chain(stage.entry)),
        "temperature": stage.temperature,
        "decision": None,
        "cascade": None,
    }
    return replace(bundle, manifest=bundle.manifest.model_copy(update=changed))
