"""Distil a fine-tuned encoder into a smaller one: it follows what the teacher answers, on any text.

The loss of a text has up to five parts: the divergence from the teacher's label shares at a temperature (Hinton et al.
2015, https://arxiv.org/abs/1503.02531); the cross-entropy with its label, where it has one; the distance of its vector
from the teacher's, where both are as wide (TinyBERT's hidden states, Jiao et al. 2020,
https://arxiv.org/abs/1909.10351, at the one place that the head looks at); and where both read the same tokens, how the
tokens relate to each other in the last layer (`relations`) and what each layer makes of each token (`states`). The
teacher's answers are computed before (`teacher_answers`), but for the last two, which would be too large to keep.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alambic.data.dataset import Dataset
from alambic.errors import TrainError
from alambic.events import Finished, Started, Work
from alambic.model.encoder import Encoder, pad
from alambic.model.student import read_alike
from alambic.train.batches import Row, batch_at, epoch_order, rows_of
from alambic.train.loop import Loop, Plan, Point
from alambic.train.precision import autocast, threads
from alambic.train.recipes import read_recipe
from alambic.train.relations import Relations, heads_of, relation_loss
from alambic.train.schedule import freeze, groups, set_dropout
from alambic.train.scoring import score
from alambic.train.states import States, check_widths, state_loss


@dataclass(frozen=True)
class DistilParams:
    """How a student follows; the defaults are what docs/lab-notes.md measured.

    Attributes:
        seed: of every random choice.
        epochs: passes over all texts at most.
        steps: exact number of steps, without dev (the refit on train and dev).
        schedule: steps over which the rate rises and falls; `steps` or those of `epochs` when None.
        batch_size: texts a step.
        learning_rate: peak rate of the layers.
        head_learning_rate: peak rate of the head.
        warmup: share of the steps spent rising.
        weight_decay: of matrices, not of biases.
        softness: temperature that both label shares are compared at.
        hard: weight of the cross-entropy with the given labels.
        hidden: weight of the distance between the vectors; says nothing where widths differ.
        relations: weight of the relations between tokens; 0 leaves them out.
        states: weight of the distance between the states of mapped layers; 0 leaves them out.
        embeddings: ``frozen`` leaves the word table as it is.
        metric: dev score: ``accuracy``, ``macro_f1``, ``micro_f1`` or ``subset_accuracy``.
        long: ``windows``, ``head``, ``head_tail`` or ``error``, as in the task.
        evaluations: scores on dev an epoch.
        patience: scores without progress before stopping.
        threads: of torch; its own choice when None.
        checkpoint_seconds: time between two checkpoints.
    """

    seed: int = 0
    epochs: float = 10.0
    steps: int | None = None
    schedule: int | None = None
    batch_size: int = 32
    learning_rate: float = 3e-4
    head_learning_rate: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    softness: float = 2.0
    hard: float = 0.2
    hidden: float = 1.0
    relations: float = 0.0
    states: float = 0.0
    embeddings: Literal["frozen", "trained"] = "frozen"
    metric: str = "accuracy"
    long: str = "windows"
    evaluations: int = 1
    patience: int = 4
    threads: int | None = None
    checkpoint_seconds: float = 60.0

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], **known: Any) -> DistilParams:
        """Build from a candidate's recipe; `known` are the task's own values (seed, long, metric, threads).

        Raises:
            TrainError: an unknown key, or a value that cannot be.
        """
        params = read_recipe(cls, recipe, known, of="distil")
        if params.softness <= 0 or min(params.hard, params.hidden, params.relations, params.states) < 0:
            weights = "hard, hidden, relations, states"
            raise TrainError(f"recipe of distil: softness is above 0, and no weight ({weights}) below 0")
        return params


@dataclass(frozen=True)
class Lesson:
    """What a student learns from.

    Attributes:
        rows: labelled texts first, then texts without labels.
        labelled: how many are labelled.
        logits: the teacher's [N, L].
        vectors: the teacher's pooled embeddings [N, H]; None where no single encoder taught.
    """

    rows: Dataset
    labelled: int
    logits: NDArray[np.float32]
    vectors: NDArray[np.floating] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        total = hashlib.sha256(f"{self.rows.digest} {self.labelled}".encode())
        total.update(self.logits.tobytes())
        if self.vectors is not None:
            total.update(self.vectors.tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class DistilResult:
    """What came out.

    Attributes:
        steps: of the weights kept; give it as `DistilParams.steps` to refit on more rows.
        schedule: steps of the whole schedule; give it too when refitting.
        best_dev: dev score of the kept weights.
        history: every score on dev.
        seconds: training time.
        interrupted: stopped by Ctrl-C before its end.
    """

    steps: int
    schedule: int
    best_dev: float | None
    history: tuple[Point, ...]
    seconds: float
    interrupted: bool = False


def distil(
    student: Encoder, lesson: Lesson, dev: Dataset | None, *, params: DistilParams, out: Path, teacher: Encoder | None
) -> Work[DistilResult]:
    """Train `student`, in place, to follow `lesson`; choose on `dev`; write the Model directory `out`.

    Run again after a kill with the same arguments, it goes on from its last checkpoint (beside `out`) to the same
    weights. Ctrl-C keeps the best so far.

    Args:
        student: with a head; where it starts from is the caller's choice.
        lesson: texts and the teacher's answers.
        dev: rows that choose; None with `params.steps`.
        params: how.
        out: folder to write.
        teacher: asked for its relations; None where `params.relations` is 0.

    Raises:
        TrainError: student and teacher cannot be compared as `params` ask, or the loss diverges.
    """
    with threads(params.threads):
        return (yield from _Run(student, lesson, dev, params=params, out=out, teacher=teacher).run())


class _Run:
    def __init__(
        self,
        student: Encoder,
        lesson: Lesson,
        dev: Dataset | None,
        *,
        params: DistilParams,
        out: Path,
        teacher: Encoder | None,
    ) -> None:
        self.student, self.lesson, self.params, self.out = student, lesson, params, out
        self.dev = None if params.steps is not None else dev
        self.rows = rows_of(student, lesson.rows, long=params.long)
        self.dev_rows = [] if self.dev is None else rows_of(student, self.dev, long=params.long)
        self.logits = torch.from_numpy(np.asarray(lesson.logits, dtype=np.float32))
        self.truths = truths_of(lesson.rows)
        self.vectors = self._vectors()
        self.teacher = teacher if params.relations > 0 or params.states > 0 else None
        self.relations: tuple[Relations, Relations] | None = None
        self.states: tuple[States, States] | None = None
        if params.relations > 0:
            self._watch(teacher, "relations")
        if params.states > 0:
            self._watch(teacher, "states")

    def run(self) -> Work[DistilResult]:
        begun = time.monotonic()
        yield Started("distil")
        set_dropout(self.student, 0.0)
        freeze(self.student, embeddings=self.params.embeddings)
        loop = self._loop()
        try:
            state = yield from loop.run()
        except GeneratorExit:
            self.student.save(self.out)
            raise
        finally:
            self._unwatch()
        self.student.save(self.out)
        if not loop.interrupted:
            loop.forget()
        seconds = time.monotonic() - begun
        yield Finished("distil", seconds)
        steps = state.step if self.dev is None else state.best_step
        return DistilResult(
            steps, loop.plan.total, state.best_dev, tuple(state.history), seconds, interrupted=loop.interrupted
        )

    def _loop(self) -> Loop:
        params = self.params
        trained = groups(
            self.student, rate=params.learning_rate, head_rate=params.head_learning_rate, layer_decay=1.0,
            weight_decay=params.weight_decay,
        )  # fmt: skip
        per_epoch = len(self._epoch(0))
        stop = params.steps if params.steps is not None else max(1, round(per_epoch * params.epochs))
        plan = Plan(
            stage="distil", total=stop if params.schedule is None else params.schedule, stop=stop,
            warmup=params.warmup, every=None if self.dev is None else max(1, per_epoch // params.evaluations),
            patience=params.patience, seed=params.seed, checkpoint=self.out.with_name(f"{self.out.name}.checkpoint"),
            checkpoint_seconds=params.checkpoint_seconds, key=self._key(),
        )  # fmt: skip
        batch = batch_at(self._epoch, per_epoch=per_epoch)
        return Loop(
            self.student,
            torch.optim.AdamW(trained, lr=params.learning_rate, fused=True),
            loss_of=lambda step: self._loss([self.rows[i] for i in batch(step)]),
            score=None if self.dev is None else self._score,
            plan=plan,
        )

    def _epoch(self, number: int) -> list[list[int]]:
        return epoch_order(self.rows, batch_size=self.params.batch_size, seed=self.params.seed, epoch=number)

    def _score(self) -> float:
        assert self.dev is not None
        return score(self.student, self.dev_rows, self.dev, metric=self.params.metric)

    def _loss(self, rows: list[Row]) -> Tensor:
        params, student = self.params, self.student
        ids, mask = pad([row.ids for row in rows], pad_id=student.pad_id)
        weights = torch.tensor([row.weight for row in rows])
        texts = torch.tensor([row.text for row in rows])
        with autocast():
            pooled = student.pool(ids, mask)
        logits = student.classify(pooled.float())
        multi = student.spec.multi_label
        losses = soft_loss(logits, self.logits[texts], softness=params.softness, multi_label=multi)
        if params.hard > 0:
            labelled = texts < self.lesson.labelled
            losses = losses + params.hard * hard_loss(logits, self.truths[texts], labelled, multi_label=multi)
        if self.vectors is not None:
            likeness = nn.functional.cosine_similarity(pooled.float(), self.vectors[texts], dim=-1)
            losses = losses + params.hidden * (1.0 - likeness)
        loss = (losses * weights).sum() / weights.sum()
        if self.teacher is None:
            return loss
        with torch.no_grad(), autocast():
            self.teacher.pool(ids, mask)
        if self.relations is not None:
            loss = loss + params.relations * relation_loss(*self.relations, mask, heads=self.heads)
        if self.states is not None:
            loss = loss + params.states * state_loss(*self.states, mask)
        return loss

    def _vectors(self) -> Tensor | None:
        vectors = self.lesson.vectors
        if self.params.hidden == 0 or vectors is None or vectors.shape[1] != self.student.spec.hidden:
            return None
        return torch.from_numpy(np.asarray(vectors, dtype=np.float32))

    def _watch(self, teacher: Encoder | None, what: Literal["relations", "states"]) -> None:
        leave = f"{what} = 0 in the recipe leaves them out"
        if teacher is None:
            raise TrainError(f"{what}: they are those of one fine-tuned teacher, and there is none", hint=leave)
        if not read_alike(self.student, teacher, self.lesson.rows.texts[:200]):
            raise TrainError(
                f"{what}: student and teacher read other tokens, so nothing can be compared token by token", hint=leave
            )
        if what == "states":
            check_widths(self.student, teacher)
            self.states = States(self.student), States(teacher.eval())
            return
        self.relations = Relations(self.student), Relations(teacher.eval())
        self.heads = heads_of(*self.relations, int(teacher.backbone.config.num_attention_heads))

    def _unwatch(self) -> None:
        for watched in (*(self.relations or ()), *(self.states or ())):
            watched.close()

    def _key(self) -> str:
        what = {
            "params": asdict(replace(self.params, checkpoint_seconds=0.0)), "lesson": self.lesson.digest,
            "base": self.student.spec.base.get("digest"), "dev": None if self.dev is None else self.dev.digest,
            "layers": int(self.student.backbone.config.num_hidden_layers), "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def soft_loss(logits: Tensor, teacher: Tensor, *, softness: float, multi_label: bool) -> Tensor:
    """Return how far label shares are from the teacher's, for each text [B].

    Args:
        logits: the student's [B, L].
        teacher: the teacher's [B, L].
        softness: temperature of both; the result is scaled by its square, so that gradients keep their size.
        multi_label: each label is a question of its own.
    """
    if multi_label:
        shares = (teacher / softness).sigmoid()
        losses = nn.functional.binary_cross_entropy_with_logits(logits / softness, shares, reduction="none")
        return losses.mean(dim=1) * softness**2
    shares, own = (teacher / softness).log_softmax(dim=1), (logits / softness).log_softmax(dim=1)
    return nn.functional.kl_div(own, shares, reduction="none", log_target=True).sum(dim=1) * softness**2


def hard_loss(logits: Tensor, truths: Tensor, labelled: Tensor, *, multi_label: bool) -> Tensor:
    """Return the cross-entropy with the given labels for each text [B], 0 for texts without.

    Args:
        logits: the student's [B, L].
        truths: zeros and ones [B, L].
        labelled: whether a text has labels [B]; none of several is a label too.
        multi_label: each label is a question of its own.
    """
    if multi_label:
        each = nn.functional.binary_cross_entropy_with_logits(logits, truths, reduction="none").mean(dim=1)
    else:
        each = -(truths * logits.log_softmax(dim=1)).sum(dim=1)
    return each * labelled


def truths_of(rows: Dataset) -> Tensor:
    """Return zeros and ones [N, L]; a text without labels has zeros only."""
    truths = torch.zeros(len(rows), len(rows.labels))
    for i, chosen in enumerate(rows.targets()):
        truths[i, chosen] = 1.0
    return truths
