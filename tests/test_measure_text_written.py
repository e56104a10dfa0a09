"""Quality and speed of a writer, with one of our own."""

import json
import threading
import time
from types import SimpleNamespace

import pytest

from alambic.errors import AlambicError, EngineError, InputTooLong
from alambic.events import drain
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.kinds.generation import Chunk, GenerationRequest, Reply, Sampling, Timings, Usage
from alambic.measure.generation_speed import MIN_REPEATS, compare_generation_speed, measure_generation_speed
from alambic.measure.written import compare_written, default_metrics, measure_written, score_written


class Parrot:
    """Writes what it was told to for each prompt, a word a token, at a set pace."""

    context_tokens = 1000
    capabilities = frozenset({"write"})

    def __init__(self, answers, *, prompt_s=0.0, token_s=0.0, cached=0):
        self.answers, self.prompt_s, self.token_s, self.cached = answers, prompt_s, token_s, cached
        self.seen, self.at_once, self.most = [], 0, 0
        self.sleep = time.sleep
        self._lock = threading.Lock()

    def _reply(self, request):
        prompt = request.chat.messages[-1].content
        self.seen.append(request)
        answer = self.answers.get(prompt, "")
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Reply):
            return answer
        usage = Usage(len(prompt.split()), len(answer.split()), self.cached)
        return Reply(answer, "stop", usage, Timings(0.0, 0.0), content=answer)

    def write(self, requests):
        return [self._reply(request) for request in requests]

    def stream(self, request):
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        reply = self._reply(request)
        self.sleep(self.prompt_s)
        for i, word in enumerate(reply.text.split()):
            if i:
                self.sleep(self.token_s)
            yield Chunk(word + " ")
        yield Chunk("", finish_reason="stop", usage=reply.usage)
        with self._lock:
            self.at_once -= 1


def chats(*pairs):
    return [Chat.of(prompt, completion=answer) for prompt, answer in pairs]


ROWS = chats(("un", "le chat dort"), ("deux", "le chien court"), ("trois", "il pleut"))


def written(answers, rows=ROWS, **options):
    return drain(measure_written(Parrot(answers), rows, **{"kind": "generate", **options}))


def test_every_answer_is_written_from_its_prompt_alone_when_measured():
    parrot = Parrot({"un": "le chat dort", "deux": "le chien dort", "trois": "il pleut"})
    found = drain(measure_written(parrot, ROWS, kind="generate", sampling=Sampling(max_tokens=7)))
    assert [r.chat.messages for r in parrot.seen] == [chat.prompt.messages for chat in ROWS]
    assert {r.sampling.max_tokens for r in parrot.seen} == {7}
    assert list(found.scores) == ["chrf", "bleu", "rouge_l", "token_f1", "exact_match"]
    assert found.scores["exact_match"].interval.value == pytest.approx(2 / 3)
    assert found.endings == {"stop": 3} and found.n == 3


def test_worst_row_comes_first_when_shown():
    found = written({"un": "le chat dort", "deux": "", "trois": "il neige"}, worst=2)
    assert [row.prompt for row in found.worst] == ["deux", "trois"]
    assert found.worst[0].expected == "le chien court" and found.worst[0].written == ""
    assert found.worst[0].score <= found.worst[1].score


def test_figures_are_json_when_asked_for_with_rows():
    data = json.loads(json.dumps(written({}).to_dict(rows=True)))
    assert data["quality"]["chrf"]["value"] == 0.0 and len(data["worst"]) == 3
    assert "worst" not in written({}).to_dict()


def test_row_that_cannot_be_written_scores_nothing_and_stops_no_other():
    answers = {"un": "le chat dort", "deux": InputTooLong("too long"), "trois": "il pleut"}
    found = written(answers, metrics=("exact_match",))
    assert found.errors == {1: "too long"} and found.endings == {"error": 1, "stop": 2}
    assert found.scores["exact_match"].interval.value == pytest.approx(2 / 3)
    assert found.worst[0].error == "too long"


def test_bug_of_an_engine_is_not_hidden_when_writing():
    with pytest.raises(ZeroDivisionError):
        written({"un": ZeroDivisionError()})


def test_json_is_compared_by_content_when_extracted():
    rows = chats(("un", '{"a": 1, "b": "x"}'), ("deux", '{"a": 2}'))
    found = written({"un": '{"b":"x","a":1}', "deux": "{a: 2}"}, rows, kind="extract")
    assert {name: round(s.interval.value, 3) for name, s in found.scores.items()} == {
        "field_f1": 0.8, "json_valid": 0.5, "exact_match": 0.5,
    }  # fmt: skip


def test_answers_are_valid_only_when_complete_and_under_the_schema():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    rows = chats(*[(name, '{"a": 1}') for name in ("un", "deux", "trois", "quatre")])
    cut = Reply('{"a": 1}', "length", Usage(1, 1), Timings(0, 0))
    answers = {"un": '{"a": 1}', "deux": '{"a": "1"}', "trois": "{", "quatre": cut}
    found = written(answers, rows, kind="extract", sampling=Sampling(json_schema=schema))
    assert found.valid.interval.value == 0.25 and found.to_dict()["schema_valid"]["value"] == 0.25
    assert written(answers, rows, kind="extract").valid is None


TOOLS = ({"type": "function", "function": {"name": "go"}},)


def test_any_accepted_answer_is_right_when_a_row_has_several():
    from alambic.data.chats import ChatDataset, ChatExample

    rows = ChatDataset((ChatExample(ROWS[0], others=("un chat dort",)), ChatExample(ROWS[1])))
    found = written({"un": "un chat dort", "deux": "un chat dort"}, rows, metrics=("exact_match",))
    assert found.row_scores == (1.0, 0.0) and found.references[0] == ("le chat dort", "un chat dort")


