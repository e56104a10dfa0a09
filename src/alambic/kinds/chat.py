"""Conversations: messages, tool calls and tools, in OpenAI's form. Every generative kind is one of these inside.

A text-to-text row is a conversation of one user message and one assistant message, so training, engines and server see
one shape only. Nothing here reads a file or renders a prompt (`alambic.render` does).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from alambic.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant asks for.

    Attributes:
        name: the function.
        arguments: its arguments, by name.
        id: what the tool's answer refers to; may be empty in training data.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""

    def to_dict(self, *, as_text: bool = False) -> dict[str, Any]:
        """Return OpenAI's form; its API has the arguments as JSON text, templates as an object."""
        arguments: Any = json.dumps(self.arguments, ensure_ascii=False) if as_text else dict(self.arguments)
        call = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return {"id": self.id, **call} if self.id else call


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        content: what is said; may be empty when there are tool calls.
        tool_calls: of an assistant.
        tool_call_id: of a tool: the call that it answers.
        name: of a tool: the function that answers.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def to_dict(self, *, as_text: bool = False) -> dict[str, Any]:
        """Return OpenAI's form; `as_text` writes the arguments of tool calls as JSON text, as its API does."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            data["tool_calls"] = [call.to_dict(as_text=as_text) for call in self.tool_calls]
        if self.tool_call_id is not None:
            data["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            data["name"] = self.name
        return data


@dataclass(frozen=True)
class Chat:
    """A conversation and the tools (OpenAI's JSON) that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, prompt: str, *, completion: str | None = None, system: str | None = None) -> Chat:
        """Return the conversation of one exchange; without `completion` it waits for the assistant."""
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", prompt))
        if completion is not None:
            messages.append(Message("assistant", completion))
        return cls(tuple(messages))

    @property
    def prompt(self) -> Chat:
        """The conversation up to its last assistant message, which is left out."""
        return Chat(self.messages[:-1], self.tools) if self.completion is not None else self

    @property
    def completion(self) -> Message | None:
        """The last message when the assistant says it."""
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last.role == "assistant" else None

    def to_dict(self, *, as_text: bool = False) -> dict[str, Any]:
        """Return OpenAI's form: `messages`, and `tools` when there are any."""
        data: dict[str, Any] = {"messages": [message.to_dict(as_text=as_text) for message in self.messages]}
        return {**data, "tools": [dict(tool) for tool in self.tools]} if self.tools else data


def parse_chat(messages: object, tools: object = None, *, where: str) -> Chat:
    """Read a conversation from OpenAI's form.

    Args:
        messages: list of objects with `role` and `content` (text, or a list of text parts).
        tools: list of OpenAI tools, or JSON text of one.
        where: ``file:line`` for messages of errors.

    Raises:
        DataError: an unknown role, a content that is no text, a tool call that does not parse.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where}: messages is not a list of messages")
    read = tuple(_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages))
    return Chat(read, _tools(tools, where))


def order_fault(chat: Chat) -> str | None:
    """Say what is out of order among the roles, None when nothing is.

    A system message comes first only; a tool answers an assistant that called one (or another tool's answer); user and
    assistant take turns otherwise.
    """
    before: str | None = None
    for i, message in enumerate(chat.messages):
        if message.role == "system" and i > 0:
            return f"messages[{i}]: a system message after the first place"
        if message.role == "tool" and not _may_answer(chat.messages[:i]):
            return f"messages[{i}]: a tool answers, but no assistant message before it calls a tool"
        if message.role == "assistant" and before in (None, "system", "assistant"):
            return f"messages[{i}]: the assistant speaks, but no user or tool before it"
        if message.role == "user" and before == "user":
            return f"messages[{i}]: two user messages in a row"
        before = message.role
    return None


def _may_answer(before: Sequence[Message]) -> bool:
    speakers = [message for message in before if message.role != "tool"]
    return bool(speakers) and speakers[-1].role == "assistant" and bool(speakers[-1].tool_calls)


def _message(raw: object, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: not an object with role and content")
    role = raw.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r}", hint=f"allowed: {', '.join(ROLES)}")
    calls = tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(raw.get("tool_calls") or ()))
    name, answers = raw.get("name"), raw.get("tool_call_id")
    return Message(
        role=cast(Role, role),
        content=_content(raw.get("content"), where),
        tool_calls=calls,
        tool_call_id=None if answers is None else str(answers),
        name=None if name is None else str(name),
    )


def _content(raw: object, where: str) -> str:
    if raw is None:
        return ""
    if isinstance(raw, str):
        return raw
    if isinstance(raw, Sequence) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in raw):
        return "".join(part["text"] for part in raw)
    raise DataError(f"{where}: content is neither text nor a list of text parts")


def _call(raw: object, where: str) -> ToolCall:
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: not a tool call (an object with function.name and function.arguments)")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"{where}: arguments do not parse as JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: arguments are {type(arguments).__name__}, not an object")
    return ToolCall(function["name"], dict(arguments), str(raw.get("id") or ""))


def _tools(raw: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if raw is None or raw == "":
        return ()
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{where}: tools do not parse as JSON: {error}") from error
    if not isinstance(raw, Sequence) or not all(isinstance(tool, Mapping) for tool in raw):
        raise DataError(f"{where}: tools is not a list of objects")
    tools = []
    for i, tool in enumerate(raw):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tools[{i}] has no function.name")
        tools.append({"type": "function", "function": dict(function)})
    return tuple(tools)
