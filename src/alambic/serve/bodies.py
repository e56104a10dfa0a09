"""Bodies of requests in OpenAI's form: what they share, how they are checked, and how a fault is named.

Unknown keys are ignored, as OpenAI does; a key of the wrong type or out of its range is a 400 that names it, and so is
one that asks for what this server cannot do: nothing that changes an answer is dropped in silence.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from alambic.errors import DataError
from alambic.kinds.chat import Chat, parse_chat
from alambic.kinds.generation import Sampling
from alambic.serve.errors import ApiError
from alambic.serve.models import LoadedWriter

_MOST_STOPS = 4
_SEED_MASK = 2**63 - 1
_TYPES = {
    "string_type": "a text", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
    "model_attributes_type": "an object",
}  # fmt: skip
_Shape = TypeVar("_Shape", bound="Body")


class Body(BaseModel):
    """Any body: strict types, unknown keys ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    stream: bool | None = None


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool | None = None


class Sampled(Body):
    """What chat and text completions share. `top_k` and `repetition_penalty` are ours, as in vLLM and llama.cpp."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    seed: int | None = None
    stop: Any = ()
    n: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Any] | None = None
    user: Any = None

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Any) -> tuple[str, ...]:
        return stops(value)

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value:
            raise unsupported("this server cannot bias single tokens")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the count of its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def stops(value: Any) -> tuple[str, ...]:
    """Read `stop`: a text, or up to four."""
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("wrong_type", "it must be a text or a list of texts")
    if not all(texts):
        raise PydanticCustomError("invalid_value", "it holds an empty text")
    if len(texts) > _MOST_STOPS:
        raise PydanticCustomError("invalid_value", "at most {most} texts may stop an answer", {"most": _MOST_STOPS})
    return tuple(texts)


def unsupported(reason: str) -> PydanticCustomError:
    """Return the fault of a key that asks for what this server cannot do."""
    return PydanticCustomError("unsupported_parameter", "{reason}", {"reason": reason})


def wrong(reason: str) -> PydanticCustomError:
    """Return the fault of a value that is not allowed."""
    return PydanticCustomError("invalid_value", "{reason}", {"reason": reason})


def _own_token_only(value: int | None) -> int | None:
    if value is not None and value > 1:
        raise unsupported(f"it is {value}; only the token that was written has its log-probability here, 0 or 1")
    return value


OwnLogprob = Annotated[int | None, Field(ge=0), AfterValidator(_own_token_only)]


def parse_body(shape: type[_Shape], body: bytes) -> _Shape:
    """Read a body.

    Raises:
        ApiError: 400; `param` names the first fault.
    """
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False)[0]
    kind, param = fault["type"], _path(fault["loc"])
    if kind == "json_invalid":
        reason = fault.get("ctx", {}).get("error", "malformed")
        return ApiError(400, "invalid_json", f"the body is not JSON ({reason})")
    if not param:
        return ApiError(400, "wrong_type", f"the body is {json_kind(fault['input'])}, not an object")
    if kind == "missing":
        return ApiError(400, "missing_parameter", f"'{param}' is missing", param=param)
    if kind in _TYPES:
        message = f"'{param}' is {json_kind(fault['input'])}; it must be {_TYPES[kind]}"
        return ApiError(400, "wrong_type", message, param=param)
    if kind == "wrong_type":
        return ApiError(400, "wrong_type", f"'{param}' is {json_kind(fault['input'])}; {fault['msg']}", param=param)
    if kind == "unsupported_parameter":
        return ApiError(400, "unsupported_parameter", f"'{param}': {fault['msg']}", param=param)
    if kind == "invalid_value":
        return ApiError(400, "invalid_value", f"'{param}': {fault['msg']}", param=param)
    shown = str(fault["input"])[:80]
    reason = fault["msg"].replace("Input should be", "it must be")
    return ApiError(400, "invalid_value", f"'{param}' is {shown}; {reason}", param=param)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def json_kind(value: object) -> str:
    """Name the JSON type of `value`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def conversation(messages: object, tools: object = None, *, param: str = "messages") -> Chat:
    """Read a conversation; `param` is what the client calls its messages.

    Raises:
        ApiError: 400.
    """
    try:
        return parse_chat(messages, tools, where="request")
    except DataError as error:
        # "request: messages[1].tool_calls[0]: what is wrong"
        place, _, reason = error.message.removeprefix("request: ").partition(": ")
        if not reason or not place.startswith(("messages", "tools")):
            place, reason = param, error.message.removeprefix("request: ")
        place = param + place.removeprefix("messages") if place.startswith("messages") else place
        hint = f" ({error.hint})" if error.hint else ""
        raise ApiError(400, "invalid_value", f"'{place}': {reason}{hint}", param=place) from error


def sampling_of(body: Sampled, model: LoadedWriter, *, max_tokens: int | None) -> Sampling:
    """Return how to write: what the body says, over what the bundle was measured with."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "max_tokens": max_tokens,
        "seed": None if body.seed is None else body.seed & _SEED_MASK,
    }
    return sampled(model, given, stop=body.stop)


def sampled(model: LoadedWriter, given: Mapping[str, Any], *, stop: tuple[str, ...] = ()) -> Sampling:
    """Return the bundle's sampling with what was given; a random seed where chance decides and none was given."""
    sampling = replace(model.sampling, **{name: value for name, value in given.items() if value is not None})
    if stop:
        sampling = replace(sampling, stop=(*sampling.stop, *stop))
    if sampling.top_p == 0:  # nothing but the likeliest token
        sampling = replace(sampling, temperature=0.0, top_p=1.0)
    if sampling.temperature > 0 and given.get("seed") is None:
        sampling = replace(sampling, seed=secrets.randbits(31))
    return sampling


def choice(sampling: Sampling, index: int) -> Sampling:
    """Return the sampling of the answer `index` to one request: another seed, the rest the same."""
    return replace(sampling, seed=(sampling.seed + index) & _SEED_MASK) if index else sampling
