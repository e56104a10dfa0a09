"""Distil a fine-tuned encoder into a smaller one: it follows what the teacher answers, on any text.

The loss of a text has up to five parts: the divergence from the teacher's label shares at a temperature (Hinton et al.
2015, https://arxiv.org/abs/1503.02531); the cross-entropy with its label, where it has one; the distance of its vector
from the teacher's, where both are as wide (TinyBERT's hidden states, Jiao et al. 2020,
https://arxiv.org/abs/1909.10351, at the one place that the head looks at); and where both read the same tokens, how the
tokens relate to each other in the last layer (`relations`) and what each layer makes of each token (`states`). The
teacher's answers are computed before (`teacher_answers`), but for the last two, which would be too large to keep.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from alambic.data.dataset import Dataset
from alambic.errors import TrainError
from alambic.events import Finished, Started, Work
from alambic.model.encoder import Encoder, pad
from alambic.model.student import read_alike
from alambic.train.batches import Row, batch_at, epoch_order, rows_of
from alambic.train.lesson import Answers, DistilResult, Lesson, StudentParams, key_of, plan_of, result_of
from alambic.train.loop import Loop
from alambic.train.precision import autocast, threads
from alambic.train.recipes import read_recipe
from alambic.train.relations import Relations, heads_of, relation_loss
from alambic.train.schedule import freeze, groups, set_dropout
from alambic.train.scoring import score
from alambic.train.states import States, check_widths, state_loss


@dataclass(frozen=True, kw_only=True)
class DistilParams(StudentParams):
    """How a smaller encoder follows; the defaults are what docs/lab-notes.md measured.

    Attributes:
        head_learning_rate: peak rate of the head.
        warmup: share of the steps spent rising.
        weight_decay: of matrices, not of biases.
        hidden: weight of the distance between the vectors; says nothing where widths differ.
        relations: weight of the relations between tokens; 0 leaves them out.
        states: weight of the distance between the states of mapped layers; 0 leaves them out.
        embeddings: ``frozen`` leaves the word table as it is.
        evaluations: scores on dev an epoch.
    """

    epochs: float = 10.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    head_learning_rate: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    softness: float = 2.0
    hidden: float = 1.0
    relations: float = 0.0
    states: float = 0.0
    embeddings: Literal["frozen", "trained"] = "frozen"
    evaluations: int = 1
    patience: int = 4

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
        self.answers = Answers(lesson)
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
            yield from loop.run()
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
        return result_of(loop, seconds=seconds)

    def _loop(self) -> Loop:
        params = self.params
        trained = groups(
            self.student, rate=params.learning_rate, head_rate=params.head_learning_rate, layer_decay=1.0,
            weight_decay=params.weight_decay,
        )  # fmt: skip
        per_epoch = len(self._epoch(0))
        every = None if self.dev is None else max(1, per_epoch // params.evaluations)
        plan = plan_of(
            params, stage="distil", per_epoch=per_epoch, warmup=params.warmup, every=every, out=self.out,
            key=self._key(),
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
        losses = self.answers.loss(logits, texts, params=params)
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
        base, layers = self.student.spec.base.get("digest"), int(self.student.backbone.config.num_hidden_layers)
        return key_of(self.params, self.lesson, self.dev, base=base, layers=layers)
