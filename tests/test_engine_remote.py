"""The remote engine against a server on this machine: both APIs, cost, keys."""

import json
import logging
import threading
import time

import pytest

from alambic.engines.remote import Prices, RemoteSpec
from alambic.engines.writer import Writer
from alambic.errors import EngineError
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.kinds.generation import GenerationRequest, Usage
from fake_endpoint import (
    HELLO,
    KEY,
    SCHEMA,
    TOOL,
    anthropic,
    ask,
    claude,
    delta,
    hang,
    openai,
    plain,
    remote,
    running_endpoint,
    sse,
)


@pytest.fixture
def server(monkeypatch):
    yield from running_endpoint(monkeypatch)


# ---- OpenAI ----------------------------------------------------------------------------------------------------------


def test_remote_is_a_writer(server):
    server.script = [sse(*HELLO)]
    assert isinstance(openai(server), Writer)


def test_openai_gives_text_usage_and_times_when_asked(server):
    server.script = [sse(*HELLO)]
    reply = openai(server).write([ask(max_tokens=20, stop=("\n",))])[0]
    assert (reply.text, reply.content, reply.finish_reason) == ("Bonjour", "Bonjour", "stop")
    assert reply.usage == Usage(11, 2, 3)
    assert reply.timings.prompt_ms > 0 and reply.timings.generation_ms > 0


def test_openai_request_says_what_was_asked(server):
    server.script = [sse(*HELLO)]
    openai(server, body={"user": "me"}).write([ask(max_tokens=20, stop=("\n",), temperature=0.5, seed=7, top_p=0.9)])
    seen = server.seen[0]
    assert (seen.path, seen.headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert seen.body == {
        "model": "small", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20, "stop": ["\n"],
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "user": "me",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Bonjour ?"}],
    }  # fmt: skip


def test_openai_streams_pieces_as_they_come(server):
    gate = threading.Event()

    def step(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b"data: " + json.dumps(delta("Bon")).encode() + b"\n\n")
        handler.wfile.flush()
        assert gate.wait(60), "the first piece was held back"
        handler.wfile.write(b"data: " + json.dumps(delta("jour", finish="length")).encode() + b"\n\ndata: [DONE]\n\n")
        handler.close_connection = True

    server.script = [step]
    chunks = openai(server).stream(ask())
    assert next(chunks).text == "Bon"
    time.sleep(0.02)
    gate.set()
    rest = list(chunks)
    assert rest[-1].timings.generation_ms >= 20
    assert [chunk.text for chunk in rest] == ["jour", ""]
    assert (rest[-1].finish_reason, rest[-1].usage) == ("length", None)


def test_openai_raw_prompt_goes_to_completions(server):
    server.script = [sse({"choices": [{"text": "2", "finish_reason": "stop"}]}, "[DONE]")]
    request = GenerationRequest(text="1 + 1 =")
    assert openai(server).write([request])[0].text == "2"
    assert (server.seen[0].path, server.seen[0].body["prompt"]) == ("/v1/completions", "1 + 1 =")


def test_openai_gives_log_probabilities_when_asked(server):
    log = {"content": [{"token": "Bon", "logprob": -0.5}]}
    server.script = [sse(delta("Bon", logprobs=log), delta(finish="stop"), "[DONE]")]
    reply = openai(server).write([ask(logprobs=True)])[0]
    assert [(item.token, item.logprob) for item in reply.logprobs] == [("Bon", -0.5)]
    assert server.seen[0].body["logprobs"] is True


@pytest.mark.parametrize(("schema", "strict"), [(SCHEMA, True), ({**SCHEMA, "required": []}, False)])
def test_openai_sends_a_schema_strict_only_where_it_is_closed(server, schema, strict):
    server.script = [sse(delta('{"team": "it"}'), delta(finish="stop"), "[DONE]")]
    openai(server).write([ask(json_schema=schema)])
    sent = server.seen[0].body["response_format"]
    assert sent == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strict}}


