"""`POST /v1/responses`: OpenAI's newer form. Nothing is stored: each request brings its whole conversation."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import Response

from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, TokenLogprob
from alambic.serve.answers import Answer, Answers, Step, timings_of, tokens_of
from alambic.serve.bodies import Body, OwnLogprob, conversation, json_kind, parse_body, sampled, unsupported
from alambic.serve.constraints import Form, form_of, schema_of
from alambic.serve.errors import ApiError
from alambic.serve.limits import Limits
from alambic.serve.models import LoadedWriter
from alambic.serve.openai_chat import logprob_of, need_logprobs, reply
from alambic.serve.response_events import Events
from alambic.serve.streams import Desk

_LOGPROBS = "message.output_text.logprobs"
_FROM = "item"  # key of a message under which the item that made it is named
_KEPT_NOWHERE = "this server keeps no conversations; send the whole of it in input"


class TextConfig(Body):
    """`text`."""

    format: Any = None


class ResponseBody(Body):
    """The body of a request."""

    input: Any
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: OwnLogprob = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    prompt: Any = None
    user: Any = None

    @field_validator("previous_response_id", "conversation")
    @classmethod
    def _no_memory(cls, value: Any) -> Any:
        if value is not None:
            raise unsupported(_KEPT_NOWHERE)
        return value

    @field_validator("background")
    @classmethod
    def _no_background(cls, value: bool | None) -> bool | None:
        if value:
            raise unsupported("this server answers while the client waits")
        return value

    @field_validator("truncation")
    @classmethod
    def _no_cut(cls, value: str | None) -> str | None:
        if value == "auto":
            raise unsupported("a conversation is never cut here; it is refused when it does not fit")
        return value

    @field_validator("prompt")
    @classmethod
    def _no_prompt(cls, value: Any) -> Any:
        if value is not None:
            raise unsupported("this server has no stored prompts; use instructions and input")
        return value


@dataclass(frozen=True)
class ResponseRequest:
    """A request that was checked.

    Attributes:
        echo: what of the request the answer repeats, as OpenAI's does.
    """

    name: str
    model: LoadedWriter
    request: GenerationRequest
    form: Form
    stream: bool
    top_logprobs: int
    echo: dict[str, Any]


def read(body: ResponseBody, *, name: str, model: LoadedWriter) -> ResponseRequest:
    """Check a body against what `model` can do.

    Raises:
        ApiError: 400; `param` names what is wrong.
    """
    given = body.text.format if body.text is not None else None
    tools = [_nested(tool) for tool in body.tools or ()]
    form = form_of(
        model,
        tools=tools,
        choice=body.tool_choice,
        schema=schema_of(given, param="text.format"),
        most_calls=1 if body.parallel_tool_calls is False else None,
        schema_param="text.format",
    )
    messages = _messages(body.input)
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions, _FROM: "instructions"})
    chat = model.asked(_conversation(messages, form.tools))
    logprobs = _LOGPROBS in (body.include or ())
    need_logprobs(model, asked=logprobs)
    wanted = {"temperature": body.temperature, "top_p": body.top_p, "max_tokens": body.max_output_tokens}
    sampling = form.constrain(replace(sampled(model, wanted), logprobs=logprobs), stop=())
    echo = {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": sampling.temperature,
        "text": {"format": given or {"type": "text"}},
        "tool_choice": body.tool_choice if body.tool_choice is not None else "auto",
        "tools": list(body.tools or ()),
        "top_p": sampling.top_p,
    }
    top = (body.top_logprobs or 0) if sampling.temperature == 0 else 0
    request = GenerationRequest(chat=chat, sampling=sampling)
    return ResponseRequest(name, model, request, form, bool(body.stream), top, echo)


async def answer(request: Request, body: bytes, *, models: Any, desks: dict[str, Desk], limits: Limits) -> Response:
    """Answer one request.

    Raises:
        ApiError: it is refused.
    """
    parsed = parse_body(ResponseBody, body)
    name, model = models(parsed.model)
    asked = read(parsed, name=name, model=model)
    answers = Answers(desks[name], [asked.request], [asked.form.reader()], param="input")
    return await reply(request, answers, _Frame(asked), stream=asked.stream)


def _conversation(messages: list[dict[str, Any]], tools: Any) -> Chat:
    """Read a conversation; a fault is named by the item that it came from.

    Raises:
        ApiError: 400.
    """
    try:
        return conversation(messages, tools)
    except ApiError as error:
        place = re.match(r"messages\[(\d+)\]", error.param or "")
        if place is None:
            raise
        item = messages[int(place[1])][_FROM]
        message = error.message.replace(error.param or "", item)
        raise ApiError(error.status, error.code, message, param=item) from error


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a flat tool of the Responses API in the form of chat completions."""
    if tool.get("type", "function") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {key: tool[key] for key in tool if key != "type" and tool[key] is not None}}


