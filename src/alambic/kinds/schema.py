"""Is a JSON Schema one that answers can be written under? Checked whole before anything slow.

Three questions, in this order: is it a schema (the metaschema of draft 2020-12), does it use only keywords that the
constrained engine keeps, and is there a value for it and for each of its parts. The last one never refuses a schema
that has answers; combinations of `anyOf`, `oneOf` and `allOf` may be impossible in ways that it does not see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from alambic import _extras
from alambic.errors import TaskError, nearest

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions", "deprecated",
    "readOnly", "writeOnly", "format", "strict",
})  # fmt: skip
KEYWORDS = frozenset({
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref",
    "properties", "required", "additionalProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
})  # fmt: skip
_SHOWN = 20
_STRICTER = {
    **dict.fromkeys(("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"), max),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"), min),
}


def load_schema(path: Path) -> dict[str, Any]:
    """Read and check the JSON Schema in a file.

    Raises:
        TaskError: it is missing, is not JSON, or no answer could ever follow it.
    """
    try:
        schema = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise TaskError(f"{path}: no such schema", hint="answer.schema is relative to the task file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TaskError(f"{path}: not a JSON Schema ({error})") from error
    check_schema(schema, where=path.name)
    return dict(schema)


def check_schema(schema: object, *, where: str) -> None:
    """Refuse a schema that no answer could follow, or that says what would be ignored; all faults are listed.

    Args:
        schema: as JSON gives it.
        where: the file, for messages.

    Raises:
        TaskError: each fault with its place in the schema.
        MissingExtra: jsonschema is not installed.
    """
    if not isinstance(schema, Mapping):
        raise TaskError(f"{where}: a JSON Schema is an object, not {type(schema).__name__}")
    found = _malformed(schema) or _unsupported(schema) or _impossible(schema)
    if not found:
        types = types_of(resolved(schema, schema))
        if not {"object", "array"} & set(types):
            found = [f"#: an answer is an object (or a list), not {' or '.join(types)}"]
    if found:
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        lines = [f"{where}: {fault}" for fault in found[:_SHOWN]]
        raise TaskError("\n".join([*lines, *more]), hint="change the schema; nothing can be written under it as it is")


def resolved(part: Any, schema: Mapping[str, Any]) -> Any:
    """Return what `part` is once its ``$ref`` is followed; a circle of references stays as it is."""
    seen: set[str] = set()
    while isinstance(part, Mapping) and isinstance(part.get("$ref"), str) and part["$ref"] not in seen:
        seen.add(part["$ref"])
        target = _target(part["$ref"], schema)
        if target is None:
            return part
        part = target
    return part


def _target(name: str, schema: Mapping[str, Any]) -> Any:
    """Return the place of the schema that a reference names, None when there is none."""
    if name == "#":
        return schema
    found: Any = schema
    if not name.startswith("#/"):
        return None
    for step in name[2:].split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found


def types_of(part: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the types that a schema allows, all of them when it does not say."""
    kind = part.get("type")
    if isinstance(kind, str):
        return (kind,)
    if kind is not None:
        return tuple(kind)
    if "properties" in part or "required" in part:
        return ("object",)
    values = part.get("enum", [part["const"]] if "const" in part else None)
    if values is not None:
        return tuple(dict.fromkeys(map(_type_of, values)))
    return ("array",) if "items" in part or "prefixItems" in part else TYPES


def _type_of(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def _malformed(schema: Mapping[str, Any]) -> list[str]:
    library = _extras.load("jsonschema").Draft202012Validator
    errors = library(library.META_SCHEMA).iter_errors(schema)
    return sorted({f"{_pointer(error.absolute_path)}: {_plain(error)}" for error in errors})


def _plain(error: Any) -> str:
    if list(error.absolute_path)[-1:] == ["type"]:
        return f"type {error.instance!r}; allowed: {', '.join(TYPES)}"
    return str(error.message)[:200]


def _pointer(path: Sequence[Any]) -> str:
    return "/".join(["#", *map(str, path)])


def _parts(schema: Any, path: str = "#") -> Iterator[tuple[str, Any]]:
    """Yield every schema inside `schema`, itself first, with its place."""
    yield path, schema
    if not isinstance(schema, Mapping):
        return
    for keyword in ("properties", "$defs", "definitions"):
        for name, part in (schema.get(keyword) or {}).items():
            yield from _parts(part, f"{path}/{keyword}/{name}")
    for keyword in ("prefixItems", "anyOf", "oneOf", "allOf"):
        for i, part in enumerate(schema.get(keyword) or ()):
            yield from _parts(part, f"{path}/{keyword}/{i}")
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), Mapping):
            yield from _parts(schema[keyword], f"{path}/{keyword}")


