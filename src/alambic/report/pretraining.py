"""The picture of a pre-training: loss of the steps and bits per byte of held-out text, against the tokens trained on.

    write_curve(curve_of(lines), run / "curve.svg")      # lines of log.jsonl, in order

The loss is that of the training text, in nats a token of this tokenizer; bits per byte compare with other models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alambic import _extras
from alambic.report.plots import ACCENT, INK, MUTED, dress

_SETTLED = 0.03  # share of the steps whose fall would flatten all that follows
_SMOOTH = 0.02  # of the steps shown: the length of the running mean
_APART = 0.052  # least distance of two names, as a share of the axis


@dataclass(frozen=True)
class Curve:
    """What the log of a training says.

    Attributes:
        tokens: trained on after each step.
        loss: cross-entropy of each step, nats a token.
        scored: tokens trained on at each validation.
        bits: of held-out text, bits per byte, at each validation.
        sources: the same of each source; only sources that every validation has.
        resumed: tokens at which a sitting went on from a checkpoint.
        falls: tokens at which the rate began to fall for good; None: it has not, or not yet.
    """

    tokens: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    scored: tuple[int, ...] = ()
    bits: tuple[float, ...] = ()
    sources: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    resumed: tuple[int, ...] = ()
    falls: int | None = None


def curve_of(lines: Iterable[Mapping[str, Any]]) -> Curve:
    """Read the lines of a log; a step that was done again after a kill counts once."""
    steps: dict[int, Mapping[str, Any]] = {}
    valid: dict[int, Mapping[str, Any]] = {}
    resumed: set[int] = set()
    for line in lines:
        if line["kind"] == "step":
            steps[line["step"]] = line
        elif line["kind"] == "valid":
            valid[line["step"]] = line
        elif line["kind"] == "resumed":
            resumed.add(line["step"])
    if not steps:
        return Curve()
    done = [steps[step] for step in sorted(steps)]
    each = done[0]["tokens"] // done[0]["step"]  # tokens of a step
    judged = [valid[step] for step in sorted(valid)]
    names = [name for name in judged[0]["sources"] if all(name in line["sources"] for line in judged)] if judged else []
    return Curve(
        tokens=tuple(line["tokens"] for line in done), loss=tuple(line["loss"] for line in done),
        scored=tuple(each * line["step"] for line in judged), bits=tuple(line["bits_per_byte"] for line in judged),
        sources={name: tuple(line["sources"][name]["bits_per_byte"] for line in judged) for name in names},
        resumed=tuple(each * step for step in sorted(resumed)), falls=_falls(done),
    )  # fmt: skip


def smoothed(values: Sequence[float], length: float) -> list[float]:
    """Return the exponential running mean over about `length` values to either side, so that it does not lag."""
    forward, backward = _running(values, length), _running(values[::-1], length)[::-1]
    return [(before + after) / 2 for before, after in zip(forward, backward, strict=True)]


def _running(values: Sequence[float], length: float) -> list[float]:
    keep = math.exp(-1.0 / max(length, 1.0))
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means


def write_curve(curve: Curve, path: Path) -> Path:
    """Draw `curve` as a PNG or SVG file, by the ending of `path`, on a white ground.

    Raises:
        MissingExtra: matplotlib is not installed.
        ValueError: the curve has no step.
    """
    if not curve.tokens:
        raise ValueError("a curve without a step cannot be drawn")
    matplotlib = _extras.load("matplotlib")
    figure = _extras.load("matplotlib.figure").Figure(figsize=(8.6, 4.0), layout="constrained")
    _extras.load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    form = path.suffix.lstrip(".")
    style = {"svg.fonttype": "none", "svg.hashsalt": "alambic-curve", "font.size": 9}
    with matplotlib.rc_context(style):
        left, right = figure.subplots(1, 2, sharex=True)
        _loss(left, curve)
        _bits(right, curve)
        for axes in (left, right):
            axes.set_xlabel("million tokens trained on", color=INK)
            dress(axes)
        figure.savefig(path, format=form, dpi=160, **({"metadata": {"Date": None}} if form == "svg" else {}))
    return path


def _loss(axes: Any, curve: Curve) -> None:
    millions = [count / 1e6 for count in curve.tokens]
    mean = smoothed(curve.loss, _SMOOTH * len(curve.loss))
    axes.plot(millions, curve.loss, color=MUTED, alpha=0.45, linewidth=0.6)
    axes.plot(millions, mean, color=ACCENT, linewidth=1.4)
    shown = curve.loss[int(_SETTLED * len(curve.loss)) :]
    room = 0.06 * max(max(shown) - min(shown), 0.1)
    axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set_title("loss of the training text, nats a token", color=INK, fontsize=9, loc="left")
    if curve.falls is not None:
        axes.axvline(curve.falls / 1e6, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate("the rate falls", (curve.falls / 1e6, 1.0), (-4, -4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right", va="top", color=INK, fontsize=8)  # fmt: skip
    for place in curve.resumed:
        axes.annotate("", (place / 1e6, 0.0), (0, 7), xycoords=("data", "axes fraction"),
                      textcoords="offset points", arrowprops={"arrowstyle": "-", "color": MUTED})  # fmt: skip


def _bits(axes: Any, curve: Curve) -> None:
    axes.set_title("held-out text, bits per byte", color=INK, fontsize=9, loc="left")
    if not curve.scored:
        axes.text(0.5, 0.5, "no validation yet", transform=axes.transAxes, ha="center", color=INK)
        return
    millions = [count / 1e6 for count in curve.scored]
    for values in curve.sources.values():
        axes.plot(millions, values, color=MUTED, linewidth=0.8, marker="o", markersize=2)
    axes.plot(millions, curve.bits, color=ACCENT, linewidth=1.6, marker="o", markersize=3)
    last = {**{name: values[-1] for name, values in curve.sources.items()}, "all": curve.bits[-1]}
    low, high = axes.get_ylim()
    for name, place in _spread(last, least=_APART * (high - low)).items():
        axes.annotate(f"{name} {last[name]:.3f}", (1.0, place), (4, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", fontsize=8, annotation_clip=False,
                      color=ACCENT if name == "all" else INK, weight="bold" if name == "all" else "normal")  # fmt: skip


def _spread(values: Mapping[str, float], *, least: float) -> dict[str, float]:
    """Return where to write each name so that two are `least` apart, as near to their values as that allows."""
    names = sorted(values, key=lambda name: values[name])
    # Groups of names that touch: each is centred on the mean of its values; groups that come to touch are joined.
    groups: list[list[str]] = []
    for name in names:
        groups.append([name])
        while len(groups) > 1 and _top(groups[-2], values, least) + least > _bottom(groups[-1], values, least):
            groups[-2:] = [groups[-2] + groups[-1]]
    return {name: _bottom(group, values, least) + i * least for group in groups for i, name in enumerate(group)}


def _bottom(group: Sequence[str], values: Mapping[str, float], least: float) -> float:
    return sum(values[name] for name in group) / len(group) - least * (len(group) - 1) / 2


def _top(group: Sequence[str], values: Mapping[str, float], least: float) -> float:
    return _bottom(group, values, least) + least * (len(group) - 1)


def _falls(steps: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the tokens after which the rate only falls, where it has stayed at its peak before."""
    peak = max(step["rate_share"] for step in steps)
    last = max(i for i, step in enumerate(steps) if step["rate_share"] == peak)
    return steps[last]["tokens"] if last < len(steps) - 1 else None
