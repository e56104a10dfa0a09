"""The lower part of the report page: confusion, per-class F1, worst errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alambic.measure.quality import Quality
from alambic.report._html import esc, table, text_cell

_MOST_LABELS = 20
_OPEN_LINES = 20


def confusion(quality: Quality) -> str:
    """Draw the confusion as a heat table; with many labels, only those that are confused most."""
    if quality.confusion is None:
        return "<p>A text may carry several labels here, so there is no confusion table.</p>"
    counts = np.array(quality.confusion)
    keep = _most_confused_labels(counts)
    note = ""
    if len(keep) < len(counts):
        note = f"<p>The {len(keep)} labels with the most errors, of {len(counts)}; other columns are not shown.</p>"
    totals = np.maximum(counts.sum(axis=1), 1)
    lines = []
    for i in keep:
        cells = [_heat(int(counts[i, j]), counts[i, j] / totals[i], right=i == j) for j in keep]
        cells.append(f'<td class="n">{counts[i].sum()}</td>')
        lines.append(f'<tr><th scope="row">{esc(quality.labels[i])}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col"><span>{esc(quality.labels[j])}</span></th>' for j in keep)
    return (
        f"{note}{_pairs(quality)}"
        '<div class="scroll"><table class="heat"><caption>Lines: what was true. Columns: what was predicted. '
        "Shade: share of the line.</caption>"
        f'<thead><tr><td></td>{head}<th scope="col"><span>rows</span></th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _most_confused_labels(counts: NDArray[np.int64]) -> list[int]:
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")
    return sorted(int(i) for i in order[:_MOST_LABELS])


def _heat(count: int, share: float, *, right: bool) -> str:
    if not count:
        return "<td></td>"
    colour = "var(--good)" if right else "var(--limit)"
    # Errors are shaded twice as strongly as hits: one tenth of a line gone astray must be seen.
    strength = round(100 * min(0.85, 0.08 + share * (0.6 if right else 1.3)))
    return f'<td style="background:color-mix(in srgb,{colour} {strength}%,transparent)">{count}</td>'


def _pairs(quality: Quality) -> str:
    if not quality.confused:
        return "<p>No text was given a wrong label.</p>"
    lines = [
        [f"{esc(pair.truth)} → {esc(pair.predicted)}", str(pair.count), f"{pair.share:.0%}"]
        for pair in quality.confused[:8]
    ]
    return table(["true → predicted", "texts", "of that label"], lines)


def per_class(quality: Quality) -> str:
    """List the F1 of every label, worst first."""
    lines = [
        [
            esc(line.label),
            f'<span class="bar"><i style="width:{100 * line.f1:.1f}%"></i></span>&nbsp;{line.f1:.3f}',
            f"{line.precision:.3f}",
            f"{line.recall:.3f}",
            str(line.support),
        ]
        for line in sorted(quality.per_class, key=lambda line: (line.f1, line.label))
    ]
    head = ["label", "F1", "precision", "recall", "rows"]
    shown = table(head, lines[:_OPEN_LINES])
    if len(lines) <= _OPEN_LINES:
        return shown
    rest = len(lines) - _OPEN_LINES
    return f"{shown}<details><summary>{rest} more labels</summary>{table(head, lines[_OPEN_LINES:])}</details>"


def mistakes(quality: Quality, *, most: int = 15) -> str:
    """List the most confident errors with their texts: often a wrong label in the data, not in the model."""
    if not quality.mistakes:
        return "<p>No error on these rows.</p>"
    lines = [
        [
            text_cell(mistake.text, most=500),
            esc(", ".join(mistake.truth) or "no label"),
            esc(", ".join(mistake.predicted) or "no label"),
            f"{mistake.confidence:.3f}",
            esc(mistake.where),
        ]
        for mistake in quality.mistakes[:most]
    ]
    return table(["text", "labelled", "predicted", "confidence", "where"], lines, kind="errors")
