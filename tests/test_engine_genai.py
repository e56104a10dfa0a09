"""The engine openvino-genai on a tiny model of random weights: what it writes, counts and refuses."""

import json
import threading
import time

import pytest

from alambic.engines.genai import GenAIWriter
from alambic.engines.genai_loop import Loop
from alambic.engines.tokens import read_tokenizer
from alambic.engines.writer import Writer
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.chat import Chat, Message
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.render import ChatTemplate
from genai_model import CONTEXT, EXACT, TEMPLATE, part_params, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory)


@pytest.fixture(scope="session")
def writer(tiny):
    with GenAIWriter(tiny[1], part_params(), threads=1) as writer:
        yield writer


def ask(text="the cat sat", **sampling):
    return GenerationRequest(chat=Chat.of(text), sampling=Sampling(**{"max_tokens": 24, **sampling}))


def text_of(writer, request):
    return writer.write([request])[0].text


def test_writer_fits_the_protocol_when_opened(writer):
    assert isinstance(writer, Writer)
    assert writer.capabilities == {"score", "json_schema", "logprobs", "token_ids"}
    assert writer.describe()["properties"] == EXACT and writer.describe()["threads"] == 1
    json.dumps(writer.describe())


def test_token_ids_are_those_of_the_rendered_chat_when_asked(writer, tiny):
    chat = Chat((Message("system", "où été"), Message("user", "garçon 🙂")))
    text = ChatTemplate(TEMPLATE).render(chat, reply=True)
    expected = read_tokenizer(tiny[1] / "tokenizer.json").encode(text, add_special_tokens=False).ids
    assert writer.token_ids(GenerationRequest(chat=chat)) == expected
    assert text.endswith("<|im_start|>assistant\n") and expected.count(1) == 3


def test_greedy_answers_are_those_of_torch_when_exact(writer, tiny):
    torch = pytest.importorskip("torch")
    from alambic.engines.torch import TorchWriter

    reference = TorchWriter(tiny[0], {}, threads=1)
    compared = 0
    for i in range(20):
        request = ask(f"the dog ran {i} {'to see ' * (i % 5)}", max_tokens=32, logprobs=True)
        assert reference.token_ids(request) == writer.token_ids(request)
        mine, theirs = writer.write([request])[0], reference.write([request])[0]
        # Up to where the two likeliest tokens are too near each other for any two engines to agree.
        sure = _sure(torch, reference, request, len(theirs.logprobs))
        assert [entry.token for entry in mine.logprobs[:sure]] == [entry.token for entry in theirs.logprobs[:sure]]
        expected = [entry.logprob for entry in theirs.logprobs[:sure]]
        assert [entry.logprob for entry in mine.logprobs[:sure]] == pytest.approx(expected, abs=2e-3)
        if sure == len(theirs.logprobs):
            assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
            assert mine.usage.completion_tokens == theirs.usage.completion_tokens
            assert mine.usage.prompt_tokens == theirs.usage.prompt_tokens and mine.usage.cached_tokens is None
        compared += sure
    assert compared > 200
    with pytest.raises(EngineError, match="only writes the likeliest tokens"):
        reference.stream(ask(temperature=1.0))


def _sure(torch, reference, request, count):
    ids = reference.token_ids(request)
    written = [id for id, _ in reference._greedy(ids, count)]
    with torch.inference_mode():
        logits = reference._decoder.model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
    top = logits.topk(2).values  # [T, 2]
    near = (top[:, 0] - top[:, 1] <= 1e-3).tolist()
    return near.index(True) if True in near else len(near)


def test_pieces_join_to_the_whole_answer_when_streamed(writer):
    request = ask("où été", max_tokens=60)
    chunks = list(writer.stream(request))
    reply = writer.write([request])[0]
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == reply.usage and chunks[-1].finish_reason == reply.finish_reason
    assert reply.usage.prompt_tokens == len(writer.token_ids(request))


def test_answer_ends_with_length_when_max_tokens_are_written(writer):
    reply = next(
        r for r in writer.write([ask(f"n {i}", max_tokens=5) for i in range(8)]) if r.finish_reason == "length"
    )
    assert reply.usage.completion_tokens == 5
    assert reply.timings.prompt_ms > 0 and reply.timings.generation_ms > 0 and reply.timings.queue_ms >= 0