def _unsupported(schema: Mapping[str, Any]) -> list[str]:
    found = []
    for path, part in _parts(schema):
        if not isinstance(part, Mapping):
            continue
        for keyword in part:
            if keyword not in KEYWORDS | ANNOTATIONS:
                found.append(f"{path}: keyword {keyword!r} is not supported; {nearest(keyword, KEYWORDS)}")
        name = part.get("$ref")
        if isinstance(name, str) and _target(name, schema) is None:
            why = "there is no such place" if name.startswith("#") else "only places of this schema can be referred to"
            found.append(f"{path}: $ref {name!r}: {why}")
    return found


def _impossible(schema: Mapping[str, Any]) -> list[str]:
    """List the parts of a schema that no value satisfies; ``false`` is one on purpose."""
    try:
        found = [_Possible(schema).why_not(part, path, ()) for path, part in _parts(schema) if part is not False]
    except RecursionError:
        return ["#: allOf refers to itself without an end"]
    return list(dict.fromkeys(fault for fault in found if fault is not None))


class _Possible:
    """Looks for a reason why no value can satisfy a part of `schema`."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = schema

    def why_not(self, part: Any, path: str, open_refs: tuple[str, ...]) -> str | None:
        """Return the place and the reason, None when values may exist. Follows what is required alone."""
        if isinstance(part, bool):
            return None if part else f"{path}: false allows no value"
        name = part.get("$ref")
        if name is not None:
            if name in open_refs:
                return f"{path}: {name} requires itself without an end"
            return self.why_not(_target(name, self.schema), path, (*open_refs, name))
        if "allOf" in part:
            part = self._merged(part)
        if "enum" in part or "const" in part:
            return self._closed(part, path)
        for keyword in ("anyOf", "oneOf"):
            reasons = [
                self._branch(part, branch, f"{path}/{keyword}/{i}", open_refs)
                for i, branch in enumerate(part.get(keyword, ()))
            ]
            if reasons and all(reasons):
                return reasons[0]
        types = types_of(part)
        if not types:
            return f"{path}: no type is left by allOf"
        reasons = [self._typed(kind, part, path, open_refs) for kind in types]
        return None if None in reasons else reasons[0]

    def _branch(self, part: Mapping[str, Any], branch: Any, path: str, open_refs: tuple[str, ...]) -> str | None:
        inner = resolved(branch, self.schema)
        if isinstance(inner, Mapping) and "type" in part and "type" in inner and not _common(part, inner):
            return f"{path}: type {inner['type']!r} contradicts type {part['type']!r} above it"
        return self.why_not(branch, path, open_refs)

    def _merged(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Write a schema and its `allOf` as one: the strictest bounds, all that is required, the common types."""
        whole = {key: value for key, value in part.items() if key != "allOf"}
        for raw in part["allOf"]:
            branch = resolved(raw, self.schema)
            if not isinstance(branch, Mapping):
                continue
            branch = self._merged(branch) if "allOf" in branch else branch
            for key, value in branch.items():
                if key == "type" and "type" in whole:
                    whole["type"] = _common(whole, branch)
                elif key == "required":
                    whole[key] = [*whole.get(key, ()), *value]
                elif key == "properties":
                    same = {n: {"allOf": [whole[key][n], v]} for n, v in value.items() if n in whole.get(key, {})}
                    whole[key] = {**whole.get(key, {}), **value, **same}
                elif key in _STRICTER and key in whole:
                    whole[key] = _STRICTER[key](whole[key], value)
                else:
                    whole.setdefault(key, value)
        return whole

    def _closed(self, part: Mapping[str, Any], path: str) -> str | None:
        """A closed set of values: one of them has to satisfy all the rest."""
        values = part.get("enum", [part["const"]] if "const" in part else [])
        if not values:
            return f"{path}: enum is empty"
        library, referencing = _extras.load("jsonschema"), _extras.load("referencing")
        open_part = {key: value for key, value in part.items() if key not in ("anyOf", "oneOf", "allOf")}
        check = library.Draft202012Validator(open_part, registry=referencing.Registry())
        if any(check.is_valid(value) for value in values):
            return None
        error = next(check.iter_errors(values[0]))
        return f"{path}: no value of its enum or const is allowed: {error.message[:120]}"

    def _typed(self, kind: str, part: Mapping[str, Any], path: str, open_refs: tuple[str, ...]) -> str | None:
        if kind == "string":
            return _crossed(part, path, "minLength", "maxLength")
        if kind in ("integer", "number"):
            return _no_number(part, path, whole=kind == "integer")
        if kind == "array":
            return self._array(part, path, open_refs)
        return self._object(part, path, open_refs) if kind == "object" else None

    def _array(self, part: Mapping[str, Any], path: str, open_refs: tuple[str, ...]) -> str | None:
        crossed = _crossed(part, path, "minItems", "maxItems")
        if crossed is not None:
            return crossed
        least, heads, items = part.get("minItems", 0), part.get("prefixItems", ()), part.get("items", True)
        for i, head in enumerate(heads[: int(least)]):
            if (why := self.why_not(head, f"{path}/prefixItems/{i}", open_refs)) is not None:
                return why
        if least > len(heads):
            if items is False:
                return f"{path}: minItems {least} is more than its {len(heads)} prefixItems, and items is false"
            if (why := self.why_not(items, f"{path}/items", open_refs)) is not None:
                return why
        values = resolved(items, self.schema).get("enum") if isinstance(items, Mapping) else None
        if part.get("uniqueItems") and not heads and values is not None:
            different = len({json.dumps(value, sort_keys=True) for value in values})
            if least > different:
                return f"{path}: minItems {least} different items of {different} values"
        return None

    def _object(self, part: Mapping[str, Any], path: str, open_refs: tuple[str, ...]) -> str | None:
        properties, required = part.get("properties", {}), dict.fromkeys(part.get("required", ()))
        extra = part.get("additionalProperties", True)
        for name in required:
            if name not in properties and extra is False:
                return f"{path}: {name!r} is required, is no property, and additionalProperties is false"
            inner = properties.get(name, extra)
            if (why := self.why_not(inner, f"{path}/properties/{name}", open_refs)) is not None:
                return why
        most, least = part.get("maxProperties", math.inf), part.get("minProperties", 0)
        if most < len(required):
            return f"{path}: maxProperties {most}, and {len(required)} are required"
        if extra is False and least > len(properties):
            return f"{path}: minProperties {least}, and it has only {len(properties)}"
        return _crossed(part, path, "minProperties", "maxProperties")