def test_tool_calls_are_scored_when_rows_have_tools():
    call = ToolCall("go", {"to": "Lyon"})
    rows = [
        Chat((Message("user", "un"), Message("assistant", "", (call,))), TOOLS),
        Chat((Message("user", "deux"), Message("assistant", "non")), TOOLS),
    ]
    said = Reply("<call>", "tool_calls", Usage(1, 1), Timings(0, 0), content="", tool_calls=(call,))
    found = written({"un": said, "deux": "non"}, rows, kind="chat")
    assert list(found.scores) == ["token_f1", "chrf", "exact_match", "tool_calls"]
    assert [found.scores[name].interval.value for name in ("token_f1", "tool_calls")] == [1.0, 1.0]
    assert found.endings == {"stop": 1, "tool_calls": 1}
    assert default_metrics("chat", ROWS) == ("token_f1", "chrf", "exact_match")


def test_two_models_are_compared_row_by_row_when_measured_on_the_same():
    good, bad = written({"un": "le chat dort", "deux": "le chien court", "trois": "il pleut"}), written({})
    assert compare_written(good, bad).difference.low > 0
    assert compare_written(good, good).tied
    with pytest.raises(AlambicError, match="other rows"):
        compare_written(good, score_written(ROWS[:1], good.replies[:1], kind="generate", metrics=("chrf",)))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [([], {}, "no row"), ([Chat.of("un")], {}, "row 0: the conversation ends without"),
     (ROWS, {"kind": "classify"}, "'classify' does not write"), (ROWS, {"metrics": ("blue",)}, "did you mean 'bleu'")],
)  # fmt: skip
def test_measuring_is_refused_when_it_cannot_be_done(rows, options, message):
    with pytest.raises(AlambicError, match=message):
        written({}, rows, **options)


# Speed.

REQUESTS = [GenerationRequest(chat=chat.prompt) for chat in chats(("a b c d", ""), ("e f g h", ""))]
PACED = {"a b c d": "1 2 3 4 5", "e f g h": "1 2 3 4 5"}


def test_prompt_and_generation_are_timed_apart_when_streamed(monkeypatch):
    now = [0.0]  # of a clock that a busy machine does not stretch
    monkeypatch.setattr("alambic.measure.generation_speed.time", SimpleNamespace(perf_counter=lambda: now[0]))
    parrot = Parrot(PACED, prompt_s=0.01, token_s=0.004)
    parrot.sleep = lambda seconds: now.__setitem__(0, now[0] + seconds)
    found = measure_generation_speed(parrot, REQUESTS, repeats=5, seconds=60)
    data = json.loads(json.dumps(found.to_dict()))
    assert found.n == MIN_REPEATS and data["concurrency"] == 1
    assert [data[name] for name in ("ttft_ms", "generation_ms", "p50_ms")] == pytest.approx([10, 16, 26])
    seconds = {name: sum(getattr(one, name) for one in found.timed) / 1000 for name in ("prompt_ms", "generation_ms")}
    assert data["tokens_per_second"] == pytest.approx(30 * 4 / seconds["generation_ms"])
    assert data["prompt_tokens_per_second"] == pytest.approx(30 * 4 / seconds["prompt_ms"])
    assert data["per_second"] == pytest.approx(30 / sum(seconds.values()))
    assert data["intervals"]["p95_ms"]["low"] <= data["p95_ms"] and data["prompt_tokens"] == 4 and data["tokens"] == 5


def test_cached_tokens_are_left_out_of_the_prompt_rate_when_told():
    found = measure_generation_speed(Parrot(PACED, prompt_s=0.005, cached=3), REQUESTS, seconds=60)
    assert found.cached_share == pytest.approx(0.75)
    assert found.prompt_tokens_per_second.value < 1.2 / 0.005


def test_writers_are_timed_in_turn_when_compared():
    order = []

    class Noted(Parrot):
        def __init__(self, name):
            super().__init__(PACED)
            self.name = name

        def stream(self, request):
            order.append(self.name)
            return super().stream(request)

    found = compare_generation_speed({"a": Noted("a"), "b": Noted("b")}, REQUESTS, warmup=0)
    assert found["a"].n == found["b"].n == len(order) // 2
    assert {tuple(sorted(order[i : i + 2])) for i in range(0, len(order), 2)} == {("a", "b")}
    assert "".join(order).count("aa") > 0  # the order is drawn, not fixed


def test_streams_run_together_when_concurrent():
    parrot = Parrot(PACED, prompt_s=0.005, token_s=0.005)
    together = measure_generation_speed(parrot, REQUESTS, concurrency=4, repeats=40)
    assert 1 < parrot.most <= 4 and together.n == 40 and together.concurrency == 4
    # Rates are over the time that all shared, in which several streams were busy at once.
    wall_s = 40 / together.per_second.value
    assert sum(one.total_ms for one in together.timed) / 1000 > 1.5 * wall_s
    assert together.tokens_per_second.value == pytest.approx(40 * 5 / wall_s)


def test_failure_in_a_stream_reaches_the_caller_when_concurrent():
    with pytest.raises(EngineError, match="broke"):
        measure_generation_speed(Parrot({"a b c d": EngineError("broke")}), REQUESTS, concurrency=2, warmup=0)


def test_no_request_is_refused_when_timed():
    with pytest.raises(AlambicError, match="no request"):
        measure_generation_speed(Parrot({}), [])


def test_answers_of_one_token_have_no_generation_rate_when_timed():
    found = measure_generation_speed(Parrot({"a b c d": "1", "e f g h": "1"}), REQUESTS)
    assert found.tokens_per_second is None and "tokens_per_second" not in found.to_dict()