def test_openai_joins_tool_calls_that_come_in_fragments(server):
    first = [{"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"ci'}}]
    second = [{"index": 0, "function": {"arguments": 'ty": "Lyon"}'}}]
    other = [{"index": 1, "id": "c2", "function": {"name": "time", "arguments": ""}}]
    steps = (delta("Voyons. ", calls=first), delta(calls=second), delta(calls=other), delta(finish="tool_calls"))
    server.script = [sse(*steps, "[DONE]")]
    request = GenerationRequest(Chat((Message("user", "?"),), (TOOL,)))
    reply = openai(server).write([request])[0]
    assert reply.tool_calls == (ToolCall("weather", {"city": "Lyon"}, "c1"), ToolCall("time", {}, "c2"))
    assert (reply.finish_reason, reply.content) == ("tool_calls", "Voyons. ")
    assert reply.text.startswith('Voyons. <tool_call>{"name": "weather", "arguments": {"city": "Lyon"}}</tool_call>')
    assert server.seen[0].body["tools"] == [TOOL]


def test_openai_reads_an_answer_that_is_not_streamed(server):
    whole = {"choices": [{"message": {"content": "Bonjour"}, "finish_reason": "stop"}],
             "usage": {"prompt_tokens": 4, "completion_tokens": 1}}  # fmt: skip
    server.script = [plain(200, whole)]
    reply = openai(server).write([ask()])[0]
    assert (reply.text, reply.usage) == ("Bonjour", Usage(4, 1))


def test_openai_own_endpoint_gets_the_new_name_of_the_token_limit():
    from alambic.engines.remote_openai import body_of

    spec = RemoteSpec("openai", "https://api.openai.com/v1", "gpt-4o-mini")
    assert "max_completion_tokens" in body_of(ask(max_tokens=5), spec)
    with pytest.raises(EngineError, match="no top_k"):
        body_of(ask(top_k=5), spec)


def test_openai_says_so_when_the_filter_withholds(server):
    server.script = [sse(delta(finish="content_filter"), "[DONE]")]
    with pytest.raises(EngineError, match="filter withheld"):
        openai(server).write([ask()])
    assert len(server.seen) == 1


def test_the_fake_server_speaks_as_openai_s_own_client_expects(server, monkeypatch):
    client = pytest.importorskip("openai").OpenAI(base_url=server.url + "/v1", api_key="x")
    server.script = [sse(*HELLO)]
    chunks = list(client.chat.completions.create(model="m", messages=[], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Bonjour"
    assert chunks[-1].usage.prompt_tokens == 11


# ---- Anthropic -------------------------------------------------------------------------------------------------------


def test_anthropic_gives_text_and_usage_when_asked(server):
    server.script = [sse(*claude("Bon", "jour"))]
    reply = anthropic(server).write([ask(max_tokens=20, stop=("x",))])[0]
    assert (reply.text, reply.finish_reason, reply.usage) == ("Bonjour", "stop", Usage(11, 5, 4))
    seen = server.seen[0]
    assert (seen.path, seen.headers["x-api-key"], seen.headers["anthropic-version"]) == (
        "/v1/messages", KEY, "2023-06-01")  # fmt: skip
    assert "Authorization" not in seen.headers
    assert seen.body == {
        "model": "claude", "stream": True, "max_tokens": 20, "system": "Be short.", "temperature": 0.0,
        "stop_sequences": ["x"], "messages": [{"role": "user", "content": [{"type": "text", "text": "Bonjour ?"}]}],
    }  # fmt: skip


def test_anthropic_turns_carry_tool_calls_and_their_answers(server):
    server.script = [sse(*claude("Il pleut."))]
    calls = (ToolCall("weather", {"city": "Lyon"}), ToolCall("weather", {"city": "Nice"}, "n1"))
    chat = Chat(
        (
            Message("user", "Lyon, Nice ?"),
            Message("assistant", "", calls),
            Message("tool", "pluie"),
            Message("tool", "soleil", tool_call_id="n1"),
        ),
        (TOOL,),
    )
    anthropic(server).write([GenerationRequest(chat)])
    body = server.seen[0].body
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"][0] == {
        "type": "tool_use", "id": "call_1_0", "name": "weather", "input": {"city": "Lyon"}}  # fmt: skip
    assert body["messages"][2]["content"] == [
        {"type": "tool_result", "tool_use_id": "call_1_0", "content": "pluie"},
        {"type": "tool_result", "tool_use_id": "n1", "content": "soleil"},
    ]
    schema = {"type": "object", "properties": {}}
    assert body["tools"] == [{"name": "weather", "description": "of a city", "input_schema": schema}]


def test_anthropic_reads_tool_calls(server):
    block = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    server.script = [sse(*claude("Je regarde.", stop="tool_use", block=block, deltas=("", '{"city"', ': "Lyon"}')))]
    reply = anthropic(server).write([GenerationRequest(Chat((Message("user", "?"),), (TOOL,)))])[0]
    assert reply.tool_calls == (ToolCall("weather", {"city": "Lyon"}, "t1"),)
    assert (reply.finish_reason, reply.content) == ("tool_calls", "Je regarde.")


def test_anthropic_follows_a_schema_by_a_forced_tool(server):
    block = {"type": "tool_use", "id": "t1", "name": "answer", "input": {}}
    server.script = [sse(*claude(stop="tool_use", block=block, deltas=('{"team":', ' "it"}')))]
    chunks = list(anthropic(server).stream(ask(json_schema=SCHEMA)))
    assert "".join(chunk.text for chunk in chunks) == '{"team": "it"}'
    assert chunks[-1].finish_reason == "stop"
    body = server.seen[0].body
    assert body["tools"][0]["input_schema"] == SCHEMA
    assert body["tool_choice"] == {"type": "tool", "name": "answer", "disable_parallel_tool_use": True}


def test_anthropic_leaves_thoughts_out_of_the_answer(server):
    events = claude("Oui")
    thought = {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hmm"}}
    events.insert(2, ("content_block_start", {"type": "content_block_start", "index": 0,
                                              "content_block": {"type": "thinking", "thinking": ""}}))  # fmt: skip
    events.insert(3, ("content_block_delta", thought))
    server.script = [sse(*events)]
    assert anthropic(server).write([ask()])[0].text == "Oui"


def test_anthropic_reads_an_answer_that_is_not_streamed(server):
    whole = {"type": "message", "stop_reason": "end_turn", "usage": {"input_tokens": 3, "output_tokens": 1},
             "content": [{"type": "text", "text": "Oui"}]}  # fmt: skip
    server.script = [plain(200, whole)]
    reply = anthropic(server).write([ask()])[0]
    assert (reply.text, reply.usage) == ("Oui", Usage(3, 1))


def test_anthropic_says_so_when_the_model_refuses(server):
    server.script = [sse(*claude("Je", stop="refusal"))]
    with pytest.raises(EngineError, match="refused to answer"):
        anthropic(server).write([ask()])


def test_anthropic_tries_again_when_overloaded_in_the_middle(server):
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    server.script = [sse(claude("Bon")[0], ("error", error)), sse(*claude("Bonjour"))]
    writer = anthropic(server)
    assert writer.write([ask()])[0].text == "Bonjour"
    assert writer.totals.retries == 1


def test_anthropic_gives_up_at_once_when_the_request_is_wrong(server):
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "bad"}}
    server.script = [sse(("error", error))]
    with pytest.raises(EngineError, match="invalid_request_error: bad"):
        anthropic(server).write([ask()])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"logprobs": True}, "log-probabilities"),
        ({"repetition_penalty": 1.1}, "penalty"),
        ({"temperature": 1.5}, "temperature above 1"),
        ({"json_schema": {"type": "array"}}, "root is no object"),
    ],
)
def test_anthropic_refuses_what_its_api_has_no_field_for(server, sampling, said):
    server.script = [sse(*claude("x"))]
    with pytest.raises(EngineError, match=f"does not take .*{said}"):
        anthropic(server).write([ask(**sampling)])
    assert server.seen == []


