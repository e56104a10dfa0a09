"""A chain of classifiers: each answers what it is sure of, the next one the rest.

Fitting the thresholds is `measure.cascade`'s work; here they are only applied, in the same way to texts (by an engine)
and to probabilities that are known already (by a build). numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from alambic.errors import nearest
from alambic.kinds.decision import tempered

NAME = "cascade"  # candidates that are chains are called this, or this with a suffix
MOST_STAGES = 4  # the thresholds tried grow with every stage

Array = NDArray[Any]
Rows = NDArray[np.intp]
Ask = Callable[[Rows], Array]


def is_cascade(name: str) -> bool:
    """Tell whether a candidate of this name is a chain: ``cascade`` or ``cascade-...``."""
    return name == NAME or name.startswith(NAME + "-")


def faults_of(
    name: str, chain: Sequence[str] | None, names: Sequence[str], *, multi_label: bool
) -> Iterator[tuple[str, str]]:
    """Yield the key and what is wrong with a chain whose stages cannot be: other candidates of the task, each once.

    Args:
        name: of the candidate.
        chain: its stages; None: it finds its own.
        names: of all candidates of the task.
        multi_label: texts may have several labels.
    """
    singles = [one for one in names if not is_cascade(one)]
    if multi_label:
        yield "name", "a cascade needs one label per text, and multi_label is true"
    elif chain is None and name != NAME:
        yield "name", f"{name!r} needs a chain; only {NAME!r} finds its own"
    elif chain is None and len(singles) < 2:
        yield "name", f"{name!r} is a chain of other candidates; this task has {len(singles)}"
    elif chain is not None:
        for one in chain:
            if one not in singles:
                yield "chain", f"{one!r} is no other candidate of this task; {nearest(one, singles)}"
        if not 2 <= len(chain) <= MOST_STAGES:
            yield "chain", f"{len(chain)} stages; a chain has 2 to {MOST_STAGES}"
        if len(set(chain)) < len(chain):
            yield "chain", "the same stage twice"


@dataclass(frozen=True)
class CascadeStage:
    """One model of a chain.

    Attributes:
        name: of the candidate that it is.
        entry: the part whose output is its answer.
        temperature: its logits are multiplied by it before its confidence is looked at.
        threshold: the least confidence that it answers with; 0 for the last one, which answers everything.
        factor: its logits are multiplied by this too in its answers, so that their confidence is right for the texts
            that reach it, which are harder than all texts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    entry: str
    temperature: float = 1.0
    threshold: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Cascade:
    """A chain with its thresholds, as a bundle holds it.

    Attributes:
        stages: cheapest first, two at least.
        facts: how the thresholds were fitted: rows, answers lost and gained, the bound reached. JSON values only.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    stages: tuple[CascadeStage, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The chain for people: its stages in turn."""
        return " -> ".join(stage.name for stage in self.stages)

    def problems(self) -> Iterator[str]:
        """Say what is wrong with it, part names aside; nothing when it can be run."""
        if len(self.stages) < 2:
            yield f"cascade: {len(self.stages)} stage(s); a chain has two at least"
        for stage in self.stages:
            if not 0.0 <= stage.threshold <= 1.0:
                yield f"cascade: stage {stage.name!r}: threshold {stage.threshold} is no probability"
            if not (0.0 < stage.temperature < np.inf and 0.0 < stage.factor < np.inf):
                yield f"cascade: stage {stage.name!r}: temperature and factor are positive numbers"
        if self.stages and self.stages[-1].threshold > 0.0:
            yield f"cascade: the last stage, {self.stages[-1].name!r}, has a threshold: nobody would answer the rest"


def relay(stages: Sequence[CascadeStage], asks: Sequence[Ask], n: int) -> tuple[NDArray[np.float32], Rows]:
    """Ask the stages in turn, each for the rows that none before it was sure of.

    Args:
        stages: thresholds and factors.
        asks: of each stage, what gives the probabilities [M, L] of rows [M] at its temperature.
        n: rows, 1 at least.

    Returns:
        Probabilities [N, L], and the place of the stage that answered each row [N].
    """
    rows, who = np.arange(n), np.zeros(n, dtype=np.intp)
    out: NDArray[np.float32] | None = None
    for k, (stage, ask) in enumerate(zip(stages, asks, strict=True)):
        found = ask(rows)
        if out is None:
            out = np.empty((n, found.shape[1]), dtype=np.float32)
        sure = found.max(axis=1) >= stage.threshold if k < len(stages) - 1 else np.ones(len(rows), dtype=np.bool_)
        mine = rows[sure]
        if len(mine):
            who[mine] = k
            answers = found[sure]
            out[mine] = answers if stage.factor == 1.0 else tempered(answers, stage.factor)
        rows = rows[~sure]
        if not len(rows):
            break
    assert out is not None, "a chain has stages and is asked about rows"
    return out, who


def relay_known(stages: Sequence[CascadeStage], probabilities: Sequence[Array]) -> tuple[NDArray[np.float32], Rows]:
    """Return what `relay` would, from what every stage says of all rows ([N, L] each, before its temperature)."""
    known = [tempered(p, stage.temperature) for stage, p in zip(stages, probabilities, strict=True)]
    asks: list[Ask] = [p.__getitem__ for p in known]
    return relay(stages, asks, len(known[0]))
