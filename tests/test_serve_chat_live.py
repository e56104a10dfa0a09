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
    with live({"m": loaded(writer)}, limits=Limits(max_streams=4, max_waiting=8, queue_seconds=60)) as running:
        yield running


def _body(said: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": said}], **options}


def _ask(server: Live, said: str, **options: Any) -> httpx.Response:
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=_body(said, **options), timeout=60, trust_env=False)


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
    client.settimeout(60)
    client.connect(("127.0.0.1", server.port))
    return client


def _eventually(condition: Callable[[], object]) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def _metrics(server: Live) -> str:
    return httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text


async def _crowd(
    server: Live, writer: FakeWriter, count: int, *, stream: bool, enough: Callable[[int], bool]
) -> list[httpx.Response]:
    """Ask at once; nothing is answered before there is `enough`, told the number of answers (refusals) so far."""
    pool = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(timeout=120, limits=pool, trust_env=False) as client:
        url = f"{server.url}/v1/chat/completions"
        posts = [
            asyncio.ensure_future(client.post(url, json=_body(f"stuck slow number {i}", stream=stream)))
            for i in range(count)
        ]
        end = time.monotonic() + 60
        while not enough(sum(post.done() for post in posts)) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        writer.release.set()
        return list(await asyncio.gather(*posts))


def _streamed(response: httpx.Response) -> str:
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert response.text.endswith("data: [DONE]\n\n")
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


@pytest.mark.parametrize("stream", [False, True])
def test_crowd_of_200_is_answered_with_the_limits_as_they_are(writer: FakeWriter, stream: bool) -> None:
    with live({"m": loaded(writer)}) as server:
        most = Limits().max_streams
        crowd = _crowd(server, writer, 200, stream=stream, enough=lambda _: writer.running == most)
        responses = asyncio.run(crowd)
        assert {response.status_code for response in responses} == {200}
        texts = [_streamed(r) if stream else _text(r) for r in responses]
        assert texts == [f"You said: stuck slow number {i}" for i in range(200)]
        assert writer.most_running == most
        assert _eventually(lambda: writer.running == 0)


def test_crowd_of_200_is_answered_or_refused_when_few_may_wait(server: Live, writer: FakeWriter) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with httpx.Client(timeout=60, trust_env=False) as client:
        # Four that run and eight that wait are stuck until the others were refused.
        responses = asyncio.run(_crowd(server, writer, 200, stream=False, enough=lambda refused: refused == 188))
        answered = [response for response in responses if response.status_code == 200]
        refused = [response for response in responses if response.status_code == 503]
        assert (len(answered), len(refused)) == (12, 188)
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
        assert writer.entered.wait(60)
        response = _ask(server, "late")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert "no turn came within 0.2 s" in response.json()["error"]["message"]
        writer.release.set()
        assert b"200 OK" in busy.recv(4096)


@pytest.mark.parametrize("stream", [False, True])
def test_writing_stops_when_the_client_disconnects(server: Live, writer: FakeWriter, stream: bool) -> None:
    with _connect(server) as leaver:
        leaver.sendall(_request("endless", stream=stream))
        assert writer.entered.wait(60)
        if stream:
            assert b"200 OK" in leaver.recv(4096)
    assert _eventually(lambda: writer.running == 0)
    assert writer.closed_early == 1
    cancelled = 'alambic_streams_total{model="m",reason="cancelled"} 1'
    assert _eventually(lambda: cancelled in _metrics(server))


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
        with _connect(server) as busy, _connect(server) as leaver:
            busy.sendall(_request("stuck"))
            assert writer.entered.wait(60)
            leaver.sendall(_request("unwanted"))
            waiting = 'alambic_streams_waiting{model="m"} 1'
            assert _eventually(lambda: waiting in _metrics(server))
            leaver.close()
            assert _eventually(lambda: waiting not in _metrics(server))
            writer.release.set()
            assert b"200 OK" in busy.recv(4096)
        assert _text(_ask(server, "next")) == "You said: next"
    assert len(writer.seen) == 2


def test_others_are_answered_when_clients_leave_a_stuck_model(server: Live, writer: FakeWriter) -> None:
    for _ in range(3):  # of the four that may run
        with _connect(server) as leaver:
            writer.entered.clear()
            leaver.sendall(_request("stuck"))
            assert writer.entered.wait(60)
    assert _text(_ask(server, "next")) == "You said: next"
    writer.release.set()
    assert _eventually(lambda: writer.running == 0)


