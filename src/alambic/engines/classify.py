"""Predict with a bundle of kind `classify`: run its parts in order and turn what comes out into labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from alambic.bundle import Bundle
from alambic.data.clean import clean_text
from alambic.engines.cascade import Relay
from alambic.engines.parts import Array, Part, TokenPart, VectorPart
from alambic.engines.windows import Cutter
from alambic.errors import EngineError
from alambic.kinds.classify import Prediction, Reason, decide
from alambic.kinds.decision import NEAREST, ON_LOGITS, SCOPES, Scope, scope_scores, tempered
from alambic.kinds.inputs import Input, text_of

if TYPE_CHECKING:
    from alambic.engines.examples import Examples
    from alambic.engines.last_stage import LastStage

_CHUNK = 1024  # texts whose ids are held at once


class TextReader:
    """Texts to one row each: a first part, and for one that reads tokens, the windows of long texts."""

    def __init__(self, part: Part | TokenPart, *, long: str) -> None:
        self.part = part
        self.output: str = getattr(part, "output", "logits")
        self.tokens = part if isinstance(part, TokenPart) else None
        self._wide = part if isinstance(part, VectorPart) and part.params.vectors else None
        if self.tokens is not None:
            params = self.tokens.params
            self._cutter = Cutter(long, params.max_tokens, params.prefix_ids, params.suffix_ids, params.pad_id)

    @property
    def vectors(self) -> bool:
        """Whether it gives the vector of a text: as its output, or behind its scores (`wide`)."""
        return self.output == "embedding" or self._wide is not None

    def read(self, texts: Sequence[str], *, batch_size: int = 32, wide: bool = False) -> tuple[Array, Owners | None]:
        """Return one row per window, and whose windows they are (None when each text has one).

        With `wide` a row holds the scores and, behind them, the vector that they are computed from.
        """
        if self.tokens is None:
            return np.asarray(self.part.run(texts)), None
        windows: list[list[int]] = []
        counts: list[int] = []
        for ids in self.tokens.token_ids(texts):
            pieces = self._cutter.cut(ids)
            windows += pieces
            counts.append(len(pieces))
        infer = self._wide.infer_wide if wide and self._wide is not None else self.tokens.infer
        values = infer(windows, batch_size=batch_size)
        return values, None if len(windows) == len(texts) else Owners(counts, [len(w) for w in windows])

    def run(self, texts: Sequence[str], *, batch_size: int = 32, wide: bool = False) -> NDArray[np.float32]:
        """Return one row per text, the mean over its windows weighted by their length; `wide` as in `read`."""
        texts = clean(texts)
        parts = []
        for i in range(0, len(texts), _CHUNK):
            values, owners = self.read(texts[i : i + _CHUNK], batch_size=batch_size, wide=wide)
            parts.append(values if owners is None else owners.mean(values))
        return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.zeros((0, 0), dtype=np.float32)

    def close(self) -> None:
        """Let go of the part; it cannot run after this."""
        self.tokens = self._wide = None
        self.part = _Closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Owners:
    """Which text each window belongs to, and how much of it the window is."""

    def __init__(self, counts: Sequence[int], lengths: Sequence[int]) -> None:
        self._starts = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.intp)
        weights = np.asarray(lengths, dtype=np.float64)
        self._shares = weights / np.repeat(np.add.reduceat(weights, self._starts), counts)

    def mean(self, values: Array) -> NDArray[np.float32]:
        """Return one row per text from one row per window."""
        means: NDArray[np.float32] = np.add.reduceat(values * self._shares[:, None], self._starts).astype(np.float32)
        return means


@dataclass(frozen=True)
class _Answers:
    """What the models say of N texts.

    Attributes:
        probabilities: [N, L].
        scopes: each score of belonging to the task that was asked for, [N].
        who: of a cascade, the place of the stage that answered, [N]; None where one model answers alone.
    """

    probabilities: NDArray[np.float32]
    scopes: dict[Scope, NDArray[np.float64]]
    who: NDArray[np.intp] | None = None


class ClassifyEngine:
    """A bundle ready to answer. Safe to share between threads; close it, or use it in a ``with`` block.

    An empty text is a text: the model answers for its special tokens alone, a linear part with its bias.
    """

    def __init__(
        self,
        bundle: Bundle,
        reader: TextReader,
        heads: Sequence[Part],
        *,
        before: Sequence[ClassifyEngine] = (),
        examples: Callable[[], Examples] | None = None,
    ) -> None:
        """Compose open parts.

        Args:
            bundle: what they belong to.
            reader: the first part.
            heads: the parts after it.
            before: of a cascade, the stages asked before these parts, which are its last one.
            examples: opens the index of training rows when it is first asked for.
        """
        self.bundle = bundle
        self._examples = None if examples is None else cache(examples)
        self.labels = bundle.manifest.labels
        self.multi_label = bundle.manifest.multi_label
        self._reader = reader
        self._heads = tuple(heads)
        self._last = getattr(self._heads[-1], "output", "logits") if self._heads else reader.output
        cascade = bundle.manifest.cascade
        self._temperature = bundle.manifest.temperature if cascade is None else cascade.stages[-1].temperature
        self._before = tuple(before)
        self.last: LastStage | None = None  # asked about what this abstains from; `engines.open` may set it
        self._relay = (
            None if cascade is None else Relay(cascade, [*(one.answer_clean for one in before), self.answer_clean])
        )
        if self._last == "embedding":
            raise EngineError(f"{bundle.source}: the entry {bundle.manifest.entry!r} gives vectors, not label scores")
        scope = bundle.manifest.decision.scope if bundle.manifest.decision is not None else None
        if scope not in (None, *self.scopes):
            given = ", ".join(self.scopes)
            raise EngineError(f"{bundle.source}: the decision looks at {scope!r}, and the bundle gives {given}")

    @property
    def capabilities(self) -> frozenset[str]:
        """What this engine can do: `predict`, `probabilities`, and where it can `embed`, `token_ids` and `reasons`."""
        extra = set()
        if self._reader.vectors:
            extra.add("embed")
        if self._reader.tokens is not None:
            extra.add("token_ids")
        if self._examples is not None:
            extra.add("reasons")
        return frozenset({"predict", "probabilities", *extra})

    def predict(self, inputs: Sequence[str | Input], *, batch_size: int = 32) -> list[Prediction]:
        """Return one prediction per input, in order; `batch_size` bounds what is computed at once.

        Raises:
            EngineError: an input is not a text; `InputTooLong` when the task says `long = "error"`.
        """
        texts = [value if isinstance(value, str) else _text(value, i) for i, value in enumerate(_many(inputs))]
        said = self._predict(texts, batch_size)
        return said if self.last is None else self.last.settle(texts, said)

    def _predict(self, texts: Sequence[str], batch_size: int) -> list[Prediction]:
        manifest = self.bundle.manifest
        decision = manifest.decision
        asked = (decision.scope,) if decision is not None and decision.scope is not None else ()
        label = decision.scope_label if decision is not None else None
        found = self._chunked(texts, asked, label, batch_size)
        said = decide(
            found.probabilities, self.labels, multi_label=self.multi_label, threshold=manifest.threshold,
            decision=decision, scope=found.scopes[asked[0]] if asked else None,
        )  # fmt: skip
        if found.who is None:
            return said
        names = self.stages
        return [replace(one, answered_by=names[k]) for one, k in zip(said, found.who, strict=True)]

    def probabilities(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return the probability of each label, [N, L]."""
        return self._chunked(texts, (), None, batch_size).probabilities

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scores of belonging to the task that this bundle can give (`kinds.decision.SCOPES`)."""
        if self._relay is not None:  # logits and vectors of one model of a chain say nothing beside those of another
            return ("confidence",)
        out = {*(() if self._last == "logits" else ON_LOGITS), *(() if self._near() else (NEAREST,))}
        return tuple(name for name in SCOPES if name not in out)

    def _near(self) -> bool:
        """Tell whether the bundle knows vectors of training rows and gives those of texts."""
        indexed = any(p.engine == "examples" and p.params.get("how") == "vectors" for p in self.bundle.manifest.parts)
        return indexed and self._examples is not None and self._reader.vectors

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the models asked in turn; empty where one answers alone."""
        return () if self._relay is None else self._relay.names

    def answered_by(self, texts: Sequence[str], *, batch_size: int = 32) -> list[str]:
        """Return the name of the stage that answers each text.

        Raises:
            EngineError: this bundle is no chain.
        """
        if self._relay is None:
            raise EngineError(f"{self.bundle.source}: one model answers alone: this bundle is no cascade")
        who, names = self._chunked(texts, (), None, batch_size).who, self.stages
        assert who is not None, "the stages of a chain answer in turn"
        return [names[k] for k in who]

    def answer_clean(self, texts: list[str], batch_size: int) -> NDArray[np.float32]:
        """Return the probabilities [N, L] that these parts alone give to texts that were cleaned before."""
        return self._alone(texts, (), None, batch_size).probabilities

    def scored(
        self, texts: Sequence[str], *, label: str | None = None, batch_size: int = 32
    ) -> tuple[NDArray[np.float32], dict[Scope, NDArray[np.float64]]]:
        """Return the probability of each label, [N, L], and each score of `scopes`, [N].

        Args:
            texts: what to read.
            label: the label of texts of no other label, where there is one.
            batch_size: bounds what is computed at once.
        """
        found = self._chunked(texts, self.scopes, label, batch_size)
        return found.probabilities, found.scopes

    def _chunked(self, texts: Sequence[str], asked: Sequence[Scope], label: str | None, batch_size: int) -> _Answers:
        texts = clean(_many(texts))
        if len(texts) <= _CHUNK and texts:
            return self._answered(texts, asked, label, batch_size)
        n, who = len(texts), None
        out = np.zeros((n, len(self.labels)), dtype=np.float32)
        scores = {name: np.zeros(n) for name in asked}
        if self._relay is not None:
            who = np.zeros(n, dtype=np.intp)
        for i in range(0, n, _CHUNK):
            some = self._answered(texts[i : i + _CHUNK], asked, label, batch_size)
            out[i : i + _CHUNK] = some.probabilities
            for name in asked:
                scores[name][i : i + _CHUNK] = some.scopes[name]
            if who is not None and some.who is not None:
                who[i : i + _CHUNK] = some.who
        return _Answers(out, scores, who)

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return the vector of each text, [N, H]: the encoder's, which the scores are computed from.

        A chain gives that of its last model. Linear models, static students and bundles of before format 6 whose
        encoder was fine-tuned have none.

        Raises:
            EngineError: this bundle gives none.
        """
        if "embed" not in self.capabilities:
            raise EngineError(f"{self.bundle.source}: this bundle gives no embeddings: its model ends in label scores")
        if self._reader.output == "embedding":
            return self._reader.run(_many(texts), batch_size=batch_size)
        return self._reader.run(_many(texts), batch_size=batch_size, wide=True)[:, len(self.labels) :]

    def reasons(self, texts: Sequence[str], *, n: int = 3) -> list[tuple[Reason, ...]]:
        """Return the `n` training rows nearest to each text, nearest first.

        They are near by the vector of the bundle's encoder, or by words where its model gives no vectors; they show
        what the bundle has seen of the kind, they are not what it computes with.

        Raises:
            EngineError: this bundle holds no index of examples.
        """
        if self._examples is None:
            raise EngineError(
                f"{self.bundle.source}: this bundle holds no index of training rows",
                hint='reasons = "rows" (or "texts") under [data] of the task, and build again',
            )
        return self._examples().nearest(_many(texts), n=n, embed=self.embed)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special tokens included, before windows are cut.

        Raises:
            EngineError: this bundle reads no tokens.
        """
        if self._reader.tokens is None:
            raise EngineError(f"{self.bundle.source}: this bundle reads no tokens (engine {self._first_engine()})")
        return self._reader.tokens.token_ids(clean(_many(texts)))

    def describe(self) -> dict[str, Any]:
        """Return engine, version, properties and threads of the part that does the work, and all parts by name."""
        described = {name: part for one in self._before for name, part in one.describe()["parts"].items()}
        parts = [self._reader.part, *self._heads]
        for spec, part in zip(self.bundle.manifest.chain(), parts, strict=True):
            described[spec.name] = part.describe()
        first = described[self.bundle.manifest.chain()[0].name]
        known = {name: first.get(name) for name in ("engine", "version", "properties", "threads")}
        remote = {} if self.last is None else {"remote": self.last.describe()}
        return {**known, "parts": described, **remote}

    def close(self) -> None:
        """Free the model. Closing twice is allowed; predicting afterwards is an EngineError."""
        for one in self._before:
            one.close()
        if self.last is not None:
            self.last.close()
        self._reader.close()
        self._heads = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _first_engine(self) -> str:
        return self.bundle.manifest.chain()[0].engine

    def probabilities_of(self, vectors: Array) -> NDArray[np.float32]:
        """Return the probability of each label, [N, L], for vectors [N, H] that `embed` gave before.

        Raises:
            EngineError: this bundle has no encoder apart from its head, or is a chain.
        """
        if self._relay is not None:
            raise EngineError(f"{self.bundle.source}: a cascade answers texts: its stages look at them in turn")
        if self._reader.output != "embedding":
            raise EngineError(f"{self.bundle.source}: this bundle takes no embeddings: its model ends in label scores")
        return self._activated(self._headed(vectors))

    def _answered(self, texts: Sequence[str], asked: Sequence[Scope], label: str | None, batch_size: int) -> _Answers:
        if self._relay is None:
            return self._alone(texts, asked, label, batch_size)
        probabilities, who = self._relay.run(texts, batch_size=batch_size)
        if self.bundle.manifest.temperature != 1.0:
            probabilities = tempered(probabilities, self.bundle.manifest.temperature).astype(np.float32)
        scores = {name: scope_scores(name, probabilities, None, self.labels, label=label) for name in asked}
        return _Answers(probabilities, scores, who)

    def _alone(self, texts: Sequence[str], asked: Sequence[Scope], label: str | None, batch_size: int) -> _Answers:
        wide = NEAREST in asked and self._reader.output != "embedding"
        values, owners = self._reader.read(texts, batch_size=batch_size, wide=wide)
        vectors = values[:, len(self.labels) :] if wide else values
        values = self._headed(values[:, : len(self.labels)] if wide else values)
        probabilities = self._activated(values)
        logits = values if self._last == "logits" else None
        scores = {
            name: self._closeness(vectors, label) if name == NEAREST
            else scope_scores(name, probabilities, logits, self.labels, label=label) for name in asked
        }  # fmt: skip
        if owners is None:
            return _Answers(probabilities, scores)
        whole = {name: owners.mean(rows[:, None])[:, 0].astype(np.float64) for name, rows in scores.items()}
        return _Answers(owners.mean(probabilities), whole)

    def _closeness(self, vectors: Array, label: str | None) -> NDArray[np.float64]:
        assert self._examples is not None, "`scopes` tells whether there is an index"
        return self._examples().closeness(vectors, without=label)

    def _headed(self, values: Array) -> Array:
        for head in self._heads:
            values = head.run(values)
        if values.ndim != 2 or values.shape[1] != len(self.labels):
            raise EngineError(
                f"{self.bundle.source}: the model gives {values.shape[-1]} scores and the bundle has "
                f"{len(self.labels)} labels"
            )
        return values

    def _activated(self, values: Array) -> NDArray[np.float32]:
        temperature = self._temperature
        if self._last == "logits":
            values = activate(values, multi_label=self.multi_label, temperature=temperature)
        elif temperature != 1.0:
            values = tempered(values, temperature)
        return np.asarray(values, dtype=np.float32)


