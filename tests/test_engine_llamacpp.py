"""The engine `llamacpp` on a random model: its answers, its limits, its manners."""

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from alambic.engines.llamacpp import SLOTS, LlamaCppWriter
from alambic.engines.llamacpp_server import LlamaServer
from alambic.engines.writer import Writer
from alambic.errors import EngineError, InputTooLong
from alambic.events import drain
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.pack.gguf import pack
from gguf_models import CHATML, byte_level, make

pytest.importorskip("xllamacpp")

CONTEXT = 512


# So small a model may have written 400 tokens before a busy machine comes to stop it: then it is asked once more.
TRIES = 20


def ask(text="Bonjour, qui êtes-vous ?", **settings):
    return GenerationRequest(chat=Chat.of(text), sampling=Sampling(**{"max_tokens": 12, **settings}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamacpp") / "model"
    folder.mkdir()
    return folder, make(folder, "llama", dtype=None)


@pytest.fixture(scope="module")
def part(model):
    folder = model[0].parent / "part"
    return folder, drain(pack(model[0], folder, form="F32"))


@pytest.fixture(scope="module")
def writer(part):
    writer = LlamaCppWriter(part[0], part[1].params, threads=1, cache_dir=None)
    yield writer
    writer.close()


def reference(model, ids, count):
    import torch

    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=2)[0]
    return out[len(ids) :].tolist()


def test_writer_keeps_the_protocol_when_open(writer):
    assert isinstance(writer, Writer)
    assert writer.context_tokens == CONTEXT
    assert writer.capabilities == {"json_schema", "logprobs", "score", "token_ids"}


def test_token_ids_are_those_of_the_template_when_asked(writer):
    tokenizer = byte_level()
    text = "<|im_start|>user\nété<|im_end|>\n<|im_start|>assistant\n"
    assert writer.token_ids(ask("été")) == tokenizer.encode(text, add_special_tokens=False).ids
    raw = GenerationRequest(text="été", sampling=Sampling())
    assert writer.token_ids(raw) == tokenizer.encode("été", add_special_tokens=False).ids


def test_answer_is_that_of_transformers_when_greedy(writer, model):
    request = ask(max_tokens=16)
    reply = writer.write([request])[0]
    expected = [i for i in reference(model[1], writer.token_ids(request), 16) if i > 2]
    assert reply.text == byte_level().decode(expected, skip_special_tokens=False)
    assert reply.usage.prompt_tokens == len(writer.token_ids(request))


def test_chunks_joined_are_the_answer_when_streamed(writer):
    request = ask(max_tokens=16)
    chunks = list(writer.stream(request))
    assert "".join(chunk.text for chunk in chunks) == writer.write([request])[0].text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1]
    assert last.finish_reason in ("stop", "length") and last.usage is not None and last.timings is not None
    assert last.usage.completion_tokens <= 16
    assert last.timings.prompt_ms > 0 and last.timings.queue_ms >= 0


def test_limit_of_tokens_is_kept_when_given(writer):
    reply = writer.write([ask(max_tokens=3)])[0]
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("length", 3)


def test_answer_ends_before_the_text_when_a_stop_text_is_given(writer):
    whole = writer.write([ask(max_tokens=24)])[0].text
    stop = whole[5:8]
    reply = writer.write([ask(max_tokens=24, stop=(stop,))])[0]
    assert reply.text == whole[: whole.index(stop)]
    assert reply.finish_reason == "stop"


def test_sampling_follows_its_seed_when_hot(writer):
    def write(seed):
        return writer.write([ask(temperature=1.5, seed=seed, max_tokens=24)])[0].text

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(4)}) > 1


def test_top_k_of_one_is_greedy_when_hot(writer):
    assert writer.write([ask(temperature=2.0, top_k=1)])[0].text == writer.write([ask()])[0].text


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 5.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
def test_penalty_changes_what_is_written_when_strong(writer, penalty):
    text = "a a a a a a a a a a"
    changed = [writer.write([ask(text * n, **settings, max_tokens=24)])[0].text
               for settings in ({}, penalty) for n in (1, 2, 3)]  # fmt: skip
    assert changed[:3] != changed[3:]


def test_prompt_that_does_not_fit_is_an_error_when_asked(writer):
    with pytest.raises(InputTooLong, match=r"the prompt has \d+ tokens and max_tokens 12, the context 512"):
        writer.write([ask("mot " * 600)])


def test_prompt_and_answer_that_do_not_fit_are_an_error_when_asked(writer):
    with pytest.raises(InputTooLong, match="max_tokens 511"):
        next(iter(writer.stream(ask(max_tokens=511))))


def test_answer_ends_at_the_context_when_no_limit_is_given(writer):
    reply = writer.write([ask("a " * 200, max_tokens=None)])[0]
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens <= CONTEXT


