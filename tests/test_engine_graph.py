"""The engine `openvino-graph` when several threads use it, and when its requests are used again."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optimum.intel", reason="needs alambic[generate]")

from alambic.engines import graph_core  # noqa: E402
from alambic.engines.graph import GraphWriter  # noqa: E402
from alambic.events import drain  # noqa: E402
from alambic.kinds.chat import Chat  # noqa: E402
from alambic.kinds.generation import GenerationRequest, Sampling  # noqa: E402
from alambic.model.clone import clone  # noqa: E402
from alambic.model.scratch import make_scratch  # noqa: E402
from alambic.pack.writer_openvino import pack_openvino  # noqa: E402

WORDS = [
    "a",
    "man",
    "woman",
    "in",
    "red",
    "walks",
    "down",
    "the",
    "street",
    "with",
    "two",
    "dogs",
    "and",
    "looks",
    "at",
    "umbrellas",
]
TEXTS = ["a", "an ox is here", "the red house by the sea and the two dogs", "b c d", "one two three four five six"]


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """An encoder-decoder in float32, where states that are mixed up show as an error rather than as a broken heap."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("graph-translator")
    rng = np.random.default_rng(1)
    rows = [Chat.of(" ".join(rng.choice(WORDS, 12)), completion=" ".join(rng.choice(WORDS, 12))) for _ in range(60)]
    make_scratch(rows, folder / "base", parameters=1_000_000, shape="encoder-decoder", context_tokens=256)
    part = drain(pack_openvino(folder / "base", folder / "w", precision="int8"))
    exact = {**part.params["properties"], "INFERENCE_PRECISION_HINT": "f32"}
    yield folder / "w", {**part.params, "properties": exact}
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def translator(paired):
    with GraphWriter(*paired, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph-decoder")
    part = drain(pack_openvino(clone("gemma-2-2b", folder / "base", width=64).folder, folder / "w", precision="fp16"))
    with GraphWriter(folder / "w", part.params, threads=1) as engine:
        yield engine


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


def test_answers_are_the_same_when_they_are_asked_for_at_once(translator):
    rng = np.random.default_rng(0)
    before, then = [29, 27, 13, 41, 27, 44, 18, 19], [19, 35, 12, 24, 24, 18, 32, 30]
    tokens = [23, 5, 12, 19, 26, 8, 15, 22, 4, 11, 18, 25, 7, 14, 21, 3]
    requests = [
        asked(" ".join(rng.choice(WORDS, n)), most) for n, most in zip([*before, *then] * 4, tokens * 4, strict=True)
    ]
    alone = [translator.write([request])[0].text for request in requests]
    for i in range(0, 64, 8):
        assert [reply.text for reply in translator.write(requests[i : i + 8])] == alone[i : i + 8]


def test_answers_of_a_decoder_alone_are_the_same_when_they_are_asked_for_at_once(decoder):
    requests = [asked(" ".join(TEXTS[: 1 + i % 5]), 5 + 7 * i % 40) for i in range(24)]
    alone = [decoder.write([request])[0].text for request in requests]
    for _ in range(3):
        assert [reply.text for reply in decoder.write(requests)] == alone


def test_no_more_requests_are_kept_than_allowed_when_many_answers_ended(engine, decoder):
    engine.write([asked("a", 2)] * 9)
    assert len(engine._graphs._free) == 1  # they take turns
    decoder.write([asked("a", 2)] * 9)
    assert len(decoder._graphs._free) == graph_core._KEPT


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
