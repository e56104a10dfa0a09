"""Small pieces of HTML; every text from outside goes through `esc`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MOST_LINES = 30


def esc(value: object) -> str:
    """Escape a value for HTML text and quoted attributes; control characters become visible."""
    text = "".join(char if char >= " " or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in str(value))
    # Half of a surrogate pair cannot be written as UTF-8.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)


def number(value: float | int | None, digits: int = 3) -> str:
    """Write a number for people: `digits` significant ones, none lost before the decimal point."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def text_cell(text: str, *, most: int = 1200) -> str:
    """Write a user's text: its own direction, line breaks kept, the middle of a very long one left out and said so."""
    if len(text) > most:
        left_out, half = len(text) - most, most // 2
        text = f"{text[:half]} […{left_out:,} characters left out…] {text[-half:]}"
    return f'<span class="text" dir="auto">{esc(text)}</span>'


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, marked: Sequence[int] = (), kind: str = "") -> str:
    """Lay out cells that are already HTML; `marked` are the numbers of highlighted lines."""
    body = []
    for i, line in enumerate(lines):
        row = ' class="marked"' if i in marked else ""
        first, *rest = line
        body.append(f'<tr{row}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{heading}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def tree(value: Any) -> str:
    """Render any JSON value: mappings as definitions, lists of mappings as tables, the rest as text."""
    if isinstance(value, Mapping):
        items = (f"<dt>{esc(_words(key))}</dt><dd>{tree(item)}</dd>" for key, item in value.items())
        return f"<dl>{''.join(items)}</dl>" if value else "none"
    if isinstance(value, list | tuple):
        return _listing(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return number(value, 4) if isinstance(value, int | float) else text_cell(str(value))


def _listing(values: Sequence[Any]) -> str:
    if not values:
        return "none"
    shown, rest = values[:_MOST_LINES], len(values) - _MOST_LINES
    more = f"<p>and {rest:,} more</p>" if rest > 0 else ""
    if all(isinstance(value, Mapping) for value in shown):
        keys = list(dict.fromkeys(key for value in shown for key in value))
        return table([esc(_words(key)) for key in keys], [[tree(v.get(key)) for key in keys] for v in shown]) + more
    if all(not isinstance(value, Mapping | list | tuple) for value in shown) and not any(
        isinstance(value, str) and len(value) > 60 for value in shown
    ):
        return ", ".join(tree(value) for value in shown) + more
    return f"<ul>{''.join(f'<li>{tree(value)}</li>' for value in shown)}</ul>{more}"


def _words(key: object) -> str:
    return str(key).replace("_", " ")
