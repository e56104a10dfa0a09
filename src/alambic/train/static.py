"""Distil a fine-tuned encoder into a static-embedding model: the mean of one vector a token, and a small network.

A token's vector starts as what the teacher makes of that token alone (Model2Vec, van Dongen and Tulkens 2024,
https://github.com/MinishLab/model2vec), reduced to fewer dimensions; then all of it follows the teacher's label shares.
It answers in microseconds and knows nothing of the order of words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alambic.data.dataset import Dataset
from alambic.errors import PackError, TrainError
from alambic.events import Started, Work
from alambic.manifest import PartSpec
from alambic.model.encoder import Encoder, by_length, pad
from alambic.train.batches import Row, batch_at, epoch_order, rows_of
from alambic.train.lesson import Answers, DistilResult, Lesson, StudentParams, key_of, plan_of, result_of
from alambic.train.loop import Loop
from alambic.train.precision import autocast, threads
from alambic.train.recipes import read_recipe
from alambic.train.scoring import score_shares

_TOKENS = 512  # tokens given to the teacher at once
_PROOF = 1e-2  # largest difference of a logit between the part, its table in float16, and the model


@dataclass(frozen=True, kw_only=True)
class StaticParams(StudentParams):
    """How a static-embedding student is made and trained.

    Attributes:
        width: numbers of a token's vector.
        hidden: width of the layer between the mean and the labels.
        dropout: share of the mean vector dropped while training.
    """

    width: int = 256
    hidden: int = 256
    epochs: float = 30.0
    batch_size: int = 64
    learning_rate: float = 3e-3
    softness: float = 4.0
    dropout: float = 0.2
    patience: int = 6

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], **known: Any) -> StaticParams:
        """Build from a candidate's recipe; `known` are the task's own values (seed, long, metric, threads).

        Raises:
            TrainError: an unknown key, or a value that cannot be.
        """
        params = read_recipe(cls, recipe, known, of="distil-static")
        if min(params.width, params.hidden) < 1 or params.softness <= 0 or params.hard < 0:
            raise TrainError("recipe of distil-static: width, hidden and softness are above 0, hard is not below 0")
        return params


def distil_static(
    teacher: Encoder, lesson: Lesson, dev: Dataset | None, *, params: StaticParams, out: Path
) -> Work[tuple[DistilResult, PartSpec]]:
    """Train a static-embedding student of `teacher` on `lesson`, choose on `dev`, write its part folder `out`.

    Run again after a kill with the same arguments, it goes on from its last checkpoint (beside `out`).

    Raises:
        TrainError: the loss diverges.
        PackError: the written part answers otherwise than the model.
    """
    with threads(params.threads):
        yield Started("distil-static")
        run = _Run(teacher, lesson, dev, params=params, out=out)
        result = yield from run.run()
        part = run.write()
    return result, part


class _Net(nn.Module):  # type: ignore[misc]
    """Mean of token vectors -> hidden layer -> logits."""

    def __init__(self, table: Tensor, hidden: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table, freeze=False)
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Linear(table.shape[1], hidden)
        self.out = nn.Linear(hidden, labels)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits [B, L] of ids [B, T]."""
        weights = mask.unsqueeze(-1).float()  # B, T, 1
        mean = (self.table(ids) * weights).sum(1) / weights.sum(1).clamp(min=1.0)  # B, D
        logits: Tensor = self.out(self.hidden(self.drop(mean)).relu())
        return logits


