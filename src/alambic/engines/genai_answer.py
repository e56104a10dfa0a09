"""One answer as it is written: ids to text, stop texts, the end of a grammar, counts and times."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alambic.engines.detokenise import Detokeniser, StopFinder
from alambic.engines.genai_core import Ask, End, Lane, News
from alambic.engines.genai_loop import Job, Loop
from alambic.engines.grammar import Grammar, closing
from alambic.engines.grammar_tree import Tracker, ebnf
from alambic.engines.toolcalls import Splitter, ToolStyle
from alambic.errors import EngineError
from alambic.kinds.generation import Chunk, FinishReason, Sampling, Timings, TokenLogprob, Usage

_STUCK = 3  # times that an answer goes on from the same place


@dataclass(frozen=True)
class Voice:
    """How ids become text: the tokenizer, the ids that show nothing, and those of them that end an answer."""

    tokenizer: Any
    silent: frozenset[int]
    ends: frozenset[int] = frozenset()

    @cached_property
    def openings(self) -> str:
        """The first letters of the names of special tokens, each once."""
        names = (self.tokenizer.id_to_token(id) for id in self.silent)
        return "".join(sorted({name[0] for name in names if name}))


class Answer:
    """An answer on its way; `chunks` may be read once, by one thread."""

    def __init__(
        self,
        loop: Loop,
        voice: Voice,
        prompt: Sequence[int],
        *,
        lane: Lane,
        settings: Mapping[str, Any],
        tokens: int,
        sampling: Sampling,
        grammar: Grammar | None = None,
        style: ToolStyle | None = None,
        adapter: str | None = None,
    ) -> None:
        self.style = style
        self._loop = loop
        self._voice = voice
        self._prompt = list(prompt)
        self._lane = lane
        self._adapter = adapter
        self._settings = settings
        self._tokens = tokens
        self._logprobs = sampling.logprobs
        self._grammar = grammar
        self._stops = StopFinder(sampling.stop)
        self._splitter = Splitter(style)
        self._text = Detokeniser(voice.tokenizer, silent=voice.silent)
        self._job: Job | None = None
        self._given_up = False
        self._written: list[int] = []  # ids
        self._said = ""  # kept for a grammar and for log-probabilities
        self._tracker = None if grammar is None else Tracker(grammar.root)
        self._freely = tokens if grammar is None else grammar.first_limit(tokens)
        self._closing = False  # under a grammar: what is left is being kept short
        self._over = False  # what came went beyond a bound
        self._without = ""  # letters that free text goes without, once special tokens came in it
        self._said_before = -1
        self._stuck = 0  # times in a row that it went on without a letter more
        self._sure: list[tuple[int, TokenLogprob]] = []  # with the length of the text after each token
        self._given = 0  # characters given out
        self._started = self._first = self._last = 0.0

    def submit(self) -> None:
        """Hand it to the engine; `chunks` does so otherwise."""
        if self._job is not None:
            return
        if self._grammar is None:
            self._ask(self._tokens, None, self._prompt)
        elif self._freely > 0:
            self._ask(self._freely, ebnf(self._grammar.root), self._prompt)
        else:
            self._go_on()

    def cancel(self) -> None:
        """Give it up, from any thread: who reads gets its end at once. Nothing happens when it is over."""
        self._given_up = True
        self._halt()

    def _halt(self) -> None:
        if self._job is not None:
            self._loop.cancel(self._job)

    def chunks(self) -> Generator[Chunk]:
        """Yield the answer piece by piece; closing this cancels the work.

        Raises:
            EngineError: the engine failed or refused it.
        """
        self.submit()
        try:
            while True:
                news, now = self._next()
                piece = self._push(news, now)
                end = news.end
                if self._stops.found:
                    self._halt()
                    end = "stop"
                elif self._over or (end == "length" and self._tracker is not None):
                    end = self._ended_or_going_on()
                if end is not None:
                    yield self._close(piece, end)
                    return
                if piece:
                    yield self._chunk(piece)
        finally:
            self.cancel()

    def _next(self) -> tuple[News, float]:
        assert self._job is not None, "it was submitted"
        item = self._job.news.get()
        if isinstance(item, BaseException):
            raise item
        self._started = self._started or self._job.started
        return item

    def _push(self, news: News, now: float) -> str:
        """Take what came; return the text that may be shown."""
        if news.ids:
            self._first = self._first or now
            self._last = now
        if not self._logprobs and self._tracker is None:
            self._written += news.ids
            return self._stops.push(self._text.push(news.ids))
        decoded = ""
        for id, logprob in zip(news.ids, news.logprobs, strict=True):
            if self._is_misread(id):
                self._over, self._without = True, self._voice.openings
                self._written = self._whole_ids(0)
                break
            text = self._text.push([id])
            taken = len(text) if self._tracker is None else self._tracker.push(text)
            self._said += text[:taken]
            decoded += text[:taken]
            if taken < len(text):
                self._over = True
                self._written = [*self._whole_ids(taken), *self._encoded(text[:taken])]
                break
            self._written.append(id)
            if self._logprobs and id not in self._voice.silent:
                shown = self._voice.tokenizer.decode([id], skip_special_tokens=False)
                self._sure.append((len(self._said), TokenLogprob(shown, logprob)))
        return self._stops.push(decoded)

    def _is_misread(self, id: int) -> bool:
        """Tell whether a grammar let a special token pass: the engine reads it as the letters of its name."""
        return self._tracker is not None and id in self._voice.silent and id not in self._voice.ends

    def _chunk(self, piece: str) -> Chunk:
        self._given += len(piece)
        if self.style is not None:
            self._splitter.push(piece)
        sure = [entry for length, entry in self._sure if length <= self._given]
        self._sure = self._sure[len(sure) :]
        return Chunk(piece, logprobs=tuple(sure))

    def _close(self, piece: str, end: End) -> Chunk:
        if end == "no_room":
            raise EngineError(
                "the engine's cache of keys and values is full, and this answer could not go on",
                hint="raise cache_mb, or lower max_tokens",
            )
        if not self._stops.found:
            piece += self._stops.push(self._text.flush()) + self._stops.flush()
        chunk = self._chunk(piece)
        # What stands in a stop text is left out; a token that is only half in it is not.
        cut = [] if self._stops.found else [entry for _, entry in self._sure]
        reason: FinishReason = end
        if self.style is not None:
            self._splitter.finish()
            if self._splitter.calls and reason == "stop":
                reason = "tool_calls"
        now = time.perf_counter()
        first, last = self._first or now, self._last or now
        started = self._started or first
        queued = self._job.queued if self._job is not None else started
        return Chunk(
            chunk.text,
            logprobs=(*chunk.logprobs, *cut),
            finish_reason=reason,
            usage=Usage(len(self._prompt), len(self._written), None),  # the engine does not tell what it kept
            timings=Timings((first - started) * 1e3, (last - first) * 1e3, max(0.0, (started - queued) * 1e3)),
        )

    def _ended_or_going_on(self) -> End | None:
        """Under a grammar an answer goes on, by its rules, where the engine stopped or went beyond a bound."""
        assert self._tracker is not None, "only answers under a grammar go on"
        if not self._over and self._tracker.whole:
            return "stop"
        if self._given_up:
            return "cancelled"
        if self._over:
            self._halt()
        else:
            self._written = self._whole_ids(0)
        self._go_on()
        return None

    def _go_on(self) -> None:
        assert self._tracker is not None, "only answers under a grammar go on"
        kept, left = self._written, self._tracker.rest
        tokens = self._tokens - len(kept)
        self._stuck = self._stuck + 1 if len(self._said) == self._said_before else 0
        self._said_before = len(self._said)
        if self._stuck >= _STUCK:
            raise EngineError(
                f"the model writes nothing that its JSON schema allows after {self._said[-40:]!r}",
                hint="it may write special tokens only: train it further, or answer without a schema",
            )
        if not self._closing and (not self._over or len(kept) >= self._freely):
            self._closing = True
            left = closing(left, tokens)
        self._over = False
        self._text = Detokeniser(self._voice.tokenizer, silent=self._voice.silent, before=kept)
        self._tracker = Tracker(left)
        self._ask(
            tokens if self._closing else self._freely - len(kept),
            ebnf(left, without=self._without),
            [*self._prompt, *kept],
        )

    def _whole_ids(self, less: int) -> list[int]:
        """Return the ids of what was said but for its last `less` characters; ids of half a character are left out."""
        said = self._said[: len(self._said) - less]
        tokenizer = self._voice.tokenizer
        for count in range(len(self._written), max(len(self._written) - 4, -1), -1):
            if (tokenizer.decode(self._written[:count], skip_special_tokens=False) if count else "") == said:
                return self._written[:count]
        return self._encoded(said)

    def _encoded(self, text: str) -> list[int]:
        return list(self._voice.tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _ask(self, tokens: int, grammar: str | None, prompt: Sequence[int]) -> None:
        settings = {**self._settings, "max_new_tokens": tokens}
        before = self._job
        self._job = self._loop.submit(Ask(0, prompt, self._lane, settings, grammar, self._adapter))
        if before is not None:
            self._job.queued = before.queued
        if self._given_up:  # between two jobs
            self._halt()


class Pieces(Iterator[Chunk]):
    """The chunks of an answer; `cancel` may be called by any thread, also while another one waits for the next."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._chunks = answer.chunks()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def cancel(self) -> None:
        """End the work at once; the last chunk then says ``cancelled``."""
        self._answer.cancel()

    def close(self) -> None:
        """End the work and the iteration."""
        self._chunks.close()
