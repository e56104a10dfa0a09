"""What is asked of a model that writes, and what it answers: requests, chunks of a stream, replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alambic.kinds.chat import Chat, ToolCall

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop. The defaults are greedy: same input, same answer.

    Attributes:
        max_tokens: most tokens to write; None: up to the context limit.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probabilities reach this share.
        top_k: this many likeliest tokens; None: all.
        repetition_penalty: 1 is none (Keskar et al. 2019).
        presence_penalty: as OpenAI defines it.
        frequency_penalty: as OpenAI defines it.
        seed: of the sampling; used when temperature > 0.
        stop: texts that end the answer; they are not part of it.
        json_schema: JSON Schema that the answer must follow; None: free text.
        logprobs: give the log-probability of each token written.
        lookup_tokens: prompt-lookup decoding: tokens guessed at once from the input; 0 is off.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    logprobs: bool = False
    lookup_tokens: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to write.

    Attributes:
        chat: the conversation that waits for the assistant.
        text: a raw prompt instead of a conversation, tokenised without any template; exactly one of the two is given.
        sampling: how.
    """

    chat: Chat | None = None
    text: str | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if (self.chat is None) == (self.text is None):
            raise ValueError("give either a chat or a text")


@dataclass(frozen=True)
class TokenLogprob:
    """A token written, as text, and its natural log-probability."""

    token: str
    logprob: float


@dataclass(frozen=True)
class Usage:
    """Tokens read and written; `cached_tokens` of the prompt were kept from an earlier request (None: not told)."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = 0


@dataclass(frozen=True)
class Timings:
    """Wall time of one answer.

    Attributes:
        prompt_ms: from the start of the work until the first token.
        generation_ms: from the first token until the last.
        queue_ms: waited before the start.
    """

    prompt_ms: float
    generation_ms: float
    queue_ms: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer as it is written; the last has `finish_reason`, `usage` and `timings`.

    Attributes:
        text: new text; may be empty. Never half a character, never part of a stop text.
        logprobs: of the tokens of `text`, when asked.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        text: as written by the model, tool calls included as it writes them.
        tool_calls: read from `text` when the request had tools; `content` is what stands beside them.
        content: `text` without the tool calls.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
