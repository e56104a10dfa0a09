"""The remote engine against servers that stall, lie and break, and many requests at once."""

import email.utils
import socket
import threading
import time

import pytest

from alambic.engines.remote import RemoteSpec
from alambic.errors import EngineError, InputTooLong
from fake_endpoint import HELLO, anthropic, ask, claude, delta, hang, openai, plain, remote, running_endpoint, sse


@pytest.fixture
def server(monkeypatch):
    yield from running_endpoint(monkeypatch)


# ---- retries, breaks, hangs ------------------------------------------------------------------------------------------


def test_429_is_tried_again_after_what_the_server_asks(server):
    server.script = [plain(429, {"error": {"message": "slow down"}}, Retry_After="2"), sse(*HELLO)]
    writer = openai(server)
    assert writer.write([ask()])[0].text == "Bonjour"
    assert (writer.waits, writer.totals.retries, writer.totals.failures) == ([2.0], 1, 0)


def test_retry_after_may_be_a_date_or_milliseconds(server):
    date = email.utils.formatdate(time.time() + 50, usegmt=True)
    steps = [plain(503, {}, Retry_After=date), plain(503, {}, retry_after_ms="1500"), sse(*HELLO)]
    server.script = steps
    writer = openai(server)
    writer.write([ask()])
    assert 10 < writer.waits[0] <= 50 and writer.waits[1] == 1.5


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
    with pytest.raises(EngineError, match=r"no answer within 0.2 s \(tried 2 times\)"):
        openai(server, timeout_s=0.2, attempts=2).write([ask()])


def test_server_that_drips_for_ever_is_given_up(server):
    server.script = [sse(*[delta("x")] * 3000, pause=0.02)]
    with pytest.raises(EngineError, match=r"no end of the answer within 0.3 s"):
        list(openai(server, total_s=0.3).stream(ask()))


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
    assert gone.wait(30), "the server still waits"


def test_close_ends_an_answer_under_way_in_another_thread(server):
    server.script = [hang]
    writer = openai(server)
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
    thread.join(30)
    assert not thread.is_alive() and "is closed" in failed[0]
    with pytest.raises(EngineError, match="is closed"):
        writer.write([ask()])


def test_no_more_requests_are_under_way_than_allowed(server):
    three = threading.Barrier(3)

    def step(handler):
        three.wait(60)  # none is answered before three are under way
        sse(*HELLO, pause=0.01)(handler)

    server.script = [step]
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
