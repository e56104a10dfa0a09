"""Tool calls out of the text that a model writes, in the form that its own chat template teaches.

    style = style_of(template)                       # None: the template writes no calls
    content, calls = parse(text, style)
    splitter = Splitter(style); splitter.push(piece)  # the same while the text comes

The form is found by rendering a conversation that holds a call, so a template never seen before works as long as it
writes calls as JSON: Qwen and Hermes ``<tool_call>{...}</tool_call>``, Llama 3 bare ``{"name", "parameters"}``, Mistral
``[TOOL_CALLS][{...}]`` and ``[TOOL_CALLS]name[ARGS]{...}``, our plain template. What does not parse stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alambic.engines.detokenise import overlap
from alambic.errors import TemplateError
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.render import ChatTemplate

_NAME, _KEY, _VALUE = "probe_function", "probe_argument", "probe_value"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "probe",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}
_WORD = re.compile(r"[A-Za-z_][\w.\-]*")
_BARE_MARKS = ("<|python_tag|>",)  # what Llama 3 may write before a bare call
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolStyle:
    """How a template writes a call.

    Attributes:
        begin: text before a call; empty: the whole answer is the call.
        end: text after a call; may be empty.
        name_key: key of the function's name in the JSON object; None: the name stands outside of it.
        arguments_key: key of the arguments; None: the object is the arguments.
        between: text between name and arguments when the name stands outside.
    """

    begin: str
    end: str
    name_key: str | None
    arguments_key: str | None
    between: str = ""


HERMES = ToolStyle("<tool_call>", "</tool_call>", "name", "arguments")


def style_of(template: ChatTemplate) -> ToolStyle | None:
    """Return how `template` writes tool calls, None when it writes none, or not as JSON."""
    user = Message("user", "probe")
    call = ToolCall(_NAME, {_KEY: _VALUE}, "abcdefghi")  # Mistral's template takes ids of nine letters only
    try:
        before = template.render(Chat((user,), (_TOOL,)), reply=True)
        plain = template.render(Chat((user, Message("assistant", "probe")), (_TOOL,)))
        whole = template.render(Chat((user, Message("assistant", "", (call,))), (_TOOL,)))
    except TemplateError:
        return None
    start = len(before) if whole.startswith(before) else whole.find("probe") + len("probe")
    said = whole[start : len(whole) - _common_end(plain, whole)]
    return _style(said)


def parse(text: str, style: ToolStyle | None) -> tuple[str, tuple[ToolCall, ...]]:
    """Split an answer into content and calls; a call that does not parse stays in the content."""
    splitter = Splitter(style)
    pieces = [*splitter.push(text), *splitter.finish()]
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = tuple(piece for piece in pieces if isinstance(piece, ToolCall))
    return (content.strip() if calls else content), calls


class Splitter:
    """The same piece by piece: text that may be the beginning of a call is held back until that is known."""

    def __init__(self, style: ToolStyle | None) -> None:
        self._style = style
        self._held = ""
        self._inside = False  # after `begin`, or in an answer that may be one bare call
        self._started = False
        self.calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """Take the next text; return content and whole calls, in order."""
        if self._style is None:
            return [text] if text else []
        self._held += text
        return list(_joined(self._bare() if not self._style.begin else self._marked(self._style)))

    def finish(self) -> list[str | ToolCall]:
        """The answer is over: return what was held back, as calls where it parses."""
        held, self._held = self._held, ""
        if not self._inside or self._style is None:
            return [held] if held else []
        body = held.removeprefix(self._style.begin)
        for mark in _BARE_MARKS if not self._style.begin else ():
            body = body.strip().removeprefix(mark)
        found = read_calls(body, self._style)
        if found is None:
            return [held] if held else []
        self.calls += len(found)
        return list(found)

    def _bare(self) -> Iterator[str | ToolCall]:
        """An answer is one bare call, or none at all: its first sign tells."""
        if not self._started:
            text = self._held.lstrip()
            if not text or any(mark.startswith(text) for mark in _BARE_MARKS):
                return
            self._started = True
            self._inside = text[0] in "{[" or text.startswith(_BARE_MARKS)
        if not self._inside:
            held, self._held = self._held, ""
            yield held

    def _marked(self, style: ToolStyle) -> Iterator[str | ToolCall]:
        while self._held:
            if not self._inside:
                start = self._held.find(style.begin)
                if start < 0:
                    keep = overlap(self._held, style.begin)
                    yield self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    return
                yield self._held[:start]
                self._held, self._inside = self._held[start:], True
            stop = self._held.find(style.end, len(style.begin)) if style.end else -1
            if stop < 0:
                return
            body, whole = self._held[len(style.begin) : stop], self._held[: stop + len(style.end)]
            self._held, self._inside = self._held[len(whole) :], False
            found = read_calls(body, style)
            if found is None:
                yield whole
            else:
                self.calls += len(found)
                yield from found


def read_calls(body: str, style: ToolStyle) -> tuple[ToolCall, ...] | None:
    """Read the calls that stand in `body`, without the marks around it; None when it is anything else."""
    calls: list[ToolCall] = []
    rest = body.strip()
    while rest:
        if style.name_key is None:
            found, rest = _named_outside(rest, style)
        else:
            value, rest = _json(rest)
            found = [_call(item, style) for item in (value if isinstance(value, list) else [value])]
        if not found or None in found:
            return None
        calls += [call for call in found if call is not None]
        rest = rest.lstrip().removeprefix(";").removeprefix(style.begin).lstrip()
    return tuple(calls) or None


def _named_outside(text: str, style: ToolStyle) -> tuple[list[ToolCall | None], str]:
    name = _WORD.match(text)
    if name is None or not text[name.end() :].lstrip().startswith(style.between):
        return [None], ""
    arguments, rest = _json(text[name.end() :].lstrip().removeprefix(style.between))
    return [_made(name[0], arguments)], rest


def _call(value: object, style: ToolStyle) -> ToolCall | None:
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("function"), Mapping):  # OpenAI's own form
        value = value["function"]
    assert isinstance(value, Mapping)
    arguments = value.get(style.arguments_key, value.get("arguments", value.get("parameters")))
    return _made(value.get(style.name_key), arguments)


def _made(name: object, arguments: object) -> ToolCall | None:
    if isinstance(arguments, str):
        arguments, rest = _json(arguments)
        if rest.strip():
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping | None):
        return None
    return ToolCall(name, dict(arguments or {}), f"call_{secrets.token_hex(12)}")


def _json(text: str) -> tuple[Any, str]:
    """Read the JSON value at the start of `text`; (None, "") when there is none."""
    text = text.lstrip()
    try:
        value, stop = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None, ""
    return value, text[stop:]


def _style(said: str) -> ToolStyle | None:
    """Find name and arguments in what a template writes for the probe's call."""
    at = said.find(_NAME)
    if at < 0:
        return None
    for start in (i for i, sign in enumerate(said[:at]) if sign in "{["):
        value, rest = _json(said[start:])
        item = value[0] if isinstance(value, list) and value else value
        if not isinstance(item, Mapping):
            continue
        inner = item["function"] if isinstance(item.get("function"), Mapping) else item
        name = next((key for key, it in inner.items() if it == _NAME), None)
        arguments = next((key for key, it in inner.items() if _is_arguments(it)), None)
        if name is not None and arguments is not None:
            return ToolStyle(_last_word(said[:start]), _first_word(rest), name, arguments)
    start = said.find("{", at + len(_NAME))
    value, rest = _json(said[start:]) if start >= 0 else (None, "")
    if not _is_arguments(value) or not (begin := _last_word(said[:at])):
        return None
    return ToolStyle(begin, _first_word(rest), None, None, said[at + len(_NAME) : start].strip())


def _is_arguments(value: object) -> bool:
    if isinstance(value, str):
        value = _json(value)[0]
    return isinstance(value, Mapping) and dict(value) == {_KEY: _VALUE}


def _last_word(text: str) -> str:
    words = text.split()
    return words[-1] if words else ""


def _first_word(text: str) -> str:
    words = text.split()
    return words[0] if words else ""


def _common_end(a: str, b: str) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[-length - 1] == b[-length - 1]:
        length += 1
    return length


def _joined(pieces: Iterator[str | ToolCall]) -> Iterator[str | ToolCall]:
    return (piece for piece in pieces if piece)
