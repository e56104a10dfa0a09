"""Answers under a JSON Schema: whatever the weights say, they are whole and valid."""

import json

import pytest

from alambic.engines.genai import GenAIWriter
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling
from genai_model import part_params, tiny_model

jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.slow

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "height": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 2.5},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["a", "b é", "c"]}, "uniqueItems": True, "minItems": 1},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ENTITIES = {
    "$defs": {
        "entity": {
            "type": "object",
            "properties": {"label": {"enum": ["PER", "LOC"]}, "text": {"type": "string", "maxLength": 12}},
            "required": ["label", "text"],
        }
    },
    "type": "object",
    "properties": {"entities": {"type": "array", "items": {"$ref": "#/$defs/entity"}, "minItems": 2, "maxItems": 5}},
    "required": ["entities"],
}
OPEN = {"type": "object", "properties": {"note": {"type": "string"}, "more": {"type": "array"}}, "required": ["note"]}
TREE = {
    "type": "object",
    "properties": {"value": {"type": ["integer", "null"]}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    _, part = tiny_model(tmp_path_factory)
    with GenAIWriter(part, part_params(1024), threads=1) as writer:
        yield writer


@pytest.mark.parametrize("max_tokens", [96, 256])
@pytest.mark.parametrize("schema", [PERSON, ENTITIES, OPEN, TREE], ids=["person", "entities", "open", "tree"])
def test_answers_are_whole_and_valid_when_50_prompts_are_asked(writer, schema, max_tokens):
    requests = [
        GenerationRequest(
            chat=Chat.of(f"prompt {i} the cat"),
            sampling=Sampling(json_schema=schema, max_tokens=max_tokens, temperature=float(i % 3), seed=i),
        )
        for i in range(50)
    ]
    checker = jsonschema.Draft202012Validator(schema)
    for reply in writer.write(requests):
        assert reply.finish_reason == "stop"
        assert reply.usage.completion_tokens <= max_tokens
        checker.validate(json.loads(reply.text))
        assert json.dumps(json.loads(reply.text), ensure_ascii=False, separators=(",", ":")).count(
            " "
        ) == reply.text.count(" ")


def test_answer_ends_by_itself_when_no_limit_is_given(writer):
    sampling = Sampling(json_schema=PERSON, temperature=1.0, seed=5)
    reply = writer.write([GenerationRequest(chat=Chat.of("x"), sampling=sampling)])[0]
    assert reply.finish_reason == "stop"
    jsonschema.validate(json.loads(reply.text), PERSON)


def test_pieces_join_to_the_answer_when_it_goes_on_after_a_bound(writer):
    sampling = Sampling(json_schema=OPEN, max_tokens=64, temperature=1.0, seed=1, logprobs=True)
    chunks = list(writer.stream(GenerationRequest(chat=Chat.of("x"), sampling=sampling)))
    text = "".join(chunk.text for chunk in chunks)
    jsonschema.validate(json.loads(text), OPEN)
    assert chunks[-1].finish_reason == "stop"
    assert sum(len(chunk.logprobs) for chunk in chunks) > 10


@pytest.mark.parametrize("lookup", [0, 3])
def test_grammar_holds_when_prompt_lookup_guesses(writer, lookup):
    sampling = Sampling(json_schema=ENTITIES, max_tokens=128, lookup_tokens=lookup)
    requests = [
        GenerationRequest(chat=Chat.of(f'{i} "label":"PER","text":"PER"'), sampling=sampling) for i in range(10)
    ]
    for reply in writer.write(requests):
        jsonschema.validate(json.loads(reply.text), ENTITIES)
        assert reply.finish_reason == "stop"


def test_answers_go_on_when_the_engine_forgets_its_grammars(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("alambic.engines.genai_core.MOST_GRAMMARS", 2)
    _, part = tiny_model(tmp_path_factory)
    with GenAIWriter(part, part_params(), threads=1) as writer:
        for i in range(6):
            sampling = Sampling(json_schema={"enum": [f"a{i}", f"b{i}"]})
            reply = writer.write([GenerationRequest(chat=Chat.of("x"), sampling=sampling)])[0]
            assert json.loads(reply.text) in (f"a{i}", f"b{i}")
