"""JSON Schemas of answers: refused when nothing can follow them; answers checked, written, made of marked texts."""

import json

import pytest

from alambic.data.read_chats import read_chats
from alambic.errors import DataError, TaskError
from alambic.kinds import schema as schemas
from alambic.kinds.extract import SchemaField, canonical, check_schema, checker, fields, load_schema, ordered, validate
from alambic.kinds.spans import Marked, answer_of, from_slots, from_spans, from_tags, schema_of, spans_of_tags
from alambic.task import DataSpec

pytest.importorskip("jsonschema")


def closed(**properties):
    return {"type": "object", "properties": properties, "required": [], "additionalProperties": False}


INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "maxLength": 20},
        "buyer": {"$ref": "#/$defs/party"},
        "lines": {
            "type": "array",
            "items": closed(price={"type": "number", "minimum": 0}, unit={"enum": ["kg", "m", None]}),
        },
    },
    "required": ["number", "buyer"],
    "additionalProperties": False,
    "$defs": {"party": {"type": "object", "properties": {"name": {"type": "string"}, "city": {"type": "string"}},
                        "required": ["name"]}},
}  # fmt: skip


def refused(schema):
    with pytest.raises(TaskError) as caught:
        check_schema(schema, where="s.json")
    return str(caught.value)


# --- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({"enum": []}, "enum is empty"),
        ({"type": "number", "minimum": 3, "maximum": 2}, "no number lies between its bounds (minimum 3, maximum 2)"),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "no integer lies between"),
        ({"type": "number", "minimum": 0.1, "maximum": 0.2, "multipleOf": 0.25}, "no multiple lies between"),
        ({"type": "integer", "minimum": 1, "maximum": 4, "multipleOf": 2.5}, "no integer lies between"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "minLength 4 is more than maxLength 3"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems 3 is more than maxItems 2"),
        ({"type": "array", "items": {"enum": ["x"]}, "uniqueItems": True, "minItems": 2}, "2 different items of 1"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "items is false"),
        ({"type": "integer", "enum": ["x", "y"]}, "no value of its enum or const is allowed: 'x' is not of type"),
        ({"type": "string", "const": "x", "minLength": 2}, "'x' is too short"),
        ({"type": "string", "anyOf": [{"type": "null"}]}, "type 'null' contradicts type 'string'"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "no type is left by allOf"),
        ({"allOf": [{"minimum": 5, "type": "number"}, {"maximum": 4}]}, "no number lies between"),
        ({"required": ["x"], "additionalProperties": False}, "'x' is required, is no property"),
        ({"properties": {"x": {}}, "minProperties": 2, "additionalProperties": False}, "it has only 1"),
        ({"type": "object", "required": ["x", "y"], "maxProperties": 1}, "maxProperties 1, and 2 are required"),
    ],
)  # fmt: skip
def test_part_that_nothing_satisfies_is_refused_with_its_place(part, fault):
    message = refused(closed(a=part))
    assert "s.json: #/properties/a" in message
    assert fault in message


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (closed(a={"type": "string", "patern": "x"}), "#/properties/a: keyword 'patern' is not supported"),
        (closed(a={"type": "string", "pattern": "x"}), "#/properties/a: keyword 'pattern' is not supported"),
        (closed(a={"type": "sting"}), "#/properties/a/type: type 'sting'; allowed: object, array, string"),
        (closed(a={"$ref": "#/$defs/no"}), "$ref '#/$defs/no': there is no such place"),
        (closed(a={"$ref": "https://example.org/s"}), "only places of this schema"),
        ({"type": "string"}, "an answer is an object (or a list), not string"),
        ({"$ref": "#"}, "requires itself without an end"),
        ({"allOf": [{"$ref": "#"}]}, "refers to itself without an end"),
        ([], "a JSON Schema is an object, not list"),
    ],
)
def test_schema_that_cannot_be_used_is_refused(schema, fault):
    assert fault in refused(schema)


def test_required_circle_is_refused_and_an_optional_one_is_not():
    node = closed(next={"$ref": "#"})
    check_schema(node, where="s.json")
    assert "requires itself" in refused({**node, "required": ["next"]})


def test_all_faults_of_a_schema_are_listed():
    message = refused(closed(a={"enum": []}, b={"type": "string", "minLength": 2, "maxLength": 1}))
    assert "#/properties/a: " in message
    assert "#/properties/b: " in message


@pytest.mark.parametrize(
    "part",
    [
        {"type": "integer", "minimum": 3, "maximum": 3},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.1},
        {"type": ["string", "null"], "enum": ["x", None]},
        {"type": "integer", "minimum": 1, "maximum": 9, "multipleOf": 2.5},
        {"type": "array", "items": {"enum": ["x", "y"]}, "uniqueItems": True, "minItems": 2},
        {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        {"allOf": [{"type": "number"}, {"type": "integer", "minimum": 2}]},
        {"type": "array", "items": False},
    ],
)
def test_part_that_something_satisfies_is_accepted(part):
    check_schema(closed(a=part), where="s.json")


