"""Rows of `extract` that are no question and answer yet: tagged tokens, spans, slots, one column for each field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alambic.data.chat_answers import Answers, written
from alambic.data.chat_rows import Fields, Parsed, Read, decoded
from alambic.data.columns import by_name
from alambic.errors import DataError
from alambic.kinds.chat import Chat
from alambic.kinds.schema import resolved, types_of
from alambic.kinds.spans import Marked, answer_of, from_slots, from_spans, from_tags

_TOKENS, _TAGS = ("tokens", "words", "mots"), ("tags", "ner_tags", "bio", "labels")
_SPANS, _SLOTS = ("spans", "entities"), ("slots",)
_TEXTS = ("text", "texte", "message", "document", "content", "sentence", "utterance", "phrase", "source_text")
_TRUE = {"true": True, "false": False, "vrai": True, "faux": False}

Fill = Callable[[Fields], tuple[str, str]]


@dataclass(frozen=True)
class MarkedForm:
    """A form of marked texts.

    Attributes:
        name: tags, spans, slots or fields.
        source: column of the text; ``text`` when it is made of tokens.
        used: columns read.
        reader: makes the reader, of what writes the user message and what checks answers.
    """

    name: str
    source: str
    used: tuple[str, ...]
    reader: Callable[[Fill, Answers], Read]


def marked_form(
    names: Sequence[str],
    sample: Sequence[Fields],
    *,
    text: str | None,
    output: str | None,
    schema: Mapping[str, Any] | None,
) -> MarkedForm | None:
    """Return the marked form of a file, None when it has none, or the task names the column of answers."""
    if schema is None or output is not None:
        return None
    whole = resolved(schema, schema)
    properties = whole.get("properties", {})
    beside = [name for name in names if name in properties]
    tokens, tags = _listed(names, sample, _TOKENS), _listed(names, sample, _TAGS)
    source = text or by_name([n for n in names if n not in (tokens, tags, *beside)], _TEXTS) or "text"
    if tokens is not None and tags is not None:
        used = (tokens, tags, *((source,) if source in names else ()), *(n for n in beside if n not in (tokens, tags)))

        def tagged(fields: Fields) -> Marked:
            own = fields.get(source)
            return from_tags(_texts(fields, tokens), _texts(fields, tags), own if isinstance(own, str) else None)

        return _marked("tags", source, used, tagged, properties, schema)
    spans = _listed(names, sample, _SPANS)
    if spans is not None and source in names and spans not in properties:

        def spanned(fields: Fields) -> Marked:
            return from_spans(written(fields.get(source)), decoded(fields.get(spans)) or ())

        return _marked("spans", source, (source, spans, *beside), spanned, properties, schema)
    slots = next((n for n in _SLOTS if n in names and n not in properties), None)
    if slots is not None and source in names:

        def slotted(fields: Fields) -> Marked:
            return from_slots(written(fields.get(source)), decoded(fields.get(slots)) or {})

        return _marked("slots", source, (source, slots, *beside), slotted, properties, schema)
    required = set(whole.get("required", ()))
    if beside and required <= set(beside) and source in names and source not in properties:
        return _marked(
            "fields", source, (source, *beside), lambda fields: Marked(written(fields.get(source))), properties, schema
        )
    return None


def _listed(names: Sequence[str], sample: Sequence[Fields], known: Sequence[str]) -> str | None:
    """Return the first known name whose cells are lists."""
    for name in known:
        if name in names and any(isinstance(decoded(row.get(name)), list) for row in sample):
            return name
    return None


def _texts(fields: Fields, name: str) -> list[str]:
    value = decoded(fields.get(name))
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name!r} is not a list of texts")
    return value


def _marked(
    name: str,
    source: str,
    used: tuple[str, ...],
    mark: Callable[[Fields], Marked],
    properties: Mapping[str, Any],
    schema: Mapping[str, Any],
) -> MarkedForm:
    beside = [column for column in used if column in properties]

    def reader(fill: Fill, answers: Answers) -> Read:
        def read(fields: Fields, where: str) -> Parsed:
            try:
                marked = mark(fields)
                values = {n: _typed(fields.get(n), resolved(properties[n], schema)) for n in beside}
                values = {n: value for n, value in values.items() if value is not None}
                answer = answer_of(Marked(marked.text, marked.spans, {**marked.values, **values}), schema)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error
            asked, given = fill({**fields, source: marked.text})
            if not given.strip():
                raise DataError(f"{where}: the text ({source!r}) is empty")
            return Parsed(Chat.of(asked, completion=answers.json(answer, where)), given)

        return read

    return MarkedForm(name, source, used, reader)


def _typed(value: Any, part: Any) -> Any:
    """Return a cell as the schema types it: a table of texts has its numbers as texts."""
    types = types_of(part) if isinstance(part, Mapping) else ()
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    if "string" in types:
        return value
    if "boolean" in types and value.casefold() in _TRUE:
        return _TRUE[value.casefold()]
    if {"integer", "number"} & set(types):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else number
    return decoded(value)
