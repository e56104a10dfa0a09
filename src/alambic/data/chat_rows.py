"""How one row of each form becomes a conversation. `chat_formats` finds the form; nothing here looks at a file.

Every reader takes the fields of a row and its ``file:line`` and returns what it Parsed, or raises DataError. Roles and
keys of other conventions (ShareGPT, the older function calls, `developer`) become OpenAI's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alambic.data.chat_answers import Answers, written
from alambic.errors import DataError
from alambic.kinds.chat import Chat, Message, parse_chat

Fields = Mapping[str, Any]
Read = Callable[[Fields, str], "Parsed"]

_CALL = "function_call"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "model": "assistant", "system": "system", "developer": "system", "tool": "tool",
    "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool", _CALL: _CALL,
}  # fmt: skip
_READ_KEYS = frozenset({"role", "from", "content", "value", "tool_calls", "tool_call_id", "name", _CALL})
_PYTHON_TYPES = {
    "dict": "object", "float": "number", "tuple": "array", "list": "array", "str": "string", "int": "integer",
    "bool": "boolean",
}  # fmt: skip


@dataclass(frozen=True)
class Parsed:
    """A row as a conversation.

    Attributes:
        chat: not normalised yet.
        given: see ChatExample.
        others: further answers.
        ignored: keys of its messages that nobody reads.
    """

    chat: Chat
    given: str | None = None
    others: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def decoded(value: Any) -> Any:
    """Return lists and objects that a table holds as JSON text; other texts as they are, None for an empty one."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return None if value == "" else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_talk(value: Any) -> bool:
    """Tell whether a cell holds a list of messages."""
    value = decoded(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value)
    )


def conversation(column: str, answer: str | None, answers: Answers) -> Read:
    """Read messages from `column`; when they end with a question, the answer from the column `answer`."""

    def read(fields: Fields, where: str) -> Parsed:
        raw = decoded(fields.get(column))
        messages, ignored = standard(raw, column, where)
        if isinstance(fields.get("system"), str) and fields["system"] and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": fields["system"]})
        chat = parse_chat(messages, _tools(fields.get("tools")), where=where)
        last = chat.completion
        if last is None and answer is not None and fields.get(answer) is not None:
            said, others = answers.message(decoded(fields[answer]), where, tools=bool(chat.tools))
            return Parsed(Chat((*chat.messages, said), chat.tools), None, others, ignored)
        if last is not None and not last.tool_calls:
            said, _ = answers.message(last.content, where)
            chat = Chat((*chat.messages[:-1], said), chat.tools)
        return Parsed(chat, None, (), ignored)

    return read


def alpaca(columns: Mapping[str, str], answers: Answers) -> Read:
    """Read instruction, input, output, system and history, each from the column of `columns`."""

    def read(fields: Fields, where: str) -> Parsed:
        def cell(name: str) -> str:
            return written(fields.get(columns[name])) if name in columns else ""

        asked = "\n\n".join(part for part in (cell("instruction"), cell("input")) if part.strip())
        if not asked:
            raise DataError(f"{where}: the instruction is empty")
        messages = [Message("system", cell("system"))] if cell("system").strip() else []
        history = decoded(fields.get(columns.get("history", ""))) or []
        if not isinstance(history, list):
            raise DataError(f"{where}: history is not a list of pairs of question and answer")
        for i, pair in enumerate(history):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise DataError(f"{where}: history[{i}] is not a pair of question and answer")
            messages += [Message("user", written(pair[0])), Message("assistant", written(pair[1]))]
        said, others = answers.message(fields.get(columns["output"]), where)
        return Parsed(Chat((*messages, Message("user", asked), said)), None, others)

    return read


def columns(source: str, answer: str, fill: Callable[[Fields], tuple[str, str]], answers: Answers) -> Read:
    """Read one exchange: `fill` gives the user message and what is given in it; either side may be a message list."""

    def read(fields: Fields, where: str) -> Parsed:
        reply = decoded(fields.get(answer)) if is_talk(fields.get(answer)) else fields.get(answer)
        if is_talk(fields.get(source)):
            raw = decoded(fields[source])
            messages, ignored = standard(raw, source, where)
            before, given = parse_chat(messages, _tools(fields.get("tools")), where=where), None
        else:
            asked, given = fill(fields)
            if not given.strip():
                raise DataError(f"{where}: the input ({source!r}) is empty")
            user = [{"role": "user", "content": asked}]
            before, ignored = parse_chat(user, _tools(fields.get("tools")), where=where), ()
        if is_talk(reply):
            raw, more = standard(reply, answer, where)
            after = parse_chat(raw, where=where).messages
            return Parsed(Chat((*before.messages, *after), before.tools), given, (), (*ignored, *more))
        said, others = answers.message(reply, where)
        return Parsed(Chat((*before.messages, said), before.tools), given, others, ignored)

    return read


def standard(raw: Any, name: str, where: str) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return messages with OpenAI's roles and keys, and the keys that nobody reads.

    Raises:
        DataError: it is no list of messages, a role is unknown, or a call does not parse.
    """
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{where}: {name} is not a list of messages")
    messages: list[dict[str, Any]] = []
    ignored: list[str] = []
    for i, one in enumerate(raw):
        place = f"{where}: {name}[{i}]"
        if not isinstance(one, Mapping):
            raise DataError(f"{place} is not a message (an object with role and content)")
        ignored += [key for key, value in one.items() if key not in _READ_KEYS and value is not None]
        role = _ROLES.get(str(one.get("role", one.get("from"))).lower())
        if role is None:
            known = "system, user, assistant, tool (ShareGPT: human, gpt, function_call, observation)"
            raise DataError(f"{place}: role {one.get('role', one.get('from'))!r}", hint=f"allowed: {known}")
        content = one.get("content", one.get("value"))
        if role == _CALL:
            _add_calls(messages, _parsed(content, f"{place}: the call"))
            continue
        message = {key: one[key] for key in ("tool_call_id", "name") if one.get(key) is not None}
        messages.append({"role": role, "content": content, **message})
        calls = one.get("tool_calls") or one.get(_CALL)
        if calls:
            calls = _parsed(calls, f"{place}.tool_calls") if isinstance(calls, str) else calls
            messages[-1]["tool_calls"] = calls if isinstance(calls, list) else [calls]
    return messages, tuple(ignored)


def _add_calls(messages: list[dict[str, Any]], calls: Any) -> None:
    """Add calls that stand as a turn of their own to what the assistant has just said, else as a message."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    known = messages[-1].setdefault("tool_calls", [])
    known += calls if isinstance(calls, list) else [calls]


def _parsed(value: Any, place: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} does not parse as JSON: {error}") from error


def _tools(raw: Any) -> Any:
    """Return tools; types that Python names (BFCL writes ``dict`` and ``float``) as JSON Schema names them."""
    raw = decoded(raw)
    return _typed(raw) if isinstance(raw, list) else raw


def _typed(value: Any) -> Any:
    if isinstance(value, list):
        return [_typed(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    kept = {key: one if key in ("enum", "const", "default", "examples") else _typed(one) for key, one in value.items()}
    kind = kept.get("type")
    return {**kept, "type": _PYTHON_TYPES[kind]} if isinstance(kind, str) and kind in _PYTHON_TYPES else kept
