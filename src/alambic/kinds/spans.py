"""Marked texts to answers: BIO tags of tokens, spans, and slots become JSON that a schema describes.

    marked = from_tags(["set", "ten", "minutes"], ["O", "B-time", "I-time"])
    marked.spans                          # ((4, 15, "time"),)
    answer_of(marked, schema)             # {"time": "ten minutes"}; a list where the schema has one

A property whose schema is an object with `start` and `end` gets the offsets too: that is how spans are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alambic.errors import nearest
from alambic.kinds.schema import resolved, types_of

Span = tuple[int, int, str]
"""Start, end (exclusive) and label."""

_LABEL_KEYS = ("label", "type", "entity_type", "entity", "slot", "tag", "name")
_VALUE_KEYS = ("text", "value", "entity_value")


@dataclass(frozen=True)
class Marked:
    """A text and what is marked in it.

    Attributes:
        text: as it is.
        spans: in order; may touch, never overlap when they come from tags.
        values: what belongs to the text without a place in it, by label (the intent, a slot that is worded otherwise).
    """

    text: str
    spans: tuple[Span, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


def spans_of_tags(tags: Sequence[str]) -> list[Span]:
    """Return the spans of a row of BIO (or BIOES, BILOU) tags, as token numbers, read as the CoNLL script does.

    An I- that continues nothing begins a span.

    Raises:
        ValueError: a tag is of another form.
    """
    spans: list[Span] = []
    start, label = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = str(tag).partition("-")
        if prefix not in ("O", "B", "I", "E", "L", "S", "U") or (prefix == "O") != (not name):
            raise ValueError(f"tag {tag!r} is neither O nor B-LABEL nor I-LABEL")
        if label and (prefix not in ("I", "E", "L") or name != label):
            spans.append((start, i, label))
            label = ""
        if prefix != "O" and not label:
            start, label = i, name
    return spans


def from_tags(tokens: Sequence[str], tags: Sequence[str], text: str | None = None) -> Marked:
    """Return the text of `tokens` (their own, or joined by spaces) with its spans in characters.

    Raises:
        ValueError: as many tags as tokens are needed, a tag is of another form, or the tokens are not in `text`.
    """
    if len(tokens) != len(tags):
        raise ValueError(f"{len(tokens)} tokens and {len(tags)} tags")
    text = " ".join(tokens) if text is None else text
    places, at = [], 0
    for token in tokens:
        found = text.find(token, at)
        if found < 0:
            raise ValueError(f"token {token!r} is not in the text after character {at}")
        at = found + len(token)
        places.append((found, at))
    spans = [(places[first][0], places[last - 1][1], label) for first, last, label in spans_of_tags(tags)]
    return Marked(text, tuple(spans))


def from_spans(text: str, spans: Iterable[Any]) -> Marked:
    """Return the spans of a row: objects with `start`, `end` and a label, or lists of the three.

    Raises:
        ValueError: a span is of another form, outside of the text, or not the text that it states.
    """
    if isinstance(spans, str | Mapping) or not isinstance(spans, Iterable):
        raise ValueError(f"the spans are {type(spans).__name__}, not a list")
    read = []
    for i, raw in enumerate(spans):
        start, end, label, value = _span(raw, i)
        if not 0 <= start < end <= len(text):
            raise ValueError(f"spans[{i}]: {start} to {end} is not inside the text of {len(text)} characters")
        if isinstance(value, str) and value.strip() != text[start:end].strip():
            raise ValueError(f"spans[{i}]: characters {start} to {end} are {text[start:end]!r}, not {value!r}")
        read.append((start, end, label))
    return Marked(text, tuple(sorted(read)))


def _span(raw: Any, i: int) -> tuple[int, int, str, Any]:
    if isinstance(raw, Mapping):
        label = next((raw[key] for key in _LABEL_KEYS if isinstance(raw.get(key), str)), None)
        value = next((raw[key] for key in _VALUE_KEYS if isinstance(raw.get(key), str)), None)
        parts = (raw.get("start"), raw.get("end"), label)
    else:
        parts = tuple(raw)[:3] if isinstance(raw, list | tuple) and len(raw) >= 3 else (None, None, None)
        value = None
    start, end, label = parts
    if type(start) is not int or type(end) is not int or not isinstance(label, str):  # True is an int, and no offset
        raise ValueError(f"spans[{i}]: not an object with start, end and label")
    return start, end, label, value


def from_slots(text: str, slots: Mapping[str, Any]) -> Marked:
    """Return a text with the values of its slots; those that stand in the text once, as they are, become spans.

    Raises:
        ValueError: the slots are no object.
    """
    if not isinstance(slots, Mapping):
        raise ValueError(f"the slots are {type(slots).__name__}, not an object of values by name")
    spans, values = [], {}
    for label, value in slots.items():
        many = value if isinstance(value, list) else [value]
        places = [_place(text, one) for one in many]
        if many and all(place is not None for place in places):
            spans += [(place[0], place[1], label) for place in places if place is not None]
        elif value is not None and value != []:
            values[label] = value
    return Marked(text, tuple(sorted(spans)), values)


def _place(text: str, value: Any) -> tuple[int, int] | None:
    if not isinstance(value, str) or not value or text.count(value) != 1:
        return None
    start = text.index(value)
    return start, start + len(value)


def answer_of(marked: Marked, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the answer of a marked text, in the order of the schema; without one, each label is a list of texts.

    Raises:
        ValueError: a label is no property of the schema, or its values do not fit there.
    """
    if schema is None:
        found: dict[str, Any] = dict(marked.values)
        for start, end, label in marked.spans:
            found.setdefault(label, []).append(marked.text[start:end])
        return found
    whole = resolved(schema, schema)
    properties = whole.get("properties", {}) if isinstance(whole, Mapping) else {}
    labels = dict.fromkeys([*marked.values, *(label for _, _, label in marked.spans)])
    for label in labels:
        if label not in properties:
            raise ValueError(f"{label!r} is no property of the schema; {nearest(label, properties)}")
    answer = {}
    for label, part in properties.items():
        if label in marked.values:
            answer[label] = marked.values[label]
        elif label in labels:
            answer[label] = _values(marked, label, resolved(part, schema), schema)
    return answer


