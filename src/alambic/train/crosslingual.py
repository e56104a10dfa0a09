"""An encoder learns a further language: it follows a teacher that only knows the first.

The student's embedding of a sentence, and of its translation, are drawn to the teacher's embedding of the sentence
(Reimers and Gurevych 2020, https://arxiv.org/abs/2004.09813), by cosine, and away from the teacher's embeddings of the
other sentences of the batch (in-batch contrast, as CLIP and LaBSE do; Feng et al. 2022,
https://arxiv.org/abs/2007.01852). First only the new word embeddings learn, then everything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alambic.data.parallel import ParallelText
from alambic.errors import TrainError
from alambic.events import Progress, Work
from alambic.model.encoder import Encoder, pad
from alambic.train.batches import ByWidth, batch_at
from alambic.train.loop import Loop, Plan, Point
from alambic.train.precision import autocast, threads
from alambic.train.schedule import set_dropout, table_groups

Vectors = NDArray[np.float16]
_PART = 4_096  # texts embedded between two events and two writes


@dataclass(frozen=True)
class FollowParams:
    """How the student follows.

    Attributes:
        seed: of every random choice.
        train: ``embeddings`` leaves all but the word embeddings as they are.
        epochs: passes over the pairs; less than one is allowed.
        batch_tokens: tokens of a step, padding included.
        learning_rate: peak rate of the layers.
        embedding_rate: peak rate of the word embeddings.
        warmup: share of the steps spent rising.
        weight_decay: of matrices, not of biases and embeddings.
        contrast: weight of the contrastive part beside the cosine part.
        temperature: of the contrastive part.
        max_tokens: longest sentence; longer pairs are left out and counted.
        evaluations: scores on the held-out pairs.
        threads: of torch; its own choice when None.
        checkpoint_seconds: time between two checkpoints.
    """

    seed: int = 0
    train: Literal["embeddings", "all"] = "all"
    epochs: float = 1.0
    batch_tokens: int = 4096
    learning_rate: float = 2e-4
    embedding_rate: float = 4e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    contrast: float = 0.1
    temperature: float = 0.05
    max_tokens: int = 64
    evaluations: int = 6
    threads: int | None = None
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True)
class Retrieval:
    """Accuracy at one of `n`: the nearest sentence of the other language is the translation."""

    n: int
    from_new: float
    from_known: float

    @property
    def mean(self) -> float:
        """Mean of both ways."""
        return (self.from_new + self.from_known) / 2


@dataclass(frozen=True)
class Followed:
    """What came out: steps, scores on the held-out pairs, tokens read, seconds of training, units too long to use."""

    steps: int
    best_step: int
    best_dev: float | None
    history: tuple[Point, ...]
    tokens: int
    seconds: float
    left_out: int
    interrupted: bool = False


def teacher_vectors(teacher: Encoder, texts: Sequence[str], folder: Path, *, threads_used: int | None) -> Work[Vectors]:
    """Return the teacher's embeddings [N, H] of `texts`, kept in `folder` part by part: a run that was killed goes on.

    The caller gives each teacher and each list of texts a folder of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = range(0, len(texts), _PART)
    with threads(threads_used):
        for number, start in enumerate(parts):
            path = folder / f"{number:05d}.npy"
            if not path.is_file():
                with autocast():
                    made = teacher.embed(texts[start : start + _PART], batch_tokens=4096).astype(np.float16)
                beside = path.with_suffix(".partial")
                with beside.open("wb") as file:
                    np.save(file, made)
                beside.replace(path)
            yield Progress("teacher", min(start + _PART, len(texts)), len(texts))
    return np.concatenate([np.load(folder / f"{number:05d}.npy") for number in range(len(parts))])


def follow(
    student: Encoder,
    train: Sequence[tuple[str, int]],
    targets: Vectors,
    held_out: ParallelText,
    *,
    params: FollowParams,
    checkpoint: Path,
    key: str,
) -> Work[Followed]:
    """Train `student` in place on `train`: texts, each with the row of `targets` [N, H] that it must come to.

    Run again after a kill with the same arguments, it goes on from `checkpoint` to the same weights. The weights kept
    are those of the best mean retrieval on `held_out`.

    Args:
        student: an encoder without a head, as wide as the teacher.
        train: (text, row of its target); a sentence and its translation have the same row.
        targets: the teacher's embeddings.
        held_out: pairs that decide which weights are kept.
        params: how.
        checkpoint: folder of the checkpoint.
        key: what the weights at the start and `targets` were made of; another key starts anew.

    Raises:
        TrainError: the widths differ, no text is short enough, or the loss diverges.
    """
    if targets.shape[1] != student.spec.hidden:
        raise TrainError(f"the teacher's embeddings are {targets.shape[1]} wide, the student's {student.spec.hidden}",
                         hint="distil to a student of the teacher's width")  # fmt: skip
    with threads(params.threads):
        run = _Follow(student, train, targets, held_out, params)
        state = yield from (loop := run.loop(checkpoint, key)).run()
        if not loop.interrupted:
            loop.forget()
    return Followed(state.step, state.best_step, state.best_dev, tuple(state.history), run.tokens(state.step),
                    state.seconds, run.left_out, loop.interrupted)  # fmt: skip


