"""How good a model's answers are on a task's own rows: write every one through the packed bundle, then score them.

    written = drain(measure_written(writer, chats, kind="generate"))
    written.scores["chrf"].interval.value, written.worst[0]

A row is a conversation that ends with the expected answer; the model sees all but that. Which metrics, by kind: see
`alambic.kinds.writing`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from alambic.engines.writer import Writer
from alambic.errors import AlambicError, EngineError
from alambic.events import Finished, Progress, Started, Work
from alambic.kinds.chat import Chat
from alambic.kinds.extract import checker
from alambic.kinds.generation import GenerationRequest, Reply, Sampling, Timings, Usage
from alambic.kinds.writing import METRICS
from alambic.measure.metrics import Paired
from alambic.measure.text import TextMetric, TextScore, compare_texts, row_scores, score_counts, score_texts
from alambic.measure.text_overlap import mean
from alambic.measure.text_structured import parse_json

_BATCH = 32
_ON_CALLS = ("tool_calls", "tool_names")


class ChatRows(Protocol):
    """Rows to write, as `alambic.data.chats.ChatDataset` has them."""

    @property
    def chats(self) -> Sequence[Chat]:
        """Conversations that end with the expected answer."""

    @property
    def references(self) -> Sequence[Sequence[str]]:
        """Texts accepted as answer of each row."""


@dataclass(frozen=True)
class WrittenRow:
    """One answer beside the expected one, with its score by the first metric."""

    prompt: str
    expected: str
    written: str
    score: float
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class Written:
    """Everything known of the answers of one model on one set of rows.

    Attributes:
        split: which rows these are: ``dev``, ``test``, or a file's name.
        kind: of the task.
        n: number of rows.
        scores: by metric, each with its interval; the first decides.
        valid: share of answers that ended by themselves and follow the schema asked for; None without a schema.
        endings: how many answers ended how: ``stop``, ``length``, ``tool_calls``, ``error``.
        worst: the rows with the lowest score by the first metric, lowest first.
        seconds: what writing took.
        row_scores: of the first metric, row by row, for paired tests.
        chats: the rows.
        references: texts accepted as answer of each row.
        replies: every answer, in order; one that could not be written is empty, see `errors`.
        errors: row number to why it could not be written.
    """

    split: str
    kind: str
    n: int
    scores: dict[str, TextScore]
    valid: TextScore | None
    endings: dict[str, int]
    worst: tuple[WrittenRow, ...]
    seconds: float
    row_scores: tuple[float, ...] = field(repr=False)
    chats: tuple[Chat, ...] = field(repr=False)
    references: tuple[tuple[str, ...], ...] = field(repr=False)
    replies: tuple[Reply, ...] = field(repr=False)
    errors: dict[int, str] = field(default_factory=dict)

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Return the figures, ready for JSON; with `rows`, the worst answers too."""
        figures: dict[str, Any] = {
            "split": self.split,
            "kind": self.kind,
            "n": self.n,
            "quality": {name: score.to_dict() for name, score in self.scores.items()},
            "endings": self.endings,
            "errors": len(self.errors),
            "seconds": round(self.seconds, 3),
        }
        if self.valid is not None:
            figures["schema_valid"] = self.valid.to_dict()
        return {**figures, "worst": [vars(row) for row in self.worst]} if rows else figures


