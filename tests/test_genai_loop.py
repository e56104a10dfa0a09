"""The thread that owns the engine, and answers as they are written, with an engine that says what it is told."""

import threading
import time
from dataclasses import dataclass, field

import pytest
import tokenizers

from alambic.engines.genai_answer import Answer, Pieces, Voice
from alambic.engines.genai_core import Ask, News
from alambic.engines.genai_loop import Loop
from alambic.engines.grammar import compile_schema
from alambic.engines.toolcalls import HERMES
from alambic.errors import EngineError
from alambic.kinds.generation import Sampling

END = 0


@dataclass
class Scripted:
    """A core that gives each request the same news, one a step, and can fail at a step."""

    script: list[News]
    fail_at: int | None = None
    refuse: str | None = None
    pause: threading.Event = field(default_factory=threading.Event)
    running: dict[int, list[News]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    most: int = 0
    steps: int = 0
    closed: bool = False

    @property
    def busy(self):
        return bool(self.running)

    def add(self, ask):
        if self.refuse:
            return News(ask.id, error=self.refuse)
        self.running[ask.id] = list(self.script)
        self.most = max(self.most, len(self.running))
        return None

    def cancel(self, id):
        if id in self.running:
            self.cancelled.append(id)

    def step(self):
        self.pause.wait(60)
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the machine is on fire")
        news = []
        for id in list(self.running):
            item = News(id, end="cancelled") if id in self.cancelled else self.running[id].pop(0)
            news.append(News(id, item.ids, item.logprobs, item.end))
            if item.end:
                del self.running[id]
        return news

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=257, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(["x"], trainer)  # every byte is a token
    return tokenizer


def script(tokenizer, text, *, size=1, end="stop"):
    ids = tokenizer.encode(text).ids
    groups = [ids[i : i + size] for i in range(0, len(ids), size)]
    news = [News(0, group, [-0.5] * len(group)) for group in groups]
    return [*news, News(0, [END], [-0.1], end)]


def spoken(tokenizer, core, *, loop=None, **options):
    core.pause.set()
    loop = loop or Loop(lambda: core, most_running=4)
    style = options.pop("style", None)
    answer = Answer(
        loop, Voice(tokenizer, frozenset({END})), [1, 2, 3], lane="plain", settings={}, tokens=500,
        sampling=Sampling(**options), style=style,
    )  # fmt: skip
    chunks = list(answer.chunks())
    loop.close(finish_s=5)
    return "".join(chunk.text for chunk in chunks), chunks


@pytest.mark.parametrize("size", [1, 3, 5])
def test_characters_come_whole_when_their_bytes_come_one_by_one(tokenizer, size):
    text = "où 🙂 你好"
    said, chunks = spoken(tokenizer, Scripted(script(tokenizer, text, size=size)))
    assert said == text
    assert all("\ufffd" not in chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1


@pytest.mark.parametrize("size", [1, 4])
def test_engine_is_told_to_stop_when_a_stop_text_comes(tokenizer, size):
    core = Scripted(script(tokenizer, "one STOP two and much more text" * 3, size=size))
    said, chunks = spoken(tokenizer, core, stop=("STOP",), logprobs=True)
    assert said == "one " and chunks[-1].finish_reason == "stop"
    assert core.cancelled == [0]
    assert "".join(entry.token for chunk in chunks for entry in chunk.logprobs) == "one "


def test_logprobs_stand_with_their_text_when_asked(tokenizer):
    said, chunks = spoken(tokenizer, Scripted(script(tokenizer, "aé b")), logprobs=True)
    assert said == "aé b"
    assert [len(chunk.logprobs) for chunk in chunks] == [1, 2, 1, 1, 0]


def test_finish_reason_is_tool_calls_when_a_call_was_written(tokenizer):
    text = 'Wait.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert spoken(tokenizer, Scripted(script(tokenizer, text)), style=HERMES)[1][-1].finish_reason == "tool_calls"
    assert spoken(tokenizer, Scripted(script(tokenizer, text[:-20])), style=HERMES)[1][-1].finish_reason == "stop"
    assert spoken(tokenizer, Scripted(script(tokenizer, text)))[1][-1].finish_reason == "stop"


def test_everyone_who_waits_is_told_when_the_engine_fails():
    core = Scripted([News(0, [5], [0.0])] * 100, fail_at=3)
    loop = Loop(lambda: core, most_running=2)
    jobs = [loop.submit(Ask(0, [1], "plain", {})) for _ in range(6)]  # two run, four wait
    core.pause.set()
    for job in jobs:
        while not isinstance(item := job.news.get(timeout=60), BaseException):
            pass
        assert "the engine failed" in str(item) and "the machine is on fire" in str(item)
    with pytest.raises(EngineError, match="answers nothing more: RuntimeError: the machine is on fire"):
        loop.submit(Ask(0, [1], "plain", {}))
    loop.close(finish_s=1)
    assert core.closed


def test_error_is_raised_when_the_engine_cannot_be_opened():
    def fail():
        raise EngineError("no such model")

    with pytest.raises(EngineError, match="no such model"):
        Loop(fail, most_running=1)


def test_one_request_is_refused_when_the_engine_does_not_take_it(tokenizer):
    with pytest.raises(EngineError, match="prompt too odd"):
        spoken(tokenizer, Scripted(script(tokenizer, "x"), refuse="prompt too odd"))


def test_answer_says_what_to_do_when_the_cache_is_full(tokenizer):
    with pytest.raises(EngineError, match="raise cache_mb"):
        spoken(tokenizer, Scripted(script(tokenizer, "x", end="no_room")))


def test_reader_gets_the_end_when_another_thread_cancels(tokenizer):
    core = Scripted([News(0, tokenizer.encode("x").ids, [0.0])] * 10**6)
    loop = Loop(lambda: core, most_running=1)
    core.pause.set()
    voice = Voice(tokenizer, frozenset({END}))
    pieces = Pieces(Answer(loop, voice, [1], lane="plain", settings={}, tokens=10**6, sampling=Sampling()))
    next(pieces)
    threading.Timer(0.05, pieces.cancel).start()
    assert list(pieces)[-1].finish_reason == "cancelled" and core.cancelled == [0]
    loop.close(finish_s=5)


def test_no_more_run_than_allowed_when_many_ask(tokenizer):
    core = Scripted(script(tokenizer, "a text"))
    loop = Loop(lambda: core, most_running=3)
    jobs = [loop.submit(Ask(0, [1], "plain", {})) for _ in range(50)]
    core.pause.set()
    for job in jobs:
        while job.news.get(timeout=60)[0].end is None:
            pass
    loop.close(finish_s=5)
    assert core.most == 3 and loop.load == (0, 0)


def test_waiting_request_never_starts_when_it_is_cancelled():
    core = Scripted([News(0, [5], [0.0])] * 5 + [News(0, end="stop")])
    loop = Loop(lambda: core, most_running=1)
    first, second = (loop.submit(Ask(0, [1], "plain", {})) for _ in range(2))
    loop.cancel(second)
    core.pause.set()
    assert second.news.get(timeout=60)[0].end == "cancelled"
    while first.news.get(timeout=60)[0].end is None:
        pass
    loop.close(finish_s=5)
    assert core.most == 1 and core.cancelled == []


def test_close_waits_for_what_runs_only_as_long_as_it_was_told():
    core = Scripted([News(0, [5], [0.0])] * 10**6)
    loop = Loop(lambda: core, most_running=1)
    core.pause.set()
    job = loop.submit(Ask(0, [1], "plain", {}))
    start = time.monotonic()
    loop.close(finish_s=0.1)
    assert time.monotonic() - start >= 0.1
    last = None
    while not job.news.empty():
        last = job.news.get()
    assert last[0].end == "cancelled" and core.closed


class Named(Scripted):
    """A core that says the name of a special token wherever its grammar has the first letter of that name."""

    def __init__(self, tokenizer, special, answer):
        super().__init__([])
        self.grammars, self.special = [], special
        self.text = script(tokenizer, answer)

    def add(self, ask):
        self.grammars.append(ask.grammar)
        named = [News(0, [self.special], [-0.1])] * 5 + [News(0, [self.special], [-0.1], "length")]
        self.script = named if self.text is None or "\\u0023-\\u005B" in ask.grammar else self.text
        return super().add(ask)


def under_schema(tokenizer, core):
    core.pause.set()
    loop = Loop(lambda: core, most_running=1)
    special = frozenset({END, core.special})
    answer = Answer(
        loop, Voice(tokenizer, special, frozenset({END})), [1], lane="plain", settings={}, tokens=500,
        sampling=Sampling(), grammar=compile_schema({"type": "string", "maxLength": 5}),
    )  # fmt: skip
    try:
        return "".join(chunk.text for chunk in answer.chunks())
    finally:
        loop.close(finish_s=5)


def test_answer_goes_on_without_the_letter_when_a_special_token_passes_for_text(tokenizer):
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<other>"])
    core = Named(tokenizer, tokenizer.token_to_id("<other>"), '"abc"')
    assert under_schema(tokenizer, core) == '"abc"'
    first, second = core.grammars
    assert first != second and "\\u003D" in second and "\\u003B" in second  # the neighbours of the letter


def test_model_that_writes_nothing_but_special_tokens_ends_with_an_error(tokenizer):
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<other>"])
    core = Named(tokenizer, tokenizer.token_to_id("<other>"), "")
    core.text = None
    with pytest.raises(EngineError, match="nothing that its JSON schema allows"):
        under_schema(tokenizer, core)
