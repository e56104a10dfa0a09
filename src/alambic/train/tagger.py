"""Train a token classifier: BIO tags of every word, and the fields that are chosen for the whole text.

    rows = [TagRow("set a timer for ten minutes", (Span(16, 27, "duration"),), {"intent": 3})]
    result = drain(train_tagger(base, rows, dev, answers=answers, params=TaggerParams(), out=folder))

Long texts are cut into the windows that the engine reads (`alambic.engines.tagging`), and dev is scored with the
engine's own decoding, so what is chosen here is what ships.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alambic.engines.tag_fields import Fields, Located, locate
from alambic.engines.tagging import Reading, Span, Window, decode, line_mark, log_softmax, read, tags_of, windows
from alambic.errors import TrainError
from alambic.events import Finished, Note, Started, Work
from alambic.measure.text_structured import micro_f1, span_rows
from alambic.model.bases import Base
from alambic.model.encoder import by_length, pad
from alambic.model.tagger import Tagger, load_states
from alambic.train.batches import batch_at
from alambic.train.loop import Loop, Plan, Point
from alambic.train.precision import autocast, threads
from alambic.train.recipes import read_recipe
from alambic.train.schedule import freeze, groups

_IGNORED = -100
_LINES = 0.01  # share of rows of several lines, from which the model is shown where lines end
_CUT_WORDS = 0.002  # share of spans that cut through a word, from which tags are given to tokens instead
_LOST, _ENOUGH = 0.5, 10  # share of a field's values that may be missing from the texts, once there are some


@dataclass(frozen=True)
class TagRow:
    """A text with its spans, and the number of the chosen value of each chosen field it has."""

    text: str
    spans: tuple[Span, ...] = ()
    choices: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What the tagger answers.

    Attributes:
        labels: of spans.
        choices: values of each field that is chosen for the whole text.
    """

    labels: tuple[str, ...]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaggerParams:
    """How to train; the defaults were measured on SNIPS and on sentences with personal data (docs/lab-notes.md).

    Attributes:
        seed: of every random choice.
        epochs: passes over train at most; by data size when None.
        steps: exact number of steps, without dev (the refit on train and dev).
        schedule: steps over which the rate rises and falls; `steps` or those of `epochs` when None.
        batch_size: windows a step.
        learning_rate: peak rate of all layers.
        head_learning_rate: peak rate of the heads, which start from nothing.
        warmup: share of the steps spent rising.
        weight_decay: of matrices, not of biases.
        embeddings: ``frozen`` leaves the word table as it is.
        long: ``windows``, ``head`` or ``error``.
        overlap: tokens that neighbouring windows share.
        evaluations: scores on dev an epoch.
        patience: scores without progress before stopping.
        threads: of torch; its own choice when None.
        checkpoint_seconds: time between two checkpoints.
    """

    seed: int = 0
    epochs: float | None = None
    steps: int | None = None
    schedule: int | None = None
    batch_size: int = 32
    learning_rate: float = 4e-4
    head_learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    embeddings: str = "trained"
    long: str = "windows"
    overlap: int = 64
    evaluations: int = 1
    patience: int = 3
    threads: int | None = None
    checkpoint_seconds: float = 60.0

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], **known: Any) -> TaggerParams:
        """Build from a candidate's recipe; `known` are the task's own values.

        Raises:
            TrainError: an unknown key, or a value of the wrong type.
        """
        return read_recipe(cls, recipe, known, of="tagger")


@dataclass(frozen=True)
class TaggerResult:
    """What came out; the fields are those of `FinetuneResult`.

    Attributes:
        model: Model directory.
        steps: steps of the weights that were kept.
        schedule: steps of the whole schedule.
        best_dev: dev score of the kept weights: span F1, and accuracy of choices, averaged when there are both.
        history: every score on dev.
        seconds: training time.
        unit: what gets one tag.
        interrupted: stopped by Ctrl-C before its end.
    """

    model: Path
    steps: int
    schedule: int
    best_dev: float | None
    history: tuple[Point, ...]
    seconds: float
    unit: str
    interrupted: bool = False


