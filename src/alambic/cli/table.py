"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )


def interval(value: Mapping[str, Any] | None, *, scale: float = 1.0, digits: int = 1) -> str:
    """Write ``92.1 [90.8, 93.3]``."""
    if value is None:
        return "-"
    v, low, high = (scale * float(value[k]) for k in ("value", "low", "high"))
    return f"{v:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def number(value: float | None, digits: int = 1) -> str:
    """Write a number, or a dash when there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def candidates_table(candidates: Sequence[Mapping[str, Any]], chosen: str) -> str:
    """The table a build ends with: figures on the deciding rows, the chosen candidate marked."""
    metrics = list(candidates[0]["quality"]) if candidates else []
    means = any("mean_ms" in item["speed"] for item in candidates)
    times = {"p50 ms": "p50_ms", "p95 ms": "p95_ms", **({"mean ms": "mean_ms"} if means else {})}
    header = ["candidate", *[f"{m} % (dev)" for m in metrics], *times, "size MB", "RAM MB"]
    rows = []
    for item in candidates:
        mark = "> " if item["name"] == chosen else "  "
        speed = item["speed"]
        rows.append(
            [
                mark + item["name"],
                *[interval(item["quality"][m], scale=100) for m in metrics],
                *[number(speed.get(key), 2) for key in times.values()],
                number(item["size_mb"]),
                number(item.get("peak_ram_mb"), 0),
            ]
        )
    return text_table(header, rows)