def test_logprobs_are_those_of_the_model_when_asked(writer, model):
    import torch

    request = ask(max_tokens=6, logprobs=True)
    reply = writer.write([request])[0]
    ids = writer.token_ids(request)
    with torch.no_grad():
        first = torch.log_softmax(model[1](torch.tensor([ids])).logits[0, -1], -1)
    assert reply.logprobs[0].logprob == pytest.approx(float(first.max()), abs=2e-2)
    assert writer.write([ask(max_tokens=6)])[0].logprobs == ()


def test_scores_are_those_of_the_model_when_a_continuation_is_given(writer, model):
    import torch

    request, text = ask(), "être 😀 naïf"
    ids, more = writer.token_ids(request), byte_level().encode(text).ids
    with torch.no_grad():
        whole = torch.log_softmax(model[1](torch.tensor([ids + more])).logits[0], -1)
    expected = [float(whole[len(ids) - 1 + i, token]) for i, token in enumerate(more)]
    assert writer.score([request], [text])[0] == pytest.approx(
        expected, abs=0.1
    )  # keys and values are in half precision
    assert writer.score([request], [""]) == [[]]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
    "required": ["name", "kind", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_answer_follows_the_schema_when_one_is_given(writer, seed):
    reply = writer.write([ask(json_schema=SCHEMA, temperature=1.0, seed=seed, max_tokens=120)])[0]
    value = json.loads(reply.text)
    assert reply.finish_reason == "stop"
    assert set(value) == {"name", "kind", "n"} and value["kind"] in ("a", "b") and len(value["name"]) <= 12


def test_answer_is_whole_when_the_limit_is_nearer_than_its_bounds(writer):
    schema = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 400}}, "required": ["text"]}
    for seed in range(3):
        reply = writer.write([ask(json_schema=schema, temperature=1.5, seed=seed, max_tokens=60)])[0]
        assert set(json.loads(reply.text)) == {"text"}
        assert reply.finish_reason == "stop" and reply.usage.completion_tokens <= 60


def test_schema_that_nothing_satisfies_is_an_error_when_given(writer):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 5, "maximum": 2}}, "required": ["n"]}
    with pytest.raises(EngineError, match="cannot be satisfied"):
        writer.write([ask(json_schema=schema)])


def test_limit_that_no_answer_fits_is_an_error_when_a_schema_is_given(writer):
    with pytest.raises(EngineError, match="max_tokens is 4"):
        writer.stream(ask(json_schema=SCHEMA, max_tokens=4))


def test_lookup_is_refused_when_asked(writer):
    with pytest.raises(EngineError, match="lookup_tokens"):
        writer.stream(ask(lookup_tokens=4))


MARKED = CHATML.replace(
    "message.content", "(message.content or '') + ('<|tool|>[' + (message.tool_calls[0].function | tojson) + ']' "
    "if message.tool_calls else '')"
)  # fmt: skip


def always(tmp_path, text, *, ends=4):
    """Return a writer whose model writes the special token `text` and nothing else."""
    import torch

    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|one|>", "<|two|>", "<|three|>", "<|tool|>"])
    folder = tmp_path / "model"
    folder.mkdir()
    model = make(folder, "phi", tokenizer=tokenizer, template=MARKED)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.token_to_id(text)] = 1e4
    model.save_pretrained(folder)
    spec = drain(pack(folder, tmp_path / "part", form="F32"))
    named = [tokenizer.token_to_id(end) for end in ("<|im_end|>", "<|one|>", "<|two|>", "<|three|>")[:ends]]
    params = {**spec.params, "end_ids": named}
    return LlamaCppWriter(tmp_path / "part", params, threads=1, cache_dir=None)


def test_answer_ends_at_the_fourth_end_when_the_file_names_three(tmp_path):
    writer = always(tmp_path, "<|three|>")
    reply = writer.write([ask(max_tokens=8)])[0]
    writer.close()
    assert (reply.text, reply.finish_reason) == ("", "stop")


def test_special_token_is_hidden_when_it_is_no_end(tmp_path):
    writer = always(tmp_path, "<|three|>", ends=3)
    reply = writer.write([ask(max_tokens=8)])[0]
    writer.close()
    assert (reply.text, reply.finish_reason, reply.usage.completion_tokens) == ("", "length", 8)


def test_sign_of_a_tool_call_is_shown_when_the_request_has_tools(tmp_path):
    writer = always(tmp_path, "<|tool|>")
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    chat = Chat(Chat.of("Quelle heure est-il ?").messages, (tool,))
    request = GenerationRequest(chat=chat, sampling=Sampling(max_tokens=3))
    with_tools, without = writer.write([request, ask(max_tokens=3)])
    writer.close()
    assert (with_tools.text, without.text) == ("<|tool|>" * 3, "")