def _common(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the types that two schemas share; an integer is a number."""
    both = [set(types_of(one)) for one in (a, b)]
    shared = both[0] & both[1]
    if any("integer" in one and "number" in other for one, other in (both, both[::-1])):
        shared.add("integer")
    return sorted(shared)


def _crossed(part: Mapping[str, Any], path: str, low: str, high: str) -> str | None:
    if low in part and high in part and part[low] > part[high]:
        return f"{path}: {low} {part[low]} is more than {high} {part[high]}"
    return None


def _no_number(part: Mapping[str, Any], path: str, *, whole: bool) -> str | None:
    """Say why no number lies between the bounds, on the grid of multipleOf, and (an integer) on that of 1."""
    low = max((_exact(part[key]) for key in ("minimum", "exclusiveMinimum") if key in part), default=None)
    high = min((_exact(part[key]) for key in ("maximum", "exclusiveMaximum") if key in part), default=None)
    if low is None or high is None:
        return None
    opened = (low == _bound(part, "exclusiveMinimum"), high == _bound(part, "exclusiveMaximum"))
    said = ", ".join(f"{key} {part[key]}" for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum",
                                                      "multipleOf") if key in part)  # fmt: skip
    if low > high or (low == high and any(opened)):
        return f"{path}: no number lies between its bounds ({said})"
    step = _bound(part, "multipleOf")
    if whole:  # the least common grid of 1 and the step
        step = Fraction(step.numerator) if step is not None else Fraction(1)
    if step is None:
        return None
    first, last = math.ceil(low / step), math.floor(high / step)
    first += opened[0] and first * step == low
    last -= opened[1] and last * step == high
    kind = "integer" if whole else "multiple"
    return f"{path}: no {kind} lies between its bounds ({said})" if first > last else None


def _bound(part: Mapping[str, Any], keyword: str) -> Fraction | None:
    return _exact(part[keyword]) if keyword in part else None


def _exact(value: float) -> Fraction:
    return Fraction(str(value))
