"""The kind `extract`: a text in, JSON that follows the task's JSON Schema (draft 2020-12) out.

Here an answer is checked against its schema and written in its one canonical form: compact, keys in the schema's order.
That is the form the constrained engine writes, so it is the form to learn. `alambic.kinds.schema` refuses a schema that
no answer could follow; `alambic.kinds.spans` makes answers of marked texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alambic import _extras
from alambic.kinds.schema import check_schema, load_schema, resolved, types_of

__all__ = ["SchemaField", "canonical", "check_schema", "checker", "fields", "load_schema", "ordered", "validate"]

_SHOWN = 60
_ITEM = "[]"


@dataclass(frozen=True)
class SchemaField:
    """A leaf of a schema.

    Attributes:
        path: ``buyer.lines[].price``: keys from the root, ``[]`` for each item of a list.
        types: JSON types it may have.
        required: it is in every answer: it and all above it are required, and no list stands in between.
        choices: its closed set of values; empty when it is open.
    """

    path: str
    types: tuple[str, ...]
    required: bool
    choices: tuple[Any, ...] = ()


def fields(schema: Mapping[str, Any]) -> tuple[SchemaField, ...]:
    """Return the leaves of a schema in its order; one that refers to itself is a leaf where it does so."""
    return tuple(_leaves(schema, schema, "", required=True, above=()))


def _leaves(
    part: Any, schema: Mapping[str, Any], path: str, *, required: bool, above: tuple[int, ...]
) -> Iterator[SchemaField]:
    part = resolved(part, schema)
    if not isinstance(part, Mapping):
        yield SchemaField(path, (), required)
        return
    types, inner = types_of(part), (*above, id(part))
    if id(part) not in above:
        if "object" in types and part.get("properties"):
            must = part.get("required", ()) if required else ()
            for name, value in part["properties"].items():
                yield from _leaves(
                    value, schema, f"{path}.{name}" if path else name, required=name in must, above=inner
                )
            return
        if "array" in types and isinstance(part.get("items"), Mapping):
            yield from _leaves(part["items"], schema, path + _ITEM, required=False, above=inner)
            return
    choices = tuple(part["enum"]) if "enum" in part else (part["const"],) if "const" in part else ()
    yield SchemaField(path, types, required, choices)


def checker(schema: Mapping[str, Any]) -> Callable[[Any], list[str]]:
    """Return the function that lists the faults of a value under `schema`, one ``path: reason`` each.

    Raises:
        MissingExtra: jsonschema is not installed.
    """
    library, referencing = _extras.load("jsonschema"), _extras.load("referencing")
    # With a registry of its own the library fetches nothing: without one, it opens the addresses in $ref.
    check = library.Draft202012Validator(schema, registry=referencing.Registry())

    def faults(value: Any) -> list[str]:
        errors = sorted(check.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
        return [f"{_place(error.absolute_path)}: {_short(error.message)}" for error in errors]

    return faults


def validate(value: Any, schema: Mapping[str, Any]) -> list[str]:
    """List the faults of one value under `schema`; `checker` is faster for many.

    Raises:
        MissingExtra: jsonschema is not installed.
    """
    return checker(schema)(value)


def _place(path: Sequence[Any]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    return text or "the answer"


def _short(message: str) -> str:
    # The library repeats the whole value; an answer may be long.
    return message if len(message) <= 2 * _SHOWN else f"{message[:_SHOWN]} … {message[-_SHOWN:]}"


def ordered(value: Any, schema: Mapping[str, Any]) -> Any:
    """Return `value` with the keys of its objects in the order of the schema; keys it does not name come last."""
    return _ordered(value, schema, schema)


def _ordered(value: Any, part: Any, schema: Mapping[str, Any]) -> Any:
    part = resolved(part, schema)
    if isinstance(value, Mapping):
        known = _properties(value, part, schema)
        names = [name for name in known if name in value] + [name for name in value if name not in known]
        return {name: _ordered(value[name], known.get(name, True), schema) for name in names}
    if isinstance(value, list | tuple):
        heads = part.get("prefixItems", ()) if isinstance(part, Mapping) else ()
        rest = part.get("items", True) if isinstance(part, Mapping) else True
        return [_ordered(item, heads[i] if i < len(heads) else rest, schema) for i, item in enumerate(value)]
    return value


def _properties(value: Mapping[str, Any], part: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties that an object's schema names, those of its combined parts included."""
    if not isinstance(part, Mapping):
        return {}
    known = dict(part.get("properties") or {})
    for branch in part.get("allOf", ()):
        known = {**known, **_properties(value, resolved(branch, schema), schema)}
    branches = [resolved(branch, schema) for keyword in ("anyOf", "oneOf") for branch in part.get(keyword, ())]
    # The branch that knows most of the keys is the one meant.
    best = max(branches, key=lambda b: len(_properties(value, b, schema).keys() & value.keys()), default=None)
    return known if best is None else {**known, **_properties(value, best, schema)}


def canonical(value: Any, schema: Mapping[str, Any] | None = None) -> str:
    """Write `value` as compact JSON, keys in the order of the schema.

    Raises:
        ValueError: it is no JSON value (NaN, an object of Python).
    """
    kept = value if schema is None else ordered(value, schema)
    try:
        return json.dumps(kept, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"no JSON value: {error}") from error