def test_streams_do_not_disturb_each_other_when_some_are_given_up(writer):
    # The first tokens only: a batch of several adds up in another order, and a random model is seldom sure.
    expected = {n: writer.write([ask("mot " * n, max_tokens=3)])[0].text for n in range(1, 9)}
    found, faults = {}, []

    def work(n):
        try:
            stream = writer.stream(ask("mot " * n, max_tokens=20))
            if n % 3 == 0:
                next(stream)
                stream.close()
            else:
                found[n] = "".join(chunk.text for chunk in stream).startswith(expected[n])
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert faults == []
    assert found == {n: True for n in expected if n % 3}


def test_waiting_is_counted_when_all_slots_are_taken(writer):
    replies = []
    late = threading.Thread(target=lambda: replies.extend(writer.write([ask(max_tokens=2)])))
    with ExitStack() as slots:
        for _ in range(SLOTS):
            slots.enter_context(writer._room.taken(1))
        late.start()
        end = time.monotonic() + 60
        while not writer._room._gate._waiters and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
    late.join()
    assert replies[0].timings.queue_ms >= 100
    # Alone it waits for nothing; of twenty, not all are held up by something else on this machine.
    assert min(writer.write([ask(max_tokens=2)])[0].timings.queue_ms for _ in range(20)) < 50


def test_answers_keep_their_order_when_many_are_asked_at_once(writer):
    requests = [ask("mot " * (12 - n), max_tokens=1 + n % 3) for n in range(12)]
    replies = writer.write(requests)
    assert [r.usage.prompt_tokens for r in replies] == [len(writer.token_ids(request)) for request in requests]
    assert [r.usage.completion_tokens for r in replies] == [request.sampling.max_tokens for request in requests]


def test_work_ends_when_the_stream_is_closed(writer, monkeypatch):
    pieces, complete = [], LlamaServer.complete

    def counted(server, body, on_chunk=None):
        return complete(server, body, on_chunk and (lambda piece: (pieces.append(piece), on_chunk(piece))[1]))

    monkeypatch.setattr(LlamaServer, "complete", counted)
    for _ in range(TRIES):
        pieces.clear()
        stream = writer.stream(ask(max_tokens=400))
        next(stream)
        stream.close()
        if len(pieces) < 400:
            break
    assert 0 < len(pieces) < 400
    assert writer.write([ask(max_tokens=2)])[0].finish_reason == "length"


def test_prefix_is_not_read_again_when_it_was_just_read(part):
    writer = LlamaCppWriter(part[0], part[1].params, threads=1, cache_dir=None)
    long = "Une consigne longue. " * 15
    writer.write([ask(long + "un", max_tokens=2)])
    reply = writer.write([ask(long + "deux", max_tokens=2)])[0]
    writer.close()
    assert reply.usage.cached_tokens > 0.8 * reply.usage.prompt_tokens


def test_close_gives_up_what_is_under_way_when_called(part):
    for _ in range(TRIES):
        writer = LlamaCppWriter(part[0], part[1].params, threads=1, cache_dir=None)
        stream = writer.stream(ask(max_tokens=400))
        next(stream)
        closer = threading.Thread(target=writer.close)
        closer.start()
        last = list(stream)[-1]
        closer.join(timeout=60)
        assert not closer.is_alive()
        if last.finish_reason == "cancelled":
            break
    assert last.finish_reason == "cancelled"
    with pytest.raises(EngineError, match="closed"):
        writer.write([ask()])


def test_close_returns_when_nothing_was_asked(part):
    # llama.cpp's loop may not have begun by then; told to stop before, it would run for ever.
    for _ in range(20):
        server = LlamaServer(part[0] / "model.gguf", context=64, threads=1)
        closer = threading.Thread(target=server.close, daemon=True)
        closer.start()
        closer.join(timeout=60)
        assert not closer.is_alive()


def test_missing_file_is_an_error_when_opened(part, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((part[0] / name).read_bytes())
    with pytest.raises(EngineError, match=r"model\.gguf: missing"):
        LlamaCppWriter(tmp_path, part[1].params, threads=1, cache_dir=None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(EngineError, match="cannot open this file"):
        LlamaCppWriter(tmp_path, part[1].params, threads=1, cache_dir=None)


def test_describe_names_engine_version_and_threads_when_asked(writer):
    said = writer.describe()
    assert said["engine"] == "llamacpp" and said["threads"] == 1 and said["precision"] == "F32"
    assert said["properties"]["context_tokens"] == CONTEXT
    json.dumps(said)


def test_nothing_is_printed_and_no_port_listens_when_used(part):
    code = """
import json, os, pathlib, sys
from alambic.engines.llamacpp import LlamaCppWriter
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling
writer = LlamaCppWriter(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), threads=1, cache_dir=None)
writer.write([GenerationRequest(chat=Chat.of("a"), sampling=Sampling(max_tokens=4))])
rows = [line.split() for path in ("/proc/net/tcp", "/proc/net/tcp6") for line in pathlib.Path(path).open()]
listening = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
mine = {os.readlink(path) for path in pathlib.Path("/proc/self/fd").iterdir() if path.is_symlink()}
assert not listening & mine
writer.close()
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", code, str(part[0]), json.dumps(part[1].params)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
