"""`POST /v1/completions`: raw prompts, written on without any template."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import Response

from alambic.kinds.generation import GenerationRequest, TokenLogprob
from alambic.serve.answers import Answer, Answers, Step, timings_of, usage_of
from alambic.serve.bodies import OwnLogprob, Sampled, choice, json_kind, parse_body, sampling_of, unsupported
from alambic.serve.errors import ApiError
from alambic.serve.limits import Limits
from alambic.serve.models import LoadedWriter
from alambic.serve.openai_chat import DONE, LEAST_LOGPROB, checked_n, dumps, need_logprobs, reply
from alambic.serve.streams import Desk
from alambic.serve.tool_calls import Plain, Said

_MAX_TOKENS = 16  # OpenAI's default here: a raw prompt has no end of turn to stop at


class CompletionBody(Sampled):
    """The body of a text completion."""

    prompt: Any
    max_tokens: int | None = Field(None, ge=1)
    logprobs: OwnLogprob = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1)

    @field_validator("echo")
    @classmethod
    def _no_echo(cls, value: bool | None) -> bool | None:
        if value:
            raise unsupported("this server does not repeat the prompt; echo must be false")
        return value

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise unsupported("this server does not write between a prompt and a suffix")
        return value

    @field_validator("best_of")
    @classmethod
    def _no_best(cls, value: int | None) -> int | None:
        if value is not None and value > 1:
            raise unsupported("this server writes n answers and returns n; best_of must be 1")
        return value


@dataclass(frozen=True)
class CompletionRequest:
    """A request that was checked; its answers are ordered by prompt, `n` of each."""

    name: str
    model: LoadedWriter
    requests: tuple[GenerationRequest, ...]
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None


def read(body: CompletionBody, *, name: str, model: LoadedWriter, limits: Limits) -> CompletionRequest:
    """Check a body against what `model` can do.

    Raises:
        ApiError: 400; `param` names what is wrong.
    """
    prompts = _prompts(body.prompt)
    need_logprobs(model, asked=body.logprobs is not None)
    count = checked_n(body.n, limits, prompts=len(prompts))
    sampling = sampling_of(body, model, max_tokens=body.max_tokens or model.sampling.max_tokens or _MAX_TOKENS)
    # A raw prompt is not the task: its schema does not apply.
    sampling = replace(sampling, logprobs=body.logprobs is not None, json_schema=None)
    requests = [GenerationRequest(text=text, sampling=choice(sampling, i)) for text in prompts for i in range(count)]
    top = None if body.logprobs is None else body.logprobs if sampling.temperature == 0 else 0
    return CompletionRequest(name, model, tuple(requests), count, bool(body.stream), body.include_usage, top)


async def answer(request: Request, body: bytes, *, models: Any, desks: dict[str, Desk], limits: Limits) -> Response:
    """Answer one request.

    Raises:
        ApiError: it is refused.
    """
    parsed = parse_body(CompletionBody, body)
    name, model = models(parsed.model)
    asked = read(parsed, name=name, model=model, limits=limits)
    answers = Answers(desks[name], asked.requests, [Plain() for _ in asked.requests], param="prompt")
    return await reply(request, answers, _Frame(asked), stream=asked.stream)


def _prompts(value: object) -> list[str]:
    prompts: list[Any] = value if isinstance(value, list) else [value]
    if not prompts:
        raise ApiError(400, "empty_input", "'prompt' is an empty list; send at least one text", param="prompt")
    for i, prompt in enumerate(prompts):
        param = f"prompt[{i}]" if isinstance(value, list) else "prompt"
        if isinstance(prompt, int | list) and not isinstance(prompt, bool):
            message = f"'{param}' holds token ids; this server reads texts, with the model's own tokenizer"
            raise ApiError(400, "unsupported_parameter", message, param=param)
        if not isinstance(prompt, str):
            message = f"'{param}' is {json_kind(prompt)}; it must be a text or a list of texts"
            raise ApiError(400, "wrong_type", message, param=param)
        if not prompt:
            raise ApiError(400, "empty_text", f"'{param}' is empty: there is nothing to write on", param=param)
    return prompts


class _Frame:
    """Puts answers into OpenAI's form."""

    def __init__(self, asked: CompletionRequest) -> None:
        self._asked = asked
        self._head = {
            "id": "cmpl-" + secrets.token_hex(12),
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.name,
            "system_fingerprint": asked.model.fingerprint,
        }
        self._open = f'data: {dumps(self._head)[:-1]},"choices":[{{"index":'
        self._no_usage = ',"usage":null' if asked.include_usage else ""
        self._offsets = [0] * len(asked.requests)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        choices = [
            {
                "index": index,
                "text": answer.text,
                "logprobs": self._logprobs_of(index, answer.logprobs),
                "finish_reason": answer.reason,
            }
            for index, answer in enumerate(answers)
        ]
        totals = {"usage": usage_of(answers, n=self._asked.n), "timings": timings_of(answers, n=self._asked.n)}
        return {**self._head, "choices": choices, **totals}

    async def events(self, first: Step, steps: AsyncGenerator[Step, None], count: int) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream; an error after the first is an event of its own, and the last."""
        ended: dict[int, Answer] = {}
        try:
            async with aclosing(steps):
                yield self._step(first, ended, count)
                async for step in steps:
                    yield self._step(step, ended, count)
        except ApiError as error:
            yield f"data: {dumps({'error': error.body()})}\n\n".encode()
            return
        if self._asked.include_usage:
            yield f"data: {dumps({**self._head, 'choices': [], **self._totals(ended)})}\n\n".encode()
        yield DONE

    def _totals(self, ended: dict[int, Answer]) -> dict[str, Any]:
        answers = [ended[index] for index in sorted(ended)]
        return {"usage": usage_of(answers, n=self._asked.n), "timings": timings_of(answers, n=self._asked.n)}

    def _step(self, step: Step, ended: dict[int, Answer], count: int) -> bytes:
        text = "".join(piece.text for piece in step.pieces if isinstance(piece, Said))
        tail = ""
        if step.last is not None:
            ended[step.index] = answer = Answer()
            answer.add(Step(step.index, (), (), step.reason, step.last))
            if len(ended) == count and not self._asked.include_usage:
                tail = f',"timings":{dumps(self._totals(ended)["timings"])}'
        elif not text and not step.logprobs:
            return b""
        logprobs = dumps(self._logprobs_of(step.index, step.logprobs)) if step.logprobs else "null"
        said = f'"text":{dumps(text)},"logprobs":{logprobs},"finish_reason":{dumps(step.reason)}'
        return f"{self._open}{step.index},{said}}}]{self._no_usage}{tail}}}\n\n".encode(errors="replace")

    def _logprobs_of(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        logprobs = [max(entry.logprob, LEAST_LOGPROB) for entry in entries]
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry.token)
        tokens = [entry.token for entry in entries]
        top = [{token: logprob} for token, logprob in zip(tokens, logprobs, strict=True)]
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top if self._asked.logprobs else None,
            "text_offset": offsets,
        }
