"""The trade-off plot: quality against p95, bubbles as large as the bundle, as SVG or PNG.

Drawn with matplotlib's object interface (no window, no global state). In a page, colours are CSS variables, so that one
picture serves the light and the dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic import _extras
from alambic.measure.frontier import Choice, Point, pareto
from alambic.measure.metrics import title_of as metric_title

if TYPE_CHECKING:
    from alambic.task import Budget

# Stand-ins replaced by CSS variables in a page, and shown as they are in files.
INK, MUTED, ACCENT, LIMIT = "#1f2733", "#7a8594", "#b4530a", "#c23b3b"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", ACCENT: "var(--accent)", LIMIT: "var(--limit)"}


@dataclass(frozen=True)
class Size:
    """Width and height in inches, and whether the picture is for a narrow screen."""

    width: float
    height: float
    narrow: bool = False


WIDE = Size(8.6, 4.6)
NARROW = Size(4.1, 4.4, narrow=True)


def tradeoff_svg(points: Sequence[Point], choice: Choice, budget: Budget, *, size: Size = WIDE) -> str:
    """Draw the trade-off as an SVG element to put in a page; colours are the page's CSS variables.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    buffer = io.StringIO()
    _save(points, choice, budget, size, buffer, "svg", salt="narrow" if size.narrow else "wide")
    return in_page(buffer.getvalue(), "quality against time of each candidate")


def in_page(svg: str, title: str) -> str:
    """Return an SVG file's drawing as an element of a page, coloured by the page's variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Fixed lengths would not follow the width of a phone; the view box does.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def write_tradeoff(points: Sequence[Point], choice: Choice, budget: Budget, path: Path) -> Path:
    """Write the trade-off as a PNG or SVG file, by the ending of `path`, on a white ground.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with path.open("wb") as file:
        _save(points, choice, budget, WIDE, file, path.suffix.lstrip("."), salt="file")
    return path


def _save(
    points: Sequence[Point], choice: Choice, budget: Budget, size: Size, target: Any, form: str, *, salt: str
) -> None:
    matplotlib = _extras.load("matplotlib")
    figure = _extras.load("matplotlib.figure").Figure(figsize=(size.width, size.height), layout="constrained")
    _extras.load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    # Texts stay texts (selectable, and drawn by the reader's fonts); names of parts depend on the content only.
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"alambic-{salt}",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
        "font.size": 9.5 if size.narrow else 9,
    }
    with matplotlib.rc_context(style):
        _draw(figure, points, choice, budget, narrow=size.narrow)
        date = {"metadata": {"Date": None}} if form == "svg" else {}
        figure.savefig(target, format=form, dpi=200, transparent=salt != "file", **date)


@dataclass(frozen=True)
class _Mark:
    """A bubble and the name to write beside it; `radius` is in typographic points."""

    x: float
    y: float
    radius: float
    text: str
    colour: str


# A line or a bar that names should keep clear of: two corners, in data coordinates.
_Segment = tuple[tuple[float, float], tuple[float, float]]


def _draw(figure: Any, points: Sequence[Point], choice: Choice, budget: Budget, *, narrow: bool) -> None:
    axes = figure.add_subplot()
    metric = choice.metric
    shown, below = _in_view(points, metric, budget)
    _frame(axes, shown, metric, budget, narrow=narrow)
    segments = _limits(axes, metric, budget)
    segments += _frontier_line(axes, shown, metric)
    largest = max(point.size_mb for point in points)
    for point in shown:
        score, time = point.quality[metric], point.p95_ms
        segments.append(((time.value, score.low), (time.value, score.high)))
        segments.append(((time.low, score.value), (time.high, score.value)))
    marks = [_bubble(axes, point, choice, largest, narrow=narrow) for point in shown]
    _below_scale(axes, below, metric)
    _labels(figure, axes, marks, segments)


def _below_scale(axes: Any, below: Sequence[Point], metric: str) -> None:
    lines = [
        f"▼ {point.name}: {point.quality[metric].value:.2g} at {point.p95_ms.value:.2g} ms, below this scale"
        for point in below
    ]
    axes.text(0.01, 0.015, "\n".join(lines), transform=axes.transAxes, color=MUTED, fontsize=8, va="bottom")


