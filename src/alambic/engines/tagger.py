"""The part `tagger`: a token classifier on ONNX Runtime or OpenVINO, the first rung of `extract`.

Its folder holds an encoder as those engines read it (its output is the state of every token), `tags_weight.npy` and
`tags_bias.npy` for BIO tags, and `choices_weight.npy` and `choices_bias.npy` when fields are chosen for the whole text.
The heads run in numpy: they are a thousandth of the work. Safe to share between threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic._registry import Registry
from alambic.engines.nearest_answer import query_of
from alambic.engines.parts import MAX_CELLS, TokenParams, check_keys, read_array
from alambic.engines.tag_answer import assemble
from alambic.engines.tag_fields import Fields, fields_of
from alambic.engines.tagging import (
    UNITS,
    Reading,
    Span,
    Window,
    aligned,
    decode,
    guess,
    line_mark,
    log_softmax,
    read,
    restored,
    windows,
)
from alambic.engines.windows import batches
from alambic.errors import EngineError
from alambic.kinds.extract import canonical
from alambic.kinds.generation import Chunk, GenerationRequest, Reply, Timings, Usage

RUNTIMES = Registry(
    "runtime", {"onnx": "alambic.engines.onnx:OnnxPart", "openvino": "alambic.engines.openvino:OpenVinoPart"}
)
_CHUNK = 256  # texts whose states are held at once
Floats = NDArray[np.float32]


class StatesPart(Protocol):
    """An encoder whose rows are the states of all tokens of a window."""

    params: TokenParams

    def infer(self, windows: Sequence[Sequence[int]], *, batch_size: int = 32) -> Floats:
        """Return states [B, T, H] of windows of ids that fit one batch."""

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads."""


@dataclass(frozen=True)
class TaggerSpec:
    """What a tagger answers.

    Attributes:
        labels: of spans, in the order of the tags.
        choices: for each field chosen for the whole text, its values.
        unit: ``word`` or ``token``: what gets one tag.
        overlap: tokens that neighbouring windows share.
        long: ``windows``, ``head`` or ``error``.
        schema: JSON Schema of the answer; None when only spans are wanted.
        lines: the model reads where lines end.
    """

    labels: tuple[str, ...]
    choices: Mapping[str, tuple[Any, ...]]
    unit: str = "word"
    overlap: int = 64
    long: str = "windows"
    schema: Mapping[str, Any] | None = None
    lines: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "labels": list(self.labels),
            "choices": {name: list(values) for name, values in self.choices.items()},
            "unit": self.unit,
            "overlap": self.overlap,
            "long": self.long,
            "schema": None if self.schema is None else dict(self.schema),
            "lines": self.lines,
        }

    @classmethod
    def of(cls, data: Mapping[str, Any], where: Path) -> TaggerSpec:
        """Read back `to_dict`, from a file that is not trusted.

        Raises:
            EngineError: a key is unknown or a value has the wrong type.
        """
        check_keys(data, cls.__dataclass_fields__, where)
        labels, choices = data.get("labels", ()), data.get("choices", {})
        if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
            raise EngineError(f"{where}: labels is {labels!r}, not a list of names")
        if not isinstance(choices, Mapping) or not all(isinstance(v, list | tuple) and v for v in choices.values()):
            raise EngineError(f"{where}: choices is {choices!r}, not lists of values by field")
        if data.get("unit", "word") not in UNITS:
            raise EngineError(f"{where}: unit is {data['unit']!r}", hint=f"allowed: {', '.join(UNITS)}")
        overlap = data.get("overlap", 64)
        if not isinstance(overlap, int) or isinstance(overlap, bool) or overlap < 0:
            raise EngineError(f"{where}: overlap is {overlap!r}, not a number of tokens")
        if not isinstance(data.get("lines", False), bool):
            raise EngineError(f"{where}: lines is {data['lines']!r}, not true or false")
        fixed = {"labels": tuple(labels), "choices": {name: tuple(values) for name, values in choices.items()}}
        return cls(**{**data, **fixed})


@dataclass(frozen=True)
class Tagged:
    """What a tagger says of one text.

    Attributes:
        spans: in the order of the text, never overlapping.
        choices: value of each chosen field.
        confidences: probability of each of them.
        answer: both as JSON under the schema; None without one.
    """

    spans: tuple[Span, ...]
    choices: Mapping[str, Any]
    confidences: Mapping[str, float]
    answer: Mapping[str, Any] | None

    @property
    def text(self) -> str:
        """The answer as JSON text, in the one form that answers are learnt in (`alambic.kinds.extract`)."""
        return canonical(self.answer)


