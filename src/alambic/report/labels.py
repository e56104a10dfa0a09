"""The labels that look wrong among the rows that decided, for the report page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alambic.report._html import esc, table, text_cell


def section(found: Mapping[str, Any]) -> str:
    """Show how many labels look wrong, what reading brings, and the rows to read first."""
    intro = (
        f"<p>About {found['share']:.1%} of the labels of the {found['rows']:,} rows that decided look wrong "
        f"(confident learning alone counts {found['counted']:.1%}); {found['listed']:,} rows have one chance in ten "
        "or more. <code>alambic check TASK --audit</code> looks at all rows to learn from and writes a list.</p>"
    )
    if not found["suspects"]:
        return intro
    price = [[f"{step['read']:,}", f"{step['found']:.0f}", f"{step['last']:.2f}"] for step in found["price"]]
    lines = [
        [
            text_cell(s["text"], most=300),
            esc(", ".join(s["labels"]) or "no label"),
            esc(", ".join(s["suggested"]) or "no label"),
            f"{s['wrong']:.2f}",
            f"<small>{esc('; '.join(s['why']))}</small>",
            esc(s["where"]),
        ]
        for s in found["suspects"]
    ]
    return (
        intro
        + table(["rows read, in this order", "wrong labels found (expected)", "of the last row"], price)
        + table(["text", "labelled", "suggested", "chance it is wrong", "why", "where"], lines, kind="errors")
    )
