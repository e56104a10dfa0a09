"""Anthropic's Messages API (https://docs.anthropic.com/en/api/messages), version 2023-06-01.

A JSON schema is followed by a forced tool whose input is the answer: every Claude model since 3 has that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alambic.engines.remote_http import Event, Transient
from alambic.engines.remote_piece import Calls, Piece, RemoteSpec
from alambic.errors import EngineError
from alambic.kinds.chat import Message
from alambic.kinds.generation import FinishReason, GenerationRequest, Usage

KEY_HEADER = "x-api-key"
HEADERS: Mapping[str, str] = {"anthropic-version": "2023-06-01"}
CAPABILITIES = frozenset({"json_schema", "tools"})
_ANSWER = "answer"  # the forced tool
_MAX_TOKENS = 4096  # the API wants a limit; this one every model allows
_FINISH: dict[str, FinishReason] = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}  # fmt: skip
_LASTING = ("invalid_request_error", "authentication_error", "permission_error", "not_found_error")


def path_of(request: GenerationRequest) -> str:
    """Return where the request goes, below the base address."""
    return "/v1/messages"


def body_of(request: GenerationRequest, spec: RemoteSpec) -> dict[str, Any]:
    """Write the request in Anthropic's form.

    Raises:
        EngineError: it asks for what this endpoint cannot do.
    """
    chat, sampling = request.chat, request.sampling
    if chat is None:
        raise EngineError("a raw prompt: Anthropic's API has conversations only")
    _check(request, spec)
    body: dict[str, Any] = {
        "model": spec.model,
        "stream": True,
        "max_tokens": sampling.max_tokens or spec.max_output_tokens or _MAX_TOKENS,
        "messages": _messages(chat.messages),
    }
    system = "\n\n".join(message.content for message in chat.messages if message.role == "system")
    if system:
        body["system"] = system
    if sampling.json_schema is not None:
        answer = "Give the answer as the input of this tool."
        body["tools"] = [{"name": _ANSWER, "description": answer, "input_schema": dict(sampling.json_schema)}]
        body["tool_choice"] = {"type": "tool", "name": _ANSWER, "disable_parallel_tool_use": True}
    elif chat.tools:
        body["tools"] = [_tool(tool) for tool in chat.tools]
    if spec.sampling:
        body["temperature"] = sampling.temperature
        body |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        body |= {"top_k": sampling.top_k} if sampling.top_k is not None else {}
    if sampling.stop:
        body["stop_sequences"] = list(sampling.stop)
    return {**body, **spec.body}


def _check(request: GenerationRequest, spec: RemoteSpec) -> None:
    """Refuse what the API has no field for, rather than leave it out in silence."""
    sampling = request.sampling
    faults = {
        "log-probabilities": sampling.logprobs,
        "a repetition, presence or frequency penalty": (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        ),
        "a temperature above 1": sampling.temperature > 1.0,
        "a JSON schema together with tools": (
            sampling.json_schema is not None and request.chat is not None and bool(request.chat.tools)
        ),
        "a JSON schema whose root is no object": (
            sampling.json_schema is not None and sampling.json_schema.get("type") != "object"
        ),
    }
    if not spec.sampling:
        sampled = sampling.temperature > 0 or sampling.top_p < 1 or sampling.top_k is not None
        faults[f"a temperature, top_p or top_k for {spec.model}"] = sampled
    asked = [name for name, fault in faults.items() if fault]
    if asked:
        raise EngineError(f"Anthropic's API does not take {' nor '.join(asked)}")


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {"name": function["name"], "description": function.get("description", ""), "input_schema": schema}


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the turns as blocks: answers of tools belong to a user's turn, and each names the call it answers."""
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls without an answer yet
    for i, message in enumerate(messages):
        if message.role == "system":
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks: list[dict[str, Any]] = []
        if message.role == "tool":
            answers = message.tool_call_id or (waiting[0] if waiting else "")
            waiting = [name for name in waiting if name != answers]
            blocks.append({"type": "tool_result", "tool_use_id": answers, "content": message.content})
        elif message.content:
            blocks.append({"type": "text", "text": message.content})
        for j, call in enumerate(message.tool_calls):
            name = call.id or f"call_{i}_{j}"
            waiting.append(name)
            blocks.append({"type": "tool_use", "id": name, "name": call.name, "input": dict(call.arguments)})
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


