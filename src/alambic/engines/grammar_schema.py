"""JSON Schema (draft 2020-12) to a grammar tree; see `alambic.engines.grammar` for what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from alambic.engines import grammar_parts as parts
from alambic.engines.grammar_numbers import decimals, integers, places_of
from alambic.engines.grammar_tree import EMPTY, Choice, Node, Repeat, Seq, Text
from alambic.errors import EngineError

_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions", "deprecated",
    "readOnly", "writeOnly", "format", "strict",
})  # fmt: skip
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_OF_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_ANY_TYPE = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"})
_KNOWN = _ANY_TYPE.union(_ANNOTATIONS, *_OF_TYPE.values())


@dataclass(frozen=True)
class Limits:
    """Bounds of what a schema leaves open.

    Attributes:
        characters: of a string without maxLength.
        items: of an array without maxItems.
        depth: levels of a schema that refers to itself, and of a value without any schema.
    """

    characters: int = 1000
    items: int = 64
    depth: int = 4


@dataclass
class Compiler:
    """Turns schemas into nodes; None stands for a schema that no value satisfies."""

    document: Any
    limits: Limits
    why: str = ""
    _literals: dict[str, Node] = field(default_factory=dict)

    def node(self, schema: Any, path: str, open_refs: tuple[str, ...]) -> Node | None:
        """Compile the schema at `path`, reached through the references `open_refs`."""
        if schema is True or schema == {}:
            return self._anything(self.limits.depth)
        if schema is False:
            return self._never(path, "false allows nothing")
        if not isinstance(schema, Mapping):
            raise EngineError(f"json_schema: {path} is {type(schema).__name__}, not an object or true or false")
        for keyword in schema:
            if keyword not in _KNOWN:
                raise EngineError(
                    f"json_schema: keyword {keyword!r} at {path} is not supported",
                    hint="supported: " + ", ".join(sorted(_KNOWN - _ANNOTATIONS)),
                )
        if "$ref" in schema:
            return self._reference(schema, path, open_refs)
        if "allOf" in schema:
            return self.node(_merged(schema, path, self._resolved), path, open_refs)
        if "const" in schema or "enum" in schema:
            return self._enum(schema, path)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._any_of(schema, keyword, path, open_refs)
        return self._typed(schema, path, open_refs)

    def _typed(self, schema: Mapping[str, Any], path: str, open_refs: tuple[str, ...]) -> Node | None:
        types = _types(schema, path)
        for keyword in schema:
            owners = [name for name, own in _OF_TYPE.items() if keyword in own]
            if owners and not set(owners) & set(types):
                raise EngineError(
                    f"json_schema: keyword {keyword!r} at {path} does not apply to type {', '.join(types)}"
                )
        makers = {"object": self._object, "array": self._array}
        options: list[Node | None] = []
        for name in types:
            if name == "boolean":
                options.append(Choice((Text("true"), Text("false"))))
            elif name == "null":
                options.append(Text("null"))
            elif name in ("integer", "number"):
                options.append(self._number(schema, path, whole=name == "integer"))
            elif name == "string":
                options.append(self._string(schema, path))
            else:
                options.append(makers[name](schema, path, open_refs))
        return parts.choice([option for option in options if option is not None])

    def _reference(self, schema: Mapping[str, Any], path: str, open_refs: tuple[str, ...]) -> Node | None:
        beside = set(schema) - _ANNOTATIONS - {"$ref"}
        if beside:
            raise EngineError(f"json_schema: keyword {min(beside)!r} beside $ref at {path} is not supported")
        name = schema["$ref"]
        target = self._resolved(name, path)
        if open_refs.count(name) >= self.limits.depth:
            return self._never(path, f"{name} refers to itself without an end")
        return self.node(target, path, (*open_refs, name))

    def _resolved(self, name: Any, path: str) -> Any:
        if not isinstance(name, str) or not name.startswith("#"):
            raise EngineError(f"json_schema: $ref {name!r} at {path}: only references within the schema are followed")
        found = self.document
        for step in name[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and step in found:
                found = found[step]
            elif (
                isinstance(found, Sequence) and not isinstance(found, str) and step.isdigit() and int(step) < len(found)
            ):
                found = found[int(step)]
            else:
                raise EngineError(f"json_schema: $ref {name!r} at {path}: there is no such place")
        return found

    def _any_of(self, schema: Mapping[str, Any], keyword: str, path: str, open_refs: tuple[str, ...]) -> Node | None:
        beside = {key: value for key, value in schema.items() if key not in _ANNOTATIONS and key != keyword}
        branches = schema[keyword]
        if not isinstance(branches, Sequence) or isinstance(branches, str) or not branches:
            raise EngineError(f"json_schema: {path}/{keyword} is not a list of schemas")
        if keyword == "oneOf":
            _check_apart([self._followed(branch, path) for branch in branches], f"{path}/{keyword}")
        options = []
        for i, branch in enumerate(branches):
            where = f"{path}/{keyword}/{i}"
            whole = _merged({**beside, "allOf": [branch]}, where, self._resolved) if beside else branch
            options.append(self.node(whole, where, open_refs))
        return parts.choice([option for option in options if option is not None])

    def _followed(self, schema: Any, path: str) -> Any:
        return self._resolved(schema["$ref"], path) if isinstance(schema, Mapping) and "$ref" in schema else schema

    def _enum(self, schema: Mapping[str, Any], path: str) -> Node | None:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise EngineError(f"json_schema: {path}/enum is not a list of values")
        if "enum" in schema and "const" in schema:
            values = [value for value in values if value in schema["enum"]]
        beside = set(schema) - _ANNOTATIONS - {"const", "enum", "type"}
        if beside:
            raise EngineError(f"json_schema: keyword {min(beside)!r} beside enum or const at {path} is not supported")
        if "type" in schema:
            types = _types(schema, path)
            values = [value for value in values if _type_of(value) & set(types)]
        if not values:
            return self._never(path, "no value of enum or const has the type")
        return parts.choice([self._literal(_json(value, path)) for value in values])

    def _string(self, schema: Mapping[str, Any], path: str) -> Node | None:
        if shape := parts.FORMATS.get(str(schema.get("format"))):
            if "minLength" in schema or "maxLength" in schema:
                raise EngineError(f"json_schema: minLength or maxLength beside format at {path} is not supported")
            return Seq((Text('"'), shape, Text('"')))
        low, high = self._range(schema, "minLength", "maxLength", self.limits.characters, path)
        if low > high:
            return self._never(path, f"minLength {low} is more than maxLength {high}")
        return Seq((Text('"'), Repeat(parts.CHARACTER, low, high, free=True), Text('"')))

    def _number(self, schema: Mapping[str, Any], path: str, *, whole: bool) -> Node | None:
        low, open_low = _bound(schema, "minimum", "exclusiveMinimum", path, max)
        high, open_high = _bound(schema, "maximum", "exclusiveMaximum", path, min)
        places = 0 if whole else 6
        if "multipleOf" in schema:
            step = _decimal(schema["multipleOf"], f"{path}/multipleOf")
            known = places_of(step)
            if known is None:
                return self._multiples(low, high, open_low, open_high, step, path, whole=whole)
            places = min(places, known)
        if low is None and high is None and whole:
            return integers(None, None)
        found = decimals(low, high, open_low=open_low, open_high=open_high, places=places)
        return found if found is not None else self._never(path, "no number lies between its bounds")

    def _multiples(
        self, low: Decimal | None, high: Decimal | None, open_low: bool, open_high: bool, step: Decimal, path: str,
        *, whole: bool,
    ) -> Node | None:  # fmt: skip
        if step <= 0 or low is None or high is None or (high - low) / step > 1000:
            raise EngineError(
                f"json_schema: keyword 'multipleOf' {step} at {path} is not supported there",
                hint="supported: 1, 0.1, 0.01 ..., or with minimum and maximum at most 1000 steps apart",
            )
        first = int((low / step).to_integral_value("ROUND_CEILING"))
        last = int((high / step).to_integral_value("ROUND_FLOOR"))
        values = [step * i for i in range(first, last + 1)]
        values = [v for v in values if not (open_low and v == low) and not (open_high and v == high)]
        if whole:
            values = [v for v in values if v == v.to_integral_value()]
        if not values:
            return self._never(path, "no multiple lies between its bounds")
        return parts.choice([Text(f"{v.normalize():f}") for v in values])

    def _object(self, schema: Mapping[str, Any], path: str, open_refs: tuple[str, ...]) -> Node | None:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise EngineError(f"json_schema: {path}/properties is not an object")
        if not isinstance(required, Sequence) or isinstance(required, str):
            raise EngineError(f"json_schema: {path}/required is not a list of names")
        extra = schema.get("additionalProperties", True)
        if isinstance(extra, Mapping) and extra:
            raise EngineError(f"json_schema: keyword 'additionalProperties' with a schema at {path} is not supported")
        if not properties and not required and extra is not False:
            return self._any_object(self.limits.depth)
        members: list[tuple[str, Node, bool]] = []
        for name in [*properties, *(name for name in required if name not in properties)]:
            if name not in properties and extra is False:
                return self._never(path, f"{name!r} is required, and additionalProperties forbids it")
            value = self.node(properties.get(name, True), f"{path}/properties/{name}", open_refs)
            if value is not None:
                members.append((name, value, name in required))
            elif name in required:
                return None
        least, most = sum(needed for _, _, needed in members), len(members)
        low, high = self._range(schema, "minProperties", "maxProperties", most, path)
        if low > most or high < least:
            return self._never(path, "minProperties or maxProperties does not fit its properties")
        if low > least or high < most:
            raise EngineError(f"json_schema: minProperties or maxProperties at {path} is not supported there")
        return Seq((Text("{"), self._members(members), Text("}")))

    def _members(self, members: Sequence[tuple[str, Node, bool]]) -> Node:
        """Write members in order, those not required or not at all, with commas between them."""
        after: dict[bool, Node] = {False: EMPTY, True: EMPTY}  # by whether a comma is due
        for name, value, needed in reversed(members):
            key = self._literal(_json(name, "") + ":")
            tail = after[True]
            after = {
                due: parts.optional(
                    Seq((*((Text(","),) if due else ()), key, value, tail)), None if needed else after[due]
                )
                for due in (False, True)
            }
        return after[False]

    def _array(self, schema: Mapping[str, Any], path: str, open_refs: tuple[str, ...]) -> Node | None:
        first = schema.get("prefixItems", [])
        if not isinstance(first, Sequence) or isinstance(first, str):
            raise EngineError(f"json_schema: {path}/prefixItems is not a list of schemas")
        low, high = self._range(schema, "minItems", "maxItems", self.limits.items + len(first), path)
        if low > high:
            return self._never(path, f"minItems {low} is more than maxItems {high}")
        items = schema.get("items", True)
        if schema.get("uniqueItems"):
            return self._unique(items, low, high, path)
        heads = [self.node(head, f"{path}/prefixItems/{i}", open_refs) for i, head in enumerate(first[:high])]
        item = self.node(items, f"{path}/items", open_refs) if high > len(heads) else None
        if item is None:
            high = min(high, len(heads))
        if None in heads:
            high = min(high, heads.index(None))
        if low > high:
            return self._never(path, f"it has at least {low} items, and item {high} cannot be")
        return Seq((Text("["), parts.listed([h for h in heads if h is not None][:high], item, low, high), Text("]")))

    def _unique(self, items: Any, low: int, high: int, path: str) -> Node | None:
        """Items that differ: those of an enum, in its order."""
        values = self._followed(items, path).get("enum") if isinstance(items, Mapping) else None
        if not isinstance(values, Sequence) or not 0 < len(values) <= 64:
            raise EngineError(
                f"json_schema: keyword 'uniqueItems' at {path} is not supported there",
                hint="supported: items of an enum of at most 64 values",
            )
        texts = list(dict.fromkeys(_json(value, path) for value in values))
        if low > min(high, len(texts)):
            return self._never(path, f"it has at least {low} different items of {len(texts)}")
        return Seq((Text("["), parts.subset([self._literal(text) for text in texts], low, high), Text("]")))

    def _anything(self, depth: int) -> Node:
        simple = [
            Text("true"),
            Text("false"),
            Text("null"),
            parts.free_number(),
            parts.free_string(self.limits.characters),
        ]
        if depth <= 1:
            return Choice(tuple(simple))
        inner = self._anything(depth - 1)
        array = Seq((Text("["), parts.listed([], inner, 0, self.limits.items), Text("]")))
        return Choice((*simple, array, self._any_object(depth, inner)))

    def _any_object(self, depth: int, inner: Node | None = None) -> Node:
        value = inner if inner is not None else self._anything(depth - 1)
        member = Seq((parts.free_string(64), Text(":"), value))
        return Seq((Text("{"), parts.listed([], member, 0, self.limits.items), Text("}")))

    def _range(self, schema: Mapping[str, Any], least: str, most: str, default: int, path: str) -> tuple[int, int]:
        values = []
        for keyword, fallback in ((least, 0), (most, None)):
            value = schema.get(keyword, fallback)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or value != int(value)
            ):
                raise EngineError(f"json_schema: {path}/{keyword} is {value!r}, not a whole number")
            values.append(None if value is None else max(int(value), 0))
        low = values[0] or 0
        return low, values[1] if values[1] is not None else max(default, low)

    def _literal(self, text: str) -> Node:
        return self._literals.setdefault(text, Text(text))

    def _never(self, path: str, why: str) -> Node | None:
        """Remember the first reason why nothing is allowed; return that nothing."""
        self.why = self.why or f"{path}: {why}"
        return None


def _merged(schema: Mapping[str, Any], path: str, resolve: Any) -> dict[str, Any]:
    """Write `allOf` and its neighbours as one schema; what says the same thing twice differently is refused."""
    whole = {key: value for key, value in schema.items() if key != "allOf"}
    for i, part in enumerate(schema["allOf"]):
        where = f"{path}/allOf/{i}"
        while isinstance(part, Mapping) and set(part) - _ANNOTATIONS == {"$ref"}:
            part = resolve(part["$ref"], where)
        if not isinstance(part, Mapping):
            raise EngineError(f"json_schema: {where} is not an object")
        if "allOf" in part:
            part = _merged(part, where, resolve)
        for key, value in part.items():
            if key in _ANNOTATIONS or key not in whole or whole[key] == value:
                whole.setdefault(key, value)
            elif key == "properties" and not {n for n in whole[key] if n in value and whole[key][n] != value[n]}:
                whole[key] = {**whole[key], **value}
            elif key == "required":
                whole[key] = [*whole[key], *(name for name in value if name not in whole[key])]
            elif key in _STRICTER:
                whole[key] = _STRICTER[key](whole[key], value)
            else:
                raise EngineError(f"json_schema: keyword {key!r} twice, differently, in allOf at {path}")
    return whole


_STRICTER: dict[str, Any] = {
    **dict.fromkeys(("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"), max),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"), min),
}


def _check_apart(branches: Sequence[Any], path: str) -> None:
    """Refuse `oneOf` whose branches could hold for the same value: a grammar can only take one of them."""
    for i, a in enumerate(branches):
        for j, b in enumerate(branches[:i]):
            if not _apart(a, b):
                raise EngineError(
                    f"json_schema: oneOf at {path}: branches {j} and {i} may both hold",
                    hint="write anyOf, or give the branches different types or a property with different const values",
                )


def _apart(a: Any, b: Any) -> bool:
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a is False or b is False
    types = [set(_types(one, "")) if "type" in one else None for one in (a, b)]
    if types[0] is not None and types[1] is not None:
        numbers = {"integer", "number"}
        if not types[0] & types[1] and not (types[0] & numbers and types[1] & numbers):
            return True
    values = [_values(one) for one in (a, b)]
    if values[0] is not None and values[1] is not None:
        return not any(value in values[1] for value in values[0])
    shared = set(a.get("required", ())) & set(b.get("required", ()))
    return any(_apart(a.get("properties", {}).get(n, {}), b.get("properties", {}).get(n, {})) for n in shared)


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if isinstance(schema.get("enum"), Sequence) else None


def _types(schema: Mapping[str, Any], path: str) -> list[str]:
    """Return the types that a schema allows: those it names, or those that its keywords speak of."""
    raw = schema.get("type")
    if raw is None:
        spoken = [name for name, own in _OF_TYPE.items() if own & set(schema)]
        spoken = [name for name in spoken if name != "integer"]
        return spoken or [name for name in _TYPES if name != "integer"]
    names = [raw] if isinstance(raw, str) else raw
    if not isinstance(names, Sequence) or not names or any(name not in _TYPES for name in names):
        raise EngineError(f"json_schema: type {raw!r} at {path}", hint="allowed: " + ", ".join(_TYPES))
    return list(names)


def _type_of(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {"string"} if isinstance(value, str) else {"object"} if isinstance(value, Mapping) else {"array"}


def _bound(
    schema: Mapping[str, Any], keyword: str, beyond: str, path: str, stricter: Any
) -> tuple[Decimal | None, bool]:
    bounds = [
        (_decimal(schema[key], f"{path}/{key}"), is_open)
        for key, is_open in ((keyword, False), (beyond, True))
        if key in schema
    ]
    if not bounds:
        return None, False
    value = stricter(bound for bound, _ in bounds)
    return value, any(is_open for bound, is_open in bounds if bound == value)


def _decimal(value: Any, path: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EngineError(f"json_schema: {path} is {value!r}, not a number")
    return Decimal(str(value))


def _json(value: Any, path: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EngineError(f"json_schema: {path}: {value!r} is no JSON value") from error