class TaggerPart:
    """Runs a folder written by `alambic.pack.tagger`."""

    output = "spans"

    def __init__(
        self,
        folder: Path,
        params: Mapping[str, Any],
        *,
        threads: int | None = None,
        cache_dir: Path | None = None,
        encoder: StatesPart | None = None,
    ) -> None:
        """Open the part.

        Args:
            folder: where its files are.
            params: ``runtime``, parameters of the ``encoder``, and what the ``tagger`` answers.
            threads: threads of the engine; None lets it choose.
            cache_dir: where compiled models are kept between runs.
            encoder: one that is open already, instead of the packed one (the proof's reference).

        Raises:
            EngineError: a file is missing or damaged, or the parameters are wrong.
        """
        check_keys(params, ("runtime", "encoder", "tagger"), folder)
        if params.get("runtime") not in RUNTIMES:
            raise EngineError(f"{folder}: runtime is {params.get('runtime')!r}", hint=f"known: {', '.join(RUNTIMES)}")
        self.runtime = str(params["runtime"])
        self.spec = TaggerSpec.of(params.get("tagger", {}), folder)
        self._fields: Fields | None = None if self.spec.schema is None else fields_of(self.spec.schema)
        self._encoder = encoder or RUNTIMES.get(self.runtime)(
            folder, params.get("encoder", {}), threads=threads, cache_dir=cache_dir
        )
        self._tokenizer = _tokenizer(folder / "tokenizer.json")
        own = self._encoder.params
        self._room = (own.max_tokens or 512) - len(own.prefix_ids) - len(own.suffix_ids)
        if self._room <= self.spec.overlap:
            raise EngineError(f"{folder}: windows of {self._room} tokens cannot share {self.spec.overlap}")
        n_tags = 1 + 2 * len(self.spec.labels)
        self._tags = _head(folder, "tags", n_tags)
        n_choices = sum(map(len, self.spec.choices.values()))
        self._choices = _head(folder, "choices", n_choices) if n_choices else None

    def run(self, items: Sequence[str]) -> list[Tagged]:
        """Return spans, choices and the assembled answer of each text; offsets are those of the text as given.

        Raises:
            InputTooLong: a text is longer than the model reads and the task says `long = "error"`.
        """
        tagged: list[Tagged] = []
        for i in range(0, len(items), _CHUNK):
            tagged += self._run(items[i : i + _CHUNK])
        return tagged

    def scores(self, texts: Sequence[str]) -> list[Scores]:
        """Return the reading of each text and the log-probabilities of its units; texts are taken as they stand."""
        mark = line_mark(self._encoder.params.suffix_ids) if self.spec.lines else None
        readings = [read(self._tokenizer.encode(text), text, unit=self.spec.unit, line_id=mark) for text in texts]
        cut = [
            windows(len(reading.ids), room=self._room, overlap=self.spec.overlap, long=self.spec.long)
            for reading in readings
        ]
        pieces = [(i, window) for i, row in enumerate(cut) for window in row]
        states = self._states([(readings[i].ids, window) for i, window in pieces])
        return [
            self._scored(reading, [(w, states[at]) for at, (owner, w) in enumerate(pieces) if owner == i])
            for i, reading in enumerate(readings)
        ]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, neither cut nor padded."""
        return [self._tokenizer.encode(text).ids for text in texts]

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads of the library that runs the encoder."""
        return {**self._encoder.describe(), "engine": "tagger", "runtime": self.runtime, "unit": self.spec.unit}

    def _run(self, items: Sequence[str]) -> list[Tagged]:
        cleaned = [aligned(text) for text in items]
        scored = self.scores([text for text, _ in cleaned])
        pairs = zip(items, cleaned, scored, strict=True)
        return [self._tagged(text, places, scores) for text, (_, places), scores in pairs]

    def _tagged(self, text: str, places: Sequence[int] | None, scores: Scores) -> Tagged:
        labels = self.spec.labels
        spans = tuple(restored(span, places) for span in decode(scores.tags, scores.reading, labels))
        choices, confidences = self._chosen(scores.choices)
        answer = None
        if self._fields is not None:

            def likeliest(name: str) -> Span | None:
                found = guess(scores.tags, scores.reading, labels, name)
                return None if found is None else restored(found, places)

            answer = assemble(text, spans, choices, self._fields, guess=likeliest)
        return Tagged(spans, choices, confidences, answer)

    def _chosen(self, logits: Floats) -> tuple[dict[str, Any], dict[str, float]]:
        chosen, sure, start = {}, {}, 0
        for name, values in self.spec.choices.items():
            shares = np.exp(log_softmax(logits[start : start + len(values)]))
            best = int(shares.argmax())
            chosen[name], sure[name] = values[best], float(shares[best])
            start += len(values)
        return chosen, sure

    def _states(self, pieces: Sequence[tuple[Sequence[int], Window]]) -> list[Floats]:
        """Return the states [T, H] of each window, without those of special tokens."""
        own = self._encoder.params
        rows = [[*own.prefix_ids, *ids[window.start : window.stop], *own.suffix_ids] or [own.pad_id]
                for ids, window in pieces]  # fmt: skip
        states: list[Floats] = [np.zeros((0, 0), dtype=np.float32)] * len(rows)
        for batch in batches([len(row) for row in rows], max_rows=32, max_cells=MAX_CELLS):
            values = self._encoder.infer([rows[i] for i in batch])
            for i, value in zip(batch, values, strict=True):
                states[i] = value[: len(rows[i])]
        return states

    def _scored(self, reading: Reading, pieces: Sequence[tuple[Window, Floats]]) -> Scores:
        before = len(self._encoder.params.prefix_ids)
        kept = [state[before + w.keep - w.start : before + w.until - w.start] for w, state in pieces]
        tokens = np.concatenate(kept)
        read_tokens = len(tokens)
        heads = [i for i in reading.heads if i < read_tokens]
        weight, bias = self._tags
        tags = log_softmax(tokens[heads] @ weight + bias) if heads else np.zeros((0, len(bias)), dtype=np.float32)
        if read_tokens < len(reading.ids):  # only the head of a long text was read
            reading = Reading(
                reading.ids[:read_tokens],
                reading.offsets[:read_tokens],
                reading.words[:read_tokens],
                reading.breaks & {*range(len(heads))},
            )
        logits = np.zeros(0, dtype=np.float32)
        if self._choices is not None:
            shares = np.array([len(state) for _, state in pieces], dtype=np.float32)
            means = np.stack([state.mean(axis=0) for _, state in pieces])
            logits = (means * (shares / shares.sum())[:, None]).sum(axis=0) @ self._choices[0] + self._choices[1]
        return Scores(reading, tags, logits)


