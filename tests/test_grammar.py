"""JSON Schema to grammar: what it allows, how long it gets, what is refused."""

import json
import random

import pytest

from alambic.engines.grammar import Limits, closing, compile_schema
from alambic.engines.grammar_tree import (
    Choice,
    Class,
    Repeat,
    Seq,
    Text,
    Tracker,
    closing_bytes,
    ebnf,
    longest,
    matches,
)
from alambic.errors import EngineError

STRING = {"type": "string"}


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def allows(schema, value, **limits):
    text = value if isinstance(value, str) else compact(value)
    return matches(compile_schema(schema, limits=Limits(**limits)).root, text)


def a_text(node, rng):
    """Write one text of a tree, by chance."""
    match node:
        case Text(text):
            return text
        case Class(ranges):
            return chr(rng.randint(*rng.choice(ranges)))
        case Seq(parts):
            return "".join(a_text(part, rng) for part in parts)
        case Choice(options):
            return a_text(rng.choice(options), rng)
        case Repeat(item, low, high):
            return "".join(a_text(item, rng) for _ in range(rng.randint(low, min(high, low + 5))))


CASES = [
    ({"type": "boolean"}, [True, False], [None, 0, '"true"']),
    ({"type": "null"}, [None], [False]),
    ({"enum": ["a", 1, {"k": [None]}]}, ["\"a\"", 1, {"k": [None]}], ["\"b\"", 2, {}]),
    ({"const": "où \"x\"\n"}, [compact("où \"x\"\n")], ["\"ou\""]),
    ({"type": ["string", "null"], "maxLength": 2}, ['""', '"é🙂"', '"\\n\\""', None], ['"abc"', '"\n"', "1"]),
    ({"type": "string", "minLength": 2}, ['"ab"'], ['"a"', '""']),
    ({"type": "integer"}, [0, -1, 10, 999999999999999], ["01", "1.0", "+1", "-0", "1e3", 10**15]),
    ({"type": "integer", "minimum": 7, "maximum": 1203}, [7, 9, 10, 99, 999, 1000, 1203], [6, 1204, 1210, 2000, "07"]),
    ({"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 2}, [-2, 0, 1], [-3, 2]),
    ({"type": "integer", "multipleOf": 5, "minimum": -5, "maximum": 10}, [-5, 0, 5, 10], [1, 15]),
    ({"type": "number"}, [0, 1.5, -2.25, "0.5"], [".5", "1.", "1e5", "00.1"]),
    ({"type": "number", "minimum": 0, "maximum": 1}, [0, 1, 0.5, "1.0", "0.999999"], [1.1, "1.000001", "2"]),
    ({"type": "number", "minimum": 0.25, "exclusiveMaximum": 1.5}, [0.25, 0.3, 1, 1.4999], [0.2, 1.5, "0.2499"]),
    ({"type": "number", "minimum": -1.5, "maximum": -0.5}, [-1.5, -1, -0.5, -0.75], [-1.6, -0.4, 0, 1]),
    ({"type": "number", "multipleOf": 0.01}, [1.25, 3], [1.255]),
    (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        [[1], [1, 2, 3]],
        [[], [1, 2, 3, 4], "[1, 2]"],
    ),
    (
        {"type": "array", "prefixItems": [STRING, {"type": "null"}], "items": False},
        [["a", None], ["a"], []],
        [["a", None, 1]],
    ),
    (
        {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2},
        [[1, 2], [1, 3]],
        [[1], [1, 1]],
    ),
    (
        {"type": "object", "properties": {"a": STRING, "b": STRING, "c": STRING}, "required": ["b"]},
        [{"b": ""}, {"a": "", "b": ""}, {"b": "", "c": ""}],
        [{}, {"a": ""}, {"b": "", "a": ""}, {"b": "", "d": ""}],
    ),
    ({"type": "object", "properties": {"a": {"type": "null"}}}, [{}, {"a": None}], ["{,}", '{"a":null,}']),
    ({"anyOf": [STRING, {"type": "integer"}]}, ['"x"', 3], [None]),
    ({"oneOf": [STRING, {"type": "integer"}]}, ['"x"', 3], [None]),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5, "minimum": 1}]}, [3, 5], [2, 6]),
    ({"type": "string", "format": "date"}, ['"2024-02-28"', '"1999-12-31"'], ['"2024-13-01"', '"2024-04-31"', '"x"']),
    ({"type": "string", "format": "date-time"}, ['"2024-02-28T23:59:59Z"'], ['"2024-02-28 23:59:59"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123"']),
    ({"type": "string", "format": "email"}, ['"anything"'], []),
    ({}, [{"a": [1, None]}, [], "true"], ["{ }"]),
    ({"type": "object"}, [{"a": [1, None]}, {}], [[], 1]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_grammar_allows_what_the_schema_says_when_compiled(schema, good, bad):
    assert [value for value in good if not allows(schema, value)] == []
    assert [value for value in bad if allows(schema, value)] == []


# jsonschema divides in binary, where -8.2 is no multiple of 0.01.
@pytest.mark.parametrize("schema", [schema for schema, _, _ in CASES if schema.get("multipleOf") != 0.01])
def test_every_text_of_the_grammar_is_valid_when_drawn(schema):
    jsonschema = pytest.importorskip("jsonschema")
    root, rng = compile_schema(schema).root, random.Random(0)
    for _ in range(60):
        text = a_text(root, rng)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert matches(root, text)
        assert len(text.encode()) <= longest(root)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": {}}, "keyword 'not' at # is not supported"),
        (
            {"properties": {"a": {"items": {"pattern": "x"}}}},
            "keyword 'pattern' at #/properties/a/items is not supported",
        ),
        ({"type": "object", "patternProperties": {}}, "'patternProperties' at #"),
        ({"type": "object", "additionalProperties": STRING}, "'additionalProperties' with a schema at #"),
        ({"type": "array", "items": STRING, "uniqueItems": True}, "'uniqueItems' at #"),
        ({"type": "number", "multipleOf": 3}, "'multipleOf' 3 at #"),
        ({"type": "strin"}, "type 'strin' at #"),
        ({"type": "string", "minimum": 1}, "'minimum' at # does not apply to type string"),
        ({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}, "branches 0 and 1 may both hold"),
        ({"$ref": "#/$defs/a"}, "there is no such place"),
        ({"$ref": "http://x/y"}, "only references within the schema"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "keyword 'type' twice"),
        ({"type": "string", "maxLength": "3"}, "#/maxLength is '3', not a whole number"),
        ([], "# is list"),
    ],
)
def test_schema_is_refused_by_name_when_not_understood(schema, said):
    with pytest.raises(EngineError) as error:
        compile_schema(schema)
    assert said in error.value.message


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        (False, "#: false allows nothing"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "#: minLength 3 is more than maxLength 2"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "#: no number lies between its bounds"),
        ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "no number lies"),
        ({"enum": ["a"], "type": "integer"}, "no value of enum or const has the type"),
        ({"type": "array", "items": False, "minItems": 1}, "false allows nothing"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is required"),
        (
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "# refers to itself without an end",
        ),
        (
            {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 3},
            "at least 3 different items of 2",
        ),
    ],
)
def test_schema_is_refused_when_nothing_satisfies_it(schema, where):
    with pytest.raises(EngineError, match="cannot be satisfied") as error:
        compile_schema(schema)
    assert where in error.value.message


