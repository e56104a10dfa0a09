"""What the writers share that read ids and answer through a `Loop`: tokenizer, template, answers in order, scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alambic.engines.arithmetic import computed
from alambic.engines.genai_answer import Answer, Pieces, Voice
from alambic.engines.genai_options import DEFAULTS, TEMPLATE, TOKENIZER, GenAIParams
from alambic.engines.genai_score import Row
from alambic.engines.tokens import read_tokenizer
from alambic.engines.toolcalls import parse, style_of
from alambic.errors import EngineError
from alambic.kinds.generation import Chunk, GenerationRequest, Reply, Sampling, TokenLogprob
from alambic.render import ChatTemplate, pinned

FINISH_S = 30.0  # that what runs has to finish when a writer is closed


class LoopWriter(ABC):
    """A writer over a folder with tokenizer.json and, for conversations, chat_template.jinja."""

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, converses: bool = True) -> None:
        """Read the tokenizer and the template, and settle what the engine computes in.

        Args:
            folder: of the part.
            params: see `GenAIParams`.
            threads: of the engine; None lets it choose.
            converses: the model reads conversations by its template, where it has one.

        Raises:
            EngineError: one of them cannot be read.
        """
        self.folder = folder
        self.params = GenAIParams.of(params, folder)
        self.context_tokens = self.params.context_tokens
        self._tokenizer = read_tokenizer(folder / TOKENIZER)
        self._template = self._read_template() if converses else None
        self._style = None if self._template is None else style_of(self._template)
        self._voice = Voice(self._tokenizer, self._silent_ids(), frozenset(self.params.end_ids))
        self._threads = threads
        self._properties = computed({**DEFAULTS, **self.params.properties}, folder)

    def stream(self, request: GenerationRequest) -> Pieces:
        """Write one answer piece by piece; `close` of the iterator cancels the work, `cancel` does from any thread.

        Raises:
            InputTooLong: prompt, or prompt and max_tokens, do not fit the context.
            EngineError: the request asks for what this engine cannot do, or the engine failed.
        """
        return Pieces(self._answer(request))

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Write all answers, in order; they are under way together.

        Raises:
            InputTooLong: one of them does not fit the context; none is written then.
            EngineError: one asks for what this engine cannot do, or the engine failed.
        """
        answers = [self._answer(request) for request in requests]
        try:
            for answer in answers:
                answer.submit()
            return [_reply(answer) for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Return the ids that the model reads for `request`, special tokens included.

        Raises:
            EngineError: a conversation, but the bundle has no chat template.
            TemplateError: the template refuses the conversation.
        """
        if request.chat is None:
            return self._ids(request.text or "", special=True)
        if self._template is None:
            raise EngineError(
                f"{self.folder}: no {TEMPLATE}, so a conversation cannot be written",
                hint="give a text, or pack the model with a template",
            )
        return self._ids(self._template.render(request.chat, reply=True), special=False)

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Return the natural log-probability of each token of each continuation, given its prompt.

        Raises:
            InputTooLong: prompt and continuation do not fit the context.
            EngineError: a prompt is empty, or the model cannot be run.
        """
        rows: list[Row] = []
        for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            ids, after = self.token_ids(prompt), self._ids(continuation, special=False)
            self._check_fits(len(ids), len(after))
            if not ids:
                raise EngineError(f"prompt {i} is empty: nothing can be said of its first token")
            rows.append((ids, after))
        return self._score(rows)

    @abstractmethod
    def close(self, *, finish_s: float = FINISH_S) -> None:
        """Free the model; what runs has `finish_s` seconds to finish, then it is cancelled."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finish_s=FINISH_S if error is None else 0.0)

    @abstractmethod
    def _answer(self, request: GenerationRequest) -> Answer:
        """Check a request and make the answer that will be written to it."""

    @abstractmethod
    def _check_fits(self, prompt: int, after: int) -> int:
        """Return how many tokens may be written after `prompt` tokens; raise InputTooLong when `after` are more."""

    @abstractmethod
    def _score(self, rows: Sequence[Row]) -> list[list[float]]:
        """Return the log-probability of each id that follows a prompt, which is not empty."""

    def _engine_settings(self, cache_dir: Path | None) -> dict[str, str | int | bool]:
        """Return what the model is compiled with: its properties, the threads, and where compiled models are kept."""
        settings = dict(self._properties)
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        if cache_dir is not None:
            settings |= {"CACHE_DIR": str(cache_dir), "CACHE_MODE": "OPTIMIZE_SIZE"}
        return settings

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _read_template(self) -> ChatTemplate | None:
        path = self.folder / TEMPLATE
        try:
            source = path.read_text("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise EngineError(f"{path}: cannot be read: {error}") from error
        return ChatTemplate(pinned(source), self.params.special, self.params.ends) if source.strip() else None

    def _silent_ids(self) -> frozenset[int]:
        """Special tokens show nothing, but for the marks that the template puts around tool calls."""
        style = self._style
        marks = () if style is None else (style.begin, style.end, style.between)
        return frozenset(
            id
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special and not any(token.content in mark for mark in marks)
        ) | frozenset(self.params.end_ids)


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings out of range.

    Raises:
        EngineError: naming the setting and what is allowed.
    """
    ranges = {
        "temperature": (0.0, math.inf), "top_p": (0.0, 1.0), "repetition_penalty": (0.0, math.inf),
        "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        value = getattr(sampling, name)
        positive = name in ("top_p", "repetition_penalty")
        if not low <= value <= high or not math.isfinite(value) or (positive and value == 0):
            raise EngineError(f"{name} is {value}; allowed: {'over ' if positive else ''}{low:g} to {high:g}")
    for name, least in (("max_tokens", 1), ("top_k", 1), ("lookup_tokens", 0), ("seed", 0)):
        value = getattr(sampling, name)
        if value is not None and value < least:
            raise EngineError(f"{name} is {value}; the least is {least}")


def _reply(answer: Answer) -> Reply:
    pieces: list[str] = []
    logprobs: list[TokenLogprob] = []
    last: Chunk | None = None
    for last in answer.chunks():
        pieces.append(last.text)
        logprobs += last.logprobs
    assert last is not None and last.finish_reason and last.usage and last.timings, "the last chunk tells how it ended"
    text = "".join(pieces)
    content, calls = parse(text, answer.style)
    return Reply(
        text, last.finish_reason, last.usage, last.timings, content=content, tool_calls=calls, logprobs=tuple(logprobs)
    )