def test_answer_ends_before_a_stop_text_when_it_comes(writer):
    whole = max((text_of(writer, ask(f"stop {i}", max_tokens=60)) for i in range(6)), key=len)
    request = next(
        ask(f"stop {i}", max_tokens=60) for i in range(6) if text_of(writer, ask(f"stop {i}", max_tokens=60)) == whole
    )
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]  # over several tokens
    sampling = Sampling(max_tokens=60, stop=("never there", stop))
    chunks = list(writer.stream(GenerationRequest(chat=request.chat, sampling=sampling)))
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_answer_is_the_same_when_the_seed_is(writer):
    request, other = (ask(temperature=1.0, seed=seed) for seed in (7, 8))
    alone = text_of(writer, request)
    among = writer.write([other, request, *(ask(f"x {i}", temperature=1.0, seed=i) for i in range(10))])
    assert among[1].text == alone != among[0].text


def test_penalties_change_the_answer_when_given(writer):
    plain = text_of(writer, ask("a", max_tokens=60))
    for name, value in (("repetition_penalty", 2.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        assert text_of(writer, ask("a", max_tokens=60, **{name: value})) != plain
    assert text_of(writer, ask("a", max_tokens=60, temperature=1.0, top_k=1)) == plain


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: over 0 to 1"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0; allowed: -2 to 2"),
        ({"top_k": 0}, "top_k is 0; the least is 1"),
        ({"max_tokens": 0}, "max_tokens is 0; the least is 1"),
        ({"stop": ("x",), "json_schema": {"type": "integer"}}, "stop texts and json_schema exclude each other"),
        ({"json_schema": {"type": "string", "pattern": "a+"}}, "keyword 'pattern' at # is not supported"),
        ({"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "#/properties/a"),
        (
            {"json_schema": {"const": "a long text"}, "max_tokens": 3},
            "may need 14 tokens to be complete, max_tokens is 3",
        ),
    ],
)
def test_request_is_refused_when_a_setting_is_wrong(writer, setting, said):
    with pytest.raises(EngineError, match=said.replace("(", r"\(")):
        writer.stream(ask(**setting))


def test_score_agrees_with_transformers_when_texts_differ_in_length(writer, tiny):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).eval()
    tokenizer = read_tokenizer(tiny[1] / "tokenizer.json")
    prompts = [GenerationRequest(text="the cat"), ask("où"), GenerationRequest(text="a " * 30), ask("x")]
    continuations = [" sat on a mat", "été 🙂 garçon " * 4, " dog", ""]
    scores = writer.score(prompts, continuations)
    assert scores[3] == []
    for prompt, continuation, got in zip(prompts[:3], continuations, scores, strict=False):
        before, after = writer.token_ids(prompt), tokenizer.encode(continuation, add_special_tokens=False).ids
        with torch.inference_mode():
            logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
        expected = [float(logits[len(before) + k - 1, id]) for k, id in enumerate(after)]
        assert got == pytest.approx(expected, abs=2e-3)


def test_score_names_the_prompt_when_it_is_empty(writer):
    with pytest.raises(EngineError, match="prompt 1 is empty: nothing can be said of its first token"):
        writer.score([ask("x"), GenerationRequest(text="")], ["the cat", "a dog"])


def test_logprobs_are_those_of_score_when_asked(writer):
    request = GenerationRequest(text="the cat", sampling=Sampling(max_tokens=30, logprobs=True))
    for temperature in (0.0, 1.0):
        sampling = Sampling(max_tokens=30, logprobs=True, temperature=temperature, seed=3)
        reply = writer.write([GenerationRequest(text="the cat", sampling=sampling)])[0]
        tokenizer = writer._tokenizer
        ids = tokenizer.encode(reply.text, add_special_tokens=False).ids
        if [tokenizer.decode([id]) for id in ids] == [entry.token for entry in reply.logprobs]:
            expected = writer.score([request], [reply.text])[0]
            assert [entry.logprob for entry in reply.logprobs] == pytest.approx(expected, abs=5e-3)
        assert all(entry.logprob < 0 for entry in reply.logprobs) and reply.logprobs


def test_long_prompt_is_refused_with_its_numbers_when_it_does_not_fit(writer):
    request = ask("cat " * 600)
    count = len(writer.token_ids(request))
    with pytest.raises(
        InputTooLong, match=f"the prompt has {count} tokens and max_tokens is 24; the model reads {CONTEXT}"
    ):
        writer.stream(request)
    short = ask("cat", max_tokens=CONTEXT)
    with pytest.raises(InputTooLong, match=f"max_tokens is {CONTEXT}"):
        writer.write([short])


def test_answer_goes_up_to_the_context_when_max_tokens_is_none(tiny):
    with GenAIWriter(tiny[1], {**part_params(128), "end_ids": []}, threads=1) as writer:
        reply = writer.write([ask("the dog", max_tokens=None)])[0]
    assert reply.finish_reason == "length"
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 128