def test_anthropic_refuses_a_raw_prompt(server):
    with pytest.raises(EngineError, match="conversations only"):
        anthropic(server).write([GenerationRequest(text="x")])


def test_model_without_sampling_gets_no_temperature(server):
    server.script = [sse(*claude("x"))]
    writer = anthropic(server, sampling=False, body={"thinking": {"type": "disabled"}})
    writer.write([ask()])
    assert "temperature" not in server.seen[0].body
    assert server.seen[0].body["thinking"] == {"type": "disabled"}
    with pytest.raises(EngineError, match="a temperature, top_p or top_k for claude"):
        writer.write([ask(temperature=0.5)])


# ---- money -----------------------------------------------------------------------------------------------------------


def test_cost_is_added_up(server):
    server.script = [sse(*HELLO)]
    writer = openai(server, prices=Prices(0.15, 0.60))
    writer.write([ask(), ask(), ask()])
    told = writer.describe()
    assert told["totals"]["prompt_tokens"] == 33 and told["totals"]["completion_tokens"] == 6
    assert told["totals"]["cost_usd"] == pytest.approx(3 * (11 * 0.15 + 2 * 0.60) / 1e6)
    assert told["usd_per_million_tokens"] == {"in": 0.15, "out": 0.60}
    json.dumps(told)


