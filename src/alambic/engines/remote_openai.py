"""OpenAI's chat completions (and raw completions), as OpenAI and every compatible server speak them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from alambic.engines.remote_http import Event, Transient
from alambic.engines.remote_piece import Calls, Piece, RemoteSpec
from alambic.errors import EngineError
from alambic.kinds.generation import FinishReason, GenerationRequest, Sampling, TokenLogprob, Usage

KEY_HEADER = "Authorization"
HEADERS: Mapping[str, str] = {}
CAPABILITIES = frozenset({"json_schema", "logprobs", "tools"})
_FINISH: dict[str, FinishReason] = {
    "stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls",
}  # fmt: skip


def path_of(request: GenerationRequest) -> str:
    """Return where the request goes, below the base address."""
    return "/chat/completions" if request.chat is not None else "/completions"


def body_of(request: GenerationRequest, spec: RemoteSpec) -> dict[str, Any]:
    """Write the request in OpenAI's form.

    Raises:
        EngineError: it asks for what this endpoint cannot do.
    """
    sampling = request.sampling
    body: dict[str, Any] = {"model": spec.model, "stream": True, "stream_options": {"include_usage": True}}
    if request.chat is None:
        if sampling.json_schema is not None:
            raise EngineError("a raw prompt with a JSON schema: OpenAI's completions have no such thing")
        body["prompt"] = request.text
    else:
        body |= request.chat.to_dict(as_text=True)
        if sampling.json_schema is not None:
            schema = sampling.json_schema
            named = {"name": "answer", "schema": dict(schema), "strict": _closed(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
    return {**body, **_sampling(sampling, spec, chat=request.chat is not None), **spec.body}


def _sampling(sampling: Sampling, spec: RemoteSpec, *, chat: bool) -> dict[str, Any]:
    own = (urlsplit(spec.url).hostname or "").endswith("openai.com")
    fields: dict[str, Any] = {}
    if sampling.max_tokens is not None:
        # OpenAI's newer models take only the new name; other servers mostly know the old one.
        fields["max_completion_tokens" if own and chat else "max_tokens"] = sampling.max_tokens
    if spec.sampling:
        fields["temperature"] = sampling.temperature
    elif sampling.temperature > 0 or sampling.top_p < 1:
        raise EngineError(f"{spec.model} takes no temperature and no top_p")
    if sampling.temperature > 0:
        fields["seed"] = sampling.seed
    optional = {
        "top_p": (sampling.top_p, 1.0),
        "presence_penalty": (sampling.presence_penalty, 0.0),
        "frequency_penalty": (sampling.frequency_penalty, 0.0),
        "top_k": (sampling.top_k, None),
        "repetition_penalty": (sampling.repetition_penalty, 1.0),
    }
    fields |= {name: value for name, (value, default) in optional.items() if value != default}
    if own and ("top_k" in fields or "repetition_penalty" in fields):
        raise EngineError("OpenAI's endpoint has no top_k and no repetition penalty")
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.logprobs:
        fields["logprobs"] = True if chat else 1
    return fields


def _closed(schema: Any) -> bool:
    """Tell whether OpenAI's strict mode takes `schema`: closed objects whose properties are all required."""
    if isinstance(schema, Mapping):
        if schema.get("type") == "object":
            properties = set(schema.get("properties") or ())
            if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != properties:
                return False
        return all(_closed(value) for value in schema.values())
    return not isinstance(schema, list) or all(_closed(value) for value in schema)


def read(events: Iterator[Event], request: GenerationRequest) -> Iterator[Piece]:
    """Read an answer; the last piece has how it ended.

    Raises:
        Transient: the stream breaks off, or holds something else.
        EngineError: the provider withholds the answer.
    """
    finish: str | None = None
    usage: Usage | None = None
    calls = Calls()
    for event in events:
        if event.failure is not None:
            raise Transient(event.failure)
        try:
            usage = _usage(event.data.get("usage")) or usage
            for choice in event.data.get("choices") or ():
                delta = choice.get("delta") or choice.get("message") or {}
                for i, call in enumerate(delta.get("tool_calls") or ()):
                    function = call.get("function") or {}
                    at = call.get("index", i)
                    calls.add(at, call.get("id"), function.get("name"), function.get("arguments") or "")
                text = delta.get("content") or choice.get("text") or ""
                finish = choice.get("finish_reason") or finish
                if text:
                    yield Piece(text, _logprobs(choice.get("logprobs")))
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise Transient(f"the server sent an answer of another form ({type(error).__name__})") from None
    if finish == "content_filter":
        raise EngineError("the provider's filter withheld the answer")
    if finish is None:
        raise Transient("the answer broke off")
    yield Piece("", finish_reason=_FINISH.get(finish, "stop"), usage=usage, calls=calls.done())


def _usage(raw: Any) -> Usage | None:
    if not raw:
        return None
    cached = (raw.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(int(raw["prompt_tokens"]), int(raw.get("completion_tokens") or 0), int(cached))


def _logprobs(raw: Any) -> tuple[TokenLogprob, ...]:
    if not raw:
        return ()
    if raw.get("content"):
        return tuple(TokenLogprob(str(item["token"]), float(item["logprob"])) for item in raw["content"])
    pairs = zip(raw.get("tokens") or (), raw.get("token_logprobs") or (), strict=False)
    return tuple(TokenLogprob(str(token), float(value)) for token, value in pairs if value is not None)
