"""A writer for tests of the server and the terminal: deterministic, and slow, endless, stuck or broken when asked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from alambic.engines.toolcalls import HERMES
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.generation import Chunk, GenerationRequest, Reply, Timings, TokenLogprob, Usage
from alambic.serve.app import create_app
from alambic.serve.limits import LOOPBACK_NAMES, Limits
from alambic.serve.models import Loaded, LoadedWriter
from alambic.serve.server import Server, listen, url_of

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>'


class FakeWriter:
    """Repeats what the user said, unless the words of a message ask for something else."""

    context_tokens = 512

    def __init__(self, *capabilities: str, answer: str | None = None) -> None:
        self.capabilities = frozenset(capabilities or ("json_schema", "logprobs", "token_ids"))
        self.answer = answer
        self.seen: list[GenerationRequest] = []
        self.running = 0
        self.most_running = 0
        self.closed_early = 0
        self.pulled = 0
        self.release = threading.Event()
        self.entered = threading.Event()
        self._lock = threading.Lock()

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        said = said_by(request)
        with self._lock:
            self.seen.append(request)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        finished = False
        try:
            self.entered.set()
            _refuse(said, request)
            if "stuck" in said:
                self.release.wait(60)
            began = time.perf_counter()
            yield from self._pieces(said, request, began)
            finished = True
        finally:
            with self._lock:
                self.closed_early += not finished
                self.running -= 1  # last: who sees that nothing runs may count the rest

    def _pieces(self, said: str, request: GenerationRequest, began: float) -> Iterator[Chunk]:
        sampling = request.sampling
        tokens, reason = self._tokens(said, request), "stop"
        if sampling.max_tokens is not None and len(tokens) > sampling.max_tokens:
            tokens, reason = tokens[: sampling.max_tokens], "length"
        prompt = len(said.split())
        for i, token in enumerate(tokens):
            if "slow" in said:
                time.sleep(0.02)
            if "pause" in said and i == 2:
                self.release.wait(60)
            if "break" in said and i == 2:
                raise RuntimeError("secret inside of the engine")
            self.pulled += 1
            logprobs = (TokenLogprob(token, -0.5),) if sampling.logprobs else ()
            yield Chunk(token, logprobs)
        timings = Timings(prompt_ms=2.0, generation_ms=1000 * (time.perf_counter() - began))
        yield Chunk("", finish_reason=reason, usage=Usage(prompt, len(tokens), 1), timings=timings)  # type: ignore[arg-type]

    def _tokens(self, said: str, request: GenerationRequest) -> list[str]:
        if "endless" in said or "flood" in said:
            return _Endless("word " * (20 if "endless" in said else 4000))  # type: ignore[return-value]
        text = self.answer if self.answer is not None else f"You said: {said}"
        if request.sampling.json_schema is not None:
            text = json.dumps(example_of(request.sampling.json_schema, request.sampling.json_schema))
        elif request.chat is not None and request.chat.tools and "weather" in said:
            text = f"Let me look.\n{CALL}"
        for stop in request.sampling.stop:
            text = text.partition(stop)[0]
        return re.findall(r"\s*\S+|\s+$", text)

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        raise AssertionError("the server streams")

    def token_ids(self, request: GenerationRequest) -> list[int]:
        return list(range(len(said_by(request).split())))

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        raise EngineError("no scores here")

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def close(self) -> None:
        self.release.set()


class _Endless:
    """Words without end, for a client that goes away."""

    def __init__(self, piece: str) -> None:
        self._piece = piece

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Iterator[str]:
        while True:
            time.sleep(0.0005)
            yield self._piece


def said_by(request: GenerationRequest) -> str:
    if request.chat is None:
        return request.text or ""
    return next((m.content for m in reversed(request.chat.messages) if m.role in ("user", "tool")), "")


def _refuse(said: str, request: GenerationRequest) -> None:
    if "too long" in said:
        raise InputTooLong("the prompt has 900 tokens; the model reads 512")
    if "explode" in said:
        raise RuntimeError("secret inside of the engine")
    if request.sampling.json_schema == {"enum": []}:
        raise EngineError("no text satisfies the schema at #: enum is empty")


def example_of(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Return the first value that comes to mind for a small schema."""
    if "$ref" in schema:
        found: Any = root
        for step in schema["$ref"].removeprefix("#").split("/")[1:]:
            found = found[step]
        return example_of(found, root)
    if "anyOf" in schema:
        return example_of(schema["anyOf"][-1], root)
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        return {key: example_of(value, root) for key, value in schema.get("properties", {}).items()}
    return {"integer": 7, "number": 0.5, "boolean": True, "array": []}.get(schema.get("type", ""), "Lyon")


@dataclass
class Live:
    """A server that answers on loopback."""

    url: str
    port: int
    server: Server


@contextmanager
def live(
    models: Mapping[str, Loaded], *, limits: Limits | None = None, api_key: str | None = None, close: bool = True
) -> Iterator[Live]:
    """Serve `models` by a real uvicorn in a thread; `close` frees writers first, so that stuck ones let it end."""
    listener = listen("127.0.0.1", 0)
    app = create_app(models, limits=limits, api_key=api_key, hosts=LOOPBACK_NAMES)
    answering = threading.Event()
    server = Server(app, on_ready=answering.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert answering.wait(60)
        yield Live(url_of(listener), listener.getsockname()[1], server)
    finally:
        for model in models.values():
            if close and isinstance(model, LoadedWriter):
                model.writer.close()
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert not thread.is_alive()


def loaded(writer: FakeWriter, **options: Any) -> LoadedWriter:
    """Return `writer` as the server takes it."""
    return LoadedWriter(writer, **{"tool_style": HERMES, "created": 1_700_000_000, "fingerprint": "fp_1", **options})
