"""The engine `openvino-graph` when several threads use it, and when its requests are used again."""

from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optimum.intel", reason="needs alambic[generate]")

from alambic.engines import graph_core  # noqa: E402
from alambic.engines.graph import GraphWriter  # noqa: E402
from alambic.events import drain  # noqa: E402
from alambic.kinds.chat import Chat  # noqa: E402
from alambic.kinds.generation import GenerationRequest, Sampling  # noqa: E402
from alambic.model.clone import clone  # noqa: E402
from alambic.pack.writer_openvino import pack_openvino  # noqa: E402

TEXTS = ["a", "an ox is here", "the red house by the sea and the two dogs", "b c d", "one two three four five six"]


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("graph")
    part = drain(
        pack_openvino(clone("opus-mt-en-fr", folder / "base", width=32).folder, folder / "w", precision="int8")
    )
    yield folder / "w", part.params
    torch.set_num_threads(before)


@pytest.fixture
def engine(paired):  # a new one for each test: what it keeps is what is tested
    with GraphWriter(*paired, threads=1) as engine:
        yield engine


def asked(text, tokens):
    return GenerationRequest(chat=Chat.of(text), sampling=Sampling(max_tokens=tokens))


def test_scores_are_the_same_when_threads_score_while_answers_are_written(engine):
    requests = [asked(text, 1) for text in TEXTS]
    alone = [engine.score([request], ["an ox"])[0] for request in requests]
    written = [reply.text for reply in engine.write([asked(text, 12) for text in TEXTS])]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(engine.write, [asked(text, 12) for text in TEXTS]) for _ in range(3)]
        scores = [pool.submit(engine.score, [request], ["an ox"]) for _ in range(12) for request in requests]
        assert all([reply.text for reply in answer.result()] == written for answer in answers)
        for i, score in enumerate(scores):
            assert score.result()[0] == pytest.approx(alone[i % len(TEXTS)], abs=1e-6)


def test_answers_are_the_same_when_requests_are_used_again(engine):
    lengths = [20, 3, 30, 1, 12]
    requests = [asked(text, tokens) for text, tokens in zip(TEXTS, lengths, strict=True)]
    with_new_ones = [reply.text for reply in engine.write(requests)]  # none was there, so each got one of its own
    for _ in range(2):
        assert [engine.write([request])[0].text for request in requests] == with_new_ones
    assert len(engine._graphs._free) == graph_core._KEPT


def test_no_more_requests_are_kept_than_allowed_when_many_answers_ended(engine):
    engine.write([asked("a", 2)] * 9)
    assert len(engine._graphs._free) == graph_core._KEPT


def test_request_is_given_back_when_a_reader_leaves(engine):
    stream = engine.stream(asked("an ox is here", 200))
    next(stream)
    stream.close()
    left = engine.write([asked("b c d", 6)])[0].text
    assert engine.write([asked("b c d", 6)])[0].text == left
    assert len(engine._graphs._free) >= 1


def test_logits_stay_as_they_are_when_the_request_reads_on(engine):
    reading = engine._graphs.reading([5, 6, 7])
    first = reading.logits()
    before = first.copy()
    reading.logits([9, 9, 9], rows=3)
    assert (first == before).all()
    assert first.flags.owndata
    reading.close()
