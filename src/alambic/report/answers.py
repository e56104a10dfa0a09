"""The part of the report page on what a model wrote: its worst answers beside what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alambic.measure.written_figures import WrittenFigures
from alambic.report._html import esc, table, text_cell

_SHOWN = 25


def worst(figures: WrittenFigures) -> str:
    """List the answers with the lowest score by the deciding metric, and how answers ended."""
    endings = ", ".join(f"{name} {count:,}" for name, count in figures.endings.items())
    lines = [
        [text_cell(row.prompt), text_cell(row.expected), text_cell(row.error or row.written), f"{row.score:.3f}"]
        for row in figures.worst[:_SHOWN]
    ]
    head = ["asked", "expected", "written", "score"]
    return f'<p class="quiet">Answers ended: {esc(endings)}.</p>{table(head, lines)}'


def preferences(scores: Mapping[str, Mapping[str, Any]], chosen: str) -> str:
    """List how often each candidate finds the better answer of a pair likelier than the worse one."""
    lines = [
        [
            esc(name) + ("<small>chosen</small>" if name == chosen else ""),
            _spread(score["accuracy"]),
            _spread(score["per_byte"]),
            _spread(score["gained"]) + f"<small>against {esc(score['against'])}</small>" if "gained" in score else "",
            f"{score['n']:,}" + (f"<small>{score['left_out']:,} left out</small>" if score["left_out"] else ""),
        ]
        for name, score in scores.items()
    ]
    marked = [i for i, name in enumerate(scores) if name == chosen]
    head = ["candidate", "better answer likelier", "by the mean over bytes", "better answer gained", "pairs"]
    text = (
        '<p class="quiet">Through the packed bundle, with 95% intervals over pairs. These pairs stopped the training '
        "of preferred candidates; the task's metric chose. A longer answer is less likely as a whole: the mean over "
        "its bytes takes that out.</p>"
    )
    return table(head, lines, marked=marked) + text


def _spread(share: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * float(share[key]):.1f}" for key in ("value", "low", "high"))
    return f"{value} %<small>{low} to {high}</small>"
