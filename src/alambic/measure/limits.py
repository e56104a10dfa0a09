"""A measured candidate, and how it stands against each limit of a budget, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from alambic.errors import AlambicError, nearest
from alambic.measure import Costs
from alambic.measure.metrics import Interval
from alambic.measure.metrics import title_of as metric_title
from alambic.measure.quality import Answers, Quality

if TYPE_CHECKING:
    from alambic.task import Budget

COSTS = ("p95_ms", "mean_ms", "size_mb", "peak_ram_mb", "j_per_request")
TITLES = {
    "p95_ms": "p95", "mean_ms": "mean time", "size_mb": "size", "peak_ram_mb": "peak memory",
    "j_per_request": "energy of one text",
}  # fmt: skip
UNITS = {"p95_ms": "ms", "mean_ms": "ms", "size_mb": "MB", "peak_ram_mb": "MB", "j_per_request": "J"}


@dataclass(frozen=True)
class Point:
    """One measured candidate.

    Attributes:
        name: of the candidate.
        quality: interval of each metric, on the rows that decide (dev).
        p50_ms: median time of one text.
        p95_ms: time that 95% of texts stay under.
        size_mb: whole bundle, 10^6 bytes.
        peak_ram_mb: of a predicting process; None when not known.
        j_per_request: None when not known.
        energy_source: ``rapl``, ``estimated`` or ``unavailable``.
        answers: row by row, for paired tests; all points share the rows and their order.
        split: the rows behind `quality`.
        row_scores: of a kind that writes, the deciding metric row by row [N], for paired tests in place of `answers`.
        mean_ms: mean time of one text; None for kinds that write.
    """

    name: str
    quality: dict[str, Interval]
    p50_ms: Interval
    p95_ms: Interval
    size_mb: float
    peak_ram_mb: float | None = None
    j_per_request: float | None = None
    energy_source: str = "unavailable"
    answers: Answers | None = None
    split: str = "dev"
    row_scores: NDArray[Any] | None = None
    mean_ms: Interval | None = None

    def cost(self, name: str) -> float | None:
        """Return the point estimate of one of `COSTS`."""
        value = getattr(self, name)
        value = value.value if isinstance(value, Interval) else value
        return None if value is None else float(value)

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Return the figures, ready for JSON; with `rows`, the answers too."""
        figures = {key: value for key, value in vars(self).items() if key not in {"answers", "quality", "row_scores"}}
        figures.update({k: v.to_dict() for k, v in figures.items() if isinstance(v, Interval)})
        figures["quality"] = {name: score.to_dict() for name, score in self.quality.items()}
        if rows and self.answers is not None:
            figures["answers"] = self.answers.to_dict()
        return figures

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Point:
        """Read back `to_dict`, also after a trip through JSON."""
        known = (name for name in ("p50_ms", "p95_ms", "mean_ms") if data.get(name) is not None)
        intervals = {name: Interval(**data[name]) for name in known}
        quality = {name: Interval(**score) for name, score in data["quality"].items()}
        answers = Answers.from_dict(data["answers"]) if "answers" in data else None
        return cls(**{**data, **intervals, "quality": quality, "answers": answers})


@dataclass(frozen=True)
class Check:
    """One limit against one point.

    Attributes:
        limit: a metric's name or one of `COSTS`.
        wanted: the budget's value.
        got: the point estimate; None when it was not measured.
        met: whether the point estimate passes.
        surely: whether the 90% bound passes too (the figure itself where there is no interval).
        gap: how far off on a log scale, 0 when met: errors for a floor, cost for a ceiling.
    """

    limit: str
    wanted: float
    got: float | None
    met: bool
    surely: bool
    gap: float


def point_of(name: str, quality: Quality, costs: Costs) -> Point:
    """Make a point from what was measured."""
    return Point(
        name,
        quality.scores,
        costs.speed.p50_ms,
        costs.speed.p95_ms,
        costs.size_mb,
        costs.memory.peak_ram_mb,
        costs.energy.j_per_request,
        costs.energy.source,
        quality.answers,
        quality.split,
        mean_ms=costs.speed.mean_ms,
    )


def check_limits(point: Point, budget: Budget) -> tuple[Check, ...]:
    """Hold one point against every limit of the budget, floors first.

    Raises:
        AlambicError: the budget names a metric that the point does not have.
    """
    checks = []
    for name, floor in budget.quality.items():
        if name not in point.quality:
            raise AlambicError(f"[budget] quality: unknown metric {name!r}", hint=nearest(name, point.quality))
        score = point.quality[name]
        # On the scale of errors, so that 0.87 for 0.88 is nearer than a majority class that is merely quick.
        gap = math.log(max(1.0 - score.value, 1e-9) / max(1.0 - floor, 1e-3))
        met = score.value >= floor
        gap = 0.0 if met else max(gap, 0.0)
        checks.append(Check(name, floor, score.value, met, met and score.low_90 >= floor, gap))
    for name in COSTS:
        ceiling = getattr(budget, name)
        if ceiling is not None:
            checks.append(_ceiling(point, name, ceiling))
    return tuple(checks)


def _ceiling(point: Point, name: str, ceiling: float) -> Check:
    got = point.cost(name)
    if got is None:
        return Check(name, ceiling, None, met=False, surely=False, gap=math.inf)
    met = got <= ceiling
    spread = getattr(point, name)
    bound = spread.high_90 if isinstance(spread, Interval) else got
    return Check(name, ceiling, got, met, met and bound <= ceiling, 0.0 if met else math.log(got / ceiling))


def final_checks(chosen: Point, test: Mapping[str, Interval], budget: Budget) -> tuple[Check, ...]:
    """Hold the floors against the chosen bundle's test scores: what the exit code of a build follows."""
    checks = check_limits(replace(chosen, quality=dict(test)), budget)
    return tuple(check for check in checks if check.limit not in COSTS)


def title_of(limit: str) -> str:
    """Write a metric or a cost for people."""
    return TITLES.get(limit) or metric_title(limit)


def sentence(check: Check, point: Point) -> str:
    """Say how `point` stands against one limit, with interval and n where there are any."""
    title, unit = title_of(check.limit), UNITS.get(check.limit, "")
    title = title[0].upper() + title[1:]
    if check.got is None:
        return f"{title} was not measured, so the limit of {check.wanted:g} {unit} cannot be held."
    verdict = "surely met" if check.surely else "met, not surely" if check.met else "missed"
    if check.limit not in COSTS:
        score = point.quality[check.limit]
        between = f"{score.low:.3f} to {score.high:.3f}, n = {score.n}"
        return f"{title} {check.got:.3f} ({between}) for at least {check.wanted:g}: {verdict}."
    detail = ""
    spread = getattr(point, check.limit)
    if isinstance(spread, Interval):
        detail = f" ({spread.low:.3g} to {spread.high:.3g}, n = {spread.n})"
    elif check.limit == "j_per_request":
        detail = f" ({point.energy_source})"
    return f"{title} {check.got:.3g} {unit}{detail} for at most {check.wanted:g} {unit}: {verdict}."


def relaxed(check: Check) -> str:
    """Write the limit that `check` would meet, rounded to the side where that stays true."""
    assert check.got is not None, "a cost that was not measured meets nothing"
    if check.limit not in COSTS:
        return f"{check.limit} = {math.floor(check.got * 1000) / 1000:g}"
    step = 10.0 ** (math.floor(math.log10(check.got)) - 1)
    return f"{check.limit} = {math.ceil(check.got / step - 1e-9) * step:.6g}"
