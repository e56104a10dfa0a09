"""The pipelines of OpenVINO GenAI that one thread (or one process) owns: requests in, ids out, step by step.

Two threads that call one pipeline crash each other, and its `step` keeps Python's global lock while it runs; so
nothing here locks, waits or knows of other threads. `alambic.engines.genai_loop` drives it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alambic import _extras
from alambic.engines.genai_prefix import Tail, Tails
from alambic.errors import EngineError

# A pipeline either guesses tokens from the prompt, or with a draft model, or not at all: it is decided when it opens.
Lane = Literal["plain", "draft", "lookup"]
End = Literal["stop", "length", "cancelled", "no_room"]
BLOCK_TOKENS = 32  # of the paged cache on CPUs
# A pipeline never forgets a grammar (0.15 MB each with 50,000 words): from here on it is opened anew once it is idle.
MOST_GRAMMARS = 2000
_TAILS_A_BLOCK = 64
_GUESSING = ("num_assistant_tokens", "max_ngram_size")  # a pipeline that guesses refuses requests without them


@dataclass(frozen=True)
class CoreSpec:
    """What to open.

    Attributes:
        folder: of the part.
        properties: of the engine, threads and cache folder included.
        cache_blocks: blocks of `BLOCK_TOKENS` tokens that the cache of each pipeline may hold.
        prompt_step: most tokens of prompts read in one step; others wait meanwhile.
        most_running: requests computed at once.
        prefix_cache: keep what was computed for the beginnings of prompts.
        draft: folder of the smaller model; None: none.
        adapters: files of LoRA adapters that requests may name.
    """

    folder: str
    properties: Mapping[str, str | int | bool]
    cache_blocks: int
    prompt_step: int
    most_running: int
    prefix_cache: bool = True
    draft: str | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """A request of the core.

    Attributes:
        id: names it.
        ids: the prompt.
        lane: the pipeline that serves it.
        settings: fields of the engine's GenerationConfig.
        grammar: EBNF that the answer follows; None: free text.
        adapter: one of `CoreSpec.adapters`; None: the base as it is. All requests under way have the same.
    """

    id: int
    ids: Sequence[int]
    lane: Lane
    settings: Mapping[str, Any]
    grammar: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class News:
    """What a step brought to one request; `end` says that nothing follows, `error` that it was refused."""

    id: int
    ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    end: End | None = None
    error: str | None = None


@dataclass
class _Pipeline:
    engine: Any
    handles: dict[int, Any] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    grammars: set[str] = field(default_factory=set)
    adapter: str | None = None  # that its weights have now
    tails: Tails | None = None  # None: it keeps no prefixes
    asks: dict[int, Ask] = field(default_factory=dict)
    said: dict[int, list[int]] = field(default_factory=dict)
    starting: dict[int, frozenset[Tail]] = field(default_factory=dict)  # without a first token yet
    held: list[Ask] = field(default_factory=list)  # until those that start from the same half block have begun


class Core:
    """Pipelines by lane; each opens when the first request needs it."""

    def __init__(self, spec: CoreSpec) -> None:
        self._spec = spec
        self._genai = _extras.load("openvino_genai")
        self._openvino = _extras.load("openvino")
        self._pipelines: dict[Lane, _Pipeline] = {}
        self._adapters: dict[str, Any] = {}
        self._open("plain" if spec.draft is None else "draft")

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return any(pipeline.handles or pipeline.held for pipeline in self._pipelines.values())

    def add(self, ask: Ask) -> News | None:
        """Take a request; return news when it ended at once, because the engine refuses it."""
        try:
            pipeline = self._ready(ask)
            if pipeline.adapter != ask.adapter:
                self._put_on(pipeline, ask)
            tails = frozenset() if pipeline.tails is None else pipeline.tails.within(ask.ids)
            if any(tails & others for others in pipeline.starting.values()):
                pipeline.held.append(ask)
                return None
            prompt = self._openvino.Tensor(np.array([ask.ids], dtype=np.int64))
            pipeline.handles[ask.id] = pipeline.engine.add_request(ask.id, prompt, self._config(ask))
        except (RuntimeError, ValueError, TypeError, EngineError) as error:
            return News(ask.id, error=first_line(error))
        pipeline.asks[ask.id], pipeline.said[ask.id] = ask, []
        if tails:
            pipeline.starting[ask.id] = tails
        return None

    def cancel(self, id: int) -> None:
        """Stop a request; the news of its end come with the next step."""
        for pipeline in self._pipelines.values():
            if any(ask.id == id for ask in pipeline.held):
                pipeline.cancelled.add(id)
            if id in pipeline.handles:
                pipeline.handles[id].cancel()
                pipeline.cancelled.add(id)

    def step(self) -> list[News]:
        """Compute once for all requests and return what came of it.

        Raises:
            RuntimeError: the engine failed; none of its requests can go on.
        """
        news = []
        for pipeline in list(self._pipelines.values()):
            news += self._retry(pipeline)
            if pipeline.handles:
                pipeline.engine.step()
                news += self._read(pipeline)
        return news

    def _retry(self, pipeline: _Pipeline) -> list[News]:
        """Add what was held, where nothing speaks against it any more."""
        held, pipeline.held = pipeline.held, []
        news = []
        for ask in held:
            if ask.id in pipeline.cancelled:
                pipeline.cancelled.remove(ask.id)
                news.append(News(ask.id, end="cancelled"))
            elif (refused := self.add(ask)) is not None:
                news.append(refused)
        return news

    def close(self) -> None:
        """Free the models."""
        self._pipelines.clear()

    def _ready(self, ask: Ask) -> _Pipeline:
        pipeline = self._pipelines.get(ask.lane)
        idle = pipeline is not None and not pipeline.handles and not pipeline.held
        if pipeline is not None and idle and len(pipeline.grammars) >= MOST_GRAMMARS:
            del self._pipelines[ask.lane], pipeline.engine
            pipeline = None
        pipeline = pipeline or self._open(ask.lane)
        if ask.grammar is not None:
            pipeline.grammars.add(hashlib.sha256(ask.grammar.encode()).hexdigest())
        return pipeline

    def _put_on(self, pipeline: _Pipeline, ask: Ask) -> None:
        """Give the pipeline the adapter of `ask`.

        `add_request` takes the adapters of a request without a word and writes with those that were there (the bare
        base at first). Only `generate` changes them, so it writes one token that nobody reads, after a whole block: a
        half one would stay in the cache (`alambic.engines.genai_prefix`).
        """
        assert not pipeline.handles, "the loop waits until other adapters have finished"
        guesses = {name: value for name, value in ask.settings.items() if name in _GUESSING}
        config = self._config(Ask(0, (), ask.lane, {**guesses, "max_new_tokens": 1}))
        config.adapters = self._adapter_config(() if ask.adapter is None else (ask.adapter,))
        block = (list(ask.ids) * BLOCK_TOKENS)[:BLOCK_TOKENS]
        prompt = self._openvino.Tensor(np.array([block], dtype=np.int64))
        pipeline.engine.generate([prompt], [config])
        pipeline.adapter = ask.adapter

    def _adapter_config(self, names: Sequence[str]) -> Any:
        config = self._genai.AdapterConfig()
        for name in names:
            if name not in self._adapters:  # an adapter is known by the object that was read
                self._adapters[name] = self._genai.Adapter(name)
            config.add(self._adapters[name], 1.0)
        return config

    def _read(self, pipeline: _Pipeline) -> list[News]:
        news = []
        for id, handle in list(pipeline.handles.items()):
            ids: list[int] = []
            logprobs: list[float] = []
            reason = None
            while handle.can_read():
                for output in handle.read().values():
                    ids += output.generated_ids
                    logprobs += output.generated_log_probs
                    reason = output.finish_reason
            pipeline.said[id] += ids
            if ids:
                pipeline.starting.pop(id, None)
            end = self._end(handle.get_status(), reason)
            if end is not None:
                self._ended(pipeline, id)
                if id in pipeline.cancelled:  # a step with nothing but cancelled requests says that it had no room
                    pipeline.cancelled.remove(id)
                    end = "cancelled"
                del pipeline.handles[id]
            if ids or end is not None:
                news.append(News(id, ids, logprobs, end))
        return news

    def _ended(self, pipeline: _Pipeline, id: int) -> None:
        """Note what the cache keeps of a request; one that wrote nothing may have been read up to anywhere."""
        ask, said = pipeline.asks.pop(id), pipeline.said.pop(id)
        pipeline.starting.pop(id, None)
        if pipeline.tails is not None:
            known = len(ask.ids) + len(said) - 1 if said else 1
            pipeline.tails.end([*ask.ids, *said], known=known)

    def _end(self, status: Any, reason: Any) -> End | None:
        states = self._genai.GenerationStatus
        if status == states.RUNNING:
            return None
        if status == states.FINISHED:
            return "length" if reason == self._genai.GenerationFinishReason.LENGTH else "stop"
        return "no_room" if status == states.IGNORED else "cancelled"

    def _config(self, ask: Ask) -> Any:
        config = self._genai.GenerationConfig()
        for name, value in ask.settings.items():
            setattr(config, name, set(value) if name == "stop_token_ids" else value)
        if ask.grammar is not None:
            config.structured_output_config = self._genai.StructuredOutputConfig(grammar=ask.grammar)
        return config

    def _open(self, lane: Lane) -> _Pipeline:
        genai, spec = self._genai, self._spec
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = spec.cache_blocks
        scheduler.max_num_batched_tokens = spec.prompt_step
        scheduler.max_num_seqs = spec.most_running
        scheduler.enable_prefix_caching = spec.prefix_cache
        properties: dict[str, Any] = dict(spec.properties)
        try:
            if spec.adapters:
                properties["adapters"] = self._adapter_config(spec.adapters)
            if lane == "lookup":
                properties["prompt_lookup"] = True
            elif lane == "draft":
                assert spec.draft is not None, "only a writer with a draft asks for this lane"
                properties["draft_model"] = genai.draft_model(spec.draft, "CPU", **spec.properties)
            engine = genai.ContinuousBatchingPipeline(Path(spec.folder), scheduler, "CPU", properties)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"{spec.folder}: OpenVINO GenAI cannot open this model: {first_line(error)}") from error
        tails = Tails(block=BLOCK_TOKENS, most=_TAILS_A_BLOCK * spec.cache_blocks) if spec.prefix_cache else None
        self._pipelines[lane] = pipeline = _Pipeline(engine, tails=tails)
        return pipeline


def first_line(error: BaseException) -> str:
    """Return what an error of OpenVINO says, without the place in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception from")]
    return said[0][:300] if said else type(error).__name__
