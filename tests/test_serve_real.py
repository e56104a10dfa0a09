"""A real uvicorn on a port of its own, and real clients: crowds, departures, slow senders, a clean end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import httpx
import pytest

from alambic.errors import AlambicError
from alambic.kinds.classify import Prediction
from alambic.serve.app import create_app
from alambic.serve.limits import LOOPBACK_NAMES, Limits
from alambic.serve.models import LoadedBundle
from alambic.serve.server import PatientH11, Server, is_loopback, listen, url_of


class SlowEngine:
    """Takes 2 ms a batch, longer for the text "slow"; notes what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.batches = 0
        self.release = threading.Event()
        self.entered = threading.Event()

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> list[Prediction]:
        self.seen.extend(inputs)
        self.batches += 1
        if "slow" in inputs:
            self.entered.set()
            self.release.wait(60)
        time.sleep(0.002)
        return [Prediction((text[-1],), 1.0, {text[-1]: 1.0}) for text in inputs]


@dataclass
class Running:
    """A server that answers."""

    url: str
    port: int
    engine: SlowEngine
    server: Server

    def ask(self, text: str, **options: object) -> httpx.Response:
        """Classify one text."""
        return httpx.post(f"{self.url}/v1/classify", json={"input": text, **options}, timeout=60, trust_env=False)

    def connect(self) -> socket.socket:
        """Open a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def _serving(limits: Limits) -> Iterator[Running]:
    engine = SlowEngine()
    listener = listen("127.0.0.1", 0)
    app = create_app({"m": LoadedBundle(engine, ("a",))}, limits=limits, hosts=LOOPBACK_NAMES)
    answering = threading.Event()
    server = Server(app, on_ready=answering.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert answering.wait(60)
        yield Running(url_of(listener), listener.getsockname()[1], engine, server)
    finally:
        engine.release.set()
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture
def running() -> Iterator[Running]:
    with _serving(Limits(max_body_bytes=20_000)) as server:
        yield server


def _eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def _metrics(running: Running) -> str:
    return httpx.get(f"{running.url}/metrics", timeout=60, trust_env=False).text


async def _crowd(url: str, count: int) -> list[httpx.Response]:
    pool = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(timeout=60, limits=pool, trust_env=False) as client:
        posts = (client.post(f"{url}/v1/classify", json={"input": f"text {i % 10}"}) for i in range(count))
        return list(await asyncio.gather(*posts))


def test_crowd_of_200_is_answered_in_shared_batches() -> None:
    with _serving(Limits()) as running:
        responses = asyncio.run(_crowd(running.url, 200))
        assert {response.status_code for response in responses} == {200}
        predicted = [response.json()["data"][0]["prediction"] for response in responses]
        assert predicted == [str(i % 10) for i in range(200)]
        assert running.engine.batches < 150


def test_crowd_of_200_is_answered_or_refused_when_the_queue_is_short() -> None:
    with _serving(Limits(queue_limit=3, max_batch=2)) as running:
        responses = asyncio.run(_crowd(running.url, 200))
        assert {response.status_code for response in responses} == {200, 503}
        for response in responses:
            if response.status_code == 503:
                assert response.json()["error"]["code"] == "queue_full"
                assert 1 <= int(response.headers["retry-after"]) <= 60
        assert running.ask("after 7").json()["data"][0]["prediction"] == "7"


def _request(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size + body


def test_queued_text_is_dropped_when_its_client_disconnects(running: Running) -> None:
    with running.connect() as busy, running.connect() as leaver:
        busy.sendall(_request(b'{"input": "slow"}'))
        assert running.engine.entered.wait(60)
        leaver.sendall(_request(b'{"input": "unwanted"}'))
        waiting = 'alambic_queue_texts{model="m"} 1'
        assert _eventually(lambda: waiting in _metrics(running))
        leaver.close()
        gone = 'alambic_requests_total{path="/v1/classify",code="499"} 1'
        assert _eventually(lambda: gone in _metrics(running))
        running.engine.release.set()
        assert b"200 OK" in busy.recv(4096)
    assert running.ask("next 1").status_code == 200
    assert "unwanted" not in running.engine.seen


def test_server_goes_on_when_a_client_disconnects_in_its_body(running: Running) -> None:
    with running.connect() as leaver:
        leaver.sendall(_request(b'{"inp', length=500))
    assert running.ask("next 1").status_code == 200
    assert running.engine.seen == ["next 1"]


def test_body_is_refused_when_it_arrives_too_slowly() -> None:
    with _serving(Limits(body_seconds=0.5)) as running, running.connect() as slow:
        slow.sendall(_request(b'{"input": ', length=500))
        answer = b"".join(iter(lambda: slow.recv(4096), b""))  # head and body may come in two pieces
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.5 s" in answer


def test_connection_is_closed_when_the_head_arrives_too_slowly(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientH11, "head_seconds", 0.3)
    # The connection is reset where this thread comes to send its piece after the time is up.
    with running.connect() as slow, suppress(ConnectionError):
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert slow.recv(4096) == b""


def test_connection_serves_again_when_kept_alive(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[asyncio.TimerHandle] = []
    stop = PatientH11._stop_clock

    def stopping(self: PatientH11) -> None:
        clocks.extend(filter(None, [self._late]))
        stop(self)

    monkeypatch.setattr(PatientH11, "_stop_clock", stopping)
    with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as client:
        client.connect()
        connection = client.sock
        for _ in range(2):
            client.request("GET", "/health")
            response = client.getresponse()
            assert response.status == 200 and response.read()
        # One connection for both, and what would have closed it was called off.
        assert client.sock is connection
        assert len(clocks) == 1 and clocks[0].cancelled()


@pytest.mark.parametrize("size", [30_000, 100_000, 3_000_000])
def test_client_hears_the_refusal_when_its_body_is_too_large(running: Running, size: int) -> None:
    response = running.ask("x" * size)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_refusal_comes_before_the_body_when_the_client_expects_100(running: Running) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\nExpect: 100-continue\r\n\r\n"
    with running.connect() as client:
        client.sendall(head)
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_accepted_request_is_answered_when_the_server_is_told_to_stop(running: Running) -> None:
    with running.connect() as client:
        client.sendall(_request(b'{"input": "slow"}'))
        assert running.engine.entered.wait(60)
        running.server.should_exit = True
        time.sleep(0.2)
        running.engine.release.set()
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["data"][0]["prediction"] == "w"


_PROGRAM = textwrap.dedent(
    """
    from alambic.kinds.classify import Prediction
    from alambic.serve import server
    from alambic.serve.app import create_app
    from alambic.serve.models import LoadedBundle
    class Engine:
        def predict(self, inputs, *, batch_size=32):
            return [Prediction(("a",), 1.0, {"a": 1.0}) for _ in inputs]
    listener = server.listen("127.0.0.1", 0)
    app = create_app({"m": LoadedBundle(Engine(), ("a",))})
    server.run(app, listener, on_ready=lambda: print(server.url_of(listener), flush=True))
    print("closed", flush=True)
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_ends_cleanly_when_it_gets_a_signal(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert httpx.get(f"{url}/health", timeout=60, trust_env=False).json()["ready"] is True
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("closed\n", "", 0)


def test_serving_imports_nothing_of_the_training_stack() -> None:
    program = "import sys, alambic.serve.app, alambic.serve.server, alambic.serve.models; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "sklearn", "nncf", "openvino"} & set(done.stdout.split())


def test_answers_are_not_delayed_when_sent_in_two_pieces(running: Running) -> None:
    # asyncio leaves Nagle's algorithm on for a socket of no named protocol, which costs every answer 40 ms.
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
    with running.connect():
        made = running.server.server_state.connections
        assert _eventually(lambda: bool(made))
        (connection,) = made
        opened = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_listen_says_what_to_do_when_the_port_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AlambicError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*\n.*--port 0"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.0.1.7", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_is_told_from_the_rest(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
