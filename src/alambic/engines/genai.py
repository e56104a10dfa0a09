"""The engine `openvino-genai`: a decoder on the CPU, many answers at once. The default of every bundle that writes.

Its folder holds openvino_model.xml and .bin, tokenizer.json and chat_template.jinja (`alambic.pack.writer_openvino`).
Prompts are rendered and tokenised here, so that the model reads the ids that it was trained on. Safe to share between
threads: one of its own owns the engine, and requests that come together are computed together.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alambic import _extras
from alambic.engines import genai_options as options
from alambic.engines.arithmetic import computed
from alambic.engines.genai_answer import Answer, Pieces, Voice
from alambic.engines.genai_core import BLOCK_TOKENS, Core, CoreSpec
from alambic.engines.genai_loop import Loop
from alambic.engines.genai_score import Scorer
from alambic.engines.grammar import Grammar, compile_schema
from alambic.engines.toolcalls import parse, style_of
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.generation import Chunk, GenerationRequest, Reply, Sampling, TokenLogprob
from alambic.render import ChatTemplate, pinned

_FINISH_S = 30.0
_NGRAM = 3  # tokens that must agree before prompt-lookup guesses the next ones
_KEPT_GRAMMARS = 64


class GenAIWriter:
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
        self.folder = folder
        self.params = options.GenAIParams.of(params, folder)
        self.context_tokens = self.params.context_tokens
        if most_running < 1 or prompt_step < BLOCK_TOKENS or draft_tokens < 1:
            raise EngineError(
                f"most_running {most_running}, prompt_step {prompt_step}, draft_tokens {draft_tokens}: "
                f"they are at least 1, {BLOCK_TOKENS} and 1"
            )
        self._tokenizer = read_tokenizer(folder / options.TOKENIZER)
        self._template = self._read_template()
        self._style = style_of(self._template) if self._template is not None else None
        if draft is not None:
            check_draft(folder, draft)
        properties = computed({**options.DEFAULTS, **self.params.properties}, folder)
        per_token = options.tokens_bytes(folder, properties)
        blocks = options.cache_blocks(per_token, context_tokens=self.context_tokens, cache_mb=cache_mb)
        self._properties = properties
        self._threads = threads
        extra: dict[str, str | int | bool] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        extra |= {} if cache_dir is None else {"CACHE_DIR": str(cache_dir), "CACHE_MODE": "OPTIMIZE_SIZE"}
        several = {adapter, *other_adapters}
        self._adapter = None if adapter is None else str(adapter)
        self._spec = CoreSpec(
            str(folder), {**properties, **extra}, blocks, prompt_step, most_running, prefix_cache and len(several) == 1,
            None if draft is None else str(draft), tuple(sorted(str(file) for file in several if file is not None)),
        )  # fmt: skip
        self._cache_mb = blocks * BLOCK_TOKENS * per_token / 1e6
        self._draft_tokens = draft_tokens
        self._grammars: dict[str, Grammar] = {}
        self._voice = Voice(self._tokenizer, self._silent_ids(), frozenset(self.params.end_ids))
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

    def stream(self, request: GenerationRequest) -> Pieces:
        """Write one answer piece by piece; `close` of the iterator cancels the work, `cancel` does from any thread.

        Raises:
            InputTooLong: prompt, or prompt and max_tokens, do not fit the context.
            EngineError: the request asks for what this engine cannot do, or the engine failed.
        """
        return Pieces(self._answer(request))

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Write all answers, in order; they are computed together.

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
            return list(self._tokenizer.encode(request.text, add_special_tokens=True).ids)
        if self._template is None:
            raise EngineError(
                f"{self.folder}: no {options.TEMPLATE}, so a conversation cannot be written",
                hint="give a text, or pack the model with a template",
            )
        return list(
            self._tokenizer.encode(self._template.render(request.chat, reply=True), add_special_tokens=False).ids
        )

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Return the natural log-probability of each token of each continuation, given its prompt.

        Raises:
            InputTooLong: prompt and continuation do not fit the context.
        """
        rows = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            ids = self.token_ids(prompt)
            after = list(self._tokenizer.encode(continuation, add_special_tokens=False).ids)
            self._check_fits(len(ids), len(after))
            rows.append((ids, after))
        return self._scorer.score(rows)

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

    def close(self, *, finish_s: float = _FINISH_S) -> None:
        """Free the model; what runs has `finish_s` seconds to finish, then it is cancelled."""
        if not self._lent:
            self._loop.close(finish_s=finish_s)
        self._scorer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finish_s=_FINISH_S if error is None else 0.0)

    def _answer(self, request: GenerationRequest) -> Answer:
        """Check a request and make the answer that will be written to it."""
        sampling = request.sampling
        _check(sampling, self.capabilities)
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
        self._check_fits(prompt, 1 if max_tokens is None else max_tokens, asked=max_tokens)
        room = min(self.context_tokens, self._room) - prompt
        return room if max_tokens is None else max_tokens

    @property
    def _room(self) -> int:
        """Tokens that the cache holds at all."""
        return (self._spec.cache_blocks - 1) * BLOCK_TOKENS

    def _check_fits(self, prompt: int, after: int, *, asked: int | None = None) -> None:
        if prompt + after <= min(self.context_tokens, self._room):
            return
        more = "" if asked is None else f" and max_tokens is {asked}"
        limit = f"the model reads {self.context_tokens} in all"
        hint = "shorten the input" if asked is None else "shorten the input, or lower max_tokens"
        if self._room < self.context_tokens:
            limit += f", and its cache of {self._cache_mb:.0f} MB holds {self._room}"
            hint += ", or raise cache_mb"
        raise InputTooLong(f"the prompt has {prompt} tokens{more}; {limit}", hint=hint)

    def _read_template(self) -> ChatTemplate | None:
        path = self.folder / options.TEMPLATE
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


def read_tokenizer(path: Path) -> Any:
    """Open a tokenizer.json with whatever truncation and padding it holds cleared.

    Raises:
        EngineError: it cannot be read.
    """
    tokenizers = _extras.load("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise EngineError(f"{path}: not a readable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check(sampling: Sampling, capabilities: frozenset[str]) -> None:
    """Refuse settings out of range, and those that exclude each other."""
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
    if sampling.json_schema is not None:
        if "json_schema" not in capabilities:
            raise EngineError(
                "this bundle cannot follow a json_schema: it has no openvino_detokenizer.xml",
                hint="pack it again where openvino-tokenizers is installed",
            )
        if sampling.stop:
            raise EngineError("stop texts and json_schema exclude each other: one could cut the other short")


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
