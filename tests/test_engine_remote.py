"""The remote engine against servers on this machine that speak, stall, lie and break like the real ones."""

import contextlib
import email.utils
import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from alambic.engines.remote import Prices, Remote, RemoteSpec
from alambic.engines.writer import Writer
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.kinds.generation import GenerationRequest, Sampling, Usage

KEY = "sk-very-secret-0123456789"
SCHEMA = {
    "type": "object", "properties": {"team": {"type": "string"}}, "required": ["team"], "additionalProperties": False,
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}},
}


class Fake(ThreadingHTTPServer):
    """Answers each POST with the next of `script`; the last one is repeated."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.seen, self.connections = [], [], set()
        self.active = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            script, seen = self.server.script, self.server.seen
            step = script[min(len(seen), len(script) - 1)]
            seen.append(SimpleNamespace(path=self.path, headers=dict(self.headers), body=body))
            self.server.connections.add(self.client_address)
            self.server.active += 1
            self.server.most = max(self.server.most, self.server.active)
        try:
            step(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.active -= 1

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    fake = Fake()
    monkeypatch.setenv("TEST_KEY", KEY)
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


def sse(*events, end=True, pause=0.0):
    """A step that streams `events`: data, or (name, data)."""

    def step(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for event in events:
            name, data = event if isinstance(event, tuple) else (None, event)
            text = data if isinstance(data, str) else json.dumps(data)
            lines = (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
            piece = lines.encode()
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            handler.wfile.flush()
            time.sleep(pause)
        if end:
            handler.wfile.write(b"0\r\n\r\n")
        else:
            handler.close_connection = True

    return step


def plain(status, body, **headers):
    """A step that answers with one JSON body."""

    def step(handler):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return step


def hang(handler):
    """Say nothing until the client has gone."""
    handler.connection.settimeout(5)
    with contextlib.suppress(OSError):
        handler.connection.recv(1)
    handler.close_connection = True


def delta(text=None, *, finish=None, calls=None, **more):
    content = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": {**content, **({"tool_calls": calls} if calls else {})},
                         "finish_reason": finish, **more}]}  # fmt: skip


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 11, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}},
}
HELLO = (delta("Bon"), delta("jour"), delta(finish="stop"), USAGE, "[DONE]")


def claude(*texts, stop="end_turn", block=None, deltas=()):
    """Anthropic's events of one answer."""
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 4}}}
    events = [start, {"type": "ping"}]
    if texts:
        events.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
        events += [
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}} for text in texts
        ]
    if block:
        events.append({"type": "content_block_start", "index": 1, "content_block": block})
        events += [
            {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": piece}}
            for piece in deltas
        ]
    events += [
        {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]
    return [(event["type"], event) for event in events]


def openai(server, **more):
    more = {"key_env": "TEST_KEY", "timeout_s": 5.0, **more}
    return remote(RemoteSpec("openai", server.url + "/v1", "small", **more))


def anthropic(server, **more):
    more = {"key_env": "TEST_KEY", "timeout_s": 5.0, **more}
    return remote(RemoteSpec("anthropic", server.url, "claude", **more))


def remote(spec):
    waits = []
    writer = Remote(spec, sleep=waits.append, jitter=lambda: 1.0)
    writer.waits = waits
    return writer


def ask(text="Bonjour ?", **sampling):
    return GenerationRequest(Chat.of(text, system="Be short."), sampling=Sampling(**sampling))


# ---- OpenAI ----------------------------------------------------------------------------------------------------------


def test_remote_is_a_writer(server):
    server.script = [sse(*HELLO)]
    assert isinstance(openai(server), Writer)


def test_openai_gives_text_usage_and_times_when_asked(server):
    server.script = [sse(*HELLO, pause=0.01)]
    reply = openai(server).write([ask(max_tokens=20, stop=("\n",))])[0]
    assert (reply.text, reply.content, reply.finish_reason) == ("Bonjour", "Bonjour", "stop")
    assert reply.usage == Usage(11, 2, 3)
    assert reply.timings.prompt_ms > 0 and reply.timings.generation_ms >= 10


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
        assert gate.wait(5), "the first piece was held back"
        handler.wfile.write(b"data: " + json.dumps(delta("jour", finish="length")).encode() + b"\n\ndata: [DONE]\n\n")
        handler.close_connection = True

    server.script = [step]
    chunks = openai(server).stream(ask())
    assert next(chunks).text == "Bon"
    gate.set()
    rest = list(chunks)
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


# ---- retries, breaks, hangs ------------------------------------------------------------------------------------------


def test_429_is_tried_again_after_what_the_server_asks(server):
    server.script = [plain(429, {"error": {"message": "slow down"}}, Retry_After="2"), sse(*HELLO)]
    writer = openai(server)
    assert writer.write([ask()])[0].text == "Bonjour"
    assert (writer.waits, writer.totals.retries, writer.totals.failures) == ([2.0], 1, 0)


def test_retry_after_may_be_a_date_or_milliseconds(server):
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    steps = [plain(503, {}, Retry_After=date), plain(503, {}, retry_after_ms="1500"), sse(*HELLO)]
    server.script = steps
    writer = openai(server)
    writer.write([ask()])
    assert 15 < writer.waits[0] <= 20 and writer.waits[1] == 1.5


def test_waits_double_when_the_server_asks_nothing(server):
    server.script = [plain(500, {})]
    writer = openai(server)
    with pytest.raises(EngineError, match=r"500: Internal Server Error \(tried 5 times\)"):
        writer.write([ask()])
    assert writer.waits == [0.5, 1.0, 2.0, 4.0]
    assert (len(server.seen), writer.totals.failures, writer.totals.replies) == (5, 1, 0)


def test_wait_that_is_too_long_is_an_error(server):
    server.script = [plain(429, {"error": {"message": "quota"}}, Retry_After="3600")]
    with pytest.raises(EngineError, match=r"429: quota \(tried 1 time; it asks to wait 3600 s\)"):
        openai(server).write([ask()])


@pytest.mark.parametrize("status", [400, 404, 422])
def test_other_client_errors_are_not_tried_again(server, status):
    server.script = [plain(status, {"error": {"message": "no such model", "type": "invalid_request_error"}})]
    with pytest.raises(EngineError, match=f"refuses the request: {status} invalid_request_error: no such model"):
        openai(server).write([ask()])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"code": "context_length_exceeded", "message": "too many tokens"}},
        {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}},
    ],
)
def test_prompt_that_does_not_fit_is_its_own_error(server, error):
    server.script = [plain(400, error)]
    with pytest.raises(InputTooLong):
        openai(server).write([ask()])