def retrieval(encoder: Encoder, pairs: ParallelText) -> Retrieval:
    """Return how often the translation is the nearest of all sentences of the other language, by cosine."""
    with autocast():
        known, new = encoder.embed(pairs.known), encoder.embed(pairs.new)
    near = unit(new) @ unit(known).T  # N new, N known
    own = np.arange(len(pairs))
    return Retrieval(len(pairs), float((near.argmax(1) == own).mean()), float((near.argmax(0) == own).mean()))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows at length one."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9), dtype=np.float32)


def distance(student: Tensor, teacher: Tensor, own: Tensor, *, contrast: float, temperature: float) -> Tensor:
    """Return the loss of a batch: 1 - cosine to the own target, plus `contrast` times the cross-entropy of finding it.

    Args:
        student: [B, H], any length.
        teacher: the different targets of the batch, [T, H], of length one.
        own: [B], row of `teacher` of each text.
        contrast: weight of the second part.
        temperature: of the second part; lower is stricter.
    """
    near = nn.functional.normalize(student, dim=-1) @ teacher.T  # B, T
    loss = 1.0 - near.gather(1, own[:, None]).mean()
    if contrast:
        loss = loss + contrast * nn.functional.cross_entropy(near / temperature, own)
    return loss


class _Follow:
    """The texts as ids in batches, and the loss of each step."""

    def __init__(
        self, student: Encoder, train: Sequence[tuple[str, int]], targets: Vectors, held_out: ParallelText,
        params: FollowParams,
    ) -> None:  # fmt: skip
        self.student, self.targets, self.held_out, self.params = student, targets, held_out, params
        set_dropout(student, 0.0)  # there is a target for every text: nothing to guard against by noise
        ids = student.tokenize([text for text, _ in train])
        members: dict[int, list[list[int]]] = {}
        for row, (_, target) in zip(ids, train, strict=True):
            members.setdefault(target, []).append(row)
        # A target whose texts are not all short enough is left out whole: the student must see both sides of a pair.
        units = [(target, rows) for target, rows in members.items() if max(map(len, rows)) <= params.max_tokens]
        self.left_out = len(members) - len(units)
        if not units:
            raise TrainError(f"no text has up to {params.max_tokens} tokens", hint="set train.max_tokens higher")
        self.units = units
        self.batches = ByWidth(
            np.array([max(map(len, rows)) for _, rows in units]), np.array([len(rows) for _, rows in units]),
            budget=params.batch_tokens, seed=params.seed,
        )  # fmt: skip

    def loop(self, checkpoint: Path, key: str) -> Loop:
        params, per_epoch = self.params, len(self.batches)
        total = max(1, math.ceil(per_epoch * params.epochs))
        plan = Plan(
            stage=f"distil ({params.train})", total=total, stop=total, warmup=params.warmup,
            every=max(1, math.ceil(total / params.evaluations)), patience=0, seed=params.seed, checkpoint=checkpoint,
            checkpoint_seconds=params.checkpoint_seconds, key=self._key(key), shape="linear",
        )  # fmt: skip
        batch = batch_at(self.batches.epoch, per_epoch=per_epoch)
        return Loop(self.student, self._optimizer(), loss_of=lambda step: self._loss(batch(step)),
                    score=lambda: retrieval(self.student, self.held_out).mean, plan=plan)  # fmt: skip

    def tokens(self, steps: int) -> int:
        """Count the tokens read in `steps` steps."""
        return self.batches.tokens(steps, np.array([sum(map(len, rows)) for _, rows in self.units]))

    def _loss(self, units: list[int]) -> Tensor:
        params, student = self.params, self.student
        rows = [row for i in units for row in self.units[i][1]]
        own = torch.tensor([place for place, i in enumerate(units) for _ in self.units[i][1]])
        with autocast():
            pooled = student.pool(*pad(rows, pad_id=student.pad_id))
        teacher = torch.from_numpy(self.targets[[self.units[i][0] for i in units]].astype(np.float32))
        teacher = nn.functional.normalize(teacher, dim=-1)
        return distance(pooled.float(), teacher, own, contrast=params.contrast, temperature=params.temperature)

    def _optimizer(self) -> torch.optim.Optimizer:
        params = self.params
        groups = table_groups(
            self.student, train=params.train, rate=params.learning_rate, table_rate=params.embedding_rate,
            weight_decay=params.weight_decay,
        )  # fmt: skip
        return torch.optim.AdamW(groups, lr=params.embedding_rate, fused=True)

    def _key(self, key: str) -> str:
        what = {"params": asdict(replace(self.params, checkpoint_seconds=0.0)), "from": key, "torch": torch.__version__}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