def _in_view(points: Sequence[Point], metric: str, budget: Budget) -> tuple[list[Point], list[Point]]:
    """Part the points from those so much worse that drawing them to scale would flatten all the others."""
    values = sorted((point.quality[metric].value for point in points), reverse=True)
    best, floor = values[0], budget.quality.get(metric, values[0])
    cut = min(best, floor) - 0.3
    shown = [point for point in points if point.quality[metric].value >= cut]
    return shown, [point for point in points if point.quality[metric].value < cut]


def _frame(axes: Any, shown: Sequence[Point], metric: str, budget: Budget, *, narrow: bool) -> None:
    lows = [point.quality[metric].low for point in shown] + [budget.quality.get(metric, 1.0)]
    highs = [point.quality[metric].high for point in shown] + [budget.quality.get(metric, 0.0)]
    room = max(0.02, 0.14 * (max(highs) - min(lows)))
    axes.set_ylim(max(0.0, min(lows) - room), max(highs) + room)
    times = [point.p95_ms.value for point in shown]
    # A limit far to the right would squeeze the points: it is then named at the edge, not drawn to scale.
    if budget.p95_ms is not None and budget.p95_ms <= 8.0 * max(times):
        times.append(budget.p95_ms)
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.9, max(times) * (3.2 if narrow else 2.4))
    ticks = _log_ticks(*axes.get_xlim(), dense=not narrow)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("p95 time of one text, ms (log scale)", color=INK)
    axes.set_ylabel(f"{metric_title(metric)} (dev), higher is better", color=INK)
    dress(axes)