def test_optional_parts_are_dropped_when_they_cannot_be():
    schema = {"type": "object", "properties": {"a": False, "b": {"type": "null"}}}
    assert allows(schema, {"b": None}) and not allows(schema, {"a": 1})


def test_recursion_is_cut_when_it_is_deep():
    schema = {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]}
    assert allows(schema, {"n": {"n": {"n": None}}}, depth=3)
    assert not allows(schema, {"n": {"n": {"n": {"n": {"n": None}}}}}, depth=3)


def test_bounds_are_the_limits_when_the_schema_has_none():
    assert allows(STRING, compact("x" * 7), characters=7) and not allows(STRING, compact("x" * 8), characters=7)
    assert not allows({"type": "array", "items": {"type": "null"}}, [None] * 4, items=3)


def test_closing_is_short_enough_when_a_text_breaks_off_anywhere():
    point = {"type": "object", "properties": {"x": STRING, "y": {"type": "number"}}, "required": ["y"]}
    schema = {
        "type": "object",
        "properties": {
            "a": STRING,
            "b": {"type": "array", "items": point, "minItems": 1},
            "c": {"enum": ["short", "a much longer value"]},
            "d": {"anyOf": [{"type": "null"}, {"type": "array", "items": STRING}]},
        },
        "required": ["a", "b", "c"],
    }  # fmt: skip
    grammar, rng = compile_schema(schema), random.Random(1)
    least = grammar.least_tokens
    for _ in range(20):
        text = a_text(grammar.root, rng)
        for cut in range(0, len(text), 3):
            tracker = Tracker(grammar.root)
            assert tracker.push(text[:cut]) == cut
            short = closing(tracker.rest, least)
            assert longest(short) < least
            whole = text[:cut] + a_text(short, rng)
            assert matches(grammar.root, whole)
    assert least == closing_bytes(grammar.root) + 1 < 120


def test_first_limit_leaves_room_to_close_when_tokens_are_few():
    grammar = compile_schema({"type": "object", "properties": {"a": STRING}, "required": ["a"]})
    assert grammar.first_limit(10**6) == 10**6
    assert grammar.first_limit(grammar.least_tokens) == 0
    assert 100 <= grammar.first_limit(200) <= 200 - grammar.least_tokens
    with pytest.raises(EngineError, match=r"may need \d+ tokens to be complete, max_tokens is 5"):
        grammar.first_limit(5)


def test_tracker_takes_what_is_allowed_when_a_piece_goes_too_far():
    tracker = Tracker(compile_schema({"type": "string", "maxLength": 3}).root)
    assert tracker.push('"ab') == 3
    assert tracker.push("cde") == 1
    assert not tracker.whole
    assert tracker.push('"') == 1 and tracker.whole


def test_ebnf_writes_four_digits_when_a_sign_is_escaped():
    text = ebnf(compile_schema({"const": 'é\\ "b'}).root)
    assert text == 'root ::= "\\"\\u00E9\\\\\\\\ \\\\\\"b\\""\n'
    assert "\\x" not in ebnf(compile_schema({}).root)
