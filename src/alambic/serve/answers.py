"""The answers to one request: opened, read as content and calls, collected or passed on, cancelled.

Every endpoint that writes uses this: it gives the requests to the desk and gets `Step`s back, or whole answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alambic.kinds.generation import Chunk, FinishReason, GenerationRequest, Timings, TokenLogprob, Usage
from alambic.serve.errors import ApiError, from_writer
from alambic.serve.streams import Cancelled, Desk, Stream, WriterFailed
from alambic.serve.tool_calls import Called, Piece, Reads, Said

_QUEUED_STEPS = 16
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Step:
    """What one read brought.

    Attributes:
        index: of the answer.
        pieces: new content and calls.
        logprobs: of the tokens read.
        reason: why it ended, in OpenAI's words; None before the end.
        last: the writer's last chunk, with usage and timings.
    """

    index: int
    pieces: Sequence[Piece]
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: str | None = None
    last: Chunk | None = None


@dataclass
class Answer:
    """A whole answer.

    Attributes:
        text: content.
        calls: (id, name, JSON text of the arguments).
        reason: why it ended, in OpenAI's words.
    """

    text: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str = "stop"
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    timings: Timings = field(default_factory=lambda: Timings(0.0, 0.0))

    def add(self, step: Step) -> None:
        """Take in `step`."""
        for piece in step.pieces:
            if isinstance(piece, Said):
                self.text += piece.text
            elif isinstance(piece, Called):
                self.calls.append((piece.id, piece.name, ""))
            else:
                call, name, text = self.calls[piece.index]
                self.calls[piece.index] = call, name, text + piece.text
        self.logprobs += step.logprobs
        if step.last is not None:
            assert step.reason is not None and step.last.usage is not None and step.last.timings is not None
            self.reason, self.usage, self.timings = step.reason, step.last.usage, step.last.timings


class Answers:
    """The answers to one request. Iterate `steps` once, or await `collect`; `cancel` ends them at any time."""

    def __init__(
        self, desk: Desk, requests: Sequence[GenerationRequest], readers: Sequence[Reads], *, param: str
    ) -> None:
        self._desk = desk
        self._requests = requests
        self._readers = readers
        self._param = param
        self._streams: list[Stream] = []
        self._cancelled = False

    def __len__(self) -> int:
        return len(self._requests)

    def cancel(self) -> None:
        """Stop all that is being written."""
        self._cancelled = True
        for stream in self._streams:
            stream.cancel()

    async def collect(self) -> list[Answer]:
        """Return all answers, whole.

        Raises:
            ApiError: one cannot be written.
        """
        answers = [Answer() for _ in self._requests]
        async with aclosing(self.steps()) as steps:
            async for step in steps:
                answers[step.index].add(step)
        return answers

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield what is written, of all answers as it comes.

        Raises:
            ApiError: one cannot be written.
            Cancelled: after `cancel`.
        """
        try:
            async with aclosing(self._follow(0) if len(self._requests) == 1 else self._merged()) as steps:
                async for step in steps:
                    yield step
        finally:
            self.cancel()

    async def _follow(self, index: int) -> AsyncGenerator[Step, None]:
        reader = self._readers[index]
        stream = await self._desk.open(self._requests[index])
        self._streams.append(stream)
        if self._cancelled:
            stream.cancel()
        begun = False
        try:
            while (chunk := await stream.read()) is not None:
                if not begun:
                    begun = True
                    self._desk.heard(stream)
                pieces = reader.feed(chunk.text)
                if chunk.finish_reason is None:
                    yield Step(index, pieces, chunk.logprobs)
                    continue
                pieces = [*pieces, *reader.end()]
                yield Step(index, pieces, chunk.logprobs, _reason(chunk.finish_reason, reader), chunk)
        except WriterFailed as failure:
            raise from_writer(failure.error, param=self._param, begun=begun) from failure.error
        finally:
            stream.cancel()

    async def _merged(self) -> AsyncGenerator[Step, None]:
        queue: asyncio.Queue[Step | BaseException | None] = asyncio.Queue(_QUEUED_STEPS)

        async def run(index: int) -> None:
            async with aclosing(self._follow(index)) as steps:
                async for step in steps:
                    await queue.put(step)

        async def watched(index: int) -> None:
            ended = asyncio.ensure_future(run(index))
            try:
                await asyncio.wait([ended])
                await queue.put(ended.exception())
            finally:
                ended.cancel()

        tasks = [asyncio.ensure_future(watched(index)) for index in range(len(self._requests))]
        try:
            left = len(tasks)
            while left:
                step = await queue.get()
                if isinstance(step, BaseException):
                    raise step
                if step is None:
                    left -= 1
                else:
                    yield step
        finally:
            for task in tasks:
                task.cancel()


def _reason(reason: FinishReason, reader: Reads) -> str:
    """Return why an answer ended, in OpenAI's words.

    Raises:
        ApiError: 503 when it was the engine that gave up, which happens when it is closed.
    """
    if reason == "cancelled":
        raise ApiError(503, "shutting_down", "the server is stopping", headers={"Retry-After": "5"})
    if reason == "length":
        return reason
    return "tool_calls" if reader.calls else "stop"


async def while_here(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """Return what `work` returns, or None (and cancel it) when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def disconnected(receive: Receive) -> None:
    """Return once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. When the client goes away, or the server stops, the answers are cancelled."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], answers: Answers) -> None:
        self._events = events
        self._answers = answers
        self.status_code = 200
        self.background = None
        # Proxies would gather the pieces otherwise.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        gone = asyncio.ensure_future(disconnected(receive))
        gone.add_done_callback(lambda _: self._answers.cancel())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Cancelled:
            pass
        finally:
            gone.cancel()
            self._answers.cancel()


def tokens_of(answers: Sequence[Answer], *, n: int = 1) -> Usage:
    """Sum the tokens of the answers to one request: each prompt counts once, however many (`n`) its answers."""
    prompts = [answer.usage for answer in answers[::n]]
    cached = [usage.cached_tokens for usage in prompts if usage.cached_tokens is not None]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        completion_tokens=sum(answer.usage.completion_tokens for answer in answers),
        cached_tokens=sum(cached) if len(cached) == len(prompts) else None,
    )


def usage_of(answers: Sequence[Answer], *, n: int = 1) -> dict[str, Any]:
    """Return OpenAI's `usage`."""
    tokens = tokens_of(answers, n=n)
    told = tokens.cached_tokens is not None
    return {
        "prompt_tokens": tokens.prompt_tokens,
        "completion_tokens": tokens.completion_tokens,
        "total_tokens": tokens.prompt_tokens + tokens.completion_tokens,
        **({"prompt_tokens_details": {"cached_tokens": tokens.cached_tokens}} if told else {}),
    }


def timings_of(answers: Sequence[Answer], *, n: int = 1) -> dict[str, float]:
    """Return `timings`: tokens as in `usage`; of answers written at the same time, the milliseconds of the slowest."""
    tokens = tokens_of(answers, n=n)
    timings = [answer.timings for answer in answers]
    return {
        "queue_ms": round(max(each.queue_ms for each in timings), 3),
        "prompt_tokens": tokens.prompt_tokens,
        "prompt_ms": round(max(each.prompt_ms for each in timings), 3),
        "generated_tokens": tokens.completion_tokens,
        "generated_ms": round(max(each.generation_ms for each in timings), 3),
    }