def _values(marked: Marked, label: str, part: Any, schema: Mapping[str, Any]) -> Any:
    places = [(start, end) for start, end, name in marked.spans if name == label]
    types = types_of(part) if isinstance(part, Mapping) else ()
    if "array" in types:
        item = resolved(part.get("items", True), schema)
        return [_value(marked.text, *place, item) for place in places]
    if len(places) > 1:
        raise ValueError(f"{len(places)} values of {label!r}, and the schema has room for one (make it an array)")
    return _value(marked.text, *places[0], part)


def _value(text: str, start: int, end: int, part: Any) -> Any:
    said = text[start:end]
    if not isinstance(part, Mapping):
        return said
    if "properties" in part:
        known = {"start": start, "end": end, "text": said, "value": said}
        return {name: known[name] for name in part["properties"] if name in known}
    types = types_of(part)
    if "string" in types or not {"integer", "number"} & set(types):
        return said
    try:
        number = float(said.replace(" ", "").replace(",", "."))
    except ValueError as error:
        raise ValueError(f"{said!r} is no number, and the schema has {' or '.join(types)}") from error
    return int(number) if number.is_integer() else number


def schema_of(rows: Iterable[Marked], *, offsets: bool = False) -> dict[str, Any]:
    """Propose the schema of the answers of marked texts: a property a label, a list where a text has several values.

    Args:
        rows: all of them.
        offsets: each value is an object with `text`, `start` and `end`.
    """
    value: dict[str, Any] = {"type": "string"}
    if offsets:
        whole = {"type": "integer", "minimum": 0}
        value = {
            "type": "object",
            "properties": {"text": {"type": "string"}, "start": whole, "end": whole},
            "required": ["text", "start", "end"],
            "additionalProperties": False,
        }
    most: dict[str, int] = {}
    for row in rows:
        labels = [label for _, _, label in row.spans]
        for label in labels:
            most[label] = max(most.get(label, 0), labels.count(label))
    properties = {label: value if most[label] == 1 else {"type": "array", "items": value} for label in sorted(most)}
    return {"type": "object", "properties": properties, "required": [], "additionalProperties": False}
