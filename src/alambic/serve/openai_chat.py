"""`POST /v1/chat/completions`: reads a request, has it written, answers whole or as a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alambic.kinds.generation import GenerationRequest, TokenLogprob
from alambic.serve.answers import Answer, Answers, EventStream, Step, timings_of, usage_of, while_here
from alambic.serve.bodies import OwnLogprob, Sampled, choice, conversation, parse_body, sampling_of, unsupported
from alambic.serve.constraints import Form, form_of, schema_of
from alambic.serve.errors import CLIENT_GONE, ApiError
from alambic.serve.limits import Limits
from alambic.serve.models import LoadedWriter
from alambic.serve.streams import Cancelled, Desk
from alambic.serve.tool_calls import Argued, Called, Piece, Said

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
LEAST_LOGPROB = -9999.0  # OpenAI's for a token that could not be expected; JSON has no infinity
DONE = b"data: [DONE]\n\n"
_ROLES = {"developer": "system", "function": "tool"}


class ChatBody(Sampled):
    """The body of a chat completion."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    logprobs: bool | None = None
    top_logprobs: OwnLogprob = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None

    @field_validator("functions", "function_call")
    @classmethod
    def _old(cls, value: Any) -> Any:
        if value is not None:
            raise unsupported("it was replaced by tools and tool_choice")
        return value

    @field_validator("modalities")
    @classmethod
    def _text(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and value != ["text"]:
            raise unsupported("this server writes text only")
        return value


@dataclass(frozen=True)
class ChatRequest:
    """A request that was checked."""

    name: str
    model: LoadedWriter
    requests: tuple[GenerationRequest, ...]
    form: Form
    stream: bool
    include_usage: bool
    top_logprobs: int


def read(body: ChatBody, *, name: str, model: LoadedWriter, limits: Limits) -> ChatRequest:
    """Check a body against what `model` can do.

    Raises:
        ApiError: 400; `param` names what is wrong.
    """
    most = 1 if body.parallel_tool_calls is False else None
    schema = schema_of(body.response_format, param="response_format")
    form = form_of(model, tools=body.tools, choice=body.tool_choice, schema=schema, most_calls=most)
    messages = [
        {**message, "role": _ROLES.get(message.get("role", ""), message.get("role"))}
        if isinstance(message.get("role"), str)
        else message
        for message in body.messages
    ]
    chat = model.asked(conversation(messages, form.tools))
    need_logprobs(model, asked=bool(body.logprobs))
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "invalid_value", "'top_logprobs' needs logprobs = true", param="top_logprobs")
    sampling = sampling_of(body, model, max_tokens=body.max_completion_tokens or body.max_tokens)
    sampling = form.constrain(replace(sampling, logprobs=bool(body.logprobs)), stop=body.stop)
    count = checked_n(body.n, limits)
    requests = tuple(GenerationRequest(chat=chat, sampling=choice(sampling, i)) for i in range(count))
    # The one token whose probability is known is the likeliest only when it was chosen for that.
    top = (body.top_logprobs or 0) if sampling.temperature == 0 else 0
    return ChatRequest(name, model, requests, form, bool(body.stream), body.include_usage, top)


def need_logprobs(model: LoadedWriter, *, asked: bool) -> None:
    """Refuse log-probabilities that the engine does not give.

    Raises:
        ApiError: 400.
    """
    if asked and not model.can("logprobs"):
        message = "'logprobs': the engine of this model gives no log-probabilities"
        raise ApiError(400, "unsupported_parameter", message, param="logprobs")


def checked_n(n: int | None, limits: Limits, *, prompts: int = 1) -> int:
    """Return how many answers are asked of each prompt.

    Raises:
        ApiError: 400.
    """
    count = 1 if n is None else n
    if count * prompts > limits.max_choices:
        message = f"'n' asks for {count * prompts} answers; one request gets at most {limits.max_choices}"
        raise ApiError(400, "invalid_value", message, param="n")
    return count


async def answer(request: Request, body: bytes, *, models: Any, desks: dict[str, Desk], limits: Limits) -> Response:
    """Answer one request.

    Raises:
        ApiError: it is refused.
    """
    parsed = parse_body(ChatBody, body)
    name, model = models(parsed.model)
    chat = read(parsed, name=name, model=model, limits=limits)
    answers = Answers(desks[name], chat.requests, [chat.form.reader() for _ in chat.requests], param="messages")
    return await reply(request, answers, _Frame(chat), stream=chat.stream)


