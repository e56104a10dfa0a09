"""The part `torch`: a Model directory run as it was trained. The reference that packed parts are compared with.

`TorchPart` is that of parts that read, `TorchWriter` that of parts that write. The one module of `engines` that may
load torch; only the build opens it, and no bundle that ships names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.detokenise import Detokeniser, StopFinder
from alambic.engines.parts import Array, TokenParams, infer_windows
from alambic.engines.toolcalls import parse, style_of
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


class TorchPart:
    """Runs a Model directory in float32; special tokens, limit and padding come from the model itself."""

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        self._torch = _extras.load("torch")
        if threads is not None:
            self._torch.set_num_threads(threads)
        # By name, because engines import nothing of the training side when they are read.
        self._encoder = _extras.load("alambic.model.encoder").Encoder.load(folder)
        prefix, suffix = self._encoder.special_ids()
        spec = self._encoder.spec
        own = {
            "output": "logits" if spec.labels is not None else "embedding",
            "prefix_ids": prefix,
            "suffix_ids": suffix,
            "pad_id": self._encoder.pad_id,
            "max_tokens": spec.max_tokens,
            "precision": "fp32",
        }
        self.params = TokenParams.of({**own, **params}, folder)
        self.output = self.params.output

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, neither cut nor padded."""
        ids: list[list[int]] = self._encoder.tokenize(texts)
        return ids

    def infer(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return one row per window of ids."""
        return infer_windows(windows, self._run, pad_id=self.params.pad_id, batch_size=batch_size)

    def run(self, items: Sequence[str]) -> NDArray[np.float32]:
        """Return one row per text; long texts are the business of `classify`."""
        return self.infer(self.token_ids(items))

    def describe(self) -> dict[str, Any]:
        """Return engine, version and threads."""
        return {
            "engine": "torch",
            "version": self._torch.__version__,
            "precision": "fp32",
            "properties": {},
            "threads": self._torch.get_num_threads(),
        }

    def _run(self, ids: Array, mask: Array) -> Array:
        with self._torch.inference_mode():
            values: Array = self._encoder(self._torch.from_numpy(ids), self._torch.from_numpy(mask)).float().numpy()
        return values


class TorchWriter:
    """A `Writer` that takes the likeliest token, one answer after the other, in float32.

    What it does not do (sampling, penalties, schemas) it refuses, so that a comparison never rests on it in silence.
    """

    def __init__(
        self, folder: Path, params: Mapping[str, Any], *, threads: int | None = None, cache_dir: Path | None = None
    ) -> None:
        """Open the model in `folder` (Hugging Face layout); `params` may name `context_tokens`."""
        self._torch = _extras.load("torch")
        if threads is not None:
            self._torch.set_num_threads(threads)
        self._decoder = _extras.load("alambic.model.decoder").Decoder.load(folder, dtype=self._torch.float32)
        self._decoder.model.eval()
        self._tokenizer = self._decoder.tokenizer
        self._template = self._decoder.template
        self._style = style_of(self._template)
        self.context_tokens: int = params.get("context_tokens", self._decoder.context_tokens)
        added = self._tokenizer.get_added_tokens_decoder()
        self._silent = {id for id, token in added.items() if token.special} | set(self._decoder.ends)

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do besides `write`."""
        return frozenset({"score", "logprobs", "token_ids"})

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Return the ids that the model reads for `request`, special tokens included."""
        if request.chat is None:
            return list(self._tokenizer.encode(request.text, add_special_tokens=True).ids)
        text = self._template.render(request.chat, reply=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Write one answer piece by piece.

        Raises:
            InputTooLong: prompt, or prompt and max_tokens, do not fit the context.
            EngineError: the request asks for more than the likeliest tokens.
        """
        _only_greedy(request.sampling)
        ids = self.token_ids(request)
        most = request.sampling.max_tokens
        if len(ids) + (most or 1) > self.context_tokens:
            raise InputTooLong(
                f"the prompt has {len(ids)} tokens and max_tokens is {most}; "
                f"the model reads {self.context_tokens} in all"
            )
        return self._chunks(ids, most or self.context_tokens - len(ids), request)

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Write all answers, one after the other."""
        return [self._reply(list(self.stream(request)), request) for request in requests]

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Return the natural log-probability of each token of each continuation, given its prompt."""
        scores = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            before = self.token_ids(prompt)
            after = self._tokenizer.encode(continuation, add_special_tokens=False).ids
            with self._torch.inference_mode():
                logits = self._decoder.model(self._torch.tensor([[*before, *after]])).logits[0]  # [T, V]
                told = logits[len(before) - 1 :].double().log_softmax(-1)
            scores.append([float(told[k, id]) for k, id in enumerate(after)])
        return scores

    def describe(self) -> dict[str, Any]:
        """Return engine, version and threads."""
        return {
            "engine": "torch",
            "version": self._torch.__version__,
            "precision": "fp32",
            "properties": {},
            "threads": self._torch.get_num_threads(),
        }

    def close(self) -> None:
        """Free the model."""
        del self._decoder.model

    def _chunks(self, prompt: list[int], tokens: int, request: GenerationRequest) -> Iterator[Chunk]:
        text = Detokeniser(self._tokenizer, silent=self._silent)
        stops = StopFinder(request.sampling.stop)
        start = first = time.perf_counter()
        reason: FinishReason = "length"
        count = 0
        for id, logprob in self._greedy(prompt, tokens):
            count += 1
            first = first if count > 1 else time.perf_counter()
            piece = stops.push(text.push([id]))
            shown = TokenLogprob(self._tokenizer.decode([id], skip_special_tokens=False), logprob)
            told = (shown,) if request.sampling.logprobs and id not in self._silent else ()
            if stops.found or id in self._decoder.ends:
                reason = "stop"
            yield Chunk(piece, logprobs=told)
            if reason == "stop":
                break
        now = time.perf_counter()
        left = "" if stops.found else stops.push(text.flush()) + stops.flush()
        yield Chunk(
            left,
            finish_reason=reason,
            usage=Usage(len(prompt), count),
            timings=Timings((first - start) * 1e3, (now - first) * 1e3),
        )

    def _greedy(self, prompt: list[int], tokens: int) -> Iterator[tuple[int, float]]:
        ids, cache = self._torch.tensor([prompt]), None
        for _ in range(tokens):
            with self._torch.inference_mode():
                out = self._decoder.model(ids, past_key_values=cache, use_cache=True)
                told = out.logits[0, -1].double().log_softmax(-1)  # [V]
            cache, id = out.past_key_values, int(told.argmax())
            yield id, float(told[id])
            ids = self._torch.tensor([[id]])

    def _reply(self, chunks: list[Chunk], request: GenerationRequest) -> Reply:
        text, last = "".join(chunk.text for chunk in chunks), chunks[-1]
        assert last.finish_reason and last.usage and last.timings, "the last chunk tells how it ended"
        content, calls = parse(text, self._style if request.chat is not None and request.chat.tools else None)
        reason: FinishReason = "tool_calls" if calls and last.finish_reason == "stop" else last.finish_reason
        told = tuple(entry for chunk in chunks for entry in chunk.logprobs)
        return Reply(text, reason, last.usage, last.timings, content=content, tool_calls=calls, logprobs=told)


def _only_greedy(sampling: Sampling) -> None:
    plain = Sampling(max_tokens=sampling.max_tokens, stop=sampling.stop, logprobs=sampling.logprobs, seed=sampling.seed)
    if sampling != plain:
        raise EngineError("the reference engine 'torch' only writes the likeliest tokens, without penalties or schema")