def test_stream_that_breaks_off_is_asked_again_when_the_whole_is_wanted(server):
    server.script = [sse(delta("Bon"), end=False), sse(*HELLO)]
    writer = openai(server)
    assert writer.write([ask()])[0].text == "Bonjour"
    assert writer.totals.retries == 1


def test_stream_that_breaks_off_is_an_error_once_a_piece_was_given(server):
    server.script = [sse(delta("Bon"), end=False), sse(*HELLO)]
    chunks = openai(server).stream(ask())
    assert next(chunks).text == "Bon"
    with pytest.raises(EngineError, match=r"small at http.*: the answer broke off"):
        list(chunks)
    assert len(server.seen) == 1


def test_stream_that_breaks_off_before_its_first_piece_is_asked_again(server):
    server.script = [sse(end=False), sse(*HELLO)]
    assert "".join(chunk.text for chunk in openai(server).stream(ask())) == "Bonjour"


def test_anthropic_stream_without_its_end_is_not_taken_for_whole(server):
    server.script = [sse(*claude("Bon", "jour")[:-1]), sse(*claude("Bonjour"))]
    writer = anthropic(server)
    assert writer.write([ask()])[0].text == "Bonjour"
    assert writer.totals.retries == 1


@pytest.mark.parametrize("data", ['{"choices": [', '"a text"', '{"choices": 3}', "[" * 100_000])
def test_malformed_data_is_tried_again_and_then_an_error(server, data):
    server.script = [sse(data, "[DONE]")]
    writer = openai(server, attempts=2)
    with pytest.raises(EngineError, match=r"not JSON|another form"):
        writer.write([ask()])
    assert len(server.seen) == 2


def test_gateway_page_is_not_quoted(server):
    server.script = [plain(502, b"<html><body>nginx</body></html>")]
    with pytest.raises(EngineError, match=r"502: Bad Gateway \(tried 1 time\)"):
        openai(server, attempts=1).write([ask()])


def test_server_that_hangs_is_given_up(server):
    server.script = [hang]
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 0.2 s \(tried 2 times\)"):
        openai(server, timeout_s=0.2, attempts=2).write([ask()])
    assert time.monotonic() - begun < 4


