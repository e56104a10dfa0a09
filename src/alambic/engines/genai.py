"""The engine `openvino-genai`: a decoder on the CPU, many answers at once. The default of every bundle that writes.

Its folder holds openvino_model.xml and .bin, tokenizer.json and chat_template.jinja (`alambic.pack.writer_openvino`).
Prompts are rendered and tokenised here, so that the model reads the ids that it was trained on. Safe to share between
threads: one of its own owns the engine, and requests that come together are computed together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alambic import _extras
from alambic.engines import genai_options as options
from alambic.engines.genai_answer import Answer
from alambic.engines.genai_core import BLOCK_TOKENS, Core, CoreSpec
from alambic.engines.genai_loop import Loop
from alambic.engines.genai_score import Row, Scorer
from alambic.engines.grammar import Grammar, compile_schema
from alambic.engines.loop_writer import FINISH_S, LoopWriter, check_sampling
from alambic.engines.tokens import read_tokenizer
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.generation import GenerationRequest, Sampling

_NGRAM = 3  # tokens that must agree before prompt-lookup guesses the next ones
_KEPT_GRAMMARS = 64


class GenAIWriter(LoopWriter):
    """Writes with the model in a folder; close it, or use a ``with`` block."""

    def __init__(
        self,
        folder: Path,
        params: Mapping[str, Any],
        *,
        threads: int | None = None,
        cache_dir: Path | None = None,
        cache_mb: float | None = None,
        prefix_cache: bool = True,
        prompt_step: int = 256,
        most_running: int = 16,
        draft: Path | None = None,
        draft_tokens: int = 4,
        adapter: Path | None = None,
        other_adapters: Sequence[Path | None] = (),
    ) -> None:
        """Open the model.

        Args:
            folder: of the part.
            params: see `GenAIParams`.
            threads: of the engine; None lets it choose.
            cache_dir: where compiled models are kept between runs; None: nowhere.
            cache_mb: most megabytes of the cache of keys and values; None: see `genai_options.cache_blocks`.
            prefix_cache: keep what was computed for beginnings of prompts (a task's constant part is then read once).
            prompt_step: most tokens of prompts read at once; answers under way wait for them.
            most_running: answers computed together; further ones wait in order.
            draft: folder of a smaller model with the same tokenizer, whose guesses this one only checks (speculative
                decoding, Leviathan et al. 2023, https://arxiv.org/abs/2211.17192).
            draft_tokens: guesses at once.
            adapter: file of the LoRA adapter that the weights are read with; None: as they are.
            other_adapters: of the writers that `with_adapter` will make. Adapters take turns, and as the engine cannot
                tell which of them it kept a beginning for, nothing is kept then.

        Raises:
            EngineError: it cannot be opened.
        """
        _check_numbers(most_running, prompt_step, draft_tokens)
        super().__init__(folder, params, threads=threads)
        if draft is not None:
            check_draft(folder, draft)
        per_token = options.tokens_bytes(folder, self._properties)
        blocks = options.cache_blocks(per_token, context_tokens=self.context_tokens, cache_mb=cache_mb)
        several = {adapter, *other_adapters}
        self._adapter = None if adapter is None else str(adapter)
        self._spec = CoreSpec(
            str(folder), self._engine_settings(cache_dir), blocks, prompt_step, most_running,
            prefix_cache and len(several) == 1, None if draft is None else str(draft),
            tuple(sorted(str(file) for file in several if file is not None)),
        )  # fmt: skip
        self._cache_mb = blocks * BLOCK_TOKENS * per_token / 1e6
        self._draft_tokens = draft_tokens
        self._grammars: dict[str, Grammar] = {}
        self._scorer = Scorer(folder / options.MODEL, self._spec.properties, adapter=adapter)
        self._lent = False
        self._loop = Loop(lambda: Core(self._spec), most_running=most_running)

    def with_adapter(self, adapter: Path | None) -> GenAIWriter:
        """Return a writer over the same weights with one of `other_adapters`; close it before this one.

        Raises:
            EngineError: the adapter was not named when this writer was opened.
        """
        if adapter is not None and str(adapter) not in self._spec.adapters:
            raise EngineError(f"{adapter}: not an adapter that this engine was opened with")
        other = copy.copy(self)
        other._adapter = None if adapter is None else str(adapter)
        other._scorer = Scorer(self.folder / options.MODEL, self._spec.properties, adapter=adapter)
        other._lent = True
        return other

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do besides `write`."""
        able = {"score", "logprobs", "token_ids"}
        if (self.folder / "openvino_detokenizer.xml").is_file():  # the grammar needs the vocabulary that is in there
            able.add("json_schema")
        return frozenset(able)

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads, as JSON values."""
        return {
            "engine": "openvino-genai",
            "version": _extras.load("openvino_genai").__version__,
            "device": "CPU",
            "tokenizer": options.TOKENIZER,
            "precision": self.params.precision,
            "properties": dict(self._properties),
            "threads": self._threads,
            "context_tokens": self.context_tokens,
            "cache_mb": round(self._cache_mb, 1),
            "prefix_cache": self._spec.prefix_cache,
            "prompt_step": self._spec.prompt_step,
            "most_running": self._spec.most_running,
            "draft": None if self._spec.draft is None else Path(self._spec.draft).name,
            "adapter": None if self._adapter is None else Path(self._adapter).parent.name,
            "adapters_served": len(self._spec.adapters),
        }

    def close(self, *, finish_s: float = FINISH_S) -> None:
        """Free the model; what runs has `finish_s` seconds to finish, then it is cancelled."""
        if not self._lent:
            self._loop.close(finish_s=finish_s)
        self._scorer.close()

    def _answer(self, request: GenerationRequest) -> Answer:
        sampling = request.sampling
        check_sampling(sampling)
        self._check_schema(sampling)
        ids = self.token_ids(request)
        grammar = None if sampling.json_schema is None else self._grammar(sampling.json_schema)
        tokens = self._limit(len(ids), sampling.max_tokens)
        if grammar is not None and sampling.max_tokens is None:
            tokens = min(tokens, grammar.most_tokens)
        style = self._style if request.chat is not None and request.chat.tools else None
        settings = self._settings(sampling)
        lane: Any = "lookup" if sampling.lookup_tokens else "plain" if self._spec.draft is None else "draft"
        if lane == "draft":
            settings["num_assistant_tokens"] = self._draft_tokens
        elif lane == "lookup":
            settings |= {"num_assistant_tokens": sampling.lookup_tokens, "max_ngram_size": _NGRAM}
        return Answer(
            self._loop, self._voice, ids, lane=lane, settings=settings, tokens=tokens, sampling=sampling,
            grammar=grammar, style=style, adapter=self._adapter,
        )  # fmt: skip

    def _score(self, rows: Sequence[Row]) -> list[list[float]]:
        return self._scorer.score(rows)

    def _check_schema(self, sampling: Sampling) -> None:
        if sampling.json_schema is None:
            return
        if "json_schema" not in self.capabilities:
            raise EngineError(
                "this bundle cannot follow a json_schema: it has no openvino_detokenizer.xml",
                hint="pack it again where openvino-tokenizers is installed",
            )
        if sampling.stop:
            raise EngineError("stop texts and json_schema exclude each other: one could cut the other short")

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        """Return the fields of the engine's GenerationConfig, but for the limit."""
        settings: dict[str, Any] = {
            "stop_token_ids": list(self.params.end_ids),
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logprobs": int(sampling.logprobs),
        }
        if self.params.end_ids:
            settings["eos_token_id"] = self.params.end_ids[0]
        if sampling.temperature > 0:
            settings |= {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "rng_seed": sampling.seed,
            }
            if sampling.top_k is not None:
                settings["top_k"] = sampling.top_k
        return settings

    def _grammar(self, schema: Mapping[str, Any]) -> Grammar:
        key = json.dumps(schema, sort_keys=False)
        if key not in self._grammars:
            if len(self._grammars) >= _KEPT_GRAMMARS:
                self._grammars.clear()
            self._grammars[key] = compile_schema(schema)
        return self._grammars[key]

    def _limit(self, prompt: int, max_tokens: int | None) -> int:
        """Return how many tokens may be written."""
        room = self._check_fits(prompt, 1 if max_tokens is None else max_tokens, asked=max_tokens)
        return room if max_tokens is None else max_tokens

    @property
    def _room(self) -> int:
        """Tokens that the cache holds at all."""
        return (self._spec.cache_blocks - 1) * BLOCK_TOKENS

    def _check_fits(self, prompt: int, after: int, *, asked: int | None = None) -> int:
        room = min(self.context_tokens, self._room) - prompt
        if after <= room:
            return room
        more = "" if asked is None else f" and max_tokens is {asked}"
        limit = f"the model reads {self.context_tokens} in all"
        hint = "shorten the input" if asked is None else "shorten the input, or lower max_tokens"
        if self._room < self.context_tokens:
            limit += f", and its cache of {self._cache_mb:.0f} MB holds {self._room}"
            hint += ", or raise cache_mb"
        raise InputTooLong(f"the prompt has {prompt} tokens{more}; {limit}", hint=hint)


def _check_numbers(most_running: int, prompt_step: int, draft_tokens: int) -> None:
    if most_running < 1 or prompt_step < BLOCK_TOKENS or draft_tokens < 1:
        raise EngineError(
            f"most_running {most_running}, prompt_step {prompt_step}, draft_tokens {draft_tokens}: "
            f"they are at least 1, {BLOCK_TOKENS} and 1"
        )


def check_draft(folder: Path, draft: Path) -> None:
    """Check that the model in `draft` means the same texts by its ids as the one in `folder`.

    Raises:
        EngineError: naming the first id that it reads otherwise.
    """
    files = (folder / options.TOKENIZER, draft / options.TOKENIZER)
    ours, theirs = ({i: text for text, i in read_tokenizer(file).get_vocab().items()} for file in files)
    if ours == theirs:
        return
    at = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    said, other = (repr(ids[at]) if at in ids else "nothing" for ids in (ours, theirs))
    raise EngineError(
        f"{draft}: a draft has the tokens of the model whose words it guesses, and token {at} is {other} there, "
        f"{said} in {folder} ({len(theirs):,} and {len(ours):,} tokens)",
        hint="take a smaller model of the same family as draft, or leave it out",
    )