def rows_of_answers(
    texts: Sequence[str], answers: Sequence[Mapping[str, Any]], schema: Fields
) -> tuple[list[TagRow], dict[str, float]]:
    """Turn texts and JSON answers into rows; also tell each field's share of values that do not stand in their text.

    Raises:
        TrainError: a field's values mostly do not stand in the texts, so that no token classifier can find them.
    """
    rows, lost, had = (
        [],
        dict.fromkeys((f.name for f in schema.fields), 0),
        dict.fromkeys((f.name for f in schema.fields), 0),
    )
    for text, answer in zip(texts, answers, strict=True):
        found: Located = locate(text, answer, schema)
        rows.append(TagRow(text, found.spans, found.choices))
        for name in {*found.lost, *found.choices, *(span.label for span in found.spans)}:
            had[name] += 1
            lost[name] += name in found.lost
    shares = {name: lost[name] / n for name, n in had.items() if n}
    for name, share in shares.items():
        if share > _LOST and had[name] >= _ENOUGH:
            raise TrainError(
                f"field {name!r}: {share:.0%} of its values do not stand in their texts; a token classifier finds only "
                "what stands there",
                hint="leave the candidate 'tagger' out for this task",
            )
    return rows, shares


def train_tagger(
    base: Path | Base,
    train: Sequence[TagRow],
    dev: Sequence[TagRow] | None,
    *,
    answers: Answers,
    params: TaggerParams,
    out: Path,
) -> Work[TaggerResult]:
    """Train on `train`, choose on `dev`, write the Model directory `out`.

    Run again after a kill with the same arguments, it goes on from its last checkpoint. Ctrl-C keeps the best so far.

    Raises:
        TrainError: there is nothing to learn, or the loss diverges.
        BaseModelError: the base cannot be loaded.
    """
    _check(train, answers)
    with threads(params.threads):
        run = _Run(base, train, dev, answers=answers, params=params, out=out)
        return (yield from run.go())


def default_epochs(rows: int) -> float:
    """Return the passes made over `rows` training rows at most."""
    return 20.0 if rows < 500 else 12.0 if rows < 2_000 else 6.0 if rows < 20_000 else 3.0


def choose_unit(tokenizer: Any, rows: Sequence[TagRow]) -> str:
    """Return ``word``, or ``token`` when spans cut through words of this tokenizer (``10kg``: 10 and kg)."""
    cut = total = 0
    for row in rows:
        if row.spans:
            edges = {edge for unit in read(tokenizer.encode(row.text), row.text, unit="word").units for edge in unit}
            total += len(row.spans)
            cut += sum(span.start not in edges or span.end not in edges for span in row.spans)
    return "token" if total and cut / total > _CUT_WORDS else "word"


def has_lines(rows: Sequence[TagRow]) -> bool:
    """Tell whether enough rows have several lines that the model should be shown where they end."""
    return sum("\n" in row.text.strip() for row in rows) >= max(1, _LINES * len(rows))


def _check(train: Sequence[TagRow], answers: Answers) -> None:
    if not train:
        raise TrainError("there is nothing to train on: 0 rows")
    if not answers.labels and not answers.choices:
        raise TrainError("there is nothing to learn: no label and no choice")
    if answers.labels and not any(row.spans for row in train):
        raise TrainError(
            f"no training row has a span of {', '.join(answers.labels)}", hint="are the values in the texts at all?"
        )
    known = set(answers.labels)
    for i, row in enumerate(train):
        for span in row.spans:
            if span.label not in known or not 0 <= span.start < span.end <= len(row.text):
                raise TrainError(
                    f"row {i + 1}: span {span.start}..{span.end} {span.label!r} is not of this text or task"
                )


@dataclass(frozen=True)
class _Piece:
    """A window of a row, ready for a batch: ids with special tokens, a tag for each ([T], ignored ones -100)."""

    row: int
    ids: tuple[int, ...]
    tags: tuple[int, ...]
    window: Window


