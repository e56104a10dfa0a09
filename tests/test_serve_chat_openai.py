"""The unmodified `openai` client against a real server on loopback; only the model is a fake."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openai
import pytest
from pydantic import BaseModel

from alambic.kinds.classify import Prediction
from alambic.serve.models import LoadedBundle
from fake_writer import FakeWriter, Live, live, loaded

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


class EncoderEngine:
    """A classifier whose encoder gives vectors of length 5."""

    capabilities = frozenset({"predict", "embed", "token_ids"})

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> list[Prediction]:
        return [Prediction(("a",), 1.0, {"a": 1.0}) for _ in inputs]

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        return np.array([[3.0 * len(text), 4.0 * len(text), 0.0] for text in texts], dtype=np.float32)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0, *range(len(text.split())), 1] for text in texts]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    models = {"replies": loaded(FakeWriter()), "tickets": LoadedBundle(EncoderEngine(), ("a",))}
    with live(models, api_key="s3cret") as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0) as client:
        yield client


def _ask(client: openai.OpenAI, said: str, **options: Any) -> Any:
    return client.chat.completions.create(model="replies", messages=[{"role": "user", "content": said}], **options)


def test_models_are_listed_and_one_is_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["replies", "tickets"]
    assert client.models.retrieve("replies").owned_by == "alambic"
    with pytest.raises(openai.NotFoundError, match="did you mean 'replies'"):
        client.models.retrieve("replie")


def test_chat_answers_with_usage_and_timings(client: openai.OpenAI) -> None:
    answer = _ask(client, "Bonjour à tous 🙂")
    assert answer.choices[0].message.content == "You said: Bonjour à tous 🙂"
    assert (answer.choices[0].finish_reason, answer.model, answer.system_fingerprint) == ("stop", "replies", "fp_1")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 6, 10)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    timings = answer.timings
    assert (timings["prompt_tokens"], timings["generated_tokens"], timings["prompt_ms"]) == (4, 6, 2.0)
    assert timings["generated_ms"] > 0 and timings["queue_ms"] >= 0


def test_chat_streams_the_same_text_with_usage_last(client: openai.OpenAI) -> None:
    chunks = list(_ask(client, "one two three", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "You said: one two three"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].timings["generated_tokens"] == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_stream_ends_with_timings_when_usage_is_not_asked(client: openai.OpenAI) -> None:
    chunks = list(_ask(client, "one", stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].timings["generated_tokens"] == 3


def test_chat_gives_n_answers_with_seeds_of_their_own(client: openai.OpenAI) -> None:
    answer = _ask(client, "two answers", n=2, seed=5, temperature=0.7)
    assert [choice.message.content for choice in answer.choices] == ["You said: two answers"] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 8)
    streamed = list(_ask(client, "two answers", n=2, stream=True))
    texts = {0: "", 1: ""}
    for chunk in streamed:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "You said: two answers", 1: "You said: two answers"}


def test_chat_calls_a_tool_when_the_model_writes_a_call(client: openai.OpenAI) -> None:
    answer = _ask(client, "the weather in Lyon?", tools=[WEATHER])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Lyon"},
    )
    again = client.chat.completions.create(
        model="replies",
        messages=[
            {"role": "user", "content": "the weather in Lyon?"},
            choice.message,
            {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
        ],
        tools=[WEATHER],
    )
    assert again.choices[0].message.content == "You said: 12 degrees"


def test_chat_streams_a_tool_call(client: openai.OpenAI) -> None:
    text, names, arguments, reasons = "", [], "", []
    for chunk in _ask(client, "the weather in Lyon?", tools=[WEATHER], stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
        for call in delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
    assert (text, names, json.loads(arguments), reasons[-1]) == (
        "Let me look.",
        ["weather"],
        {"city": "Lyon"},
        "tool_calls",
    )


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_held_to_a_named_tool(client: openai.OpenAI, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    options = {"tools": [WEATHER, NOW], "tool_choice": choice}
    if stream:
        with client.chat.completions.stream(
            model="replies", messages=[{"role": "user", "content": "hello"}], **options
        ) as events:
            answer = events.get_final_completion()
    else:
        answer = _ask(client, "hello", **options)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Lyon"})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not answer.choices[0].message.content


def test_chat_is_held_to_any_tool_when_one_is_required(client: openai.OpenAI) -> None:
    answer = _ask(client, "hello", tools=[WEATHER, NOW], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("now", {})


def test_chat_shows_no_tools_when_the_choice_is_none(client: openai.OpenAI) -> None:
    answer = _ask(client, "the weather?", tools=[WEATHER], tool_choice="none")
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == ("You said: the weather?", None)


class Trip(BaseModel):
    """What the structured answer holds."""

    city: str
    nights: int


def test_chat_parses_into_a_model_when_a_schema_is_given(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="replies", messages=[{"role": "user", "content": "a trip"}], response_format=Trip
    )
    assert answer.choices[0].message.parsed == Trip(city="Lyon", nights=7)


def test_chat_streams_into_a_model_when_a_schema_is_given(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="replies", messages=[{"role": "user", "content": "a trip"}], response_format=Trip
    ) as events:
        kinds = {event.type for event in events}
        assert events.get_final_completion().choices[0].message.parsed == Trip(city="Lyon", nights=7)
    assert {"content.delta", "content.done"} <= kinds


def test_chat_gives_logprobs_when_asked(client: openai.OpenAI) -> None:
    content = _ask(client, "hi", logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert [(entry.token, entry.logprob) for entry in content] == [("You", -0.5), (" said:", -0.5), (" hi", -0.5)]
    assert content[1].bytes == list(b" said:") and content[1].top_logprobs[0].token == " said:"
    streamed = [c.choices[0].logprobs for c in _ask(client, "hi", logprobs=True, stream=True)]
    assert [entry.token for part in streamed if part for entry in part.content] == ["You", " said:", " hi"]


def test_completions_write_on_raw_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="replies", prompt=["one two", "three"], max_tokens=50, n=2)
    assert [choice.text for choice in answer.choices] == ["You said: one two"] * 2 + ["You said: three"] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 14)
    chunks = list(client.completions.create(model="replies", prompt="one two", stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "You said: one two"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completions_stop_after_16_tokens_when_no_limit_is_given(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="replies", prompt="word " * 30)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 16)


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_embeddings_have_length_1(client: openai.OpenAI, form: Any) -> None:
    options = {"encoding_format": form} if form else {}
    answer = client.embeddings.create(model="tickets", input=["one two", "three"], **options)
    vectors = [item.embedding for item in answer.data]
    if form == "base64":
        vectors = [np.frombuffer(base64.b64decode(vector), dtype="<f4") for vector in vectors]  # type: ignore[misc]
    np.testing.assert_allclose(vectors, [[0.6, 0.8, 0.0]] * 2, atol=1e-6)
    assert (answer.usage.prompt_tokens, [item.index for item in answer.data]) == (7, [0, 1])


def test_response_answers_a_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="replies", input="Bonjour", instructions="Be brief.")
    assert (answer.output_text, answer.status, answer.instructions) == ("You said: Bonjour", "completed", "Be brief.")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1, 3)
    assert answer.store is False


def test_response_is_incomplete_when_the_limit_ends_it(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="replies", input="a b c d e f", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_response_streams_events_in_order(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="replies", input="one two", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "You said: one two"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == "You said: one two"


def test_response_parses_into_a_model(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="replies", input="a trip", text_format=Trip)
    assert answer.output_parsed == Trip(city="Lyon", nights=7)


def test_response_calls_a_tool_and_reads_its_output(client: openai.OpenAI) -> None:
    tool = {"type": "function", "name": "weather", **{k: v for k, v in WEATHER["function"].items() if k != "name"}}
    answer = client.responses.create(model="replies", input="the weather in Lyon?", tools=[tool])
    call = answer.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Lyon"})
    assert answer.output_text == "Let me look."
    items = [
        {"role": "user", "content": "the weather in Lyon?"},
        *answer.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"},
    ]
    assert client.responses.create(model="replies", input=items, tools=[tool]).output_text == "You said: 12 degrees"


def test_response_streams_a_tool_call(client: openai.OpenAI) -> None:
    tool = {"type": "function", "name": "weather", "parameters": WEATHER["function"]["parameters"]}
    with client.responses.stream(model="replies", input="hello", tools=[tool], tool_choice="required") as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert json.loads(final.output[0].arguments) == {"city": "Lyon"}


def test_client_raises_its_own_errors(client: openai.OpenAI, server: Live) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(client, "this is too long")
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.InternalServerError) as failed:
        _ask(client, "explode")
    assert "secret" not in str(failed.value)


def test_client_raises_when_the_model_breaks_in_the_middle_of_a_stream(client: openai.OpenAI) -> None:
    text = ""
    with pytest.raises(openai.APIError, match="the engine failed on this request"):
        for chunk in _ask(client, "break after two words", stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "You said:"


def test_response_stream_says_failed_when_the_model_breaks(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="replies", input="break after two words", stream=True))
    assert (events[-1].type, events[-1].response.error.code) == ("response.failed", "server_error")


def test_async_client_gets_many_streams_at_once(server: Live) -> None:
    import asyncio

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.chat.completions.create(
            model="replies", messages=[{"role": "user", "content": f"slow {i}"}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(20)))

    assert asyncio.run(main()) == [f"You said: slow {i}" for i in range(20)]
