"""The writer `llamacpp`: a GGUF file, run by llama.cpp through xllamacpp.

Its folder holds `model.gguf`, `tokenizer.json` and `chat_template.jinja`. A prompt is rendered and tokenised by our own
renderer and tokenizer, and given to llama.cpp as ids: what the model reads is what it was trained on. Requests share
one batch (`SLOTS` at once), and a prompt's beginning that a slot has read is not read again.

llama.cpp counts the prompt in all its penalties, `presence_penalty` and `frequency_penalty` too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from alambic.engines import toolcalls
from alambic.engines.grammar import Grammar, closing, compile_schema
from alambic.engines.grammar_tree import Tracker, ebnf
from alambic.engines.llamacpp_server import Json, LlamaServer
from alambic.engines.parts import check_keys
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.generation import (
    Chunk,
    FinishReason,
    GenerationRequest,
    Reply,
    Sampling,
    Timings,
    TokenLogprob,
    Usage,
)
from alambic.render import ChatTemplate

SLOTS = 4
_POOL = 8192  # tokens that the slots may hold together, where the context is shorter
_NAMED_ENDS = 3
_WAITING = 32  # requests of one `write` that wait or run at once
_DONE = object()
_FORMS = ("architecture", "parameters", "precision", "tokenizer")  # for people and tools
_KEYS = (*_FORMS, "special", "ends", "end_ids", "context_tokens", "properties")


@dataclass
class _Answer:
    """What is known of an answer while it is written."""

    ids: list[int] = field(default_factory=list)
    finish: FinishReason = "cancelled"
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class _Piece:
    """What one chunk brings."""

    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class LlamaCppWriter:
    """Runs a folder written by `alambic.pack.gguf.pack`. Safe to share between threads."""

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        """Load a part.

        Args:
            folder: with model.gguf, tokenizer.json and chat_template.jinja.
            params: of its manifest.
            threads: of the computation; None lets llama.cpp choose.
            cache_dir: unused: nothing is compiled.

        Raises:
            EngineError: a file is missing, or cannot be opened.
        """
        check_keys(params, _KEYS, folder)
        self._tokenizer = _tokenizer(folder)
        self._template = _template(folder, params)
        self._rows = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._style = toolcalls.style_of(self._template)
        self.context_tokens = int(params["context_tokens"])
        # A file names three ends; others are made visible, and so are the special tokens around tool calls.
        more = (self._tokenizer.id_to_token(int(i)) for i in params.get("end_ids", ())[_NAMED_ENDS:])
        self._more_ends = [text for text in more if text]
        self._tool_marks = _marks(self._tokenizer, self._style, without=self._template.ends)
        self._precision = str(params.get("precision", ""))
        self._server = LlamaServer(
            folder / "model.gguf", context=self.context_tokens, slots=SLOTS, threads=threads,
            pool=min(SLOTS * self.context_tokens, max(_POOL, self.context_tokens)),
        )  # fmt: skip
        self._room = _Room(self._server.pool, SLOTS)

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do besides `write`."""
        return frozenset({"json_schema", "logprobs", "score", "token_ids"})

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Return the ids that the model reads for `request`, special tokens included."""
        if request.chat is None:
            return list(self._tokenizer.encode(request.text, add_special_tokens=True).ids)
        text = self._template.render(request.chat, reply=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Write one answer piece by piece; closing the iterator cancels the work at the next token or prompt batch.

        Raises:
            InputTooLong: the prompt, or prompt + max_tokens, does not fit the context.
            EngineError: the schema cannot be satisfied, or llama.cpp refuses the request.
        """
        if request.sampling.lookup_tokens:
            raise EngineError(
                "lookup_tokens: the engine llamacpp has no prompt lookup", hint="leave lookup_tokens at 0"
            )
        ids = self.token_ids(request)
        grammar = None if request.sampling.json_schema is None else compile_schema(request.sampling.json_schema)
        return self._stream(request, ids, self._limit(ids, request.sampling, grammar), grammar)

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Write all answers, in the order of `requests`, several at once."""
        if len(requests) < 2:
            return [self._reply(request) for request in requests]
        # More than the slots: those that wait do so where the waiting is counted.
        with ThreadPoolExecutor(min(len(requests), _WAITING), thread_name_prefix="alambic-llamacpp") as workers:
            return list(workers.map(self._reply, requests))

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Return the natural log-probability of each token of each continuation, given its prompt.

        llama.cpp gives those of written tokens only, so the continuation is forced by a grammar of its ids.

        Raises:
            InputTooLong: prompt and continuation together do not fit the context.
        """
        return [self._score(prompt, text) for prompt, text in zip(prompts, continuations, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return engine, version, form, threads and properties."""
        return {
            "engine": "llamacpp",
            "version": metadata.version("xllamacpp"),
            "llama_cpp": f"b{self._server.build.get('build_number')} {self._server.build.get('commit')}",
            "precision": self._precision,
            "threads": self._server.threads,
            "properties": {
                "context_tokens": self.context_tokens, "slots": SLOTS, "pool_tokens": self._server.pool,
                "kv_cache": "f16", "flash_attention": "auto", "cache_prompt": True,
            },
        }  # fmt: skip

    def close(self) -> None:
        """Give up what is under way and free the model."""
        self._server.close()

    def _reply(self, request: GenerationRequest) -> Reply:
        text, last = "", Chunk("")
        logprobs: list[TokenLogprob] = []
        for last in self.stream(request):
            text += last.text
            logprobs += last.logprobs
        assert last.finish_reason and last.usage and last.timings, "the last chunk has them"
        style = self._style if request.chat is not None and request.chat.tools else None
        content, calls = toolcalls.parse(text, style)
        return Reply(text, last.finish_reason, last.usage, last.timings, content, calls, tuple(logprobs))

    def _limit(self, ids: Sequence[int], sampling: Sampling, grammar: Grammar | None) -> int:
        room = self.context_tokens - len(ids)
        wanted = sampling.max_tokens
        if room < max(1, wanted or 1):
            asked = f" and max_tokens {wanted}" if wanted else ""
            raise InputTooLong(f"the prompt has {len(ids)} tokens{asked}, the context {self.context_tokens}")
        limit = room if wanted is None else wanted
        if grammar is None:
            return limit
        limit = limit if wanted is not None else min(limit, grammar.most_tokens)
        grammar.first_limit(limit)  # says so when that can never be enough
        return limit

    def _stream(
        self, request: GenerationRequest, ids: list[int], limit: int, grammar: Grammar | None
    ) -> Iterator[Chunk]:
        asked = time.perf_counter()
        style = self._style if request.chat is not None and request.chat.tools else None
        splitter = toolcalls.Splitter(style)
        with self._room.taken(len(ids) + limit):
            began = time.perf_counter()
            first = last = 0.0
            answer = _Answer()
            for piece in self._pieces(request, ids, limit, grammar, answer):
                last = time.perf_counter()
                first = first or last
                splitter.push(piece.text)
                given = piece.logprobs if request.sampling.logprobs else ()
                if piece.text or given:
                    yield Chunk(piece.text, given)
            splitter.finish()
            now = time.perf_counter()
            first, last = first or now, last or now
            yield Chunk(
                "",
                finish_reason="tool_calls" if splitter.calls and answer.finish == "stop" else answer.finish,
                usage=Usage(len(ids), answer.completion_tokens, answer.cached_tokens),
                timings=Timings((first - began) * 1e3, (last - first) * 1e3, (began - asked) * 1e3),
            )

    def _pieces(
        self, request: GenerationRequest, ids: list[int], limit: int, grammar: Grammar | None, answer: _Answer
    ) -> Iterator[_Piece]:
        body = self._body(request, ids)
        if grammar is None:
            yield from self._run({**body, "max_tokens": limit}, answer)
        else:
            yield from self._by_grammar(body, ids, limit, grammar, answer)

    def _by_grammar(
        self, body: Json, ids: list[int], limit: int, grammar: Grammar, answer: _Answer
    ) -> Iterator[_Piece]:
        """Write what a schema allows, and bring it to its end in time.

        llama.cpp holds the form; a `Tracker` holds the lengths: where a text grows beyond its bound, or the limit of
        tokens comes near, the answer goes on under a shorter grammar from where it was.
        """
        freely, left, near = grammar.first_limit(limit), grammar.root, False
        if freely <= 0:
            left, near = closing(left, limit), True
        said, kept = "", _Answer()
        while True:
            tracker, run, over = Tracker(left), _Answer(), False
            tokens = (limit if near else freely) - kept.completion_tokens
            asked = {"prompt": [*ids, *kept.ids], "max_tokens": tokens, "grammar": ebnf(left)}
            pieces = self._run({**body, **asked}, run)
            for piece in pieces:
                taken = tracker.push(piece.text)
                over = taken < len(piece.text)
                if over:
                    pieces.close()
                    piece = _Piece(piece.text[:taken], self._encoded(piece.text[:taken]))
                said += piece.text
                kept.ids += piece.ids
                yield piece
                if over:
                    break
            if kept.finish == "cancelled":  # the first run alone says what was cached
                answer.cached_tokens = run.cached_tokens
            kept.finish = "length"
            done = not over and (run.finish != "length" or tracker.whole)
            kept.ids = kept.ids if done else self._whole(kept.ids, said)
            kept.completion_tokens = kept.completion_tokens + run.completion_tokens if done else len(kept.ids)
            answer.completion_tokens = kept.completion_tokens
            if done or kept.completion_tokens >= limit:
                answer.finish = "stop" if done and run.finish == "length" else run.finish
                return
            left = tracker.rest
            if not near and (not over or kept.completion_tokens >= freely):
                left, near = closing(left, limit - kept.completion_tokens), True

    def _whole(self, ids: list[int], said: str) -> list[int]:
        """Return ids of what was said; llama.cpp names none that ends inside of a character: it is read again then."""
        if self._tokenizer.decode(ids, skip_special_tokens=False) == said:
            return ids
        return list(self._encoded(said))

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _run(self, body: Json, answer: _Answer) -> Generator[_Piece]:
        """Run one request in a thread of its own, so that closing this generator gives it up."""
        chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        given_up = threading.Event()

        def take(chunk: Json) -> bool:
            chunks.put(chunk)
            return given_up.is_set()

        worker = threading.Thread(target=_into, args=(chunks, lambda: self._server.complete(body, take)), daemon=True)
        worker.start()
        try:
            while (chunk := chunks.get()) is not _DONE:
                if isinstance(chunk, Exception):
                    raise chunk
                yield from _read(chunk, answer)
        finally:
            given_up.set()
            worker.join()

    def _body(self, request: GenerationRequest, ids: list[int]) -> Json:
        asked = request.sampling
        body: Json = {
            "prompt": ids,
            "temperature": asked.temperature,
            "top_k": asked.top_k or 0,
            "top_p": asked.top_p,
            "min_p": 0.0,
            "repeat_penalty": asked.repetition_penalty,
            "repeat_last_n": self.context_tokens,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "seed": asked.seed,
            "stop": [*asked.stop, *self._more_ends],
            "preserved_tokens": [*self._more_ends, *(self._tool_marks if request.chat and request.chat.tools else ())],
            "cache_prompt": True,
        }
        if asked.logprobs or asked.json_schema is not None:
            body["n_probs"] = 1
        return body

    def _score(self, prompt: GenerationRequest, continuation: str) -> list[float]:
        ids = self.token_ids(prompt)
        forced: list[int] = self._tokenizer.encode(continuation, add_special_tokens=False).ids
        if not forced:
            return []
        if len(ids) + len(forced) > self.context_tokens:
            raise InputTooLong(
                f"prompt and continuation have {len(ids) + len(forced)} tokens, the context {self.context_tokens}"
            )
        grammar = "%llguidance {}\nstart: " + " ".join(f"<[{i}]>" for i in forced)
        body = {"prompt": ids, "max_tokens": len(forced), "temperature": 0.0, "n_probs": 1, "grammar": grammar}
        with self._room.taken(len(ids) + len(forced)):
            answer = self._server.complete(body)
            written = iter((answer["choices"][0].get("logprobs") or {}).get("content") or [])
            entry = next(written, None)
            scores = []
            for i, token in enumerate(forced):
                if entry is not None and entry["id"] == token:
                    scores.append(float(entry["logprob"]))
                    entry = next(written, None)
                else:  # a token that ends inside of a character: llama.cpp leaves it out
                    scores.append(dict(self._server.best([*ids, *forced[:i]], self._rows))[token])
        if entry is not None:
            raise EngineError("llama.cpp did not write the tokens that it was made to score", hint="update xllamacpp")
        return scores


class _Room:
    """Slots and cells of the cache; a request waits until there is room for all of it."""

    def __init__(self, cells: int, slots: int) -> None:
        self._cells, self._slots, self._gate = cells, slots, threading.Condition()

    @contextmanager
    def taken(self, cells: int) -> Iterator[None]:
        with self._gate:
            self._gate.wait_for(lambda: self._slots > 0 and self._cells >= cells)
            self._slots -= 1
            self._cells -= cells
        try:
            yield
        finally:
            with self._gate:
                self._slots += 1
                self._cells += cells
                self._gate.notify_all()


def _into(chunks: queue.SimpleQueue[Any], run: Callable[[], Json]) -> None:
    try:
        run()
    except EngineError as error:
        chunks.put(error)
    finally:
        chunks.put(_DONE)


def _read(chunk: Json, answer: _Answer) -> Iterator[_Piece]:
    if "choices" not in chunk or "prompt_progress" in chunk:  # an error is raised when the request ends
        return
    choice = chunk["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    logprobs = tuple(TokenLogprob(entry["token"], float(entry["logprob"])) for entry in entries)
    if choice["text"] or entries:
        yield _Piece(choice["text"], tuple(int(entry["id"]) for entry in entries), logprobs)
    if choice["finish_reason"] is not None:
        usage = chunk["usage"]
        answer.finish = "length" if choice["finish_reason"] == "length" else "stop"
        answer.completion_tokens = int(usage["completion_tokens"])
        answer.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))


def _marks(tokenizer: Any, style: toolcalls.ToolStyle | None, *, without: Sequence[str]) -> list[str]:
    """Return the special tokens that stand around a tool call; llama.cpp shows no special token unless asked to."""
    if style is None:
        return []
    around = style.begin + style.between + style.end
    special = (token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    return [text for text in special if text in around and text not in without]


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise EngineError(f"{path}: cannot be read ({error})", hint="build the bundle again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _template(folder: Path, params: Mapping[str, Any]) -> ChatTemplate:
    path = folder / "chat_template.jinja"
    try:
        source = path.read_text("utf-8")
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror})", hint="build the bundle again") from error
    special = {str(k): str(v) for k, v in dict(params.get("special", {})).items()}
    return ChatTemplate(source, special, tuple(params.get("ends", ())))
