"""The part of the report page on confidence: reliability before and after the temperature, and what was promised."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from alambic import _extras
from alambic.measure.calibration import Reliability
from alambic.report._html import esc, table
from alambic.report.plots import ACCENT, INK, MUTED, dress, in_page


def section(trust: Mapping[str, Any]) -> str:
    """Return the section as HTML: the diagram and the calibration errors.

    Args:
        trust: `dev` (before and after the temperature) and `test` reliability, as JSON.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    named = {
        "dev, before": Reliability.from_dict(trust["dev"]["before"]),
        "dev, after": Reliability.from_dict(trust["dev"]["after"]),
        "test, after": Reliability.from_dict(trust["test"]),
    }
    lines = [[esc(name), f"{r.ece:.4f}", f"{r.low:.4f} to {r.high:.4f}", f"{r.n:,}"] for name, r in named.items()]
    bins = len(named["dev, after"].bins)
    note = (
        f"Each point is one of {bins} bins with as many rows each. On the line, 90 % confident means right 9 times in "
        f"10. The logits are multiplied by {trust['dev']['temperature']:g}, fitted on dev rows."
    )
    head = ["rows", "expected calibration error", "95% interval", "n"]
    return f'<div class="plot">{reliability_svg(named)}</div><p class="quiet">{esc(note)}</p>{table(head, lines)}'


def reliability_svg(named: Mapping[str, Reliability]) -> str:
    """Draw accuracy against confidence as an SVG element to put in a page.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = _extras.load("matplotlib")
    figure = _extras.load("matplotlib.figure").Figure(figsize=(8.6, 4.4), layout="constrained")
    style = {"svg.fonttype": "none", "svg.hashsalt": "alambic-reliability", "font.size": 9}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for (name, found), colour, mark in zip(named.items(), (MUTED, INK, ACCENT), ("o", "o", "s"), strict=True):
            xs, ys = [b.confidence for b in found.bins], [b.accuracy for b in found.bins]
            axes.plot(xs, ys, color=colour, marker=mark, markersize=4, linewidth=1.0, label=f"{name}: {found.ece:.3f}")
        axes.set_xlabel("mean confidence of the bin", color=INK)
        axes.set_ylabel("share right", color=INK)
        dress(axes)
        axes.legend(frameon=False, labelcolor=INK, title="calibration error", loc="upper left")
        axes.get_legend().get_title().set_color(INK)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return in_page(buffer.getvalue(), "accuracy against confidence")
