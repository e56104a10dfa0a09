"""Thresholds of a chain of classifiers: the least mean cost for the quality of the full model, as far as rows prove it.

Takes what every stage answered on rows that fitted none of them, and says what those rows support; reads no file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.errors import AlambicError
from alambic.kinds.cascade import MOST_STAGES, CascadeStage, relay_known
from alambic.kinds.decision import tempered
from alambic.measure.calibration import fit_temperature

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TOLERANCE = 0.01  # share of answers that may be lost against the full model: one point of accuracy
CONFIDENCE = 0.95  # of the bound on that loss
_STEPS = {1: 200, 2: 40, 3: 12}  # thresholds tried for each of that many stages before the full model
_TIED = 0.975  # of each side of the interval that says whether the chain is tied with the full model
_LEAST_REACHED = 50  # rows that must reach a stage for a temperature of its own there


@dataclass(frozen=True)
class Member:
    """A stage as it was measured.

    Attributes:
        name: of the candidate.
        probabilities: of the rows that decide [N, L], which it was not fitted on.
        ms: time of one text.
    """

    name: str
    probabilities: NDArray[Any]
    ms: float


@dataclass(frozen=True)
class FittedChain:
    """What the rows that decide say of a chain.

    Attributes:
        stages: with thresholds; empty when nothing is supported, and then `why` says what is missing.
        why: in words, with numbers.
        n: rows that decided.
        tolerance: share of answers that may be lost against the full model, the last stage.
        confidence: of the bound.
        lost: rows that the full model has right and the chain wrong.
        gained: the other way round.
        bound: upper bound on the share lost, gains taken off.
        answered: share of the rows that each stage answers.
        ms: expected mean time of one text.
        full_ms: that of the full model.
        tried: thresholds tested, in an order that no label decided.
    """

    stages: tuple[CascadeStage, ...]
    why: str
    n: int
    tolerance: float
    confidence: float
    lost: int
    gained: int
    bound: float
    answered: tuple[float, ...]
    ms: float
    full_ms: float
    tried: int

    def facts(self) -> dict[str, Any]:
        """Return all but the stages, ready for JSON."""
        figures = asdict(self)
        del figures["stages"]
        return {**figures, "answered": list(self.answered)}


@dataclass(frozen=True)
class _Trial:
    """Thresholds of the stages used (None: the stage is left out), with what is expected of them."""

    thresholds: tuple[float | None, ...]
    wrong: float  # answers of the early stages that their own confidence expects to be wrong
    ms: float


def loss_bound(lost: int, gained: int, n: int, *, confidence: float = CONFIDENCE) -> float:
    """Return the upper bound on the share lost less that gained, of which `lost` and `gained` rows of `n` were seen.

    The score interval of the difference of paired shares (Tango 1998, Statistics in Medicine 17, 891-908): unlike the
    normal approximation or the bootstrap it does not shrink to nothing where no row differs.
    """
    z = NormalDist().inv_cdf(confidence)
    low, high = (lost - gained) / n, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(lost, gained, n, middle) > -z else (low, middle)
    return high


def _score(lost: int, gained: int, n: int, loss: float) -> float:
    """Return Tango's statistic of the hypothesis that the share lost less that gained is `loss`."""
    b = -lost - gained + (2 * n - lost + gained) * loss
    c = -gained * loss * (1.0 - loss)
    rate = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    spread = n * (2.0 * max(rate, 0.0) + loss * (1.0 - loss))
    away = lost - gained - n * loss
    return away / math.sqrt(spread) if spread > 0.0 else -math.copysign(math.inf, -away) if away else 0.0


def rows_needed(tolerance: float, *, confidence: float = CONFIDENCE) -> int:
    """Return the fewest rows that can support a chain: none of them may then be answered worse."""
    z2 = NormalDist().inv_cdf(confidence) ** 2
    return math.ceil(z2 * (1.0 - tolerance) / tolerance - 1e-9)


def too_few(n: int, tolerance: float, *, confidence: float = CONFIDENCE) -> str | None:
    """Say why `n` rows cannot support any threshold; None when they can."""
    least = rows_needed(tolerance, confidence=confidence)
    if n >= least:
        return None
    return (
        f"no threshold can be supported: to show at {confidence:.0%} confidence that at most "
        f"{100 * tolerance:g} points are lost takes {least:,} rows that decide even if none is lost; there are {n:,}"
    )


