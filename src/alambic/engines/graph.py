"""The engine `openvino-graph`: models that write and that the batching pipeline of OpenVINO GenAI cannot take.

Encoder-decoders (T5, Marian, BART, mBART, Pegasus) and Gemma 2, whose attention caps its scores. It has the same
interface; answers that come together share the processor token by token, but not a batch, and none follows a JSON
schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alambic import _extras
from alambic.engines.genai_answer import Answer
from alambic.engines.genai_loop import Loop
from alambic.engines.genai_options import TOKENIZER
from alambic.engines.genai_score import Row
from alambic.engines.graph_core import GraphCore, Graphs, GraphSpec, log_probability
from alambic.engines.loop_writer import FINISH_S, LoopWriter, check_sampling
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling

_OWN = ("shape", "start_id", "first_id")


class GraphWriter(LoopWriter):
    """Writes with the graphs in a folder; close it, or use a ``with`` block."""

    def __init__(
        self,
        folder: Path,
        params: Mapping[str, Any],
        *,
        threads: int | None = None,
        cache_dir: Path | None = None,
        most_running: int = 16,
    ) -> None:
        """Open the model.

        Args:
            folder: of the part.
            params: those of `openvino-genai`, and `shape`: ``decoder`` or ``encoder-decoder``; of the latter also
                `start_id` and `first_id`, see `GraphSpec`.
            threads: of the engine; None lets it choose.
            cache_dir: where compiled models are kept between runs; None: nowhere.
            most_running: answers that take turns; further ones wait in order.

        Raises:
            EngineError: it cannot be opened.
        """
        self._paired = params.get("shape") == "encoder-decoder"
        start, first = params.get("start_id"), params.get("first_id")
        if self._paired and not isinstance(start, int):
            raise EngineError(f"{folder}: start_id is {start!r}, not a token id")
        own = {k: v for k, v in params.items() if k not in _OWN}
        super().__init__(folder, own, threads=threads, converses=not self._paired)
        spec = GraphSpec(folder, self._engine_settings(cache_dir), start if self._paired else None, first)
        self._graphs = Graphs(spec)
        self._loop = Loop(lambda: GraphCore(self._graphs), most_running=most_running)

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do besides `write`."""
        return frozenset({"score", "logprobs", "token_ids"})

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Return the ids that the model reads for `request`: of an encoder-decoder, those of the text alone.

        Raises:
            EngineError: a conversation that this model cannot read.
            TemplateError: the template refuses the conversation.
        """
        if self._paired and request.chat is not None:
            return self._ids(source_text(request.chat), special=True)
        return super().token_ids(request)

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads, as JSON values."""
        return {
            "engine": "openvino-graph",
            "version": _extras.load("openvino").__version__,
            "device": "CPU",
            "tokenizer": TOKENIZER,
            "shape": "encoder-decoder" if self._paired else "decoder",
            "precision": self.params.precision,
            "properties": dict(self._properties),
            "threads": self._threads,
            "context_tokens": self.context_tokens,
        }

    def close(self, *, finish_s: float = FINISH_S) -> None:
        """Free the model; what runs has `finish_s` seconds to finish, then it is cancelled."""
        self._loop.close(finish_s=finish_s)

    def _answer(self, request: GenerationRequest) -> Answer:
        sampling = request.sampling
        check_sampling(sampling)
        if sampling.json_schema is not None:
            raise EngineError(
                "this model cannot follow a json_schema: its engine (openvino-graph) has no grammar",
                hint="take a decoder of another family as base",
            )
        ids = self.token_ids(request)
        room = self._check_fits(len(ids), 1 if sampling.max_tokens is None else sampling.max_tokens)
        tokens = room if sampling.max_tokens is None else sampling.max_tokens
        style = self._style if request.chat is not None and request.chat.tools else None
        return Answer(
            self._loop, self._voice, ids, lane="plain", settings=self._settings(sampling), tokens=tokens,
            sampling=sampling, style=style,
        )  # fmt: skip

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        return {
            "stop_token_ids": frozenset(self.params.end_ids),
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "do_sample": sampling.temperature > 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "rng_seed": sampling.seed,
        }

    def _check_fits(self, prompt: int, after: int) -> int:
        room = self.context_tokens - (0 if self._paired else prompt)  # an encoder-decoder counts them apart
        if prompt > self.context_tokens or after > room:
            each = " of each" if self._paired else " in all"
            raise InputTooLong(
                f"the prompt has {prompt} tokens and {after} are to be written; the model reads "
                f"{self.context_tokens}{each}",
                hint="shorten the input, or lower max_tokens",
            )
        return room

    def _score(self, rows: Sequence[Row]) -> list[list[float]]:
        return [self._score_one(ids, after) if after else [] for ids, after in rows]

    def _score_one(self, ids: Sequence[int], after: Sequence[int]) -> list[float]:
        reading = self._graphs.reading(ids)
        try:
            logits = reading.logits(after[:-1], rows=len(after))  # [K, V]
        except BaseException:
            reading.drop()
            raise
        reading.close()
        return [log_probability(row, token) for row, token in zip(logits, after, strict=True)]


def source_text(chat: Chat) -> str:
    """Return what an encoder-decoder reads of a conversation: the system message, if any, and the user's.

    Raises:
        EngineError: it has several turns, or tools.
    """
    messages = chat.prompt.messages
    roles = [message.role for message in messages]
    if roles not in (["user"], ["system", "user"]) or chat.tools:
        raise EngineError(
            f"this model reads one user message, got {', '.join(roles)}{' and tools' if chat.tools else ''}",
            hint="take a decoder as base for conversations",
        )
    return "\n\n".join(message.content for message in messages)