def activate(logits: Array, *, multi_label: bool, temperature: float) -> NDArray[np.float32]:
    """Return softmax (or sigmoid) of ``logits * temperature``, [N, L]."""
    scaled = np.asarray(logits, dtype=np.float32) * np.float32(temperature)
    if multi_label:
        # tanh neither overflows nor warns, whatever the logit.
        sigmoid: NDArray[np.float32] = 0.5 * (1.0 + np.tanh(0.5 * scaled))
        return sigmoid
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def clean(texts: Sequence[str]) -> list[str]:
    """Clean texts as the reader of training data does, so that the model sees here what it saw there."""
    return [clean_text(text).text for text in texts]


def _many(inputs: Sequence[Any]) -> Sequence[Any]:
    if isinstance(inputs, str | bytes):
        raise EngineError("predict takes a list of texts, got one text", hint="predict([text])[0]")
    return inputs


def _text(value: Any, index: int) -> str:
    try:
        return text_of(value)
    except (TypeError, AttributeError) as error:
        raise EngineError(f"input {index} is a {type(value).__name__}, not a text") from error


class _Closed:
    """Stands for the parts of a closed engine."""

    output = "closed"

    def run(self, items: Any) -> NoReturn:
        raise EngineError("this engine is closed", hint="open the bundle again")

    def describe(self) -> NoReturn:
        raise EngineError("this engine is closed", hint="open the bundle again")
