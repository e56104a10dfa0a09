"""The server with a real engine: a random two-layer model packed for OpenVINO GenAI, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.serve.models import Loaded, LoadedWriter, load
from fake_writer import Live, live

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
pytestmark = pytest.mark.slow
HELLO: Any = [{"role": "user", "content": "Hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Loaded]]:
    pytest.importorskip("openvino_genai", reason="models that write need openvino-genai")
    pytest.importorskip("torch", reason="packing needs the extra build")
    from alambic.bundle import seal
    from alambic.events import drain
    from alambic.manifest import Manifest, WriterSpec
    from alambic.pack.writer_openvino import pack_openvino
    from gguf_models import make

    folder: Path = tmp_path_factory.mktemp("writer")
    make(folder / "model", "qwen2", template=TEMPLATE, max_position_embeddings=1024)
    part = drain(pack_openvino(folder / "model", folder / "bundle" / "writer", precision="fp32"), lambda _event: None)
    manifest = Manifest(
        alambic="0.1.0",
        name="tiny",
        kind="chat",
        created="2026-01-01T00:00:00Z",
        entry=part.name,
        parts=(part,),
        writer=WriterSpec(sampling={"max_tokens": 200}),
    )
    with load([seal(folder / "bundle", manifest).path], threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(models: dict[str, Loaded]) -> Iterator[Live]:
    with live(models, close=False) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_answer_is_what_the_engine_writes(client: openai.OpenAI, models: dict[str, Loaded]) -> None:
    model = models["tiny"]
    assert isinstance(model, LoadedWriter)
    (reply,) = model.writer.write([GenerationRequest(chat=Chat.of("Hello"), sampling=Sampling(max_tokens=12))])
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12)
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, stream=True)
    assert answer.choices[0].message.content == reply.text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == reply.text
    assert answer.usage is not None and answer.usage.prompt_tokens == reply.usage.prompt_tokens


def test_calls_follow_their_schema(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice)
        (call,) = answer.choices[0].message.tool_calls or ()
        arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
        assert set(arguments) == ({"city", "unit"} if call.function.name == "weather" else set())  # type: ignore[union-attr]
        assert answer.choices[0].finish_reason == "tool_calls"


def test_structured_answer_follows_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["unit"] in ("C", "F")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"messages": [{"role": "user", "content": "x " * 1200}]}, "context_length_exceeded"),
        ({"max_tokens": 5000}, "context_length_exceeded"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "x"}},
                }
            },
            "unsupported_parameter",
        ),
    ],
)
def test_request_is_refused_when_the_engine_cannot(client: openai.OpenAI, options: Any, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **options})
    assert refused.value.code == code


def test_crowd_is_answered_alike_when_computed_together(server: Live) -> None:
    async def one(client: openai.AsyncOpenAI, said: str) -> str:
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": said}], max_tokens=12
        )
        return answer.choices[0].message.content or ""

    async def main() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await one(client, f"question {i}") for i in range(4)]
            return alone, await asyncio.gather(*(one(client, f"question {i % 4}") for i in range(40)))

    alone, together = asyncio.run(main())
    assert together == alone * 10


def test_engine_stops_when_the_client_leaves(server: Live) -> None:
    import httpx

    body = json.dumps({"messages": HELLO, "stream": True, "max_tokens": 900, "temperature": 0}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)

    def cancelled() -> int:
        page = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
        found = re.search(r'alambic_streams_total{model="tiny",reason="cancelled"} (\d+)', page)
        return int(found[1]) if found else 0

    before = cancelled()
    # So small a model may be done before a busy machine hears that the client has left: then it is left again.
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as leaver:
            leaver.sendall(head + body)
            assert leaver.recv(1000).startswith(b"HTTP/1.1 200 OK")
        end = time.monotonic() + 3
        while time.monotonic() < end:
            if cancelled() > before:
                return
            time.sleep(0.02)
    raise AssertionError("the answer was not cancelled")