def dress(axes: Any) -> None:
    """Give axes the grid, ticks and frame of every plot of ours."""
    axes.grid(visible=True, color=MUTED, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=INK, labelcolor=INK, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(MUTED)


def _log_ticks(low: float, high: float, *, dense: bool) -> list[float]:
    decades = math.log10(high / low)
    steps = (1.0, 2.0, 5.0) if decades < (3.5 if dense else 2.0) else (1.0, 3.0) if decades < 2.5 else (1.0,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high]


def _limits(axes: Any, metric: str, budget: Budget) -> list[_Segment]:
    """Shade what the budget rules out, and return the lines drawn."""
    segments: list[_Segment] = []
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    if metric in budget.quality:
        floor = budget.quality[metric]
        axes.axhspan(bottom, floor, color=LIMIT, alpha=0.07, linewidth=0)
        axes.axhline(floor, color=LIMIT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"floor {floor:g}", (right, floor), (-3, 3), textcoords="offset points", ha="right", color=LIMIT, fontsize=8
        )
        segments.append(((left, floor), (right, floor)))
    if budget.p95_ms is not None:
        inside = budget.p95_ms < right
        axes.annotate(
            f"at most {budget.p95_ms:g} ms" + ("" if inside else " →"), (budget.p95_ms if inside else right, top),
            (0, 3), textcoords="offset points", ha="center" if inside else "right", va="bottom", color=LIMIT,
            fontsize=8,
        )  # fmt: skip
        if inside:
            axes.axvspan(budget.p95_ms, right, color=LIMIT, alpha=0.07, linewidth=0)
            axes.axvline(budget.p95_ms, color=LIMIT, linewidth=0.9, linestyle=(0, (4, 3)))
            segments.append(((budget.p95_ms, bottom), (budget.p95_ms, top)))
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    return segments


def _frontier_line(axes: Any, shown: Sequence[Point], metric: str) -> list[_Segment]:
    names = set(pareto(shown, metric, axes=("p95_ms",)))
    members = sorted((p for p in shown if p.name in names), key=lambda p: p.p95_ms.value)
    times, scores = [p.p95_ms.value for p in members], [p.quality[metric].value for p in members]
    # A step: what lies between two candidates is not to be had.
    axes.step(times, scores, where="post", color=MUTED, linewidth=1.2, zorder=2)
    segments: list[_Segment] = []
    for i in range(len(members) - 1):
        segments.append(((times[i], scores[i]), (times[i + 1], scores[i])))
        segments.append(((times[i + 1], scores[i]), (times[i + 1], scores[i + 1])))
    return segments


def _bubble(axes: Any, point: Point, choice: Choice, largest: float, *, narrow: bool) -> _Mark:
    score, time = point.quality[choice.metric], point.p95_ms
    chosen = point.name == choice.chosen
    colour = ACCENT if chosen else INK if point.name in choice.frontier else MUTED
    area = (18.0 if narrow else 26.0) + (420.0 if narrow else 700.0) * point.size_mb / max(largest, 1e-9)
    axes.errorbar(
        [time.value],
        [score.value],
        xerr=[[max(0.0, time.value - time.low)], [max(0.0, time.high - time.value)]],
        yerr=[[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]],
        fmt="none",
        ecolor=colour,
        elinewidth=1.0,
        capsize=2.0,
        zorder=3,
    )
    axes.scatter([time.value], [score.value], s=area, color=colour, alpha=0.28, linewidths=0, zorder=3)
    axes.scatter([time.value], [score.value], s=16, color=colour, zorder=4, linewidths=0)
    if chosen:
        axes.scatter([time.value], [score.value], s=area + 60, facecolors="none", edgecolors=ACCENT, zorder=4)
    text = f"{point.name}\n{point.size_mb:.3g} MB" + (", chosen" if chosen else "")
    return _Mark(time.value, score.value, math.sqrt(area) / 2, text, colour)


def _labels(figure: Any, axes: Any, marks: Sequence[_Mark], segments: Sequence[_Segment]) -> None:
    """Write each name beside its point where it covers least of lines, bubbles and other names."""
    figure.canvas.draw()  # the layout must be known before anything can be measured
    pixels = figure.dpi / 72.0
    taken = [_box(axes, segment, 1.5 * pixels) for segment in segments]
    taken += [_box(axes, ((m.x, m.y), (m.x, m.y)), 0.8 * m.radius * pixels) for m in marks]
    for mark in sorted(marks, key=lambda m: m.colour != ACCENT):
        trials = [(_cost(figure, axes, note, taken), i, note) for i, note in enumerate(_notes(axes, mark))]
        best = min(trials)[2]
        for _, _, note in trials:
            if note is not best:
                note.remove()
        taken.append(best.get_window_extent(figure.canvas.get_renderer()))


def _notes(axes: Any, mark: _Mark) -> list[Any]:
    notes = []
    for dx, dy, across, up in _PLACES:
        gap = (0.75 * mark.radius if dx and dy else mark.radius) + 4.0
        note = axes.annotate(
            mark.text, (mark.x, mark.y), (dx * gap, dy * gap), textcoords="offset points", ha=across, va=up,
            color=mark.colour, fontsize=8.5, linespacing=1.15, zorder=5,
            weight="bold" if mark.colour == ACCENT else "normal",
        )  # fmt: skip
        note.set_in_layout(False)
        notes.append(note)
    return notes


def _cost(figure: Any, axes: Any, note: Any, taken: Sequence[Any]) -> float:
    renderer = figure.canvas.get_renderer()
    box, frame = note.get_window_extent(renderer), axes.get_window_extent(renderer)
    outside = float(box.width * box.height) - _overlap(box, frame)
    return sum(_overlap(box, other) for other in taken) + 5.0 * max(0.0, outside)


def _box(axes: Any, segment: _Segment, margin: float) -> Any:
    transforms = _extras.load("matplotlib.transforms")
    (x0, y0), (x1, y1) = axes.transData.transform(segment)
    return transforms.Bbox([[min(x0, x1) - margin, min(y0, y1) - margin], [max(x0, x1) + margin, max(y0, y1) + margin]])


_PLACES = (
    (1, 1, "left", "bottom"), (1, -1, "left", "top"), (-1, 1, "right", "bottom"), (-1, -1, "right", "top"),
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"), (0, -1, "center", "top"),
    (2, 2, "left", "bottom"), (2, -2, "left", "top"), (-2, 2, "right", "bottom"), (-2, -2, "right", "top"),
)  # fmt: skip


def _overlap(a: Any, b: Any) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