class _Run:
    def __init__(
        self, teacher: Encoder, lesson: Lesson, dev: Dataset | None, *, params: StaticParams, out: Path
    ) -> None:
        self.teacher, self.lesson, self.params, self.out = teacher, lesson, params, out
        self.dev = None if params.steps is not None else dev
        rows = rows_of(teacher, lesson.rows, long=params.long)
        dev_rows = [] if self.dev is None else rows_of(teacher, self.dev, long=params.long)
        # Only the vectors of tokens that are met are worked on; those of dev alone stay as they start.
        used = sorted({i for row in (*rows, *dev_rows) for i in row.ids})
        self.used = np.array(used)
        place = {number: i for i, number in enumerate(used)}
        self.rows = [replace(row, ids=tuple(place[i] for i in row.ids)) for row in rows]
        self.dev_rows = [replace(row, ids=tuple(place[i] for i in row.ids)) for row in dev_rows]
        self.start = start_vectors(teacher, width=params.width)
        torch.manual_seed(params.seed)
        self.net = _Net(
            torch.from_numpy(self.start[self.used].copy()), params.hidden, len(lesson.rows.labels), params.dropout
        )
        self.answers = Answers(lesson)

    def run(self) -> Work[DistilResult]:
        params = self.params
        per_epoch = len(self._epoch(0))
        every = None if self.dev is None else per_epoch
        plan = plan_of(
            params, stage="distil-static", per_epoch=per_epoch, warmup=0.05, every=every, out=self.out, key=self._key()
        )
        batch = batch_at(self._epoch, per_epoch=per_epoch)
        trained = {"params": list(self.net.parameters()), "peak": params.learning_rate, "weight_decay": 0.0}
        loop = Loop(
            self.net,
            torch.optim.AdamW([trained], lr=params.learning_rate, fused=True),
            loss_of=lambda step: self._loss([self.rows[i] for i in batch(step)]),
            score=None if self.dev is None else self._score,
            plan=plan,
        )
        state = yield from loop.run()
        if not loop.interrupted:
            loop.forget()
        return result_of(loop, seconds=state.seconds)

    def write(self) -> PartSpec:
        """Write the part folder and prove that it answers as the model does."""
        self.out.mkdir(parents=True, exist_ok=True)
        table = self.start.copy()
        table[self.used] = self.net.table.weight.detach().numpy()
        arrays = {
            "table": table.astype(np.float16),
            "hidden_weight": self.net.hidden.weight.detach().numpy().T, "hidden_bias": self.net.hidden.bias.detach(),
            "weight": self.net.out.weight.detach().numpy().T, "bias": self.net.out.bias.detach(),
        }  # fmt: skip
        for name, values in arrays.items():
            np.save(self.out / f"{name}.npy", np.ascontiguousarray(values))
        self.teacher.tokenizer.save(str(self.out / "tokenizer.json"))
        prefix, suffix = self.teacher.special_ids()
        params = {
            "output": "logits", "prefix_ids": prefix, "suffix_ids": suffix, "pad_id": self.teacher.pad_id,
            "max_tokens": self.teacher.spec.max_tokens, "precision": "fp16",
        }  # fmt: skip
        part = PartSpec(name="classifier", engine="static", folder=self.out.name, params=params)
        self._prove(part)
        return part

    def _prove(self, part: PartSpec) -> None:
        from alambic.engines import load_part

        rows = self.rows[:200]
        with torch.no_grad():
            expected = self.net.eval()(*_padded(rows)).numpy()
        windows = [self.used[list(row.ids)].tolist() for row in rows]
        gap = float(np.abs(load_part(part, self.out, threads=1).infer(windows) - expected).max())
        if not gap <= _PROOF * max(1.0, float(np.abs(expected).max())):
            raise PackError(f"{self.out}: a logit of the written part is {gap:.3g} off the model's")

    def _epoch(self, number: int) -> list[list[int]]:
        return epoch_order(self.rows, batch_size=self.params.batch_size, seed=self.params.seed, epoch=number)

    def _loss(self, rows: list[Row]) -> Tensor:
        texts = torch.tensor([row.text for row in rows])
        weights = torch.tensor([row.weight for row in rows])
        losses = self.answers.loss(self.net(*_padded(rows)), texts, params=self.params)
        return (losses * weights).sum() / weights.sum()

    def _score(self) -> float:
        assert self.dev is not None
        multi = self.dev.multi_label
        shares = torch.zeros(len(self.dev), len(self.dev.labels))
        for numbers in by_length([len(row.ids) for row in self.dev_rows], batch_tokens=16_384):
            rows = [self.dev_rows[i] for i in numbers]
            logits = self.net(*_padded(rows))
            each = logits.sigmoid() if multi else logits.softmax(dim=1)
            weights = torch.tensor([row.weight for row in rows])
            shares.index_add_(0, torch.tensor([row.text for row in rows]), each * weights[:, None])
        return score_shares(shares, self.dev, metric=self.params.metric)

    def _key(self) -> str:
        start = hashlib.sha256(self.start.tobytes()).hexdigest()
        return key_of(self.params, self.lesson, self.dev, start=start)


def start_vectors(teacher: Encoder, *, width: int) -> NDArray[np.float32]:
    """Return what `teacher` makes of each token alone [V, width]: its pooled vectors, the main directions kept.

    Numbers are scaled to a standard deviation of 1. Where `width` is not under the teacher's, nothing is reduced and
    the rest is zero.
    """
    prefix, suffix = teacher.special_ids()
    count = max(teacher.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    vectors = np.zeros((count, teacher.spec.hidden), dtype=np.float32)
    teacher.eval()
    with torch.no_grad(), autocast():
        for start in range(0, count, _TOKENS):
            rows = torch.tensor([[*prefix, i, *suffix] for i in range(start, min(start + _TOKENS, count))])
            vectors[start : start + len(rows)] = teacher.pool(rows, torch.ones_like(rows)).float().numpy()
    vectors -= vectors.mean(axis=0)
    _, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    kept = (vectors @ directions[:, ::-1][:, :width]).astype(np.float32)
    out = np.zeros((count, width), dtype=np.float32)
    out[:, : kept.shape[1]] = kept / max(float(kept.std()), 1e-6)
    return out


def _padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    return pad([row.ids for row in rows], pad_id=0)  # masked out, so any number does