def measure_written(
    writer: Writer,
    dataset: ChatRows | Sequence[Chat],
    *,
    kind: str,
    metrics: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    split: str = "test",
    worst: int = 50,
    seed: int = 0,
) -> Work[Written]:
    """Write every answer of `dataset` through `writer` and score it.

    Args:
        writer: the packed model.
        dataset: conversations that end with the expected answer, or a data set that may accept several for a row.
        kind: ``generate``, ``chat`` or ``extract``: chooses the metrics.
        metrics: other names of `TEXT_METRICS`; the first decides.
        sampling: how to write; greedy by default.
        split: what these rows are called in reports.
        worst: rows shown.
        seed: of the resampling.

    Raises:
        AlambicError: no row, a row without an expected answer, or an unknown kind or metric.
        MissingExtra: a library that a metric needs is not installed.
    """
    chats = tuple(dataset if isinstance(dataset, Sequence) else dataset.chats)
    references = None if isinstance(dataset, Sequence) else dataset.references
    _check(chats)
    names = tuple(metrics or default_metrics(kind, chats))
    yield Started("write")
    start = time.perf_counter()
    replies, errors = yield from write_all(writer, chats, sampling=sampling or Sampling())
    seconds = time.perf_counter() - start
    yield Finished("write", seconds)
    schema = None if sampling is None else sampling.json_schema
    return score_written(
        chats, replies, references=references, schema=schema, errors=errors, kind=kind, metrics=names, split=split,
        worst=worst, seconds=seconds, seed=seed,
    )  # fmt: skip


def default_metrics(kind: str, chats: Sequence[Chat]) -> tuple[str, ...]:
    """Return the metrics of `kind`; those on tool calls only when a row has tools.

    Raises:
        AlambicError: the kind does not write.
    """
    if kind not in METRICS:
        raise AlambicError(f"kind {kind!r} does not write", hint="kinds that do: " + ", ".join(METRICS))
    tools = any(chat.tools for chat in chats)
    return tuple(name for name in METRICS[kind] if tools or name not in _ON_CALLS)


def write_all(
    writer: Writer, chats: Sequence[Chat], *, sampling: Sampling
) -> Work[tuple[tuple[Reply, ...], dict[int, str]]]:
    """Write the answer of every conversation; a row that cannot be written gets an empty answer and its reason."""
    replies: list[Reply] = []
    errors: dict[int, str] = {}
    requests = [GenerationRequest(chat=chat.prompt, sampling=sampling) for chat in chats]
    for start in range(0, len(requests), _BATCH):
        batch = requests[start : start + _BATCH]
        try:
            replies += writer.write(batch)
        except EngineError:
            for i, request in enumerate(batch, start):
                try:
                    replies += writer.write([request])
                except EngineError as error:
                    errors[i] = error.message
                    replies.append(_NOTHING)
        yield Progress("write", len(replies), len(requests))
    return tuple(replies), errors


_NOTHING = Reply("", "cancelled", Usage(0, 0), Timings(0.0, 0.0))


def score_written(
    chats: Sequence[Chat],
    replies: Sequence[Reply],
    *,
    kind: str,
    metrics: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    schema: Mapping[str, Any] | None = None,
    errors: dict[int, str] | None = None,
    split: str = "test",
    worst: int = 50,
    seconds: float = 0.0,
    seed: int = 0,
) -> Written:
    """Score answers that were written already, one a row and in order; see `measure_written`.

    Args:
        chats: conversations that end with the expected answer.
        replies: what was written.
        kind: of the task.
        metrics: the first decides.
        references: accepted answers of each row; what the conversations end with when None.
        schema: JSON Schema that the answers had to follow.
        errors: row number to why it could not be written.
        split: what these rows are called in reports.
        worst: rows shown.
        seconds: what writing took.
        seed: of the resampling.

    Raises:
        AlambicError: a metric is unknown, or there is no row.
    """
    errors = errors or {}
    accepted = tuple(map(tuple, expected_texts(chats) if references is None else references))
    scores = {}
    for name in metrics:
        said, true = sides(name, kind, chats, replies, references=accepted)
        scores[name] = score_texts(name, said, true, rng=np.random.default_rng(seed))
    said, true = sides(metrics[0], kind, chats, replies, references=accepted)
    each = row_scores(metrics[0], said, true)
    endings = Counter("error" if i in errors else reply.finish_reason for i, reply in enumerate(replies))
    return Written(
        split=split,
        kind=kind,
        n=len(chats),
        scores=scores,
        valid=None if schema is None else _valid(replies, schema, seed),
        endings=dict(sorted(endings.items())),
        worst=_worst(each, chats, replies, errors, worst),
        seconds=seconds,
        row_scores=tuple(float(value) for value in each),
        chats=tuple(chats),
        references=accepted,
        replies=tuple(replies),
        errors=errors,
    )


