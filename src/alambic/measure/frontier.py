"""Quality x time x size x energy: which candidates are on the frontier, and which one a budget chooses.

A floor is met by the point estimate, and *surely* met when the 90% bound passes too. Among the candidates that meet
every limit, `prefer` decides: the fastest when a quality floor is given, otherwise the best. Candidates that a paired
bootstrap cannot tell from the best are ties: shown, and put in its place only as far as `give_up` points allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alambic.errors import AlambicError, nearest
from alambic.measure.limits import (
    COSTS,
    UNITS,
    Check,
    Point,
    check_limits,
    final_checks,
    point_of,
    relaxed,
    sentence,
    title_of,
)
from alambic.measure.metrics import Interval, Paired, paired_bootstrap, paired_rows
from alambic.measure.metrics import title_of as metric_title

if TYPE_CHECKING:
    from alambic.task import Budget

__all__ = [
    "Check",
    "Choice",
    "Missed",
    "Point",
    "Tie",
    "check_limits",
    "choose",
    "contradictions",
    "final_checks",
    "pareto",
    "point_of",
]

_SUPERLATIVE = {
    "p95_ms": "fastest", "mean_ms": "fastest on average", "size_mb": "smallest", "peak_ram_mb": "leanest",
    "j_per_request": "most frugal",
}  # fmt: skip
_HELP = {
    "quality": "more or cleaner examples of the labels with the lowest F1, or a larger base",
    "p95_ms": "the int8 form, a smaller `max_tokens`, or a linear candidate",
    "mean_ms": "a cascade, the int8 form, or a linear candidate",
    "size_mb": "the int8 form, or a linear candidate",
    "peak_ram_mb": "the int8 form, or a linear candidate",
    "j_per_request": "the int8 form, or a linear candidate; where energy cannot be read, give the processor's TDP",
}


@dataclass(frozen=True)
class Tie:
    """A candidate that cannot be told from the chosen one: its metric minus the chosen one's, as an interval."""

    name: str
    metric: str
    difference: Interval
    p_value: float


@dataclass(frozen=True)
class Missed:
    """No point meets the budget: how near the nearest came, and what would help."""

    nearest: str
    checks: tuple[Check, ...]
    helps: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The outcome.

    Attributes:
        chosen: name of the point; the nearest one when the budget is not met.
        met: whether it meets every limit by its point estimates.
        surely: whether the 90% bounds pass too.
        metric: the quality metric that decides.
        prefer: what decided among those that meet every limit.
        reasons: plain sentences, the main one first.
        ties: candidates within every limit that the metric cannot tell from the chosen one.
        missed: None when met.
        frontier: names of the points that no other beats on every axis, in the order given.
        checks: of every point, by name.
    """

    chosen: str
    met: bool
    surely: bool
    metric: str
    prefer: str
    reasons: tuple[str, ...]
    ties: tuple[Tie, ...]
    missed: Missed | None
    frontier: tuple[str, ...]
    checks: dict[str, tuple[Check, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        data = asdict(self)
        for check in (c for checks in data["checks"].values() for c in checks):
            check["gap"] = check["gap"] if math.isfinite(check["gap"]) else None
        if data["missed"] is not None:
            del data["missed"]["checks"]
        return data


def pareto(points: Sequence[Point], metric: str, *, axes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the points that no other equals or beats on `metric` and on every cost of `axes`.

    By default the axes are p95, size and, where every point has them, mean time and energy.
    """
    if axes is None:
        known = (name for name in ("mean_ms", "j_per_request") if all(p.cost(name) is not None for p in points))
        axes = ("p95_ms", "size_mb", *known)
    rows = [(-point.quality[metric].value, *(point.cost(axis) for axis in axes)) for point in points]
    values = np.array([[math.inf if v is None else v for v in row] for row in rows], dtype=np.float64)
    names = []
    for i, point in enumerate(points):
        beaten = (values <= values[i]).all(axis=1) & (values < values[i]).any(axis=1)
        if not beaten.any():
            names.append(point.name)
    return tuple(names)


def choose(points: Sequence[Point], budget: Budget, *, seed: int = 0) -> Choice:
    """Choose among measured candidates by the budget.

    Raises:
        AlambicError: there is no point, or the budget names an unknown metric.
    """
    if not points:
        raise AlambicError("no candidate was measured, so none can be chosen", hint="see why each candidate failed")
    metric = next(iter(budget.quality), next(iter(points[0].quality)))
    prefer = budget.prefer or ("p95_ms" if budget.quality else "quality")
    checks = {point.name: check_limits(point, budget) for point in points}
    within = [point for point in points if all(check.met for check in checks[point.name])]
    missed = None
    if within:
        chosen, reasons = _prefer(within, budget, metric=metric, prefer=prefer, seed=seed)
    else:
        chosen = min(points, key=lambda p: (sum(c.gap for c in checks[p.name]), -p.quality[metric].value))
        missed = _missed(chosen, points, checks)
        reasons = [f"No candidate meets every limit; {chosen.name} comes nearest."]
    mine = checks[chosen.name]
    reasons += [sentence(check, chosen) for check in mine]
    return Choice(
        chosen=chosen.name,
        met=bool(within),
        surely=all(check.surely for check in mine),
        metric=metric,
        prefer=prefer,
        reasons=tuple(reasons),
        ties=_ties(chosen, within, metric, seed) if within else (),
        missed=missed,
        frontier=pareto(points, metric),
        checks=checks,
    )