def read(events: Iterator[Event], request: GenerationRequest) -> Iterator[Piece]:
    """Read an answer; the last piece has how it ended.

    Raises:
        Transient: the stream breaks off, or holds something else.
        EngineError: the model refuses, or the API says no in the middle.
    """
    state = _State(as_json=request.sampling.json_schema is not None)
    for event in events:
        if event.failure is not None:
            if event.failure.startswith(_LASTING):
                raise EngineError(f"the API ends the answer: {event.failure}")
            raise Transient(event.failure)
        try:
            text = state.take(event.data)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise Transient(f"the server sent an answer of another form ({type(error).__name__})") from None
        if text:
            yield Piece(text)
    if state.stop == "refusal":
        raise EngineError("the model refused to answer")
    if state.stop is None or not state.ended:
        raise Transient("the answer broke off")
    finish = _FINISH.get(state.stop, "stop")
    if state.as_json:
        yield Piece("", finish_reason="stop" if finish == "tool_calls" else finish, usage=state.usage())
    else:
        yield Piece("", finish_reason=finish, usage=state.usage(), calls=state.calls.done())


class _State:
    """What has come so far."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.calls = Calls()
        self.stop: str | None = None
        self.ended = False
        self._read = self._cached = self._written = 0

    def take(self, data: Mapping[str, Any]) -> str:
        """Take one event, and return the text that it adds to the answer."""
        kind = data["type"]
        if kind == "message":  # a server that does not stream sends the whole
            return self._whole(data)
        if kind == "message_start":
            self._count(data["message"].get("usage") or {})
        elif kind == "message_delta":
            self._count(data.get("usage") or {})
            self.stop = data["delta"].get("stop_reason") or self.stop
        elif kind == "message_stop":
            self.ended = True
        elif kind == "content_block_start":
            block = data["content_block"]
            if block["type"] == "tool_use":
                self.calls.add(data["index"], block["id"], block["name"], "")
            return str(block.get("text") or "") if block["type"] == "text" else ""
        elif kind == "content_block_delta":
            return self._delta(data["index"], data["delta"])
        return ""

    def usage(self) -> Usage:
        return Usage(self._read + self._cached, self._written, self._cached)

    def _delta(self, index: int, delta: Mapping[str, Any]) -> str:
        if delta["type"] == "text_delta":
            return "" if self.as_json else str(delta["text"])
        if delta["type"] == "input_json_delta":
            if self.as_json:
                return str(delta["partial_json"])
            self.calls.add(index, None, None, str(delta["partial_json"]))
        return ""  # thoughts and signatures are not the answer

    def _whole(self, data: Mapping[str, Any]) -> str:
        self._count(data.get("usage") or {})
        self.stop, self.ended = data["stop_reason"], True
        texts = []
        for i, block in enumerate(data["content"]):
            if block["type"] == "text" and not self.as_json:
                texts.append(str(block["text"]))
            elif block["type"] == "tool_use" and self.as_json:
                texts.append(json.dumps(block["input"], ensure_ascii=False))
            elif block["type"] == "tool_use":
                self.calls.add(i, block["id"], block["name"], json.dumps(block["input"]))
        return "".join(texts)

    def _count(self, usage: Mapping[str, Any]) -> None:
        # Of the prompt, what was newly read, written to the provider's cache and taken from it are counted apart.
        read = int(usage.get("input_tokens") or 0) + int(usage.get("cache_creation_input_tokens") or 0)
        self._read = max(self._read, read)
        self._cached = max(self._cached, int(usage.get("cache_read_input_tokens") or 0))
        self._written = max(self._written, int(usage.get("output_tokens") or 0))