def fit_cascade(
    members: Sequence[Member],
    truths: NDArray[np.int64],
    *,
    tolerance: float = TOLERANCE,
    least: float = 0.0,
    skip: bool = False,
    confidence: float = CONFIDENCE,
) -> FittedChain:
    """Find the thresholds of least mean time that lose no more than `tolerance` against the last member.

    Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei 2021, arXiv:2110.01052) with a fixed sequence: the
    confidences alone, no label, lay down which thresholds are tested and in which order, from the fewest expected
    errors to the least time; each is tested by `loss_bound`, and the first that fails ends it. Of those that pass, the
    last one that is tied with the full model (zero lies in the two-sided interval of the difference) is taken.

    Args:
        members: cheapest first, the full model last, on the same rows; one label a text.
        truths: label indices [N].
        tolerance: share of answers that may be lost, gains taken off.
        least: no threshold under this confidence.
        skip: members that save no time at the same risk may be left out.
        confidence: of the bound.

    Raises:
        AlambicError: fewer than two members, or more than `MOST_STAGES`.
    """
    if not 2 <= len(members) <= MOST_STAGES:
        raise AlambicError(f"a chain has 2 to {MOST_STAGES} stages, got {len(members)}")
    n = len(truths)
    nothing = FittedChain((), "", n, tolerance, confidence, 0, 0, 1.0, (), members[-1].ms, members[-1].ms, 0)
    why = too_few(n, tolerance, confidence=confidence)
    if why is not None:
        return _without(nothing, why)
    seen = _seen(members, truths)
    path = _path(seen.sure, [member.ms for member in members], least=least, skip=skip)
    if not path:
        said = f" at a confidence of {least:g} or more" if least > 0 else ""
        return _without(nothing, f"no threshold{said} saves time: {_times(members)}")
    kept, tried = _last_supported(path, seen, tolerance, confidence)
    if kept is None:
        lost, gained = _changes(_who(path[0].thresholds, seen.sure), seen.right)
        bound = loss_bound(lost, gained, n, confidence=confidence)
        why = (
            f"no threshold is supported by the {n:,} rows that decide: the safest has {lost} answers lost and "
            f"{gained} gained, so up to {100 * bound:.2f} points may be lost, and {100 * tolerance:g} may be"
        )
        return _without(nothing, why, tried=tried, bound=bound)
    return _fitted(members, truths, seen, kept, replace(nothing, tried=tried))


@dataclass(frozen=True)
class _Seen:
    """What the members say of the rows: their factors, and of each the confidence [N] and whether it is right [N]."""

    factors: tuple[float, ...]
    sure: tuple[Floats, ...]
    right: tuple[Bools, ...]


def _seen(members: Sequence[Member], truths: NDArray[np.int64]) -> _Seen:
    factors = tuple(fit_temperature(member.probabilities, truths) for member in members)
    known = [tempered(member.probabilities, factor) for member, factor in zip(members, factors, strict=True)]
    right = tuple(np.asarray(p.argmax(axis=1) == truths, dtype=np.bool_) for p in known)
    return _Seen(factors, tuple(p.max(axis=1) for p in known), right)


def _last_supported(
    path: Sequence[_Trial], seen: _Seen, tolerance: float, confidence: float
) -> tuple[_Trial | None, int]:
    """Test the thresholds in order until one fails; return the last tied one that passed, and how many were tested."""
    kept, tried, n = None, 0, len(seen.sure[0])
    for trial in path:
        tried += 1
        lost, gained = _changes(_who(trial.thresholds, seen.sure), seen.right)
        if loss_bound(lost, gained, n, confidence=confidence) > tolerance:
            break
        if loss_bound(gained, lost, n, confidence=_TIED) >= 0.0:
            kept = trial
    return kept, tried


def _without(nothing: FittedChain, why: str, *, tried: int = 0, bound: float = 1.0) -> FittedChain:
    return replace(nothing, why=why, tried=tried, bound=bound)


