"""Which fields of a JSON Schema a token classifier can give, and where their values stand in a text.

A field whose values stand in the text is found as spans; a field with a closed set of values (an enum, a boolean) is
chosen for the whole text. A field is named by its path, ``buyer.city``. Lists of objects cannot be put together from
spans, and free values that never stand in the text cannot be found: both are said before anything is trained. How
spans become JSON again is in tag_answer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alambic.engines.tagging import Span
from alambic.errors import EngineError
from alambic.kinds.schema import resolved, types_of

Type = Literal["string", "number", "integer"]
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\d(?:[\d.,'\u2019\u00a0\u202f ]*\d)?(?!\w)")
_SPACES = re.compile(r"\s+")
_SPACE_AT_SIGN = re.compile(r"\s+(?=[^\w\s])|(?<=[^\w\s])\s+")
_PIECES = re.compile(r"\w+|[^\w\s]")
# A value with its place: that is how a schema asks for spans (alambic.kinds.spans).
OFFSETS = frozenset({"start", "end", "text", "value"})
_DEPTH = 20
_ELSEWHERE = "leave the candidate 'tagger' out for this schema"


@dataclass(frozen=True)
class Field:
    """A leaf of the schema.

    Attributes:
        path: keys from the root.
        type: of the value, or of each value of a list.
        many: the field is a list.
        choices: its closed set of values; empty for a field found in the text.
        nullable: it may be null.
        part: its schema, or that of each value of a list: bounds of lengths and numbers.
        most: longest list allowed; None without limit.
        least: shortest list allowed, 0 or 1.
        offsets: properties of a value that is given with its place; empty for a plain value.
    """

    path: tuple[str, ...]
    type: Type
    many: bool
    choices: tuple[Any, ...]
    nullable: bool
    part: Mapping[str, Any]
    most: int | None = None
    least: int = 0
    offsets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path as one word, the label of its spans."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Group:
    """An object of the schema: its members in order, and which of them it must have."""

    members: Mapping[str, Field | Group]
    required: frozenset[str]
    nullable: bool = False

    def leaves(self) -> Iterator[Field]:
        """Yield the fields in the order of the schema."""
        for member in self.members.values():
            if isinstance(member, Group):
                yield from member.leaves()
            else:
                yield member


@dataclass(frozen=True)
class Fields:
    """All leaves of a schema, in its order, and the objects around them."""

    fields: tuple[Field, ...]
    root: Group

    @property
    def spans(self) -> tuple[Field, ...]:
        """Fields found in the text."""
        return tuple(field for field in self.fields if not field.choices)

    @property
    def chosen(self) -> tuple[Field, ...]:
        """Fields with a closed set of values."""
        return tuple(field for field in self.fields if field.choices)


def fields_of(schema: Mapping[str, Any]) -> Fields:
    """Return the leaves of a JSON Schema.

    Raises:
        EngineError: it is no object, or has a part that a token classifier cannot give; the part is named.
    """
    part, _ = _plain(schema, schema, ())
    if "object" not in types_of(part) or not part.get("properties"):
        raise EngineError("the schema of a token classifier is an object with properties", hint=_ELSEWHERE)
    root = _group(part, schema, (), nullable=False)
    return Fields(tuple(root.leaves()), root)


def _group(part: Mapping[str, Any], schema: Mapping[str, Any], path: tuple[str, ...], *, nullable: bool) -> Group:
    properties, required = part["properties"], frozenset(map(str, part.get("required", ())))
    absent = sorted(required - set(properties))
    if absent:
        raise EngineError(f"schema: {_shown((*path, absent[0]))} is required and has no property")
    if len(path) > _DEPTH:
        raise EngineError(f"schema: {_shown(path[:3])}... refers to itself without end", hint=_ELSEWHERE)
    members = {str(key): _member(inner, schema, (*path, str(key))) for key, inner in properties.items()}
    return Group(members, required, nullable)


def _member(raw: Any, schema: Mapping[str, Any], path: tuple[str, ...]) -> Field | Group:
    part, nullable = _plain(raw, schema, path)
    types = types_of(part)
    if "array" not in types:
        if part.get("properties") and not _placed(part):
            return _group(part, schema, path, nullable=nullable)
        return _leaf(part, path, many=False, nullable=nullable)
    if "prefixItems" in part or int(part.get("minItems", 0)) > 1:
        raise _cannot(path, "a list with places of its own" if "prefixItems" in part else "a least number of values")
    item, _ = _plain(part.get("items", {}), schema, path)
    leaf = _leaf(item, path, many=True, nullable=nullable)
    most = part.get("maxItems")
    return Field(leaf.path, leaf.type, True, (), nullable, leaf.part, None if most is None else int(most),
                 int(part.get("minItems", 0)), leaf.offsets)  # fmt: skip


def _plain(raw: Any, schema: Mapping[str, Any], path: tuple[str, ...]) -> tuple[Mapping[str, Any], bool]:
    """Follow references and take null out of a union; say whether it was there."""
    part = resolved(raw, schema)
    if not isinstance(part, Mapping):
        raise _cannot(path, "a value of any type")
    nullable = False
    for word in ("allOf", "anyOf", "oneOf"):
        if word in part:
            branches = [resolved(branch, schema) for branch in part[word]]
            others = [branch for branch in branches if branch != {"type": "null"} and isinstance(branch, Mapping)]
            if len(others) != 1:
                raise _cannot(path, f"{word} of {len(others)} kinds of values")
            nullable = nullable or len(others) < len(branches)
            inner, also = _plain({**{k: v for k, v in part.items() if k != word}, **others[0]}, schema, path)
            part, nullable = inner, nullable or also
    types = part.get("type")
    if isinstance(types, list | tuple) and "null" in types:
        return {**part, "type": [name for name in types if name != "null"]}, True
    return part, nullable


def _placed(part: Mapping[str, Any]) -> bool:
    names = set(part["properties"])
    return {"start", "end"} <= names <= OFFSETS


def _leaf(part: Mapping[str, Any], path: tuple[str, ...], *, many: bool, nullable: bool) -> Field:
    if part.get("properties") and _placed(part):
        return Field(path, "string", many, (), nullable, {}, offsets=tuple(part["properties"]))
    types = types_of(part)
    choices = tuple(part["enum"]) if "enum" in part else (part["const"],) if "const" in part else ()
    if tuple(types) == ("boolean",):
        choices = choices or (False, True)
    nullable = nullable or None in choices
    choices = tuple(value for value in choices if value is not None)
    if choices and not many:
        return Field(path, "string", False, choices, nullable, part)
    open_types = [name for name in types if name in ("string", "number", "integer")]
    if choices or len(types) > 2 or len(open_types) != len(types) or not open_types:
        what = (
            "a list of choices"
            if choices
            else "a value of any type"
            if len(types) > 3
            else f"type {' or '.join(types)}"
        )
        raise _cannot(path, what + (" in a list" if many and not choices else ""))
    kind: Any = "string" if "string" in open_types else "number" if "number" in open_types else "integer"
    return Field(path, kind, many, (), nullable, part)


def _cannot(path: Sequence[str], what: str) -> EngineError:
    return EngineError(
        f"schema: {_shown(path)}: a token classifier cannot give {what}",
        hint=f"{_ELSEWHERE}, or make it a text, a number, an enum, or a list of texts or numbers",
    )


def _shown(path: Sequence[str]) -> str:
    return ".".join(path) or "the whole"


@dataclass(frozen=True)
class Located:
    """Where the values of an answer stand in its text.

    Attributes:
        spans: of all values found.
        choices: number of the chosen value of each chosen field, by name; absent where the answer has none.
        lost: names of fields with a value that does not stand in the text.
    """

    spans: tuple[Span, ...]
    choices: Mapping[str, int]
    lost: tuple[str, ...]


def locate(text: str, answer: Mapping[str, Any], fields: Fields) -> Located:
    """Find the values of `answer` in `text`: as they stand, else without case and with other spaces, else as numbers.

    Other spaces: any white space between two words, any or none beside a sign. A value that stands there several times
    is marked each time; where two fields claim a place the longer value has it.
    """
    spans: list[Span] = []
    choices: dict[str, int] = {}
    lost: list[str] = []
    for field in fields.fields:
        value = _get(answer, field.path)
        if value is None:
            continue
        if field.choices:
            if value in field.choices:
                choices[field.name] = field.choices.index(value)
            else:
                lost.append(field.name)
            continue
        for one in value if field.many and isinstance(value, list) else [value]:
            found = _places(text, one, field)
            spans += [Span(start, end, field.name) for start, end in found]
            if not found:
                lost.append(field.name)
    return Located(_apart(spans), choices, tuple(lost))


def _get(answer: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = answer
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _places(text: str, value: Any, field: Field) -> list[tuple[int, int]]:
    if field.offsets:
        start, end = (value.get("start"), value.get("end")) if isinstance(value, Mapping) else (None, None)
        inside = isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)
        return [(int(start), int(end))] if inside else []  # type: ignore[arg-type]
    if field.type == "string":
        said = str(value).strip()
        if not said:
            return []
        # A scanned "12,MAIN ST" is the "12, Main St" that a person typed: beside a sign, spaces come and go.
        loose = r"\s+".join(_tight(word) for word in _SPACES.split(_SPACE_AT_SIGN.sub("", said)))
        for pattern, flags in ((re.escape(said), 0), (loose, re.IGNORECASE)):
            found = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, flags)]
            if found:
                return found
        return []
    return [match.span() for match in _NUMBER.finditer(text) if parse_number(match[0]) == value]


def _tight(word: str) -> str:
    """Return the pattern of a word: white space may stand beside each of its signs."""
    return r"\s*".join(map(re.escape, _PIECES.findall(word)))


def _apart(spans: Sequence[Span]) -> tuple[Span, ...]:
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start - span.end):
        if all(span.end <= other.start or span.start >= other.end for other in kept):
            kept.append(span)
    return tuple(sorted(kept, key=lambda span: span.start))


def parse_number(text: str) -> float | None:
    """Read a number as people write it (``1 234,50``, ``1,234.50``, ``$9.00``); None when it is none.

    Of two different signs the last one is the decimal one; a lone comma before exactly three digits groups thousands.
    """
    digits = re.sub(r"[^\d.,+-]", "", text)
    if not re.fullmatch(r"[-+]?[\d.,]*\d[\d.,]*", digits):
        return None
    dot, comma = digits.rfind("."), digits.rfind(",")
    if dot >= 0 and comma >= 0:
        group = "," if dot > comma else "."
        digits = digits.replace(group, "")
    elif digits.count(",") > 1 or re.fullmatch(r"[-+]?\d{1,3},\d{3}", digits):
        digits = digits.replace(",", "")
    elif digits.count(".") > 1:
        digits = digits.replace(".", "")
    try:
        return float(digits.replace(",", "."))
    except ValueError:
        return None
