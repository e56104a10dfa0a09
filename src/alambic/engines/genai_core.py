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
from alambic.errors import EngineError

# A pipeline either guesses tokens from the prompt, or with a draft model, or not at all: it is decided when it opens.
Lane = Literal["plain", "draft", "lookup"]
End = Literal["stop", "length", "cancelled", "no_room"]
BLOCK_TOKENS = 32  # of the paged cache on CPUs
# A pipeline never forgets a grammar (0.15 MB each with 50,000 words): from here on it is opened anew once it is idle.
MOST_GRAMMARS = 2000


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
    """

    folder: str
    properties: Mapping[str, str | int | bool]
    cache_blocks: int
    prompt_step: int
    most_running: int
    prefix_cache: bool = True
    draft: str | None = None


@dataclass(frozen=True)
class Ask:
    """A request of the core.

    Attributes:
        id: names it.
        ids: the prompt.
        lane: the pipeline that serves it.
        settings: fields of the engine's GenerationConfig.
        grammar: EBNF that the answer follows; None: free text.
    """

    id: int
    ids: Sequence[int]
    lane: Lane
    settings: Mapping[str, Any]
    grammar: str | None = None


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


class Core:
    """Pipelines by lane; each opens when the first request needs it."""

    def __init__(self, spec: CoreSpec) -> None:
        self._spec = spec
        self._genai = _extras.load("openvino_genai")
        self._openvino = _extras.load("openvino")
        self._pipelines: dict[Lane, _Pipeline] = {}
        self._open("plain" if spec.draft is None else "draft")

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return any(pipeline.handles for pipeline in self._pipelines.values())

    def add(self, ask: Ask) -> News | None:
        """Take a request; return news when it ended at once, because the engine refuses it."""
        try:
            pipeline = self._ready(ask)
            prompt = self._openvino.Tensor(np.array([ask.ids], dtype=np.int64))
            pipeline.handles[ask.id] = pipeline.engine.add_request(ask.id, prompt, self._config(ask))
        except (RuntimeError, ValueError, TypeError, EngineError) as error:
            return News(ask.id, error=first_line(error))
        return None

    def cancel(self, id: int) -> None:
        """Stop a request; the news of its end come with the next step."""
        for pipeline in self._pipelines.values():
            if id in pipeline.handles:
                pipeline.handles[id].cancel()
                pipeline.cancelled.add(id)

    def step(self) -> list[News]:
        """Compute once for all requests and return what came of it.

        Raises:
            RuntimeError: the engine failed; none of its requests can go on.
        """
        news = []
        for pipeline in self._pipelines.values():
            if pipeline.handles:
                pipeline.engine.step()
                news += self._read(pipeline)
        return news

    def close(self) -> None:
        """Free the models."""
        self._pipelines.clear()

    def _ready(self, ask: Ask) -> _Pipeline:
        pipeline = self._pipelines.get(ask.lane)
        if pipeline is not None and len(pipeline.grammars) >= MOST_GRAMMARS and not pipeline.handles:
            del self._pipelines[ask.lane], pipeline.engine
            pipeline = None
        pipeline = pipeline or self._open(ask.lane)
        if ask.grammar is not None:
            pipeline.grammars.add(hashlib.sha256(ask.grammar.encode()).hexdigest())
        return pipeline

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
            end = self._end(handle.get_status(), reason)
            if end is not None:
                if id in pipeline.cancelled:  # a step with nothing but cancelled requests says that it had no room
                    pipeline.cancelled.remove(id)
                    end = "cancelled"
                del pipeline.handles[id]
            if ids or end is not None:
                news.append(News(id, ids, logprobs, end))
        return news

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
            if lane == "lookup":
                properties["prompt_lookup"] = True
            elif lane == "draft":
                assert spec.draft is not None, "only a writer with a draft asks for this lane"
                properties["draft_model"] = genai.draft_model(spec.draft, "CPU", **spec.properties)
            engine = genai.ContinuousBatchingPipeline(Path(spec.folder), scheduler, "CPU", properties)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"{spec.folder}: OpenVINO GenAI cannot open this model: {first_line(error)}") from error
        self._pipelines[lane] = pipeline = _Pipeline(engine)
        return pipeline


def first_line(error: BaseException) -> str:
    """Return what an error of OpenVINO says, without the place in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception from")]
    return said[0][:300] if said else type(error).__name__
