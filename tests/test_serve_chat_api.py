"""What the endpoints that write accept and refuse, over Starlette's test client; the writer is a fake."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from alambic.engines.grammar import compile_schema
from alambic.engines.grammar_tree import matches
from alambic.engines.toolcalls import HERMES, ToolStyle
from alambic.kinds.classify import Prediction
from alambic.kinds.generation import Sampling
from alambic.serve.app import create_app
from alambic.serve.constraints import form_of
from alambic.serve.limits import LOOPBACK_NAMES, Limits
from alambic.serve.models import LoadedBundle
from alambic.serve.tool_calls import WRITTEN_OUT, Argued, Called, Calls, Said
from fake_writer import CALL, FakeWriter, loaded

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


class Classifier:
    def predict(self, inputs: Any, *, batch_size: int = 32) -> list[Prediction]:
        return [Prediction(("a",), 1.0, {"a": 1.0}) for _ in inputs]


@pytest.fixture
def writer() -> FakeWriter:
    return FakeWriter()


@pytest.fixture
def client(writer: FakeWriter) -> Iterator[TestClient]:
    models = {
        "replies": loaded(writer),
        "tickets": LoadedBundle(Classifier(), ("a",)),
        "plain": loaded(FakeWriter("token_ids"), tool_style=None),
    }
    app = create_app(models, limits=Limits(max_body_bytes=20_000), hosts=LOOPBACK_NAMES)
    with TestClient(app, "http://localhost") as client:
        yield client


def _chat(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HI, **body})


def _error(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "code", "param", "message"),
    [
        ({"messages": []}, "invalid_value", "messages", "at least 1"),
        ({"messages": "hi"}, "wrong_type", "messages", "'messages' is a text; it must be a list"),
        ({"messages": ["hi"]}, "wrong_type", "messages[0]", "'messages[0]' is a text; it must be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0]", "role 'robot'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "invalid_value", "messages[0]", "role 3"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_value", "messages[0]", "content is neither text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "invalid_value",
            "messages[0]",
            "content is neither text nor a list of text parts",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "invalid_value",
            "messages[0].tool_calls[0]",
            "arguments do not parse as JSON",
        ),
        ({"temperature": "hot"}, "wrong_type", "temperature", "'temperature' is a text; it must be a number"),
        ({"temperature": True}, "wrong_type", "temperature", "'temperature' is a boolean; it must be a number"),
        ({"temperature": 2.5}, "invalid_value", "temperature", "'temperature' is 2.5; it must be less than or equal"),
        ({"top_p": -0.1}, "invalid_value", "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 1.5}, "wrong_type", "max_completion_tokens", "it must be a whole number"),
        ({"n": 9}, "invalid_value", "n", "'n' asks for 9 answers; one request gets at most 8"),
        ({"n": "2"}, "wrong_type", "n", "'n' is a text; it must be a whole number"),
        ({"seed": 1.5}, "wrong_type", "seed", "whole number"),
        ({"stop": [1]}, "wrong_type", "stop", "it must be a text or a list of texts"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop", "at most 4 texts"),
        ({"stop": [""]}, "invalid_value", "stop", "empty text"),
        ({"stream": "yes"}, "wrong_type", "stream", "it must be true or false"),
        ({"stream_options": []}, "wrong_type", "stream_options", "it must be an object"),
        (
            {"stream_options": {"include_usage": 1}},
            "wrong_type",
            "stream_options.include_usage",
            "it must be true or false",
        ),
        ({"logit_bias": {"50": -100}}, "unsupported_parameter", "logit_bias", "cannot bias"),
        ({"logprobs": True, "top_logprobs": 5}, "unsupported_parameter", "top_logprobs", "it is 5"),
        ({"top_logprobs": 1}, "invalid_value", "top_logprobs", "needs logprobs"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions", "replaced by tools"),
        ({"modalities": ["audio"]}, "unsupported_parameter", "modalities", "writes text only"),
        ({"tools": {}}, "wrong_type", "tools", "it must be a list"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type", "only functions"),
        ({"tools": [{"type": "function"}]}, "missing_parameter", "tools[0].function.name", "every function has a name"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools[1].function.name", "is there twice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
            "wrong_type",
            "tools[0].function.parameters",
            "is a text, not a JSON Schema",
        ),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice", "'tools' is empty"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "invalid_value", "tool_choice", "must be none, auto, required"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_value",
            "tool_choice",
            "names the function 'g', which 'tools' does not hold",
        ),
        ({"response_format": "json"}, "wrong_type", "response_format", "must be an object"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type", "must be text, json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "wrong_type",
            "response_format.json_schema.schema",
            "is null; it must be a JSON Schema",
        ),
        ({"model": 3}, "wrong_type", "model", "it must be a text"),
        ({"model": "tickets"}, "unsupported_model", "model", "'tickets' is not a model that writes"),
        ({"model": "plain", "logprobs": True}, "unsupported_parameter", "logprobs", "gives no log-probabilities"),
        (
            {"model": "plain", "response_format": {"type": "json_object"}},
            "unsupported_parameter",
            "response_format",
            "cannot hold an answer to a schema",
        ),
        ({"model": "plain", "tools": [TOOL]}, "unsupported_parameter", "tools", "has no place for tools"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
            "unsupported_parameter",
            None,
            "no text satisfies the schema",
        ),
    ],
)
def test_chat_refuses_when_the_body_is_wrong(
    client: TestClient, body: dict[str, Any], code: str, param: str | None, message: str
) -> None:
    response = _chat(client, **body)
    error = _error(response)
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "invalid_json"), (b"\xff", "invalid_json"), (b"[1]", "wrong_type"), (b"[" * 9000, "invalid_json")],
)
def test_endpoint_refuses_when_the_body_is_no_object(client: TestClient, path: str, body: bytes, code: str) -> None:
    response = client.post(path, content=body)
    assert (response.status_code, _error(response)["code"]) == (400, code)


def test_chat_refuses_when_a_text_holds_half_of_a_surrogate_pair(client: TestClient) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    response = client.post("/v1/chat/completions", content=body)
    assert (response.status_code, _error(response)["code"]) == (400, "invalid_json")


def test_chat_ignores_keys_that_it_does_not_know(client: TestClient) -> None:
    response = _chat(client, user="me", store=True, metadata={"a": "b"}, service_tier="auto", whatever=[1])
    assert response.json()["choices"][0]["message"]["content"] == "You said: hi"


def test_chat_passes_the_settings_to_the_writer(client: TestClient, writer: FakeWriter) -> None:
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "presence_penalty": 1, "frequency_penalty": -1}
    _chat(client, **settings, repetition_penalty=1.1, seed=-1, stop="x", max_tokens=9, max_completion_tokens=7)
    sampling = writer.seen[-1].sampling
    assert sampling == Sampling(**settings, repetition_penalty=1.1, seed=2**63 - 1, stop=("x",), max_tokens=7)


def test_chat_draws_another_seed_each_time_when_none_is_given(client: TestClient, writer: FakeWriter) -> None:
    for _ in range(3):
        _chat(client, temperature=1.0)
    assert len({request.sampling.seed for request in writer.seen}) == 3


def test_answers_to_one_request_have_seeds_of_their_own(client: TestClient, writer: FakeWriter) -> None:
    _chat(client, temperature=1.0, seed=2**63 - 1, n=3)
    assert sorted(request.sampling.seed for request in writer.seen) == [0, 1, 2**63 - 1]


def test_chat_is_greedy_when_top_p_is_0(client: TestClient, writer: FakeWriter) -> None:
    _chat(client, temperature=1.0, top_p=0)
    assert (writer.seen[-1].sampling.temperature, writer.seen[-1].sampling.top_p) == (0.0, 1.0)


def test_chat_keeps_what_the_bundle_was_measured_with(writer: FakeWriter) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    own = Sampling(temperature=0.3, max_tokens=40, stop=("END",), json_schema=schema)
    model = loaded(writer, kind="extract", sampling=own, prompt="Extract from: {text}")
    with TestClient(create_app({"places": model})) as client:
        answer = _chat(client, seed=1, stop=["x"]).json()
        assert json.loads(answer["choices"][0]["message"]["content"]) == {"city": "Lyon"}
        _chat(client, response_format={"type": "text"})
    first, second = writer.seen
    assert first.chat is not None and first.chat.messages[0].content == "Extract from: hi"
    assert (first.sampling.temperature, first.sampling.max_tokens, first.sampling.stop) == (0.3, 40, ("END", "x"))
    assert (first.sampling.json_schema, second.sampling.json_schema) == (schema, None)


def test_chat_reads_the_roles_of_newer_and_older_clients(client: TestClient, writer: FakeWriter) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "hi"},
    ]
    assert _chat(client, messages=messages).status_code == 200
    chat = writer.seen[-1].chat
    assert chat is not None and (chat.messages[0].role, chat.messages[0].content) == ("system", "Be brief.")


def test_chat_drops_calls_beyond_the_first_when_they_may_not_be_parallel() -> None:
    writer = FakeWriter(answer="x")
    with TestClient(create_app({"m": loaded(writer)})) as client:
        for parallel, count in ((True, 2), (False, 1)):
            writer._tokens = lambda said, request: [CALL, CALL]  # type: ignore[method-assign]
            answer = _chat(client, tools=[TOOL], parallel_tool_calls=parallel).json()
            assert len(answer["choices"][0]["message"]["tool_calls"]) == count


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "too long"}]}, "messages"),
        ("/v1/completions", {"prompt": "too long"}, "prompt"),
        ("/v1/responses", {"input": "too long"}, "input"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompt_is_refused_when_it_exceeds_the_context(
    client: TestClient, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    response = client.post(path, json={**body, "stream": stream})
    error = _error(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert error["message"] == "the prompt has 900 tokens; the model reads 512"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_parameter", "prompt"),
        ({"prompt": []}, "empty_input", "prompt"),
        ({"prompt": ""}, "empty_text", "prompt"),
        ({"prompt": [1, 2]}, "unsupported_parameter", "prompt[0]"),
        ({"prompt": [[1, 2]]}, "unsupported_parameter", "prompt[0]"),
        ({"prompt": {}}, "wrong_type", "prompt"),
        ({"prompt": "a", "echo": True}, "unsupported_parameter", "echo"),
        ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
        ({"prompt": "a", "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"prompt": "a", "logprobs": 5}, "unsupported_parameter", "logprobs"),
        ({"prompt": ["a", "b", "c"], "n": 3}, "invalid_value", "n"),
    ],
)
def test_completion_refuses_when_the_body_is_wrong(
    client: TestClient, body: dict[str, Any], code: str, param: str
) -> None:
    response = client.post("/v1/completions", json=body)
    assert (response.status_code, _error(response)["code"], _error(response)["param"]) == (400, code, param)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_parameter", "input"),
        ({"input": 3}, "wrong_type", "input"),
        ({"input": []}, "empty_input", "input"),
        ({"input": ["a"]}, "wrong_type", "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "invalid_value", "input[0]"),
        (
            {"input": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}], "instructions": "y"},
            "invalid_value",
            "input[1]",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}], "instructions": "y"},
            "invalid_value",
            "input[0]",
        ),
        ({"input": "a", "previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"input": "a", "background": True}, "unsupported_parameter", "background"),
        ({"input": "a", "truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "wrong_type", "text.format.schema"),
        ({"input": "a", "tools": [{"type": "file_search"}]}, "unsupported_parameter", "tools[0].type"),
    ],
)
def test_response_refuses_when_the_body_is_wrong(
    client: TestClient, body: dict[str, Any], code: str, param: str
) -> None:
    response = client.post("/v1/responses", json=body)
    assert (response.status_code, _error(response)["code"], _error(response)["param"]) == (400, code, param)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/classify", {"input": "a", "model": "replies"}, "'replies' is not a model that classifies; here: tickets"),
        ("/v1/embeddings", {"input": "a"}, "no model of this server gives embeddings"),
        ("/v1/embeddings", {"input": "a", "model": "tickets"}, "'tickets' is not a model that gives embeddings"),
    ],
)
def test_endpoint_refuses_a_model_that_cannot(
    client: TestClient, path: str, body: dict[str, Any], message: str
) -> None:
    response = client.post(path, json=body)
    assert (response.status_code, _error(response)["code"]) == (400, "unsupported_model")
    assert message in _error(response)["message"]


def test_classify_takes_the_first_classifier_when_none_is_named(client: TestClient) -> None:
    assert client.post("/v1/classify", json={"input": "a"}).json()["model"] == "tickets"


def test_models_tell_what_a_writer_can_do(client: TestClient) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["created"]) == ("replies", "model", 1_700_000_000)
    assert card["alambic"]["kind"] == "chat"
    assert card["alambic"]["context_tokens"] == 512
    assert card["alambic"]["capabilities"] == ["json_schema", "logprobs", "token_ids"]


def test_metrics_count_streams_and_tokens(client: TestClient) -> None:
    _chat(client)
    _chat(client, stream=True)
    _chat(client, messages=[{"role": "user", "content": "explode"}])
    end = time.monotonic() + 60  # a stream is counted once its thread is through, a moment after its last byte
    while 'reason="error"} 1' not in (text := client.get("/metrics").text) or '_running{model="replies"} 0' not in text:
        assert time.monotonic() < end
    lines = text.splitlines()
    assert 'alambic_streams_total{model="replies",reason="stop"} 2' in lines
    assert 'alambic_streams_total{model="replies",reason="error"} 1' in lines
    assert 'alambic_tokens_total{model="replies",kind="prompt"} 2' in lines
    assert 'alambic_tokens_total{model="replies",kind="generated"} 6' in lines
    assert 'alambic_streams_running{model="replies"} 0' in lines
    assert 'alambic_first_token_seconds_count{model="replies"} 2' in lines


def test_writing_is_refused_when_a_page_of_another_site_asks(client: TestClient) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
    response = client.post("/v1/chat/completions", content=json.dumps({"messages": HI}), headers=headers)
    assert (response.status_code, _error(response)["code"]) == (403, "cross_site")


def test_key_is_asked_of_every_endpoint_that_writes() -> None:
    app = create_app({"m": loaded(FakeWriter())}, api_key="s3cret")
    with TestClient(app) as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"):
            assert client.post(path, json={}).status_code == 401
        assert client.get("/v1/models/m").status_code == 401


def _read(style: ToolStyle, text: str, size: int, **options: Any) -> list[object]:
    reader = Calls(style, ("f", "g"), **options)
    pieces = [piece for i in range(0, len(text), size) for piece in reader.feed(text[i : i + size])]
    pieces += reader.end()
    read: list[object] = []
    for piece in pieces:
        if isinstance(piece, Said):
            if read and isinstance(read[-1], str):
                read[-1] += piece.text
            else:
                read.append(piece.text)
        elif isinstance(piece, Called):
            read.append((piece.name,))
        else:
            assert isinstance(piece, Argued)
            read[-1] += (json.loads(piece.text),)  # type: ignore[operator]
    return read


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("style", "text", "read"),
    [
        (HERMES, "no call  here \n", ["no call  here \n"]),
        (HERMES, "a < b <tool", ["a < b <tool"]),
        (HERMES, 'Ok.\n<tool_call>{"name":"f","arguments":{"x":"<é>"}}</tool_call>\n', ["Ok.", ("f", {"x": "<é>"})]),
        (HERMES, "<tool_call>{broken</tool_call>", ["<tool_call>{broken</tool_call>"]),
        (HERMES, '<tool_call>{"name":"unknown","arguments":{}}</tool_call>', [("unknown", {})]),
        (WRITTEN_OUT, '{"name": "g", "arguments": {}}', [("g", {})]),
        (WRITTEN_OUT, '{"name": "Bob", "age": 3}', ['{"name": "Bob", "age": 3}']),
        (WRITTEN_OUT, '{"city": "Lyon"}', ['{"city": "Lyon"}']),
    ],
)
def test_calls_are_read_however_the_text_is_cut(style: ToolStyle, text: str, read: list[object], size: int) -> None:
    assert _read(style, text, size) == read


WRITTEN = {
    "call": '{"name":"weather","arguments":{"unit":"C"}}',
    "other call": '{"name":"now","arguments":{}}',
    "wrong argument": '{"name":"weather","arguments":{"unit":"K"}}',
    "unknown function": '{"name":"never","arguments":{}}',
    "content": '{"text":"hi"}',
}


@pytest.mark.parametrize(
    ("choice", "answer", "allowed"),
    [
        ("required", False, {"call", "other call"}),
        ("auto", True, {"call", "other call", "content"}),
    ],
)
def test_forced_calls_are_a_schema_that_the_engine_can_hold(choice: str, answer: bool, allowed: set[str]) -> None:
    unit = {"$ref": "#/$defs/unit"}
    parameters = {"type": "object", "properties": {"unit": unit}, "$defs": {"unit": {"enum": ["C", "F"]}}}
    tools = [{"function": {"name": "weather", "parameters": parameters}}, {"function": {"name": "now"}}]
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]} if answer else None
    form = form_of(loaded(FakeWriter()), tools=tools, choice=choice, schema=schema)
    assert form.schema is not None
    root = compile_schema(form.schema).root
    assert {name for name, text in WRITTEN.items() if matches(root, text)} == allowed