def _prefer(within: list[Point], budget: Budget, *, metric: str, prefer: str, seed: int) -> tuple[Point, list[str]]:
    if prefer != "quality" and (budget.quality or budget.give_up <= 0):
        return _cheapest(within, budget, metric=metric, prefer=prefer)
    title = metric_title(metric)
    best = min(within, key=lambda p: (-p.quality[metric].value, *_rank(p, "p95_ms")))
    reasons = [f"{best.name} {_among(within, f'has the highest {title}')}."]
    if budget.give_up <= 0:
        return best, reasons
    tied = [tie.name for tie in _ties(best, within, metric, seed) if -100 * tie.difference.value <= budget.give_up]
    first = "p95_ms" if prefer == "quality" else prefer
    chosen = min((p for p in within if p is best or p.name in tied), key=lambda p: _rank(p, first))
    if chosen is best:
        return best, reasons
    lost = 100 * (best.quality[metric].value - chosen.quality[metric].value)
    return chosen, [
        f"{chosen.name} is the {_SUPERLATIVE[first]} of those that cannot be told from {best.name}, "
        f"the best in {title}: it gives up {lost:.2f} points, and `give_up` allows {budget.give_up:g}."
    ]


def _cheapest(within: list[Point], budget: Budget, *, metric: str, prefer: str) -> tuple[Point, list[str]]:
    best = min(within, key=lambda p: (_rank(p, prefer)[0], -p.quality[metric].value, *_rank(p, prefer)))
    reasons = [f"{best.name} {_among(within, f'is the {_SUPERLATIVE[prefer]}')}."]
    if not budget.quality:
        reasons.append(f"The budget has no quality floor, so {metric_title(metric)} had no say.")
    return best, reasons


def _rank(point: Point, first: str) -> tuple[float, ...]:
    costs = [point.cost(name) for name in (first, "p95_ms", "size_mb")]
    return tuple(math.inf if cost is None else cost for cost in costs)


def _among(within: Sequence[Point], claim: str) -> str:
    if len(within) == 1:
        return "is the only candidate that meets every limit"
    return f"{claim} of the {len(within)} candidates that meet every limit"


def _ties(chosen: Point, within: Sequence[Point], metric: str, seed: int) -> tuple[Tie, ...]:
    ties = []
    for point in within:
        pair = None if point is chosen else _paired(point, chosen, metric, np.random.default_rng(seed))
        if pair is not None and pair.tied:
            ties.append(Tie(point.name, metric, pair.difference, pair.p_value))
    return tuple(ties)


def _paired(point: Point, chosen: Point, metric: str, rng: np.random.Generator) -> Paired | None:
    if point.row_scores is not None and chosen.row_scores is not None:
        return paired_rows(point.row_scores, chosen.row_scores, rng=rng)
    if point.answers is None or chosen.answers is None:
        return None
    if not np.array_equal(point.answers.truths, chosen.answers.truths):
        raise AlambicError(f"{point.name} and {chosen.name} were not scored on the same rows")
    return paired_bootstrap(
        metric, chosen.answers.truths, point.answers.predictions, chosen.answers.predictions, rng=rng
    )


def _missed(chosen: Point, points: Sequence[Point], checks: Mapping[str, tuple[Check, ...]]) -> Missed:
    helps = []
    failing = [check for check in checks[chosen.name] if not check.met]
    for check in failing:
        kind = check.limit if check.limit in COSTS else "quality"
        helps.append(f"For {title_of(check.limit)}: {_HELP[kind]}.")
        others = [p for p in points if any(c.limit == check.limit and c.met for c in checks[p.name])]
        if others:
            best = min(others, key=lambda p: sum(c.gap for c in checks[p.name]))
            lost = ", ".join(title_of(c.limit) for c in checks[best.name] if not c.met)
            helps.append(f"{best.name} meets that limit, but misses {lost}.")
    if all(check.got is not None for check in failing):
        helps.append(f"{chosen.name} would meet a budget with {', '.join(map(relaxed, failing))}.")
    return Missed(chosen.name, checks[chosen.name], tuple(helps))


def contradictions(
    budget: Budget, metrics: Sequence[str], *, least: Mapping[str, float] | None = None
) -> tuple[str, ...]:
    """List what makes a budget impossible whatever is measured; empty when nothing does.

    Args:
        budget: the limits.
        metrics: metrics of the task.
        least: for costs known beforehand, the smallest value that any candidate can have (a size, for example).
    """
    faults = []
    for name, floor in budget.quality.items():
        if name not in metrics:
            faults.append(f"[budget] quality: this task has no metric {name!r} ({nearest(name, metrics)})")
        elif floor > 1.0:
            share = f"; {floor:g}% is written {floor / 100:g}" if floor <= 100.0 else ""
            faults.append(f"[budget] quality.{name} = {floor:g}: a share is between 0 and 1{share}")
    for name in COSTS:
        ceiling, floor = getattr(budget, name), (least or {}).get(name, 0.0)
        if ceiling is None:
            continue
        if ceiling <= 0:
            faults.append(f"[budget] {name} = {ceiling:g}: nothing can meet it; it must be greater than 0")
        elif ceiling < floor:
            faults.append(
                f"[budget] {name} = {ceiling:g}: the least that any candidate can have is {floor:.3g} {UNITS[name]}"
            )
    if budget.prefer is not None and budget.prefer not in ("quality", *COSTS):
        faults.append(f"[budget] prefer = {budget.prefer!r} ({nearest(budget.prefer, ('quality', *COSTS))})")
    return tuple(faults)