def test_server_that_drips_for_ever_is_given_up(server):
    server.script = [sse(*[delta("x")] * 400, pause=0.02)]
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"no end of the answer within 0.3 s"):
        list(openai(server, total_s=0.3).stream(ask()))
    assert time.monotonic() - begun < 4


def test_port_where_nobody_listens_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    writer = remote(RemoteSpec("openai", f"http://127.0.0.1:{port}/v1", "m", attempts=2))
    with pytest.raises(EngineError, match="the connection failed"):
        writer.write([ask()])


def test_connection_is_kept_between_answers_and_replaced_when_the_server_closed_it(server):
    server.script = [sse(*HELLO)]
    writer = openai(server)
    writer.write([ask()])
    writer.write([ask()])
    assert len(server.connections) == 1

    def once(handler):
        sse(*HELLO)(handler)
        handler.close_connection = True

    server.script = [once]
    writer.write([ask()])
    writer.write([ask()])
    assert writer.totals.replies == 4 and writer.totals.retries == 0


def test_redirect_is_not_followed(server):
    server.script = [plain(307, {}, Location="http://127.0.0.1:9/v2")]
    with pytest.raises(EngineError, match=r"redirects to http://127.0.0.1:9/v2"):
        openai(server).write([ask()])


def test_closing_the_iterator_drops_the_connection(server):
    gone = threading.Event()

    def step(handler):
        sse(delta("x"), end=False)(handler)
        hang(handler)
        gone.set()

    server.script = [step]
    chunks = openai(server).stream(ask())
    assert next(chunks).text == "x"
    chunks.close()
    assert gone.wait(3), "the server still waits"


def test_close_ends_an_answer_under_way_in_another_thread(server):
    server.script = [hang]
    writer = openai(server, timeout_s=30)
    failed = []

    def work():
        try:
            writer.write([ask()])
        except EngineError as error:
            failed.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    while not server.seen:
        time.sleep(0.005)
    writer.close()
    thread.join(3)
    assert not thread.is_alive() and "is closed" in failed[0]
    with pytest.raises(EngineError, match="is closed"):
        writer.write([ask()])


def test_no_more_requests_are_under_way_than_allowed(server):
    server.script = [sse(*HELLO, pause=0.01)]
    replies = openai(server, concurrency=3).write([ask(str(i)) for i in range(12)])
    assert [reply.text for reply in replies] == ["Bonjour"] * 12
    assert server.most == 3


def test_answers_keep_the_order_of_the_requests(server):
    def step(handler):
        number = int(server.seen[-1].body["messages"][-1]["content"])
        time.sleep(0.02 * (3 - number))
        sse(delta(str(number)), delta(finish="stop"), "[DONE]")(handler)

    server.script = [step]
    replies = openai(server, concurrency=1).write([ask(str(i)) for i in range(4)])
    assert [reply.text for reply in replies] == ["0", "1", "2", "3"]


def test_first_failure_for_good_stops_what_has_not_begun(server):
    server.script = [plain(400, {"error": "no"})]
    with pytest.raises(EngineError, match="400 no"):
        openai(server, concurrency=1).write([ask(str(i)) for i in range(50)])
    assert len(server.seen) < 50


def test_one_row_that_fails_costs_none_of_the_others(server):
    def step(handler):
        text = server_text(handler.server)
        (plain(400, {"error": "bad row"}) if text == "3" else sse(delta(text), delta(finish="stop"), "[DONE]"))(handler)

    def server_text(fake):
        return fake.seen[-1].body["messages"][-1]["content"]

    server.script = [step]
    found = list(openai(server, concurrency=1).write_each(ask(str(i)) for i in range(6)))
    assert [one.text for one in found if not isinstance(one, EngineError)] == ["0", "1", "2", "4", "5"]
    assert "400 bad row" in str(found[3])


def test_rows_are_read_only_as_fast_as_they_are_answered(server):
    server.script = [sse(*HELLO)]
    taken = []

    def rows():
        for i in range(1000):
            taken.append(i)
            yield ask(str(i))

    replies = openai(server, concurrency=2).write_each(rows())
    assert next(replies).text == "Bonjour"
    assert len(taken) == 4
    replies.close()
    assert len(server.seen) <= 4


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
    writer = make(server, attempts=2, timeout_s=0.2)
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
