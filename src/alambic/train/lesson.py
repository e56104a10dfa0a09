"""What the students of a fine-tuned classifier share: their lesson, how they follow it, and what comes out.

A student is a smaller encoder (`distil`) or one vector a token and a small network (`static`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alambic.data.dataset import Dataset
from alambic.train.loop import Loop, Plan, Point


@dataclass(frozen=True, kw_only=True)
class StudentParams:
    """How any student follows its teacher; how well each kind does so decides the defaults.

    Attributes:
        seed: of every random choice.
        epochs: passes over all texts at most.
        steps: exact number of steps, without dev (the refit on train and dev).
        schedule: steps over which the rate rises and falls; `steps` or those of `epochs` when None.
        batch_size: texts a step.
        learning_rate: peak rate of all weights, but for those that have one of their own.
        softness: temperature that both label shares are compared at.
        hard: weight of the cross-entropy with the given labels.
        metric: dev score: ``accuracy``, ``macro_f1``, ``micro_f1`` or ``subset_accuracy``.
        long: ``windows``, ``head``, ``head_tail`` or ``error``, as in the task.
        patience: scores without progress before stopping.
        threads: of torch; its own choice when None.
        checkpoint_seconds: time between two checkpoints.
    """

    seed: int = 0
    epochs: float
    steps: int | None = None
    schedule: int | None = None
    batch_size: int
    learning_rate: float
    softness: float
    hard: float = 0.2
    metric: str = "accuracy"
    long: str = "windows"
    patience: int
    threads: int | None = None
    checkpoint_seconds: float = 60.0


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
        steps: of the weights kept; give it as `StudentParams.steps` to refit on more rows.
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


def plan_of(
    params: StudentParams, *, stage: str, per_epoch: int, warmup: float, every: int | None, out: Path, key: str
) -> Plan:
    """Return the plan of a training with `per_epoch` steps a pass; its checkpoint lies beside `out`."""
    stop = params.steps if params.steps is not None else max(1, round(per_epoch * params.epochs))
    return Plan(
        stage=stage, total=stop if params.schedule is None else params.schedule, stop=stop, warmup=warmup, every=every,
        patience=params.patience, seed=params.seed, checkpoint=out.with_name(f"{out.name}.checkpoint"),
        checkpoint_seconds=params.checkpoint_seconds, key=key,
    )  # fmt: skip


def key_of(params: StudentParams, lesson: Lesson, dev: Dataset | None, **start: Any) -> str:
    """Return the digest (hex) of all that decides the weights; `start` says what the student begins with."""
    what = {
        "params": asdict(replace(params, checkpoint_seconds=0.0)), "lesson": lesson.digest,
        "dev": None if dev is None else dev.digest, "torch": torch.__version__, "threads": torch.get_num_threads(),
        **start,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def result_of(loop: Loop, *, seconds: float) -> DistilResult:
    """Return what came out of a loop that has ended."""
    state = loop.state
    steps = state.step if loop.score is None else state.best_step
    return DistilResult(
        steps, loop.plan.total, state.best_dev, tuple(state.history), seconds, interrupted=loop.interrupted
    )


class Answers:
    """What teacher and labels say of the texts of a lesson."""

    def __init__(self, lesson: Lesson) -> None:
        self.logits = torch.from_numpy(np.asarray(lesson.logits, dtype=np.float32))  # [N, L]
        self.truths = truths_of(lesson.rows)
        self.labelled = lesson.labelled
        self.multi_label = lesson.rows.multi_label

    def loss(self, logits: Tensor, texts: Tensor, *, params: StudentParams) -> Tensor:
        """Return how far a student's `logits` [B, L] are from the answers to `texts`, numbers in the lesson [B]."""
        losses = soft_loss(logits, self.logits[texts], softness=params.softness, multi_label=self.multi_label)
        if params.hard == 0:
            return losses
        labelled = texts < self.labelled
        return losses + params.hard * hard_loss(logits, self.truths[texts], labelled, multi_label=self.multi_label)


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
