"""What an answer must be: `response_format`, `tools` and `tool_choice`, as a JSON Schema and a reader of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from alambic.kinds.generation import Sampling
from alambic.serve.bodies import json_kind
from alambic.serve.errors import ApiError
from alambic.serve.models import LoadedWriter
from alambic.serve.tool_calls import WRITTEN_OUT, Arguments, Calls, Plain, Reads

_MOST_TOOLS = 128
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Form:
    """The form asked of an answer.

    Attributes:
        schema: JSON Schema of the whole text; None: free, or as the task says.
        free: no schema even where the task has one.
        tools: those that the model is shown, in OpenAI's form.
        reader: makes what turns the text into content and calls, one per answer.
    """

    schema: Mapping[str, Any] | None = None
    free: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    reader: Callable[[], Reads] = Plain

    def constrain(self, sampling: Sampling, *, stop: tuple[str, ...]) -> Sampling:
        """Return `sampling` with the schema of this form.

        A schema says where an answer ends, so the task's own stop texts give way to it; those of the client (`stop`) do
        not, and an engine that cannot have both refuses.
        """
        if self.schema is None and not self.free and not self.tools:
            return sampling
        return replace(sampling, json_schema=self.schema, stop=sampling.stop if self.schema is None else stop)


def form_of(
    model: LoadedWriter,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: object,
    schema: Mapping[str, Any] | bool | None,
    most_calls: int | None = None,
    schema_param: str = "response_format",
) -> Form:
    """Return the form that a request asks for.

    Args:
        model: what will write.
        tools: in OpenAI's form, checked here.
        choice: ``none``, ``auto``, ``required``, or the object that names a function.
        schema: of the content; False: free text was asked for; None: nothing was.
        most_calls: calls in one answer; None: any number.
        schema_param: what the client calls the schema.

    Raises:
        ApiError: 400.
    """
    known = _named(tools or ())
    wanted = _choice(choice, known)
    if isinstance(schema, Mapping):
        _need(model, schema_param)
    given = schema if isinstance(schema, Mapping) else None
    if not known or wanted == "none":
        return Form(schema=given, free=schema is False)
    if model.tool_style is None:
        message = "'tools': the template of this model has no place for tools"
        raise ApiError(400, "unsupported_parameter", message, param="tools")
    shown, names = tuple(tools or ()), tuple(known)
    most = {} if most_calls is None else {"most": most_calls}
    if wanted == "auto":
        if given is None:
            return Form(free=True, tools=shown, reader=partial(Calls, model.tool_style, names, **most))
        either = _any_of(given, list(known.values()))
        return Form(schema=either, tools=shown, reader=partial(Calls, WRITTEN_OUT, names, **most))
    _need(model, "tool_choice")
    forced = list(known) if wanted == "required" else [wanted]
    if len(forced) == 1:
        parameters = known[forced[0]].get("parameters") or _NO_ARGUMENTS
        return Form(schema=parameters, tools=shown, reader=partial(Arguments, forced[0]))
    any_call = _any_of(None, list(known.values()))
    return Form(schema=any_call, tools=shown, reader=partial(Calls, WRITTEN_OUT, names, most=1))


def schema_of(value: object, *, param: str) -> Mapping[str, Any] | bool | None:
    """Read `response_format` (or `text.format`): a schema, False for free text, None when absent.

    Raises:
        ApiError: 400.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ApiError(400, "wrong_type", f"'{param}' is {json_kind(value)}; it must be an object", param=param)
    kind = value.get("type")
    if kind == "text":
        return False
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        message = f"'{param}.type' is {str(kind)[:80]!r}; it must be text, json_object or json_schema"
        raise ApiError(400, "invalid_value", message, param=f"{param}.type")
    # The Responses API has the schema one level higher than chat completions.
    inner, where = (value, param) if "json_schema" not in value else (value["json_schema"], f"{param}.json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        message = f"'{where}.schema' is {json_kind(schema)}; it must be a JSON Schema, an object"
        raise ApiError(400, "wrong_type", message, param=f"{where}.schema")
    return schema


def _need(model: LoadedWriter, param: str) -> None:
    if not model.can("json_schema"):
        message = f"'{param}': the engine of this model cannot hold an answer to a schema"
        raise ApiError(400, "unsupported_parameter", message, param=param)


def _named(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the functions by name."""
    if len(tools) > _MOST_TOOLS:
        message = f"'tools' holds {len(tools)} tools; at most {_MOST_TOOLS} go in one request"
        raise ApiError(400, "invalid_value", message, param="tools")
    known: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        kind, function = tool.get("type", "function"), tool.get("function")
        if kind != "function":
            message = f"'tools[{i}].type' is {str(kind)[:80]!r}; this server runs no tools of its own, only functions"
            raise ApiError(400, "unsupported_parameter", message, param=f"tools[{i}].type")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            message = f"'tools[{i}].function.name' is missing: every function has a name"
            raise ApiError(400, "missing_parameter", message, param=f"tools[{i}].function.name")
        if not isinstance(function.get("parameters") or {}, Mapping):
            message = f"'tools[{i}].function.parameters' is {json_kind(function['parameters'])}, not a JSON Schema"
            raise ApiError(400, "wrong_type", message, param=f"tools[{i}].function.parameters")
        if function["name"] in known:
            message = f"'tools[{i}]': the function {function['name']!r} is there twice"
            raise ApiError(400, "invalid_value", message, param=f"tools[{i}].function.name")
        known[function["name"]] = function
    return known


def _choice(choice: object, known: Mapping[str, Any]) -> str:
    """Return ``none``, ``auto``, ``required``, or the name of a function."""
    if choice is None:
        return "auto" if known else "none"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            message = f"'tool_choice' is {choice[:80]!r}; it must be none, auto, required, or name a function"
            raise ApiError(400, "invalid_value", message, param="tool_choice")
        if choice == "required" and not known:
            raise ApiError(400, "invalid_value", "'tool_choice' is required, but 'tools' is empty", param="tool_choice")
        return choice
    inner = choice.get("function", choice) if isinstance(choice, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not isinstance(choice, dict) or choice.get("type", "function") != "function":
        message = "'tool_choice' must be none, auto, required, or an object of type function that names one"
        raise ApiError(400, "invalid_value", message, param="tool_choice")
    if name not in known:
        message = f"'tool_choice' names the function {name[:80]!r}, which 'tools' does not hold"
        raise ApiError(400, "invalid_value", message, param="tool_choice")
    return name


def _any_of(content: Mapping[str, Any] | None, functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the schema of an answer that is `content`, or a call of one of `functions` written out.

    Each schema becomes a definition of the whole; the references inside it are moved along.
    """
    forms: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    if content is not None:
        definitions["content"] = _moved(content, "#/$defs/content")
        forms.append({"$ref": "#/$defs/content"})
    for i, function in enumerate(functions):
        place = f"arguments{i}"
        definitions[place] = _moved(function.get("parameters") or _NO_ARGUMENTS, f"#/$defs/{place}")
        name = {"type": "string", "enum": [function["name"]]}
        forms.append(
            {
                "type": "object",
                "properties": {"name": name, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": forms, "$defs": definitions}


def _moved(value: Any, place: str) -> Any:
    """Return the schema `value` with the local references in it starting at `place`."""
    if isinstance(value, Mapping):
        return {
            key: place + item[1:]
            if key == "$ref" and isinstance(item, str) and item.startswith("#")
            else _moved(item, place)
            for key, item in value.items()
        }
    return [_moved(item, place) for item in value] if isinstance(value, list) else value
