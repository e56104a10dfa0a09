"""When a classifier answers, and when it abstains: thresholds that were fitted once and travel in the bundle.

Fitting them is `measure.selective`'s work and `build`'s; here they are only applied. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

Scope = Literal["confidence", "max_logit", "energy", "nearest"]
SCOPES: tuple[Scope, ...] = ("confidence", "max_logit", "energy", "nearest")
ON_LOGITS = ("max_logit", "energy")
NEAREST = "nearest"  # how near a training row is, by vectors: `engines.examples` knows

FLOOR = 1e-9  # probabilities under it are taken for it: a head that votes gives exact zeros

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """How probabilities become an answer, a label set, or an abstention (one label per text).

    Attributes:
        threshold: the least confidence that is answered; 0 answers everything.
        scope: the score that tells texts of the task from others (one of `SCOPES`); None tells nothing.
        scope_threshold: the least score of a text that is taken for one of the task.
        scope_label: the label that means "none of the others", where the data has one.
        set_threshold: the least probability of a label of the label set; None gives no sets.
        facts: how each was fitted: what was promised, on how many rows, the bound reached. JSON values only.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    threshold: float = 0.0
    scope: Scope | None = None
    scope_threshold: float | None = None
    scope_label: str | None = None
    set_threshold: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def refuses(self, confidence: Array, chosen: Sequence[str], scope: Array | None) -> list[str | None]:
        """Tell for each text why it is not answered: ``out_of_scope``, ``unsure``, or None when it is.

        Args:
            confidence: probability of the chosen label [N].
            chosen: the label chosen.
            scope: the score that `scope` names [N]; needed when it is set.
        """
        outside = np.array([label == self.scope_label for label in chosen], dtype=np.bool_)
        if self.scope is not None and self.scope_threshold is not None:
            assert scope is not None, "the engine gives the scope scores that the decision names"
            outside |= np.asarray(scope) < self.scope_threshold
        unsure = np.asarray(confidence) < self.threshold
        return ["out_of_scope" if o else "unsure" if u else None for o, u in zip(outside, unsure, strict=True)]

    def label_set(self, scores: dict[str, float], best: str) -> tuple[str, ...] | None:
        """Return the labels that the truth is among, likeliest first; the best one is always there."""
        if self.set_threshold is None:
            return None
        inside = {name for name, p in scores.items() if p >= self.set_threshold} | {best}
        return tuple(sorted(inside, key=lambda name: -scores[name]))


def scope_scores(
    scope: Scope, probabilities: Array, logits: Array | None, labels: Sequence[str], *, label: str | None = None
) -> Floats:
    """Return how surely each text belongs to the task, [N]; higher is surer.

    ``confidence`` is the largest probability (Hendrycks and Gimpel 2017, arXiv:1610.02136); ``max_logit`` the largest
    logit (Hendrycks 2022, arXiv:1911.11132); ``energy`` the log of the sum of exponentials of the logits (Liu 2020,
    arXiv:2010.03759). A `label` for other texts is left out of all three; its logit is taken away from the last two.
    ``nearest`` is not computed here: it takes the training rows (`engines.examples.Examples.closeness`).

    Args:
        scope: which score, not ``nearest``.
        probabilities: [N, L], after the temperature.
        logits: [N, L], before it; None where the model gives none (then only ``confidence`` can be had).
        labels: label order.
        label: the label of texts of no other label.
    """
    inside = np.array([name != label for name in labels], dtype=np.bool_)
    if scope == "confidence":
        return np.asarray(np.asarray(probabilities, dtype=np.float64)[:, inside].max(axis=1))
    assert scope in ON_LOGITS and logits is not None, "only a model that gives logits has these scores"
    values = np.asarray(logits, dtype=np.float64)
    top = values[:, inside].max(axis=1)
    away = 0.0 if inside.all() else values[:, ~inside][:, 0]
    if scope == "max_logit":
        return np.asarray(top - away)
    spread = np.log(np.exp(values[:, inside] - top[:, None]).sum(axis=1))
    return np.asarray(top + spread - away)


def tempered(probabilities: Array, factor: float) -> Floats:
    """Return what `probabilities` [N, L] become when the logits behind them are multiplied by `factor`."""
    logs = factor * np.log(np.clip(np.asarray(probabilities, dtype=np.float64), FLOOR, 1.0))
    logs -= logs.max(axis=1, keepdims=True)
    values = np.exp(logs)
    return np.asarray(values / values.sum(axis=1, keepdims=True))
