"""What a cell that holds the answer says: a text, several accepted texts, JSON by a schema, or calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alambic.errors import DataError
from alambic.kinds.chat import Message, ToolCall, parse_chat
from alambic.kinds.extract import canonical, checker

_FAULTS = 3


class Answers:
    """Turns cells into answers; with a schema (`extract`), into the one form of JSON that is learnt and written."""

    def __init__(self, schema: Mapping[str, Any] | None = None) -> None:
        self.schema = schema
        self._faults = checker(schema) if schema is not None else None

    def message(self, value: Any, where: str, *, tools: bool = False) -> tuple[Message, tuple[str, ...]]:
        """Return the answer and the other texts that are accepted.

        Args:
            value: of the cell.
            where: ``file:line``.
            tools: the row has tools, so a list of objects is a list of calls.

        Raises:
            DataError: it is empty, is no JSON under the schema, or a call does not parse.
        """
        if self.schema is not None:
            return Message("assistant", self.json(value, where)), ()
        if tools and value == []:
            raise DataError(f"{where}: the answer is empty: no call is expected, and no text is given instead")
        if tools and _is_calls(value):
            return _calls(value, where), ()
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            texts = list(dict.fromkeys(one for one in value if one.strip()))
            if not texts:
                raise DataError(f"{where}: the answer is empty", hint="every row needs an answer to learn")
            return Message("assistant", texts[0]), tuple(texts[1:])
        if isinstance(value, dict | list):
            return Message("assistant", canonical(value)), ()
        return Message("assistant", written(value)), ()

    def json(self, value: Any, where: str) -> str:
        """Return an answer as JSON under the schema, checked."""
        assert self._faults is not None, "only asked with a schema"
        if isinstance(value, str):
            if not value.strip():
                raise DataError(f"{where}: the answer is empty", hint="write {} where nothing is to be found")
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: the answer is not JSON: {error}") from error
        faults = self._faults(value)
        if faults:
            more = f" (and {len(faults) - _FAULTS} more)" if len(faults) > _FAULTS else ""
            raise DataError(f"{where}: the answer does not follow the schema: {'; '.join(faults[:_FAULTS])}{more}")
        try:
            return canonical(value, self.schema)
        except ValueError as error:
            raise DataError(f"{where}: the answer is {error}") from error


def written(value: object) -> str:
    """Return a cell as text, exactly; lists and objects as JSON."""
    if value is None or value != value:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_calls(value: Any) -> bool:
    """Tell whether a value is a list of calls: OpenAI's form, name and arguments, or BFCL's accepted values."""
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return False
    return all("function" in one or {"name", "arguments"} <= set(one) or _is_accepted(one) for one in value)


def _is_accepted(call: Mapping[str, Any]) -> bool:
    """``{name: {argument: [accepted values]}}``, as the Berkeley Function-Calling Leaderboard writes it."""
    inner = next(iter(call.values())) if len(call) == 1 else None
    return isinstance(inner, Mapping) and all(isinstance(values, list) for values in inner.values())


def _calls(value: list[Mapping[str, Any]], where: str) -> Message:
    calls = [one for one in value if not _is_accepted(one)]
    if calls:
        return parse_chat([{"role": "assistant", "content": "", "tool_calls": calls}], where=where).messages[0]
    made = []
    for one in value:
        ((name, arguments),) = one.items()
        given = {key: _first(values) for key, values in arguments.items() if _is_needed(values)}
        made.append(ToolCall(str(name), given))
    return Message("assistant", "", tuple(made))


def _is_needed(values: list[Any]) -> bool:
    """An accepted value ``""`` says that the argument may be left out."""
    return "" not in values and bool(values)


def _first(values: Any) -> Any:
    first = values[0] if isinstance(values, list) and values else values
    if isinstance(first, Mapping):
        return {key: _first(inner) for key, inner in first.items() if not isinstance(inner, list) or _is_needed(inner)}
    if isinstance(first, list):
        return [_first([one]) for one in first]
    return first