class TaggerWriter:
    """A tagger as a `Writer`: the answer to what was said last is JSON under the schema of the task.

    It reads the text alone, so a bundle with this part has no prompt around the text. Safe to share between threads.
    """

    context_tokens = 1 << 20  # windows read any length

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        self.part = TaggerPart(folder, params, threads=threads, cache_dir=cache_dir)
        if self.part.spec.schema is None:
            raise EngineError(f"{folder}: a tagger without a schema gives spans and writes no JSON")

    @property
    def capabilities(self) -> frozenset[str]:
        """Its answers follow the schema of the task; it also gives token ids and spans."""
        return frozenset({"write", "json_schema", "token_ids", "spans"})

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Give the whole answer in one piece; sampling settings have no effect."""
        reply = self.write([request])[0]
        yield Chunk(reply.text, (), reply.finish_reason, reply.usage, reply.timings)

    def write(self, requests: Sequence[GenerationRequest]) -> list[Reply]:
        """Return the JSON of every request, in order.

        Raises:
            EngineError: a request asks for another schema than the task's.
        """
        for request in requests:
            asked = request.sampling.json_schema
            if asked is not None and dict(asked) != dict(self.part.spec.schema or {}):
                raise EngineError("this model answers under the schema of its task only, not under another one")
        texts = [query_of(request) for request in requests]
        start = time.perf_counter()
        tagged = self.part.run(texts)
        each = 1000.0 * (time.perf_counter() - start) / max(1, len(texts))
        lengths = [len(ids) for ids in self.part.token_ids(texts)]
        pairs = zip(tagged, lengths, strict=True)
        return [Reply(one.text, "stop", Usage(n, 0), Timings(each, 0.0), content=one.text) for one, n in pairs]

    def tag(self, texts: Sequence[str]) -> list[Tagged]:
        """Return answers with the spans that they were made of."""
        return self.part.run(texts)

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """Return the ids that the model reads for `request`, before windows are cut."""
        return self.part.token_ids([query_of(request)])[0]

    def score(self, prompts: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[list[float]]:
        """Raise EngineError: answers are put together from spans and have no probability."""
        raise EngineError("the engine 'tagger' gives no probabilities of texts")

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads."""
        return self.part.describe()

    def close(self) -> None:
        """Nothing to free before the object itself goes."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities [U, 1 + 2K] of the units of a reading, and logits of all choices."""

    reading: Reading
    tags: Floats
    choices: Floats


def _head(folder: Path, name: str, rows: int) -> tuple[Floats, Floats]:
    """Return weight [H, rows] and bias [rows]."""
    weight = read_array(folder / f"{name}_weight.npy", dims=2).astype(np.float32)
    bias = read_array(folder / f"{name}_bias.npy", dims=1).astype(np.float32)
    if weight.shape[0] != rows or bias.shape != (rows,):
        raise EngineError(f"{folder / name}: {weight.shape[0]} rows and {bias.shape[0]} biases for {rows} outputs")
    return np.ascontiguousarray(weight.T), bias


def _tokenizer(path: Path) -> Any:
    tokenizers = _extras.load("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise EngineError(f"{path}: not a readable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