def test_model_waits_when_the_client_reads_nothing(writer: FakeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientH11, "write_seconds", 600.0)
    with live({"m": loaded(writer)}, limits=Limits(buffer_characters=2000)) as server:
        with _connect(server, receive_bytes=4096) as deaf:
            deaf.sendall(_request("flood", stream=True))
            assert writer.entered.wait(60)
            pulled = -1
            while pulled != writer.pulled and pulled < 1000:
                pulled = writer.pulled
                time.sleep(0.3)
            # 20 kB a piece: the sockets' buffers hold a few megabytes, this server next to nothing.
            assert pulled < 1000 and writer.running == 1
        assert _eventually(lambda: writer.running == 0)


def test_connection_is_cut_when_the_client_reads_nothing_for_long(
    writer: FakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientH11, "write_seconds", 1.0)
    with live({"m": loaded(writer)}, limits=Limits(buffer_characters=2000)) as server:
        with _connect(server, receive_bytes=4096) as deaf:
            deaf.sendall(_request("flood", stream=True))
            assert writer.entered.wait(60)
            assert _eventually(lambda: writer.running == 0), "the connection was not cut"
        assert _text(_ask(server, "next")) == "You said: next"


def test_answer_is_not_cut_when_the_client_reads_slowly(
    writer: FakeWriter, server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No client is too slow for ten minutes, however busy the machine: the clocks are looked at instead.
    monkeypatch.setattr(PatientH11, "write_seconds", 600.0)
    clocks: list[asyncio.TimerHandle] = []
    pause = PatientH11.pause_writing

    def pausing(self: PatientH11) -> None:
        pause(self)
        clocks.extend(filter(None, [self._stuck]))

    monkeypatch.setattr(PatientH11, "pause_writing", pausing)
    writer.answer = f"{'w' * 999} " * 8000  # more than the sockets hold
    received, count = b"", 0
    with _connect(server, receive_bytes=65536) as slow:
        slow.sendall(_request("long", stream=True))
        assert _eventually(lambda: clocks), "the server never waited for its client"
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = slow.recv(65536)
            assert piece, "the connection was cut"
            received, count = received[-100:] + piece, count + piece.count(b"w")
        assert all(clock.cancelled() for clock in clocks), "a clock ran on although the client read"
    assert count >= 999 * 8000


def test_stream_is_finished_and_the_waiting_refused_when_the_server_stops(writer: FakeWriter) -> None:
    with (
        live({"m": loaded(writer)}, limits=Limits(max_streams=1)) as server,
        _connect(server) as begun,
        _connect(server) as waiting,
    ):
        begun.sendall(_request("pause " * 20, stream=True))
        assert b"200 OK" in begun.recv(4096)
        waiting.sendall(_request("later"))
        line = 'alambic_streams_waiting{model="m"} 1'
        assert _eventually(lambda: line in _metrics(server))
        server.server.should_exit = True
        refusal = b"".join(iter(lambda: waiting.recv(4096), b""))
        assert b" 503 " in refusal.partition(b"\r\n")[0] and b"shutting_down" in refusal
        writer.release.set()
        answer = b"".join(iter(lambda: begun.recv(4096), b""))
        assert b"data: [DONE]" in answer and answer.count(b"pause") == 20


def test_server_ends_when_the_model_is_stuck_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alambic.serve.streams._CLOSE_SECONDS", 0.2)
    stuck = FakeWriter()
    stuck.close = lambda: None  # type: ignore[method-assign]
    with live({"m": loaded(stuck)}) as server, _connect(server) as leaver:
        leaver.sendall(_request("stuck"))
        assert stuck.entered.wait(60)
    assert stuck.running == 1, "the server waited for its model"
    stuck.release.set()


def test_pieces_that_are_ready_leave_as_one(writer: FakeWriter) -> None:
    """A loop that is busy while 50 tokens come sends fewer events, and loses nothing."""
    from alambic.kinds.chat import Chat
    from alambic.kinds.generation import GenerationRequest
    from alambic.serve.streams import Desk

    async def main() -> tuple[str, int]:
        desk = Desk(writer, name="m", limits=Limits())
        stream = await desk.open(GenerationRequest(chat=Chat.of("word " * 50)))
        stream.thread.join(60)  # blocks the loop, not the writer's thread
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
