"""A server on this machine that speaks, stalls, lies and breaks like the real ones, and clients of it."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from alambic.engines.remote import Remote, RemoteSpec
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling

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
        self.asked = body
        try:
            step(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.active -= 1

    def log_message(self, *args):
        pass


def running_endpoint(monkeypatch):
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
    handler.connection.settimeout(60)
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
    more = {"key_env": "TEST_KEY", "timeout_s": 60.0, **more}
    return remote(RemoteSpec("openai", server.url + "/v1", "small", **more))


def anthropic(server, **more):
    more = {"key_env": "TEST_KEY", "timeout_s": 60.0, **more}
    return remote(RemoteSpec("anthropic", server.url, "claude", **more))


def remote(spec):
    waits = []
    writer = Remote(spec, sleep=waits.append, jitter=lambda: 1.0)
    writer.waits = waits
    return writer


def ask(text="Bonjour ?", **sampling):
    return GenerationRequest(Chat.of(text, system="Be short."), sampling=Sampling(**sampling))