class _Run:
    """One training, from base to Model directory."""

    def __init__(
        self,
        base: Path | Base,
        train: Sequence[TagRow],
        dev: Sequence[TagRow] | None,
        *,
        answers: Answers,
        params: TaggerParams,
        out: Path,
    ) -> None:
        self.params, self.out, self.answers = params, out, answers
        encoder = load_states(base)
        torch.manual_seed(params.seed)  # the heads start at random
        self.unit = choose_unit(encoder.tokenizer, train)
        self.lines = has_lines(train) and line_mark(encoder.special_ids()[1]) is not None
        sizes = {name: len(values) for name, values in answers.choices.items()}
        self.tagger = Tagger(encoder, labels=answers.labels, choices=sizes, unit=self.unit, lines=self.lines)
        self.train, self.dev = list(train), None if params.steps is not None or dev is None else list(dev)
        self.pieces, _ = self._cut(self.train)
        self.dev_pieces, self.dev_readings = ([], []) if self.dev is None else self._cut(self.dev)
        self.key = self._key(encoder.spec.base.get("digest"))

    def go(self) -> Work[TaggerResult]:
        begun = time.monotonic()
        yield Started("tagger")
        if self.unit == "token":
            yield Note("some spans cut through words, so every token gets its own tag")
        freeze(self.tagger.encoder, embeddings=self.params.embeddings)
        loop = self._loop()
        try:
            state = yield from loop.run()
        except GeneratorExit:
            self.tagger.save(self.out)  # closed half-way: what was best is not lost
            raise
        self.tagger.save(self.out)
        if not loop.interrupted:
            loop.forget()
        seconds = time.monotonic() - begun
        yield Finished("tagger", seconds)
        steps = state.step if self.dev is None else state.best_step
        return TaggerResult(
            self.out, steps, loop.plan.total, state.best_dev, tuple(state.history), seconds, self.unit, loop.interrupted
        )

    def _loop(self) -> Loop:
        params = self.params
        trained = groups(
            self.tagger.encoder,
            rate=params.learning_rate,
            head_rate=params.head_learning_rate,
            layer_decay=1.0,
            weight_decay=params.weight_decay,
        )
        rate = params.head_learning_rate
        heads = [p for _, p in self.tagger.heads()]
        trained.append({"params": heads, "lr": rate, "peak": rate, "weight_decay": 0.0})
        per_epoch = len(self._epoch(0))
        epochs = params.epochs if params.epochs is not None else default_epochs(len(self.train))
        stop = params.steps if params.steps is not None else max(1, round(per_epoch * epochs))
        plan = Plan(
            stage="tagger",
            total=params.schedule or stop,
            stop=stop,
            warmup=params.warmup,
            every=None if self.dev is None else max(1, per_epoch // params.evaluations),
            patience=params.patience,
            seed=params.seed,
            checkpoint=self.out.with_name(f"{self.out.name}.checkpoint"),
            checkpoint_seconds=params.checkpoint_seconds,
            key=self.key,
        )
        at = batch_at(self._epoch, per_epoch=per_epoch)
        optimizer = torch.optim.AdamW(trained, lr=params.learning_rate, fused=True)
        score = None if self.dev is None else self._score
        return Loop(self.tagger, optimizer, loss_of=lambda step: self._loss(at(step)), score=score, plan=plan)

    def _epoch(self, number: int) -> list[list[int]]:
        """Return the piece numbers of each batch: of like length inside large chunks, in an order fixed by the seed."""
        rng = np.random.default_rng((self.params.seed, number))
        order, size = rng.permutation(len(self.pieces)).tolist(), self.params.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), 50 * size):
            chunk = sorted(order[start : start + 50 * size], key=lambda i: len(self.pieces[i].ids))
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _loss(self, numbers: Sequence[int]) -> Tensor:
        pieces = [self.pieces[i] for i in numbers]
        ids, mask = pad([piece.ids for piece in pieces], pad_id=self.tagger.encoder.pad_id)
        tags = torch.full(ids.shape, _IGNORED)
        for i, piece in enumerate(pieces):
            tags[i, : len(piece.tags)] = torch.tensor(piece.tags)
        with autocast():
            logits, chosen = self.tagger(ids, mask)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tags.flatten(), ignore_index=_IGNORED,
                                           reduction="sum") / (tags != _IGNORED).sum().clamp(min=1)  # fmt: skip
        if chosen is not None:
            for name, part in self._by_choice(chosen.float()):
                targets = [self.train[piece.row].choices.get(name, _IGNORED) for piece in pieces]
                if any(target != _IGNORED for target in targets):
                    goal = torch.tensor(targets)
                    loss = loss + nn.functional.cross_entropy(part, goal, ignore_index=_IGNORED)
        return loss

    def _by_choice(self, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.answers.choices, logits.split(list(self.tagger.choices.values()), dim=-1), strict=True)

    def _score(self) -> float:
        dev = self.dev
        assert dev is not None
        tags, choices = self._scores_of(self.dev_pieces, self.dev_readings)
        parts = []
        if self.answers.labels:
            said = [
                _plain(decode(row, reading, self.answers.labels))
                for row, reading in zip(tags, self.dev_readings, strict=True)
            ]
            counts = span_rows(said, [[_plain(row.spans)] for row in dev])
            parts.append(float(micro_f1(counts.sum(axis=0, keepdims=True), len(dev))[0]))
        for name, part in self._by_choice(choices):
            goals = [row.choices.get(name) for row in dev]
            best = part.argmax(dim=-1).tolist()
            known = [said == goal for said, goal in zip(best, goals, strict=True) if goal is not None]
            parts.append(sum(known) / max(1, len(known)))
        return sum(parts) / len(parts)

    def _scores_of(
        self, pieces: Sequence[_Piece], readings: Sequence[Reading]
    ) -> tuple[list[np.ndarray[Any, np.dtype[np.float32]]], Tensor]:
        """Return log-probabilities [U, 1 + 2K] of the units of each reading, and logits of choices [N, C]."""
        before = len(self.tagger.encoder.special_ids()[0])
        width, total = self.tagger.tags.out_features, sum(self.tagger.choices.values())
        tokens = [np.zeros((len(reading.ids), width), dtype=np.float32) for reading in readings]
        choices, weights = torch.zeros(len(readings), total), torch.zeros(len(readings), 1)
        for batch in by_length([len(piece.ids) for piece in pieces], batch_tokens=2048):
            ids, mask = pad([pieces[i].ids for i in batch], pad_id=self.tagger.encoder.pad_id)
            with autocast():
                logits, chosen = self.tagger(ids, mask)
            for at, i in enumerate(batch):
                window, row = pieces[i].window, pieces[i].row
                kept = logits[at, before + window.keep - window.start : before + window.until - window.start]
                tokens[row][window.keep : window.until] = kept.float().numpy()
                if chosen is not None:
                    choices[row] += chosen[at].float() * len(pieces[i].ids)
                    weights[row] += len(pieces[i].ids)
        scored = [log_softmax(row[reading.heads]) for row, reading in zip(tokens, readings, strict=True)]
        return scored, choices / weights.clamp(min=1.0)

    def _cut(self, rows: Sequence[TagRow]) -> tuple[list[_Piece], list[Reading]]:
        encoder, params = self.tagger.encoder, self.params
        prefix, suffix = encoder.special_ids()
        room = encoder.spec.max_tokens - len(prefix) - len(suffix)
        mark = line_mark(suffix) if self.lines else None
        pieces, readings = [], []
        for number, row in enumerate(rows):
            reading = read(encoder.tokenizer.encode(row.text), row.text, unit=self.unit, line_id=mark)
            readings.append(reading)
            tags = [_IGNORED] * len(reading.ids)
            for head, tag in zip(reading.heads, tags_of(row.spans, reading, self.answers.labels), strict=True):
                tags[head] = tag
            overlap = min(params.overlap, room // 2)
            for window in windows(len(reading.ids), room=room, overlap=overlap, long=params.long):
                ids = (*prefix, *reading.ids[window.start : window.stop], *suffix)
                own = tags[window.start : window.stop]
                goals = (*[_IGNORED] * len(prefix), *own, *[_IGNORED] * len(suffix))
                pieces.append(_Piece(number, ids, goals, window))
        return pieces, readings

    def _key(self, digest: str | None) -> str:
        what = {
            "params": asdict(replace(self.params, checkpoint_seconds=0.0)),
            "answers": [self.answers.labels, {k: list(map(str, v)) for k, v in self.answers.choices.items()}],
            "base": digest,
            "lines": self.lines,
            "train": _digest(self.train),
            "dev": None if self.dev is None else _digest(self.dev),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _plain(spans: Sequence[Span]) -> list[tuple[int, int, str]]:
    return [(span.start, span.end, span.label) for span in spans]


def _digest(rows: Sequence[TagRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.text, _plain(row.spans), sorted(row.choices.items()))).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