def test_keywords_are_those_that_the_constrained_engine_keeps():
    from alambic.engines import grammar_schema

    assert schemas.KEYWORDS | schemas.ANNOTATIONS == grammar_schema._KNOWN


def test_schema_file_is_loaded_or_named(tmp_path):
    path = tmp_path / "s.json"
    with pytest.raises(TaskError, match="no such schema"):
        load_schema(path)
    path.write_text("{")
    with pytest.raises(TaskError, match="not a JSON Schema"):
        load_schema(path)
    path.write_text(json.dumps(INVOICE))
    assert load_schema(path) == INVOICE


def test_fields_are_the_leaves_by_path():
    assert fields(INVOICE) == (
        SchemaField("number", ("string",), True),
        SchemaField("buyer.name", ("string",), True),
        SchemaField("buyer.city", ("string",), False),
        SchemaField("lines[].price", ("number",), False),
        SchemaField("lines[].unit", ("string", "null"), False, ("kg", "m", None)),
    )


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answer_is_checked_field_by_field():
    right = {"number": "F1", "buyer": {"name": "Zoé"}, "lines": [{"price": 2.5, "unit": None}]}
    assert validate(right, INVOICE) == []
    wrong = {"buyer": {"city": 3}, "lines": [{"price": -1}], "note": ""}
    faults = checker(INVOICE)(wrong)
    assert "the answer: 'number' is a required property" in faults
    assert "buyer.city: 3 is not of type 'string'" in faults
    assert "lines[0].price: -1 is less than the minimum of 0" in faults
    assert len(faults) == 5


def test_answer_is_written_compactly_in_the_order_of_the_schema():
    answer = {"lines": [{"unit": "m", "price": 2}], "buyer": {"city": "Lyon", "name": "Zoé"}, "number": "é\n"}
    assert canonical(answer, INVOICE) == (
        '{"number":"é\\n","buyer":{"name":"Zoé","city":"Lyon"},"lines":[{"price":2,"unit":"m"}]}'
    )


def test_order_follows_the_branch_that_knows_the_keys():
    either = {"anyOf": [closed(a={}, b={}), closed(c={}, d={})]}
    assert list(ordered({"d": 1, "c": 2}, either)) == ["c", "d"]


def test_value_that_is_no_json_is_refused():
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})


# --- marked texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-a I-a O", [(1, 3, "a")]),
        ("B-a B-a I-b O", [(0, 1, "a"), (1, 2, "a"), (2, 3, "b")]),
        ("I-a I-a O I-b", [(0, 2, "a"), (3, 4, "b")]),
        ("B-a-b I-a-b", [(0, 2, "a-b")]),
        ("S-a B-a E-a", [(0, 1, "a"), (1, 3, "a")]),
        ("U-a U-a B-b I-b L-b", [(0, 1, "a"), (1, 2, "a"), (2, 5, "b")]),
    ],
)
def test_tags_are_read_as_spans(tags, spans):
    assert spans_of_tags(tags.split()) == spans


@pytest.mark.parametrize("tag", ["X-a", "B", "B-", "music", "O-a"])
def test_tag_of_another_form_is_refused(tag):
    with pytest.raises(ValueError, match="neither O nor B-LABEL"):
        spans_of_tags(["O", tag])


def test_tokens_are_found_in_their_text():
    marked = from_tags(["l'", "eau", "chaude"], ["O", "B-x", "I-x"], "De l'eau  chaude !")
    assert [marked.text[start:end] for start, end, _ in marked.spans] == ["eau  chaude"]
    assert from_tags(["a", "b"], ["O", "B-x"]) == Marked("a b", ((2, 3, "x"),))


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: from_tags(["a"], []), "1 tokens and 0 tags"),
        (lambda: from_tags(["z"], ["O"], "a"), "token 'z' is not in the text"),
        (lambda: from_spans("abc", [{"start": 1, "end": 9, "type": "x"}]), "1 to 9 is not inside the text of 3"),
        (lambda: from_spans("abc", [{"start": 0, "end": 1, "type": "x", "value": "b"}]), "are 'a', not 'b'"),
        (lambda: from_spans("abc", [{"start": 0}]), "not an object with start, end and label"),
    ],
)
def test_marks_that_do_not_fit_their_text_are_refused(make, fault):
    with pytest.raises(ValueError, match=fault):
        make()


MARKED = Marked("12 kg and 3 kg of flour", ((0, 2, "weight"), (10, 11, "weight"), (18, 23, "what")))


