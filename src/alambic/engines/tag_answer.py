"""Spans and choices to JSON that follows the schema, whatever was found. The fields are those of tag_fields.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alambic.engines.tag_fields import Field, Fields, Group, parse_number
from alambic.engines.tagging import Span

Guess = Callable[[str], Span | None]
_SPACES = re.compile(r"\s+")


def assemble(
    text: str,
    spans: Sequence[Span],
    choices: Mapping[str, Any],
    fields: Fields,
    *,
    guess: Guess = lambda name: None,
) -> dict[str, Any]:
    """Put spans and choices together as JSON that has every required field and keeps every bound.

    Of several spans of a field that is no list, the surest is taken. A required field without a span, and not nullable,
    gets the likeliest span there is (`guess` by name), else the emptiest value that its schema allows.

    Args:
        text: the whole text.
        spans: found in it.
        choices: value of each chosen field, by name.
        fields: of the schema.
        guess: the likeliest span of a field, however unlikely.
    """
    return _object(fields.root, text, spans, choices, guess, forced=True) or {}


def _object(
    group: Group, text: str, spans: Sequence[Span], choices: Mapping[str, Any], guess: Guess, *, forced: bool
) -> dict[str, Any] | None:
    """Return an object with all it must have; None when nothing of it was found and it need not be there."""
    values: dict[str, Any] = {}
    for key, member in group.members.items():
        if isinstance(member, Group):
            value: Any = _object(member, text, spans, choices, guess, forced=False)
        elif member.choices:
            value = choices.get(member.name)
        else:
            value = _found(text, spans, member)
        if value is not None:
            values[key] = value
    if not values and not forced:
        return None
    for key in group.required - set(values):
        member = group.members[key]
        if isinstance(member, Field):
            values[key] = _fallback(text, member, guess)
        else:
            values[key] = None if member.nullable else _object(member, text, spans, choices, guess, forced=True)
    return {key: values[key] for key in group.members if key in values}


def _found(text: str, spans: Sequence[Span], field: Field) -> Any:
    """Return the value of a field found in the text, None when it is not there."""
    typed = [(span, _value(text, span, field)) for span in spans if span.label == field.name]
    values = [(span, value) for span, value in typed if value is not None and _fits(value, field)]
    if not field.many:
        return max(values, key=lambda pair: pair[0].score)[1] if values else None
    several: list[Any] = []
    for _, value in sorted(values, key=lambda pair: pair[0].start):
        if value not in several:
            several.append(value)
    return several[: field.most] or None


def _value(text: str, span: Span, field: Field) -> Any:
    said = span.text(text)
    if field.offsets:
        known = {"start": span.start, "end": span.end, "text": said, "value": said}
        return {name: known[name] for name in field.offsets}
    if field.type == "string":
        return _SPACES.sub(" ", said).strip() or None
    number = parse_number(said)
    if number is None or (field.type == "integer" and not number.is_integer()):
        return None
    return int(number) if number.is_integer() else number


def _fits(value: Any, field: Field) -> bool:
    """Tell whether a value keeps the bounds of its schema."""
    part = field.part
    if isinstance(value, str):
        return bool(part.get("minLength", 0) <= len(value) <= part.get("maxLength", math.inf))
    if isinstance(value, int | float):
        low, high = _bounds(part)
        step = part.get("multipleOf")
        inside = low <= value <= high and value not in (part.get("exclusiveMinimum"), part.get("exclusiveMaximum"))
        return bool(inside) and (not step or math.isclose(value / step, round(value / step), abs_tol=1e-9))
    return True


def _bounds(part: Mapping[str, Any]) -> tuple[float, float]:
    low = max(part.get("minimum", -math.inf), part.get("exclusiveMinimum", -math.inf))
    return low, min(part.get("maximum", math.inf), part.get("exclusiveMaximum", math.inf))


def _fallback(text: str, field: Field, guess: Guess) -> Any:
    """Return what a required field holds when nothing was found."""
    if field.nullable:
        return None
    if field.many and not field.least:
        return []
    if field.choices:
        return field.choices[0]
    likeliest = guess(field.name)
    value = None if likeliest is None else _value(text, likeliest, field)
    if value is None or not _fits(value, field):
        value = _emptiest(field)
    return [value] if field.many else value


def _emptiest(field: Field) -> Any:
    if field.offsets:
        known = {"start": 0, "end": 0, "text": "", "value": ""}
        return {name: known[name] for name in field.offsets}
    if field.type == "string":
        return " " * int(field.part.get("minLength", 0))
    low, high = _bounds(field.part)
    step = field.part.get("multipleOf") or 1
    # The nearest to zero: zero itself, or the first multiple inside the bounds.
    nearest = 0 if low <= 0 <= high else math.ceil(low / step) * step if low > 0 else math.floor(high / step) * step
    inside = [nearest, nearest + step, nearest - step, (low + high) / 2]
    return next((value for value in inside if math.isfinite(value) and _fits(value, field)), nearest)
