"""Answers over real connections: crowds, clients that leave, read nothing or hang, a stuck model, a clean end."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from alambic.serve.limits import Limits
from alambic.serve.server import PatientH11
from fake_writer import FakeWriter, Live, live, loaded


@pytest.fixture
def writer() -> FakeWriter:
    return FakeWriter()


@pytest.fixture
def server(writer: FakeWriter) -> Iterator[Live]:
    with live({"m": loaded(writer)}, limits=Limits(max_streams=4, max_waiting=8, queue_seconds=5)) as running:
        yield running


def _body(said: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": said}], **options}


def _ask(server: Live, said: str, **options: Any) -> httpx.Response:
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=_body(said, **options), timeout=20, trust_env=False)


def _text(response: httpx.Response) -> str:
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def _request(said: str, **options: Any) -> bytes:
    body = json.dumps(_body(said, **options)).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _connect(server: Live, *, receive_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(20)
    client.connect(("127.0.0.1", server.port))
    return client


def _eventually(condition: Callable[[], object]) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


async def _crowd(server: Live, count: int, *, stream: bool) -> list[httpx.Response]:
    pool = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(timeout=60, limits=pool, trust_env=False) as client:
        url = f"{server.url}/v1/chat/completions"
        posts = (client.post(url, json=_body(f"slow number {i}", stream=stream)) for i in range(count))
        return list(await asyncio.gather(*posts))


def _streamed(response: httpx.Response) -> str:
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert response.text.endswith("data: [DONE]\n\n")
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


@pytest.mark.parametrize("stream", [False, True])
def test_crowd_of_200_is_answered_with_the_limits_as_they_are(writer: FakeWriter, stream: bool) -> None:
    with live({"m": loaded(writer)}) as server:
        responses = asyncio.run(_crowd(server, 200, stream=stream))
        assert {response.status_code for response in responses} == {200}
        texts = [_streamed(r) if stream else _text(r) for r in responses]
        assert texts == [f"You said: slow number {i}" for i in range(200)]
        assert writer.most_running == Limits().max_streams
        assert _eventually(lambda: writer.running == 0)


def test_crowd_of_200_is_answered_or_refused_when_few_may_wait(server: Live, writer: FakeWriter) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with httpx.Client(trust_env=False) as client:
        responses = asyncio.run(_crowd(server, 200, stream=False))
        answered = [response for response in responses if response.status_code == 200]
        refused = [response for response in responses if response.status_code == 503]
        assert len(answered) + len(refused) == 200 and answered and refused
        for response in refused:
            assert response.json()["error"]["code"] == "queue_full"
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert client.get(f"{server.url}/health").json()["ready"] is True
    assert writer.most_running == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert _text(_ask(server, "after")) == "You said: after"


def test_request_is_refused_when_no_turn_comes_in_time(writer: FakeWriter) -> None:
    limits = Limits(max_streams=1, queue_seconds=0.2)
    with live({"m": loaded(writer)}, limits=limits) as server, _connect(server) as busy:
        busy.sendall(_request("stuck"))
        assert writer.entered.wait(5)
        response = _ask(server, "late")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert "no turn came within 0.2 s" in response.json()["error"]["message"]
        writer.release.set()
        assert b"200 OK" in busy.recv(4096)


@pytest.mark.parametrize("stream", [False, True])
def test_writing_stops_when_the_client_disconnects(server: Live, writer: FakeWriter, stream: bool) -> None:
    with _connect(server) as leaver:
        leaver.sendall(_request("endless", stream=stream))
        assert writer.entered.wait(5)
        if stream:
            assert b"200 OK" in leaver.recv(4096)
    assert _eventually(lambda: writer.running == 0)
    assert writer.closed_early == 1
    cancelled = 'alambic_streams_total{model="m",reason="cancelled"} 1'
    assert _eventually(lambda: cancelled in httpx.get(f"{server.url}/metrics", trust_env=False).text)


def test_every_answer_stops_when_the_client_of_n_disconnects(server: Live, writer: FakeWriter) -> None:
    with _connect(server) as leaver:
        leaver.sendall(_request("endless", stream=True, n=6))
        assert _eventually(lambda: writer.running == 4)
        assert b"200 OK" in leaver.recv(4096)
    assert _eventually(lambda: writer.running == 0)
    assert len(writer.seen) <= 6
    assert _text(_ask(server, "next")) == "You said: next"


def test_waiting_request_never_runs_when_its_client_disconnects(writer: FakeWriter) -> None:
    with live({"m": loaded(writer)}, limits=Limits(max_streams=1)) as server:
        metrics = f"{server.url}/metrics"
        with _connect(server) as busy, _connect(server) as leaver:
            busy.sendall(_request("stuck"))
            assert writer.entered.wait(5)
            leaver.sendall(_request("unwanted"))
            waiting = 'alambic_streams_waiting{model="m"} 1'
            assert _eventually(lambda: waiting in httpx.get(metrics, trust_env=False).text)
            leaver.close()
            assert _eventually(lambda: waiting not in httpx.get(metrics, trust_env=False).text)
            writer.release.set()
            assert b"200 OK" in busy.recv(4096)
        assert _text(_ask(server, "next")) == "You said: next"
    assert len(writer.seen) == 2


def test_others_are_answered_when_clients_leave_a_stuck_model(server: Live, writer: FakeWriter) -> None:
    for _ in range(3):  # of the four that may run
        with _connect(server) as leaver:
            writer.entered.clear()
            leaver.sendall(_request("stuck"))
            assert writer.entered.wait(5)
    assert _text(_ask(server, "next")) == "You said: next"
    writer.release.set()
    assert _eventually(lambda: writer.running == 0)


def test_model_waits_when_the_client_reads_nothing(writer: FakeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientH11, "write_seconds", 3.0)
    with live({"m": loaded(writer)}, limits=Limits(buffer_characters=2000)) as server:
        with _connect(server, receive_bytes=4096) as deaf:
            deaf.sendall(_request("flood", stream=True))
            assert writer.entered.wait(5)
            pulled = -1
            while pulled != writer.pulled:
                pulled = writer.pulled
                time.sleep(0.3)
            assert writer.running == 1, "the connection was cut before its time"
            # 20 kB a piece: the sockets' buffers hold a few megabytes, this server next to nothing.
            assert pulled < 1000
            assert _eventually(lambda: writer.running == 0), "the connection was not cut"
        assert _text(_ask(server, "next")) == "You said: next"


def test_answer_is_not_cut_when_the_client_reads_slowly(
    writer: FakeWriter, server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientH11, "write_seconds", 2.0)
    writer.answer = "word " * 20_000
    with _connect(server, receive_bytes=4096) as slow:
        slow.sendall(_request("long", stream=True))
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = slow.recv(65536)
            assert piece, "the connection was cut"
            received += piece
            time.sleep(0.0005)
    assert received.count(b"word") >= 20_000


def test_stream_is_finished_and_the_waiting_refused_when_the_server_stops(writer: FakeWriter) -> None:
    with (
        live({"m": loaded(writer)}, limits=Limits(max_streams=1)) as server,
        _connect(server) as begun,
        _connect(server) as waiting,
    ):
        begun.sendall(_request("slow " * 20, stream=True))
        assert writer.entered.wait(5)
        waiting.sendall(_request("later"))
        line = 'alambic_streams_waiting{model="m"} 1'
        assert _eventually(lambda: line in httpx.get(f"{server.url}/metrics", trust_env=False).text)
        server.server.should_exit = True
        refusal = b"".join(iter(lambda: waiting.recv(4096), b""))
        assert b" 503 " in refusal.partition(b"\r\n")[0] and b"shutting_down" in refusal
        answer = b"".join(iter(lambda: begun.recv(4096), b""))
        assert b"data: [DONE]" in answer and answer.count(b"slow") == 20


def test_server_ends_when_the_model_is_stuck_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alambic.serve.streams._CLOSE_SECONDS", 0.2)
    stuck = FakeWriter()
    stuck.close = lambda: None  # type: ignore[method-assign]
    began = time.monotonic()
    with live({"m": loaded(stuck)}) as server, _connect(server) as leaver:
        leaver.sendall(_request("stuck"))
        assert stuck.entered.wait(5)
    assert time.monotonic() - began < 8
    stuck.release.set()


def test_pieces_that_are_ready_leave_as_one(writer: FakeWriter) -> None:
    """A loop that is busy while 50 tokens come sends fewer events, and loses nothing."""
    from alambic.kinds.chat import Chat
    from alambic.kinds.generation import GenerationRequest
    from alambic.serve.streams import Desk

    async def main() -> tuple[str, int]:
        desk = Desk(writer, name="m", limits=Limits())
        stream = await desk.open(GenerationRequest(chat=Chat.of("word " * 50)))
        time.sleep(0.3)  # blocks the loop, not the writer's thread
        text, reads = "", 0
        while (piece := await stream.read()) is not None:
            text, reads = text + piece.text, reads + 1
        await desk.close()
        return text, reads

    text, reads = asyncio.run(main())
    assert (text.split(), reads) == (["You", "said:", *["word"] * 50], 1)


def test_threads_end_with_their_streams(server: Live) -> None:
    for i in range(5):
        _ask(server, f"number {i}")
    assert _eventually(lambda: not [t for t in threading.enumerate() if t.name == "alambic-stream"])