def test_work_stops_when_the_iterator_is_closed(tiny, monkeypatch):
    given_up, cancel = [], Loop.cancel
    monkeypatch.setattr(Loop, "cancel", lambda loop, job: (given_up.append(job), cancel(loop, job)))
    with GenAIWriter(tiny[1], {**part_params(), "end_ids": []}, threads=1) as writer:
        stream = writer.stream(ask("the dog", max_tokens=400))
        next(stream)
        assert given_up == []
        stream.close()
        assert len(given_up) == 1
        deadline = time.monotonic() + 60
        while writer._loop.load != (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert text_of(writer, ask("a", max_tokens=3))


def test_nothing_is_lost_when_200_threads_ask_at_once(tiny):
    requests = [ask(f"question {i}", max_tokens=12) for i in range(200)]
    with GenAIWriter(tiny[1], part_params(), threads=1) as writer:
        expected = [reply.text for reply in writer.write(requests)]
        got: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda i=i: got.__setitem__(i, text_of(writer, requests[i]))) for i in range(200)
        ]
        for thread in threads:
            thread.start()
        assert max(writer._loop.load[0] for _ in range(50)) <= 16
        for thread in threads:
            thread.join(300)
    assert [got[i] for i in range(200)] == expected


def test_answers_are_the_same_when_the_cache_is_small(tiny):
    requests = [ask(f"the cat {i} " * 8, max_tokens=40) for i in range(6)]
    with GenAIWriter(tiny[1], part_params(), threads=1) as roomy:
        expected = [reply.text for reply in roomy.write(requests)]
    with GenAIWriter(tiny[1], part_params(), threads=1, cache_mb=0.06) as tight:
        assert tight.describe()["cache_mb"] <= 0.1
        assert [reply.text for reply in tight.write(requests)] == expected
        with pytest.raises(InputTooLong, match="its cache of 0 MB holds"):
            tight.write([ask("cat " * 200, max_tokens=50)])


def test_prompt_lookup_writes_the_same_when_greedy(writer):
    requests = [ask(f"{i} the cat sat on a mat the cat sat", max_tokens=40) for i in range(4)]
    plain = [reply.text for reply in writer.write(requests)]
    looked = [ask(f"{i} the cat sat on a mat the cat sat", max_tokens=40, lookup_tokens=4) for i in range(4)]
    assert [reply.text for reply in writer.write(looked)] == plain


def test_draft_writes_the_same_when_greedy(tiny, tmp_path_factory):
    _, small = tiny_model(tmp_path_factory, layers=1, seed=1)
    requests = [ask(f"{i} the cat", max_tokens=40) for i in range(4)]
    with GenAIWriter(tiny[1], part_params(), threads=1) as alone:
        plain = [reply.text for reply in alone.write(requests)]
    with GenAIWriter(tiny[1], part_params(), threads=1, draft=small, draft_tokens=3) as writer:
        assert [reply.text for reply in writer.write(requests)] == plain
        assert writer.describe()["draft"] == "part"


def test_close_finishes_what_runs_when_there_is_time(tiny):
    writer = GenAIWriter(tiny[1], {**part_params(), "end_ids": []}, threads=1)
    stream = writer.stream(ask("the dog", max_tokens=60))
    next(stream)
    writer.close()
    assert list(stream)[-1].finish_reason == "length"
    with pytest.raises(EngineError, match="this engine is closed"):
        list(writer.stream(ask()))


def test_close_cancels_what_runs_when_there_is_no_time(tiny):
    for _ in range(20):  # so small a model may be done before a busy machine comes to close it: then once more
        writer = GenAIWriter(tiny[1], {**part_params(), "end_ids": []}, threads=1, most_running=1)
        stream = writer.stream(ask("the dog", max_tokens=450))
        next(stream)
        writer.close(finish_s=0.0)
        if (reason := list(stream)[-1].finish_reason) == "cancelled":
            break
    assert reason == "cancelled"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context_tokens": 0}, "context_tokens is 0"),
        ({"end_ids": "2"}, "end_ids is '2'"),
        ({"wat": 1}, "unknown parameter 'wat'"),
        ({"properties": {"DEVICE_ID": 1}}, "unknown parameter 'DEVICE_ID'"),
    ],
)
def test_part_is_refused_when_its_parameters_are_wrong(tiny, change, said):
    with pytest.raises(EngineError, match=said):
        GenAIWriter(tiny[1], {**part_params(), **change})


def test_part_is_refused_when_a_file_is_missing(tiny, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny[1] / name).read_bytes())
    with pytest.raises(EngineError, match=r"openvino_model.xml: missing"):
        GenAIWriter(tmp_path, part_params())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match="not a readable tokenizer"):
        GenAIWriter(tmp_path, part_params())