class Frame(Protocol):
    """Puts answers into the form of one API."""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        ...

    def events(self, first: Step, steps: AsyncGenerator[Step, None], count: int) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream of `count` answers: of a first step and of those that follow."""
        ...


async def reply(request: Request, answers: Answers, frame: Frame, *, stream: bool) -> Response:
    """Answer whole, or with events; a client that went away gets nothing.

    Raises:
        ApiError: the model refuses the request, or fails before the first piece.
    """
    try:
        if stream:
            return await _stream(request, answers, frame)
        whole = await while_here(request, answers.collect())
    except Cancelled:
        whole = None
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(frame.whole(whole))


async def _stream(request: Request, answers: Answers, frame: Frame) -> Response:
    """Answer with events once the first piece is there: what is refused before it has a status of its own."""
    steps = answers.steps()
    first = await while_here(request, anext(steps))
    if first is None:
        await steps.aclose()
        return Response(status_code=CLIENT_GONE)
    return EventStream(frame.events(first, steps, len(answers)), answers)


class _Frame:
    """Puts answers into OpenAI's form. What repeats in each event is written once."""

    def __init__(self, chat: ChatRequest) -> None:
        self._chat = chat
        self._head = {
            "id": "chatcmpl-" + secrets.token_hex(12),
            "created": int(time.time()),
            "model": chat.name,
            "system_fingerprint": chat.model.fingerprint,
        }
        chunk = dumps({**self._head, "object": "chat.completion.chunk"})[:-1]
        self._open = f'data: {chunk},"choices":[{{"index":'
        self._no_usage = ',"usage":null' if chat.include_usage else ""
        self._logprobs = any(request.sampling.logprobs for request in chat.requests)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        count = len(answers)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_of(answers, n=count),
            "timings": timings_of(answers, n=count),
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        content = None if answer.calls and not answer.text else answer.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer.calls:
            message["tool_calls"] = [
                {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call, name, arguments in answer.calls
            ]
        logprobs = self._logprobs_of(answer.logprobs) if self._logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.reason}

    async def events(self, first: Step, steps: AsyncGenerator[Step, None], count: int) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream; an error after the first is an event of its own, and the last."""
        ended: list[Answer] = []
        yield "".join(
            self._event(i, {"role": "assistant", "content": "", "refusal": None}) for i in range(count)
        ).encode()
        try:
            async with aclosing(steps):
                yield self._step(first, ended, count)
                async for step in steps:
                    yield self._step(step, ended, count)
        except ApiError as error:
            yield f"data: {dumps({'error': error.body()})}\n\n".encode()
            return
        if self._chat.include_usage:
            last = {"choices": [], "usage": usage_of(ended, n=count), "timings": timings_of(ended, n=count)}
            yield f"data: {dumps({**self._head, 'object': 'chat.completion.chunk', **last})}\n\n".encode()
        yield DONE

    def _step(self, step: Step, ended: list[Answer], count: int) -> bytes:
        """Return the events of one step; log-probabilities go with the first of them."""
        logprobs = self._logprobs_of(step.logprobs) if step.logprobs and self._logprobs else None
        text = ""
        for piece in step.pieces:
            text += self._piece(step.index, piece, logprobs)
            logprobs = None
        if logprobs is not None:
            text += self._event(step.index, {}, logprobs=logprobs)
        if step.last is not None:
            answer = Answer()
            answer.add(Step(step.index, (), (), step.reason, step.last))
            ended.append(answer)
            last = len(ended) == count and not self._chat.include_usage
            tail = f',"timings":{dumps(timings_of(ended, n=count))}' if last else ""
            text += self._event(step.index, {}, reason=step.reason, tail=tail)
        return text.encode(errors="replace")

    def _piece(self, index: int, piece: Piece, logprobs: dict[str, Any] | None) -> str:
        if isinstance(piece, Said):
            if logprobs is None:  # the usual event, and the only one worth making cheap
                quoted = dumps(piece.text)
                end = f'"logprobs":null,"finish_reason":null}}]{self._no_usage}}}\n\n'
                return f'{self._open}{index},"delta":{{"content":{quoted}}},{end}'
            return self._event(index, {"content": piece.text}, logprobs=logprobs)
        if isinstance(piece, Called):
            function = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
        else:
            assert isinstance(piece, Argued)
            call = {"index": piece.index, "function": {"arguments": piece.text}}
        return self._event(index, {"tool_calls": [call]}, logprobs=logprobs)

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        tail: str = "",
    ) -> str:
        said = f'"delta":{dumps(delta)},"logprobs":{dumps(logprobs)},"finish_reason":{dumps(reason)}'
        return f"{self._open}{index},{said}}}]{self._no_usage}{tail}}}\n\n"

    def _logprobs_of(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": [logprob_of(entry, top=self._chat.top_logprobs) for entry in entries], "refusal": None}


def logprob_of(entry: TokenLogprob, *, top: int) -> dict[str, Any]:
    """Return OpenAI's entry for one token."""
    logprob = max(entry.logprob, LEAST_LOGPROB)
    own = {"token": entry.token, "logprob": logprob, "bytes": list(entry.token.encode(errors="replace"))}
    return {**own, "top_logprobs": [own] if top else []}
