"""The seam of engines that write: OpenVINO GenAI, llama.cpp, a remote endpoint, torch as the reference.

Each opens a part of a bundle (or an endpoint) and gives this one interface; server, measurements and the command line
know nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from alambic.kinds.generation import Chunk, GenerationRequest, Reply


@runtime_checkable
class Writer(Protocol):
    """A model that writes. Safe to call from several threads; close it when done."""

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do besides `write`: ``score``, ``embed``, ``json_schema``, ``logprobs``, ``token_ids``."""

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Write one answer piece by piece; closing the iterator cancels the work at once.

        A generator that waits inside the engine cannot be closed by another thread; where the iterator has a method
        `cancel` that any thread may call, the server calls it: a departure is felt before the next token then.

        Raises:
            InputTooLong: the prompt, or prompt + max_tokens, does not fit the context.
            EngineError: the request asks for what this engine cannot do.
        """

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Write all answers, in the order of `requests`, batched as the engine can."""

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Return the ids that the model reads for `request`, special tokens included."""

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Return the natural log-probability of each token of each continuation, given its prompt."""

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads, as JSON values."""

    def close(self) -> None:
        """Free the model."""


@runtime_checkable
class Shares(Protocol):
    """An engine whose weights several writers use, each with an adapter of its own."""

    def with_adapter(self, adapter: Path | None) -> Writer:
        """Return a writer over the same weights; close it before this one."""