def _times(members: Sequence[Member]) -> str:
    return ", ".join(f"{member.name} {member.ms:.3g} ms" for member in members)


def _path(sure: Sequence[Floats], ms: Sequence[float], *, least: float, skip: bool) -> list[_Trial]:
    """Return thresholds in the order in which they are tested: ever less time, at ever more expected errors."""
    early = sure[:-1]
    grids: list[list[float | None]] = [[*_grid(values, _STEPS[len(early)], least)] for values in early]
    if skip:
        grids = [[*grid, None] for grid in grids]
    trials = [_expected(combination, sure, ms) for combination in itertools.product(*grids)]
    trials = [t for t in trials if t.ms < ms[-1] and any(one is not None for one in t.thresholds)]
    return list(_frontier(trials))


def _frontier(trials: Sequence[_Trial]) -> Iterator[_Trial]:
    best = math.inf
    for trial in sorted(trials, key=lambda t: (t.wrong, t.ms)):
        if trial.ms < best:
            best = trial.ms
            yield trial


def _grid(values: Floats, steps: int, least: float) -> list[float]:
    """Return confidences that equal shares of the rows lie above, highest first, no share twice.

    Rounded down, so that what is written to a manifest is what was tested.
    """
    known = np.sort(values)[::-1]
    at = [known[math.ceil(len(known) * step / steps) - 1] for step in range(1, steps + 1)]
    return sorted({t for value in at if (t := math.floor(float(value) * 1e6) / 1e6) >= least}, reverse=True)


def _expected(thresholds: tuple[float | None, ...], sure: Sequence[Floats], ms: Sequence[float]) -> _Trial:
    left = np.ones(len(sure[0]), dtype=np.bool_)
    wrong, time = 0.0, 0.0
    for threshold, values, cost in zip(thresholds, sure, ms, strict=False):  # the last stage has no threshold
        if threshold is None:
            continue
        time += cost * float(left.mean())
        mine = left & (values >= threshold)
        wrong += float((1.0 - values[mine]).sum())
        left &= ~mine
    return _Trial(thresholds, wrong, time + ms[-1] * float(left.mean()))


def _who(thresholds: Sequence[float | None], sure: Sequence[Floats]) -> NDArray[np.intp]:
    """Return the place of the stage that answers each row [N]."""
    who = np.full(len(sure[0]), len(sure) - 1, dtype=np.intp)
    for k in reversed(range(len(thresholds))):
        threshold = thresholds[k]
        if threshold is not None:
            who[sure[k] >= threshold] = k
    return who


def _changes(who: NDArray[np.intp], right: Sequence[Bools]) -> tuple[int, int]:
    """Count the rows that the chain loses and gains against the last stage."""
    chain = np.choose(who, right)
    return int((right[-1] & ~chain).sum()), int((chain & ~right[-1]).sum())


def _fitted(
    members: Sequence[Member], truths: NDArray[np.int64], seen: _Seen, kept: _Trial, nothing: FittedChain
) -> FittedChain:
    who = _who(kept.thresholds, seen.sure)
    lost, gained = _changes(who, seen.right)
    thresholds = (*kept.thresholds, 0.0)
    used = [k for k, threshold in enumerate(thresholds) if threshold is not None]
    stages = []
    for k in used:
        reached, factor = who >= k, 1.0
        if k != used[0] and int(reached.sum()) >= _LEAST_REACHED:
            factor = fit_temperature(tempered(members[k].probabilities[reached], seen.factors[k]), truths[reached])
        stages.append(CascadeStage(members[k].name, "", seen.factors[k], thresholds[k] or 0.0, factor))
    return replace(
        nothing,
        stages=tuple(stages),
        lost=lost,
        gained=gained,
        bound=loss_bound(lost, gained, len(truths), confidence=nothing.confidence),
        answered=tuple(float((who == k).mean()) for k in used),
        ms=kept.ms,
    )


def probabilities_of(chain: FittedChain, members: Sequence[Member]) -> NDArray[np.float32]:
    """Return what the chain answers on the rows that decided [N, L]: arithmetic on what its stages said there."""
    known = {member.name: member.probabilities for member in members}
    return relay_known(chain.stages, [known[stage.name] for stage in chain.stages])[0]