def _messages(given: object) -> list[dict[str, Any]]:
    """Read `input`: a text, or a list of items."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        message = f"'input' is {json_kind(given)}; it must be a text or a list of items"
        raise ApiError(400, "wrong_type", message, param="input")
    if not given:
        raise ApiError(400, "empty_input", "'input' is an empty list; send at least one item", param="input")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            message = f"'input[{i}]' is {json_kind(item)}; it must be an object"
            raise ApiError(400, "wrong_type", message, param=f"input[{i}]")
        _add(messages, item, f"input[{i}]")
    if not messages:
        raise ApiError(400, "empty_input", "'input' holds no message", param="input")
    return messages


def _add(messages: list[dict[str, Any]], item: dict[str, Any], param: str) -> None:
    """Add `item` to the conversation; calls of one turn stand in one message of the assistant."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        role = "system" if role == "developer" else role
        messages.append({"role": role, "content": item.get("content"), _FROM: param})
    elif kind == "function_call":
        call = {"id": item.get("call_id"), "function": {"name": item.get("name"), "arguments": item.get("arguments")}}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call], _FROM: param})
    elif kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str | list) else json.dumps(output, ensure_ascii=False)
        messages.append({"role": "tool", "content": text, "tool_call_id": item.get("call_id"), _FROM: param})
    elif kind != "reasoning":  # what an earlier model thought is no part of the conversation
        message = f"'{param}.type' is {str(kind)[:80]!r}; known: message, function_call, function_call_output"
        raise ApiError(400, "unsupported_parameter", message, param=f"{param}.type")


class _Frame:
    """Puts an answer into the form of the Responses API."""

    def __init__(self, asked: ResponseRequest) -> None:
        self._asked = asked
        self._id = "resp_" + secrets.token_hex(16)
        self._created = int(time.time())

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        (answer,) = answers
        items = []
        if answer.text or not answer.calls:
            items.append(self.message("msg_" + secrets.token_hex(12), answer.text, answer.logprobs, answer.reason))
        for call, name, arguments in answer.calls:
            items.append(self.call("fc_" + secrets.token_hex(12), call, name, arguments))
        return self.ended(answer, items)

    async def events(self, first: Step, steps: AsyncGenerator[Step, None], _count: int) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream; after a failure the last one is `response.failed`."""
        events = Events(self)
        yield events.begin()
        whole = Answer()
        try:
            async with aclosing(steps):
                whole.add(first)
                yield events.step(first)
                async for step in steps:
                    whole.add(step)
                    yield events.step(step)
        except ApiError as error:
            failed = self.response("failed") | {"error": {"code": "server_error", "message": error.message}}
            yield events.end("response.failed", failed)
            return
        response = self.ended(whole, events.items)
        yield events.end("response." + response["status"], response)

    def ended(self, answer: Answer, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the response that holds `items`, once all is written."""
        cut = answer.reason == "length"
        tokens = tokens_of([answer])
        response = self.response("incomplete" if cut else "completed", items)
        cached = (
            {} if tokens.cached_tokens is None else {"input_tokens_details": {"cached_tokens": tokens.cached_tokens}}
        )
        return response | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": tokens.prompt_tokens,
                **cached,
                "output_tokens": tokens.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens.prompt_tokens + tokens.completion_tokens,
            },
            "timings": timings_of([answer]),
        }

    def response(self, status: str, items: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return the response as it stands."""
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._asked.name,
            "output": items or [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            **self._asked.echo,
        }

    def message(self, item: str, text: str, logprobs: list[TokenLogprob], reason: str) -> dict[str, Any]:
        """Return the item of a whole message."""
        status = "incomplete" if reason == "length" else "completed"
        return {
            "id": item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self.part(text, logprobs)],
        }

    def part(self, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        """Return the content of a message."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs_of(logprobs)}

    def call(self, item: str, call: str, name: str, arguments: str, *, status: str = "completed") -> dict[str, Any]:
        """Return the item of a call."""
        return {
            "id": item,
            "type": "function_call",
            "status": status,
            "call_id": call,
            "name": name,
            "arguments": arguments,
        }

    def logprobs_of(self, entries: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
        """Return the log-probabilities of tokens."""
        return [logprob_of(entry, top=self._asked.top_logprobs) for entry in entries]
