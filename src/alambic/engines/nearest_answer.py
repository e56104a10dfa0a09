"""The writer `nearest`: it gives the answer of the most similar known input, by BM25 (Robertson and Zaragoza 2009).

No model writes here: it is the rung that any writing model has to beat, and where answers repeat it often wins. Its
folder holds `words.txt`, the postings `starts.npy` [V + 1], `rows.npy` and `weights.npy` (term by term), and
`answers.jsonl`. `alambic.train.nearest` makes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alambic.engines.parts import check_keys, read_array
from alambic.engines.tfidf_features import NORMALISATION, normalise, word_ngrams
from alambic.engines.toolcalls import HERMES
from alambic.errors import DataError, EngineError
from alambic.kinds.chat import Chat, Message, ToolCall, parse_chat
from alambic.kinds.generation import Chunk, FinishReason, GenerationRequest, Reply, Timings, Usage

_REBUILD = "build the bundle again"
_CONTEXT = 1 << 20  # words; it reads anything


def terms_of(text: str) -> list[str]:
    """Return what is looked up of a text: its words and pairs of words, normalised, with repeats."""
    return word_ngrams(normalise(text), 1, 2)


def query_of(request: GenerationRequest) -> str:
    """Return the text that is looked up: the raw prompt, or what the user said last."""
    return request.text if request.chat is None else last_said(request.chat)  # type: ignore[return-value]


def last_said(chat: Chat) -> str:
    """Return the last message of `chat` that the assistant does not say itself."""
    said = [message.content for message in chat.messages if message.role in ("user", "tool")]
    return said[-1] if said else ""


class NearestWriter:
    """Runs a folder written by `alambic.train.nearest.fit_nearest`. Safe to share between threads."""

    context_tokens = _CONTEXT
    tool_style = HERMES  # how tool calls are written into the text of a stream

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        check_keys(params, ("normalisation", "fallback", "calls"), folder)
        if params.get("normalisation") != NORMALISATION:
            raise EngineError(f"{folder}: normalisation is {params.get('normalisation')!r}", hint=_REBUILD)
        words = _lines(folder / "words.txt")
        self._terms = {word: i for i, word in enumerate(words)}
        self._starts = read_array(folder / "starts.npy", dims=1)
        self._rows = read_array(folder / "rows.npy", dims=1)
        self._weights = read_array(folder / "weights.npy", dims=1).astype(np.float32)
        self._answers = [_read_answer(line, folder) for line in _lines(folder / "answers.jsonl")]
        self._fallback = int(params.get("fallback", 0))
        fits = len(self._starts) == len(words) + 1 and len(self._rows) == len(self._weights) == self._starts[-1]
        if not fits or not self._answers or (len(self._rows) and self._rows.max() >= len(self._answers)):
            raise EngineError(f"{folder}: its files do not fit each other", hint=_REBUILD)

    @property
    def capabilities(self) -> frozenset[str]:
        """Nothing besides `write`."""
        return frozenset({"write"})

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Give the whole answer in one piece; sampling settings have no effect on an answer that is looked up."""
        reply = self.write([request])[0]
        yield Chunk(reply.text, (), reply.finish_reason, reply.usage, reply.timings)

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Look up the answer of each request."""
        return [self._answer(query_of(request)) for request in requests]

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Raise EngineError: nothing here reads tokens."""
        raise EngineError("the engine 'nearest' reads words, not tokens")

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Raise EngineError: an answer that is looked up has no probability."""
        raise EngineError("the engine 'nearest' gives no probabilities")

    def describe(self) -> dict[str, Any]:
        """Say what runs."""
        return {
            "engine": "nearest", "version": np.__version__, "properties": {}, "threads": 1,
            "answers": len(self._answers), "terms": len(self._terms),
        }  # fmt: skip

    def close(self) -> None:
        """Nothing to free."""

    def _answer(self, query: str) -> Reply:
        began = time.perf_counter()
        terms = terms_of(query)
        scores = np.zeros(len(self._answers), dtype=np.float32)
        for term in map(self._terms.get, terms):
            if term is not None:
                found = slice(self._starts[term], self._starts[term + 1])
                scores[self._rows[found]] += self._weights[found]
        best = int(scores.argmax()) if scores.any() else self._fallback
        answer = self._answers[best]
        text = answer.content + "".join(map(_called, answer.tool_calls))
        usage = Usage(len(terms), len(text.split()))
        timings = Timings(1000 * (time.perf_counter() - began), 0.0)
        reason: FinishReason = "tool_calls" if answer.tool_calls else "stop"
        return Reply(text, reason, usage, timings, content=answer.content, tool_calls=answer.tool_calls)


def _read_answer(line: str, folder: Path) -> Message:
    """Read an answer: a text, or the message that it was when it called tools.

    Raises:
        EngineError: it is neither.
    """
    try:
        value = json.loads(line)
        return Message("assistant", value) if isinstance(value, str) else parse_chat([value], where="x").messages[0]
    except (ValueError, DataError) as error:
        raise EngineError(f"{folder / 'answers.jsonl'}: {error}", hint=_REBUILD) from error


def _called(call: ToolCall) -> str:
    """Write a tool call into the text, as `tool_style` says."""
    body = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
    return f"{HERMES.begin}{body}{HERMES.end}"


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise EngineError(f"{path}: missing", hint=_REBUILD)
    return path.read_bytes().decode("utf-8", "surrogatepass").split("\n")[:-1]
