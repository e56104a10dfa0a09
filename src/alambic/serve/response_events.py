"""The events of a streamed response: each names its item, the place of its text, and its own number."""

from __future__ import annotations

import json
import secrets
from typing import Any, Protocol

from alambic.kinds.generation import TokenLogprob
from alambic.serve.answers import Step
from alambic.serve.tool_calls import Argued, Called, Said

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Frame(Protocol):
    """What makes the items; see `alambic.serve.responses`."""

    def response(self, status: str, items: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return the response as it stands."""

    def message(self, item: str, text: str, logprobs: list[TokenLogprob], reason: str) -> dict[str, Any]:
        """Return the item of a whole message."""

    def part(self, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        """Return the content of a message."""

    def call(self, item: str, call: str, name: str, arguments: str, *, status: str = "completed") -> dict[str, Any]:
        """Return the item of a call."""

    def logprobs_of(self, entries: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
        """Return the log-probabilities of tokens."""


class Events:
    """Turns steps into events, and keeps the items that are whole.

    Items follow each other: a message ends where a call begins.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._number = 0
        self.items: list[dict[str, Any]] = []
        self._message: str | None = None
        self._text = ""
        self._logprobs: list[TokenLogprob] = []
        self._call: tuple[str, str, str] | None = None  # item, call, name
        self._arguments = ""
        self._delta = ""

    def begin(self) -> bytes:
        """Return the events before anything is written."""
        response = self._frame.response("in_progress")
        text = self._event("response.created", response=response)
        return (text + self._event("response.in_progress", response=response)).encode(errors="replace")

    def step(self, step: Step) -> bytes:
        """Return the events of one step."""
        text = ""
        logprobs = step.logprobs
        for piece in step.pieces:
            if isinstance(piece, Said):
                text += self._said(piece.text, logprobs)
                logprobs = ()
            elif isinstance(piece, Called):
                text += self._close("stop") + self._called(piece)
            else:
                assert isinstance(piece, Argued)
                text += self._argued(piece.text)
        if step.reason is not None:
            if not self.items and self._message is None and self._call is None:
                text += self._open_message()
            text += self._close(step.reason)
        return text.encode(errors="replace")

    def end(self, kind: str, response: dict[str, Any]) -> bytes:
        """Return the last event."""
        return self._event(kind, response=response).encode(errors="replace")

    def _said(self, said: str, logprobs: tuple[TokenLogprob, ...]) -> str:
        text = ""
        if self._message is None:
            text += self._close("stop") + self._open_message()
        self._text += said
        self._logprobs += logprobs
        entries = dumps(self._frame.logprobs_of(logprobs)) if logprobs else "[]"
        # The usual event, and the only one worth making cheap.
        self._number += 1
        return f'{text}{self._delta}{self._number - 1},"delta":{dumps(said)},"logprobs":{entries}}}\n\n'

    def _open_message(self) -> str:
        self._message = item = "msg_" + secrets.token_hex(12)
        index = len(self.items)
        empty = self._frame.message(item, "", [], "stop") | {"status": "in_progress", "content": []}
        place = {"item_id": item, "output_index": index, "content_index": 0}
        text = self._event("response.output_item.added", output_index=index, item=empty)
        text += self._event("response.content_part.added", **place, part=self._frame.part("", []))
        kind = "response.output_text.delta"
        self._delta = f'event: {kind}\ndata: {dumps({"type": kind, **place})[:-1]},"sequence_number":'
        return text

    def _called(self, piece: Called) -> str:
        item = "fc_" + secrets.token_hex(12)
        self._call, self._arguments = (item, piece.id, piece.name), ""
        call = self._frame.call(item, piece.id, piece.name, "", status="in_progress")
        return self._event("response.output_item.added", output_index=len(self.items), item=call)

    def _argued(self, arguments: str) -> str:
        assert self._call is not None
        self._arguments += arguments
        place = {"item_id": self._call[0], "output_index": len(self.items)}
        return self._event("response.function_call_arguments.delta", **place, delta=arguments)

    def _close(self, reason: str) -> str:
        """End the item that is open, if one is."""
        index = len(self.items)
        if self._call is not None:
            item, call, name = self._call
            whole = self._frame.call(item, call, name, self._arguments)
            done = {"item_id": item, "output_index": index, "name": name, "arguments": self._arguments}
            text = self._event("response.function_call_arguments.done", **done)
            self._call = None
        elif self._message is not None:
            whole = self._frame.message(self._message, self._text, self._logprobs, reason)
            place = {"item_id": self._message, "output_index": index, "content_index": 0}
            logprobs = self._frame.logprobs_of(self._logprobs)
            text = self._event("response.output_text.done", **place, text=self._text, logprobs=logprobs)
            text += self._event("response.content_part.done", **place, part=whole["content"][0])
            self._message, self._text, self._logprobs = None, "", []
        else:
            return ""
        self.items.append(whole)
        return text + self._event("response.output_item.done", output_index=index, item=whole)

    def _event(self, kind: str, **data: Any) -> str:
        number, self._number = self._number, self._number + 1
        return f"event: {kind}\ndata: {dumps({'type': kind, **data, 'sequence_number': number})}\n\n"
