"""What the two protocols of the remote engine share: the endpoint's description, pieces of an answer, tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alambic.engines.remote_http import Transient
from alambic.kinds.chat import ToolCall
from alambic.kinds.generation import FinishReason, TokenLogprob, Usage


@dataclass(frozen=True)
class Prices:
    """US dollars a million tokens read and written."""

    per_million_in: float
    per_million_out: float

    def cost(self, usage: Usage) -> float:
        """Return the price of one answer in US dollars; tokens that the provider had cached count in full."""
        tokens = usage.prompt_tokens * self.per_million_in + usage.completion_tokens * self.per_million_out
        return tokens / 1e6


@dataclass(frozen=True)
class RemoteSpec:
    """An endpoint that the user names.

    Attributes:
        api: ``openai`` (OpenAI and compatible servers) or ``anthropic``.
        url: base address: ``https://api.openai.com/v1``, ``https://api.anthropic.com``, ``http://127.0.0.1:8080/v1``.
        model: name that the endpoint knows.
        key_env: environment variable that holds the key; None: none is sent.
        context_tokens: most tokens it reads and writes together.
        max_output_tokens: most tokens it writes; None: unknown.
        prices: None: unknown, and no cost is stated.
        sampling: it takes temperature, top_p and top_k.
        body: fields to add to each request.
        timeout_s: longest silence, of the connection or between two pieces.
        total_s: longest time of one answer.
        attempts: tries in all, when a try fails in a way that another may mend.
        longest_wait_s: a server that asks to wait longer is an error.
        concurrency: requests under way at once.
    """

    api: Literal["openai", "anthropic"]
    url: str
    model: str
    key_env: str | None = None
    context_tokens: int = 128_000
    max_output_tokens: int | None = None
    prices: Prices | None = None
    sampling: bool = True
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    total_s: float = 600.0
    attempts: int = 5
    longest_wait_s: float = 60.0
    concurrency: int = 4


@dataclass(frozen=True)
class Piece:
    """A part of an answer as a protocol gives it; the last has the reason, the usage (if any) and the calls."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    calls: tuple[ToolCall, ...] = ()


class Calls:
    """Tool calls that arrive in fragments."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, str]] = {}

    def add(self, at: int, call_id: str | None, name: str | None, arguments: str) -> None:
        """Add a fragment of the call number `at`."""
        part = self._parts.setdefault(int(at), {"id": "", "name": "", "arguments": ""})
        part["id"] = call_id or part["id"]
        part["name"] += name or ""
        part["arguments"] += arguments

    def done(self) -> tuple[ToolCall, ...]:
        """Return the whole calls.

        Raises:
            Transient: the arguments of one are not a JSON object.
        """
        calls = []
        for _, part in sorted(self._parts.items()):
            try:
                arguments = json.loads(part["arguments"] or "{}")
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                raise Transient(f"the arguments of the call of {part['name']!r} are not a JSON object")
            calls.append(ToolCall(part["name"], arguments, part["id"]))
        return tuple(calls)