def compare_written(first: Written, second: Written, *, metric: str | None = None, seed: int = 0) -> Paired:
    """Compare two models on the same rows by `metric` (the first one's first by default): first minus second.

    Raises:
        AlambicError: the rows are not the same.
    """
    if (first.chats, first.references) != (second.chats, second.references):
        raise AlambicError("the two models were measured on other rows; measure both on the same")
    name = metric or next(iter(first.scores))
    said, true = sides(name, first.kind, first.chats, first.replies, references=first.references)
    other, _ = sides(name, second.kind, second.chats, second.replies)
    return compare_texts(name, true, said, other, rng=np.random.default_rng(seed))


def _check(chats: Sequence[Chat]) -> None:
    if not chats:
        raise AlambicError("no row to write", hint="give a data set with at least one usable row")
    for i, chat in enumerate(chats):
        if chat.completion is None:
            raise AlambicError(f"row {i}: the conversation ends without an expected answer")


def sides(
    name: str,
    kind: str,
    chats: Sequence[Chat],
    replies: Sequence[Reply],
    *,
    references: Sequence[Sequence[str]] | None = None,
) -> tuple[list[Any], list[list[Any]]]:
    """Return predictions and references as the metric `name` reads them."""
    if name in _ON_CALLS:
        completions = [chat.completion for chat in chats]
        expected = [[list(message.tool_calls)] for message in completions if message is not None]
        return [list(reply.tool_calls) for reply in replies], expected
    shape: Callable[[str], str] = _canonical if kind == "extract" and name == "exact_match" else str
    accepted = expected_texts(chats) if references is None else references
    said = [shape(answer_of(chat, reply)) for chat, reply in zip(chats, replies, strict=True)]
    return said, [[shape(text) for text in row] for row in accepted]


def expected_texts(chats: Sequence[Chat]) -> list[list[str]]:
    """Return what the assistant says at the end of each conversation, as the only accepted answer."""
    return [[chat.completion.content if chat.completion is not None else ""] for chat in chats]


def _valid(replies: Sequence[Reply], schema: Mapping[str, Any], seed: int) -> TextScore:
    """Score complete answers under `schema`: cut-off ones are not, even where what is there happens to parse."""
    faults = checker(schema)

    def follows(reply: Reply) -> bool:
        try:
            return reply.finish_reason == "stop" and not faults(parse_json(reply.text))
        except ValueError:
            return False

    counts = np.array([[float(follows(reply))] for reply in replies])
    return score_counts(_SCHEMA_VALID, counts, rng=np.random.default_rng(seed))


def _rows_of_marks(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> Any:
    return np.array([[float(one)] for one in predictions])


_SCHEMA_VALID = TextMetric(
    "schema_valid", "complete and valid under the schema", "share", 0.0, 1.0, True,
    lambda: "finish reason stop, strict JSON, no fault under JSON Schema 2020-12", _rows_of_marks, mean,
)  # fmt: skip


def answer_of(chat: Chat, reply: Reply) -> str:
    """Return what a reply says to a person: beside tool calls when there are tools, all of it otherwise."""
    return reply.content if chat.tools else reply.text


def _canonical(text: str) -> str:
    """Return JSON with sorted keys and no free white space, so that only its content is compared."""
    try:
        return json.dumps(parse_json(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except ValueError:
        return text


def _worst(
    scores: Any, chats: Sequence[Chat], replies: Sequence[Reply], errors: dict[int, str], worst: int
) -> tuple[WrittenRow, ...]:
    order = np.argsort(scores, kind="stable")[:worst]
    rows = []
    for i in map(int, order):
        prompt, completion = chats[i].prompt, chats[i].completion
        assert completion is not None
        expected = completion.content or json.dumps([call.to_dict() for call in completion.tool_calls])
        rows.append(
            WrittenRow(
                prompt=prompt.messages[-1].content if prompt.messages else "",
                expected=expected,
                written=replies[i].text,
                score=float(scores[i]),
                finish_reason=replies[i].finish_reason,
                error=errors.get(i),
            )
        )
    return tuple(rows)
