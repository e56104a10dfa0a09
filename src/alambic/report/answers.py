"""The part of the report page on what a model wrote: its worst answers beside what was expected."""

from __future__ import annotations

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