def test_answer_takes_the_shape_of_the_schema():
    offsets = closed(text={"type": "string"}, start={"type": "integer"}, end={"type": "integer"})
    schema = closed(what=offsets, weight={"type": "array", "items": {"type": "integer"}})
    answer = answer_of(MARKED, schema)
    assert answer == {"what": {"text": "flour", "start": 18, "end": 23}, "weight": [12, 3]}
    assert list(answer) == ["what", "weight"]
    assert validate(answer, schema) == []


def test_answer_without_schema_is_lists():
    assert answer_of(MARKED) == {"weight": ["12", "3"], "what": ["flour"]}


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (closed(what={"type": "string"}), "'weight' is no property of the schema"),
        (closed(what={"type": "string"}, weight={"type": "string"}), "2 values of 'weight'"),
        (closed(what={"type": "number"}, weight={"type": "array"}), "'flour' is no number"),
    ],
)
def test_marks_that_the_schema_has_no_room_for_are_refused(schema, fault):
    with pytest.raises(ValueError, match=fault):
        answer_of(MARKED, schema)


@pytest.mark.parametrize("offsets", [False, True])
def test_proposed_schema_fits_the_answers(offsets):
    schema = schema_of([MARKED, Marked("nothing")], offsets=offsets)
    check_schema(schema, where="proposed")
    assert schema["properties"]["weight"]["type"] == "array"
    assert validate(answer_of(MARKED, schema), schema) == []
    assert answer_of(Marked("nothing"), schema) == {}


def test_slots_become_spans_where_they_stand_once():
    marked = from_slots("set ten minutes in ten", {"time": "ten minutes", "area": "Kitchen", "n": 10, "word": "ten"})
    assert marked.spans == ((4, 15, "time"),)
    assert marked.values == {"area": "Kitchen", "n": 10, "word": "ten"}


# --- rows of files ---------------------------------------------------------------------------------------------------


def read(folder, *rows, schema, **spec):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return read_chats(path, DataSpec(train=str(path), **spec), schema=schema)


TEXTS = closed(time={"type": "string"}, intent={"enum": ["set", "stop"]})


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"tokens": ["ten", "minutes"], "tags": ["B-time", "I-time"], "intent": "set"}, "tags"),
        ({"text": "ten minutes", "spans": [{"start": 0, "end": 11, "label": "time"}], "intent": "set"}, "spans"),
        ({"text": "ten minutes", "slots": {"time": "ten minutes"}, "intent": "set"}, "slots"),
        ({"text": "ten minutes", "time": "ten minutes", "intent": "set"}, "fields"),
        ({"text": "ten minutes", "output": {"intent": "set", "time": "ten minutes"}}, "columns"),
        ({"text": "ten minutes", "json": '{"intent": "set", "time": "ten minutes"}'}, "columns"),
    ],
)
def test_rows_of_every_form_give_the_same_answer(tmp_path, row, form):
    got = read(tmp_path, row, schema=TEXTS, prompt="Extract: {text}")
    chat = got.dataset.examples[0].chat
    assert got.form == form
    assert [m.content for m in chat.messages] == ["Extract: ten minutes", '{"time":"ten minutes","intent":"set"}']


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "a", "output": "{"}, "the answer is not JSON"),
        ({"text": "a", "output": ""}, "the answer is empty"),
        ({"text": "a", "output": {"intent": "go"}}, "does not follow the schema: intent: 'go' is not one of"),
        ({"text": "a", "spans": [{"start": 0, "end": 1, "label": "hour"}]}, "'hour' is no property"),
        ({"tokens": ["a"], "tags": ["Q"]}, "tag 'Q' is neither O"),
    ],
)
def test_row_that_does_not_follow_the_schema_is_named(tmp_path, row, fault):
    with pytest.raises(DataError) as caught:
        read(tmp_path, row, schema=TEXTS)
    assert "rows.jsonl:1: " in str(caught.value)
    assert fault in str(caught.value)


def test_table_cells_are_typed_by_the_schema(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,total,paid,note\nbill,12.5,true,\n")
    schema = closed(total={"type": "number"}, paid={"type": "boolean"}, note={"type": "string"})
    got = read_chats(path, DataSpec(train=str(path)), schema=schema)
    assert got.dataset.examples[0].answer == '{"total":12.5,"paid":true}'


def test_public_tagged_sentences_become_answers(shared_data):
    path = shared_data / "snips" / "dev.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    schema = schema_of(from_tags(row["tokens"], row["tags"], row["text"]) for row in rows)
    got = read_chats(path, DataSpec(train=str(path)), schema=schema)
    assert (len(got.dataset), got.form) == (700, "tags")
    assert got.dataset.examples[0].answer == (
        '{"music_item":"track","playlist":"classical relaxations","playlist_owner":"my"}'
    )