def test_answer_without_usage_is_counted_as_unmeasured(server):
    server.script = [sse(delta("x"), delta(finish="stop"), "[DONE]")]
    writer = openai(server, prices=Prices(1, 1))
    writer.write([ask()])
    assert (writer.totals.replies, writer.totals.unmeasured, writer.totals.cost_usd) == (1, 1, 0.0)


def test_no_cost_is_stated_without_prices(server):
    server.script = [sse(*HELLO)]
    writer = openai(server)
    writer.write([ask()])
    assert "cost_usd" not in writer.describe()["totals"]


def test_more_tokens_than_the_model_writes_are_refused_before_anything_is_spent(server):
    with pytest.raises(EngineError, match="max_tokens is 9000; small writes at most 8192"):
        openai(server, max_output_tokens=8192).write([ask(max_tokens=9000)])
    assert server.seen == []


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_absent_key_is_said_before_any_connection(server, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(EngineError, match=r"(?s)TEST_KEY holds none.*export TEST_KEY="):
        openai(server)


def test_key_with_a_line_break_is_never_quoted(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret\r\nX-Evil: 1")
    with pytest.raises(EngineError, match="holds characters that no HTTP header may hold") as raised:
        openai(server)
    assert "sk-secret" not in str(raised.value)


def test_no_key_is_sent_when_none_is_named(server):
    server.script = [sse(*HELLO)]
    openai(server, key_env=None).write([ask()])
    assert "Authorization" not in server.seen[0].headers


def test_key_does_not_travel_in_clear_text_beyond_this_network():
    with pytest.raises(EngineError, match=r"would travel to example\.org in clear text"):
        remote(RemoteSpec("openai", "http://example.org/v1", "m", key_env="HOME"))


@pytest.mark.parametrize(
    "url", ["https://me:pw@example.org", "https://example.org/v1?key=abc", "ftp://x", "example.org"]
)
def test_unsafe_address_is_refused(url):
    with pytest.raises(EngineError, match=r"holds a user, a password or a query|not an http or https URL") as raised:
        remote(RemoteSpec("openai", url, "m"))
    assert "pw@" not in str(raised.value) and "abc" not in str(raised.value)


def failing_steps():
    echo = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    return {
        "401": plain(401, echo), "400": plain(400, echo), "500": plain(500, echo),
        "stream": sse(delta("x"), {"error": {"message": f"key {KEY} expired"}}), "garbage": sse("{"), "hang": hang,
    }  # fmt: skip


@pytest.mark.parametrize("case", ["401", "400", "500", "stream", "garbage", "hang"])
@pytest.mark.parametrize("make", [openai, anthropic], ids=["openai", "anthropic"])
def test_key_appears_nowhere_whatever_fails(server, make, case, caplog):
    caplog.set_level(logging.DEBUG)
    server.script = [failing_steps()[case]]
    writer = make(server, attempts=2, timeout_s=0.2 if case == "hang" else 60.0)
    with pytest.raises(EngineError) as raised:
        writer.write([ask()])
    seen, error = [], raised.value
    while error is not None:  # causes and contexts too
        seen += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    seen += [json.dumps(writer.describe()), repr(writer), repr(vars(writer)), repr(vars(writer._endpoint)), caplog.text]
    seen += [record.getMessage() for record in caplog.records]
    assert not [text for text in seen if KEY in text]


def test_retries_are_logged_without_the_request(server, caplog):
    caplog.set_level(logging.DEBUG, logger="alambic")
    server.script = [plain(503, {"error": "busy"}), sse(*HELLO)]
    openai(server).write([ask("un secret de famille")])
    assert "503: busy; trying again in 0.5 s" in caplog.text
    assert "secret de famille" not in caplog.text


# ---- the rest of the seam --------------------------------------------------------------------------------------------


def test_what_an_endpoint_cannot_do_is_said(server):
    writer = openai(server)
    assert "score" not in writer.capabilities and "token_ids" not in writer.capabilities
    with pytest.raises(EngineError, match="does not tell token ids"):
        writer.token_ids(ask())
    with pytest.raises(EngineError, match="does not score"):
        writer.score([ask()], ["x"])


def test_unknown_api_lists_the_known():
    with pytest.raises(EngineError, match=r"(?s)no API 'grpc'.*openai, anthropic"):
        remote(RemoteSpec("grpc", "https://example.org", "m"))


def test_nothing_is_connected_before_the_first_request(server):
    openai(server)
    assert server.connections == set()
