"""Fine-tune an encoder into a classifier: fitted head first, then all layers; contrastive when examples are few."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alambic.data.dataset import Dataset
from alambic.errors import TrainError
from alambic.events import Finished, Note, Started, Work
from alambic.model.bases import Base
from alambic.model.encoder import Encoder
from alambic.train.batches import Row, batch_at, class_order, collate, epoch_order, rows_of, target_tensor
from alambic.train.contrastive import supcon, with_label_names
from alambic.train.head_start import fit_head, objective
from alambic.train.loop import Loop, Plan, Point
from alambic.train.precision import autocast, threads
from alambic.train.recipes import read_recipe
from alambic.train.schedule import freeze, groups, set_dropout
from alambic.train.scoring import pooled as pooled_rows
from alambic.train.scoring import score

# Of a normalised vector: makes logits of a useful size, and the head's and layers' gradients comparable.
_SCALE = 16.0
_DECAY, _FEW_DECAY = 1.0, 0.9
_DROPOUT = 0.0  # of the plain way; the contrastive one keeps the base's own
# Peak rate: where the head fitted on frozen embeddings is nearly right already, more undoes what the base knows.
_RATE, _LOW_RATE, _FEW_RATE = 2e-4, 1e-4, 3e-4
_NEARLY_RIGHT = 0.92
_SMOOTHING, _MANY_LABELS = 0.1, 20
_FEW = 20  # rows a class, median, up to which the contrastive way is tried
_UNBALANCED = 4.0  # largest class over smallest


@dataclass(frozen=True)
class FinetuneParams:
    """How to fine-tune; the defaults are the recipe measured in docs/lab-notes.md.

    Attributes:
        seed: of every random choice.
        epochs: passes over train at most; by data size when None.
        steps: exact number of steps, without dev (the refit on train and dev).
        schedule: steps over which the rate rises and falls; `steps` or those of `epochs` when None.
        batch_size: rows a step.
        learning_rate: peak rate of the top layer; by mode and by how good the fitted head is on dev when None.
        head_learning_rate: peak rate of the head.
        layer_decay: rate of a layer over that above; 0.9 in the contrastive way and 1 otherwise when None.
        warmup: share of the steps spent rising.
        weight_decay: of matrices, not of biases.
        dropout: in all layers; none in the plain way and the base's own in the contrastive one when None.
        label_smoothing: share of each target spread over all labels; 0.1 from 20 labels up and 0 below when None.
        embeddings: ``frozen`` leaves the word table as it is.
        few_shot: ``auto`` tries the contrastive way under 20 rows a class and keeps it if better on dev.
        temperature: of the contrastive loss.
        keep_base: share of the base's weights mixed back into the contrastive result.
        metric: dev score: ``accuracy``, ``macro_f1`` or ``micro_f1``.
        class_weights: ``auto`` weights classes when they are unbalanced and the metric is macro F1.
        long: ``windows``, ``head``, ``head_tail`` or ``error``, as in the task.
        evaluations: scores on dev an epoch.
        patience: scores without progress before stopping.
        threads: of torch; its own choice when None. Another number of threads gives slightly other weights.
        checkpoint_seconds: time between two checkpoints.
    """

    seed: int = 0
    epochs: float | None = None
    steps: int | None = None
    schedule: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    head_learning_rate: float = 5e-4
    layer_decay: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    dropout: float | None = None
    label_smoothing: float | None = None
    embeddings: Literal["frozen", "trained"] = "frozen"
    few_shot: Literal["auto", "on", "off"] = "auto"
    temperature: float = 0.07
    keep_base: float = 0.25
    metric: str = "accuracy"
    class_weights: Literal["auto", "on", "off"] = "auto"
    long: str = "windows"
    evaluations: int = 1
    patience: int = 3
    threads: int | None = None
    checkpoint_seconds: float = 60.0
    head_penalty: float = 3e-4

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], **known: Any) -> FinetuneParams:
        """Build from a candidate's recipe; `known` are the task's own values (seed, long, metric, threads).

        Raises:
            TrainError: an unknown key, or a value of the wrong type.
        """
        return read_recipe(cls, recipe, known, of="finetune")


@dataclass(frozen=True)
class FinetuneResult:
    """What came out.

    Attributes:
        model: Model directory.
        steps: steps of the weights that were kept; give it as `FinetuneParams.steps` to refit on more rows.
        schedule: steps of the whole schedule; give it too when refitting.
        best_dev: dev score of the kept weights.
        history: every score on dev.
        seconds: training time, reading and writing excluded.
        learning_rate: that was used; give it too when refitting.
        mode: ``finetune`` or ``few-shot``.
        interrupted: stopped by Ctrl-C before its end.
    """

    model: Path
    steps: int
    schedule: int
    best_dev: float | None
    history: tuple[Point, ...]
    seconds: float
    learning_rate: float
    mode: str
    interrupted: bool = False


def finetune(
    base: Path | Base, train: Dataset, dev: Dataset | None, *, params: FinetuneParams, out: Path
) -> Work[FinetuneResult]:
    """Train on `train`, choose on `dev`, write the Model directory `out`.

    Run again after a kill with the same arguments, it goes on from its last checkpoint (beside `out`) to the same
    weights. Ctrl-C keeps the best so far.

    Raises:
        TrainError: the labels do not allow training, or the loss diverges.
        BaseModelError: the base cannot be loaded.
    """
    _check(train, params)
    with threads(params.threads):
        modes = _modes(train, dev, params)
        done: list[FinetuneResult] = []
        for mode in modes:
            folder = out if len(modes) == 1 else out.with_name(f"{out.name}.{mode}")
            work = _Run(base, train, dev, params=params, out=folder, mode=mode)
            done.append((yield from work.run()))
            if done[-1].interrupted:
                break
        return _keep_best(done, out)


def few_shot(train: Dataset) -> bool:
    """Tell whether `train` has so few rows a class that the contrastive way should be tried."""
    counts = [n for n in train.counts.values() if n]
    return not train.multi_label and statistics.median(counts) <= _FEW and max(counts) > 1


def default_epochs(rows: int) -> float:
    """Return the passes made over `rows` training rows at most: many over small sets, few over large ones."""
    return 8.0 if rows < 2_000 else 5.0 if rows < 20_000 else 3.0


def _modes(train: Dataset, dev: Dataset | None, params: FinetuneParams) -> list[str]:
    if params.few_shot == "off" or train.multi_label or (params.few_shot == "auto" and not few_shot(train)):
        return ["finetune"]
    if params.few_shot == "on" or dev is None:
        return ["few-shot"]
    return ["few-shot", "finetune"]


def _keep_best(done: list[FinetuneResult], out: Path) -> FinetuneResult:
    if len(done) == 1 and done[0].model == out:
        return done[0]
    best = max(done, key=lambda result: result.best_dev or 0.0)  # the first of equals
    Encoder.load(best.model).save(out)
    for result in done:
        shutil.rmtree(result.model)
    return replace(best, model=out, seconds=sum(result.seconds for result in done))


def _check(train: Dataset, params: FinetuneParams) -> None:
    present = [label for label, n in train.counts.items() if n]
    needed = 1 if train.multi_label else 2
    if len(present) < needed:
        raise TrainError(
            f"training needs examples of at least {needed} labels, got {len(present)} ({', '.join(present) or 'none'})",
            hint="look at the label column with: alambic check",
        )
    if params.metric not in ("accuracy", "macro_f1", "micro_f1", "subset_accuracy"):
        raise TrainError(f"metric {params.metric!r}: allowed are accuracy, macro_f1, micro_f1, subset_accuracy")
    if params.steps is not None and params.steps < 0:
        raise TrainError(f"steps = {params.steps}: expected 0 or more")


class _Run:
    """One fine-tuning of one mode, from base to Model directory."""

    def __init__(
        self, base: Path | Base, train: Dataset, dev: Dataset | None, *, params: FinetuneParams, out: Path, mode: str
    ) -> None:
        self.dev = None if params.steps is not None else dev
        self.params, self.out, self.mode = params, out, mode
        scale_of = Encoder.load(base)
        scale = _SCALE if scale_of.spec.normalize else 1.0
        self.encoder = scale_of.with_head(train.labels, multi_label=train.multi_label, scale=scale)
        self.train = with_label_names(train) if mode == "few-shot" else train
        self.rows = rows_of(self.encoder, self.train, long=params.long)
        self.dev_rows = [] if self.dev is None else rows_of(self.encoder, self.dev, long=params.long)
        self.weights = _class_weights(train, params)
        self.key = _key(self.encoder, train, self.dev, params, mode)

    def run(self) -> Work[FinetuneResult]:
        begun = time.monotonic()
        yield Started(self.mode)
        set_dropout(self.encoder, self._dropout())
        freeze(self.encoder, embeddings=self.params.embeddings)
        self._fit_head()
        rate = self._rate()
        self.start = {name: p.detach().clone() for name, p in self._layers().items()}
        if self.mode == "few-shot":
            yield Note(f"{len(self.train)} examples for {len(self.train.labels)} labels: contrastive training is tried")
        loop = self._loop(rate)
        loop.state.seconds = time.monotonic() - begun  # fitting the head is part of training; a checkpoint overrides it
        try:
            state = yield from loop.run()
        except GeneratorExit:
            self._finish()  # closed half-way: what was best is not lost
            raise
        self._finish()
        if not loop.interrupted:
            loop.forget()
        seconds = time.monotonic() - begun
        yield Finished(self.mode, seconds)
        steps = state.step if self.dev is None else state.best_step
        return FinetuneResult(
            self.out,
            steps,
            loop.plan.total,
            state.best_dev,
            tuple(state.history),
            seconds,
            rate,
            self.mode,
            loop.interrupted,
        )

    def _finish(self) -> None:
        if self.mode == "few-shot":
            self._mix()
            self._fit_head()
        self.encoder.save(self.out)

    def _mix(self) -> dict[str, Tensor]:
        """Mix some of the base back in and return the weights as they were.

        Weights between the base and the tuned ones generalise better than either when examples are few (WiSE-FT,
        Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
        """
        tuned = {name: p.detach().clone() for name, p in self._layers().items()}
        with torch.no_grad():
            for name, parameter in self._layers().items():
                parameter.lerp_(self.start[name], self.params.keep_base)
        return tuned

    def _layers(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.encoder.backbone.named_parameters() if p.requires_grad}

    def _dropout(self) -> float | None:
        return _DROPOUT if self.params.dropout is None and self.mode != "few-shot" else self.params.dropout

    def _smoothing(self) -> float:
        if self.params.label_smoothing is not None:
            return self.params.label_smoothing
        return _SMOOTHING if len(self.train.labels) >= _MANY_LABELS else 0.0

    def _rate(self) -> float:
        """Choose the peak rate; the head is fitted and nothing else is trained yet."""
        if self.params.learning_rate is not None:
            return self.params.learning_rate
        if self.mode == "few-shot":
            return _FEW_RATE
        if self.dev is None:
            return _RATE
        self.encoder.eval()
        with torch.no_grad():
            return _LOW_RATE if self._score_as_is() >= _NEARLY_RIGHT else _RATE

    def _loop(self, rate: float) -> Loop:
        params = self.params
        decay = params.layer_decay
        if decay is None:
            decay = _FEW_DECAY if self.mode == "few-shot" else _DECAY
        trained = groups(
            self.encoder,
            rate=rate,
            head_rate=params.head_learning_rate,
            layer_decay=decay,
            weight_decay=params.weight_decay,
        )
        optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)
        epoch = self._epoch
        per_epoch = len(epoch(0))
        stop = params.steps if params.steps is not None else round(per_epoch * self._epochs())
        plan = Plan(
            stage=self.mode,
            total=stop if params.schedule is None else params.schedule,
            stop=stop,
            warmup=params.warmup,
            every=None if self.dev is None else max(1, per_epoch // params.evaluations),
            patience=params.patience,
            seed=params.seed,
            checkpoint=self.out.with_name(f"{self.out.name}.checkpoint"),
            checkpoint_seconds=params.checkpoint_seconds,
            key=self.key,
        )
        batch = batch_at(epoch, per_epoch=per_epoch)
        loss_of = self._contrastive_loss if self.mode == "few-shot" else self._loss
        return Loop(
            self.encoder,
            optimizer,
            loss_of=lambda step: loss_of([self.rows[i] for i in batch(step)]),
            score=None if self.dev is None else self._score,
            plan=plan,
        )

    def _epoch(self, number: int) -> list[list[int]]:
        seed = self.params.seed
        if self.mode == "few-shot":
            return class_order(self.rows, classes=40, each=3, seed=seed, epoch=number)
        return epoch_order(self.rows, batch_size=self.params.batch_size, seed=seed, epoch=number)

    def _epochs(self) -> float:
        return default_epochs(len(self.train)) if self.params.epochs is None else self.params.epochs

    def _loss(self, rows: list[Row]) -> Tensor:
        spec = self.encoder.spec
        batch = collate(rows, pad_id=self.encoder.pad_id, n_labels=len(self.train.labels), multi_label=spec.multi_label)
        with autocast():
            pooled = self.encoder.pool(batch.ids, batch.mask)
        logits = self.encoder.classify(pooled.float())
        losses = objective(logits, batch.targets, weights=self.weights, smoothing=self._smoothing())
        return (losses * batch.weights).sum() / batch.weights.sum()

    def _contrastive_loss(self, rows: list[Row]) -> Tensor:
        # Classes mix lengths: the batch goes through in parts of like length, or half of it would be padding.
        with autocast():
            parts = list(pooled_rows(rows, self.encoder, batch_tokens=512))
        pooled = torch.cat([part for _, part in parts])
        targets = torch.tensor([rows[i].targets[0] for numbers, _ in parts for i in numbers])
        unit = nn.functional.normalize(pooled, dim=-1)
        return supcon(unit, targets, temperature=self.params.temperature)

    def _fit_head(self) -> None:
        """Fit the head on the embeddings as they are now."""
        features = self._features(self.rows, len(self.train))
        targets = target_tensor(self.train.targets(), len(self.train.labels), multi_label=self.train.multi_label)
        head = fit_head(
            features, targets, n_labels=len(self.train.labels), penalty=self.params.head_penalty, weights=self.weights
        )
        self.encoder.set_head(head.weight, head.bias)

    def _features(self, rows: list[Row], n: int) -> Tensor:
        """Return what the head sees [N, H]: the weighted mean over the windows of each text."""
        features = torch.zeros(n, self.encoder.spec.hidden)
        self.encoder.eval()
        with torch.no_grad(), autocast():
            for numbers, vectors in pooled_rows(rows, self.encoder):
                weights = torch.tensor([rows[i].weight for i in numbers])
                features.index_add_(0, torch.tensor([rows[i].text for i in numbers]), vectors * weights[:, None])
        return features * self.encoder.spec.scale

    def _score(self) -> float:
        if self.mode != "few-shot":
            return self._score_as_is()
        tuned = self._mix()  # score what would be written, then go on from where training was
        self._fit_head()
        value = self._score_as_is()
        with torch.no_grad():
            for name, parameter in self._layers().items():
                parameter.copy_(tuned[name])
        return value

    def _score_as_is(self) -> float:
        assert self.dev is not None
        return score(self.encoder, self.dev_rows, self.dev, metric=self.params.metric)


def _class_weights(train: Dataset, params: FinetuneParams) -> Tensor | None:
    """Weigh a class by the square root of its rarity: full inverse counts drown the common classes."""
    counts = torch.tensor([max(1, train.counts[label]) for label in train.labels], dtype=torch.float32)
    wanted = params.class_weights == "on" or (
        params.class_weights == "auto"
        and params.metric == "macro_f1"
        and float(counts.max() / counts.min()) >= _UNBALANCED
    )
    if not wanted:
        return None
    if train.multi_label:
        return ((len(train) - counts).clamp(min=1) / counts).sqrt()
    weights = counts.rsqrt()
    return weights / (weights * counts).sum() * counts.sum()


def _key(encoder: Encoder, train: Dataset, dev: Dataset | None, params: FinetuneParams, mode: str) -> str:
    what = {
        "params": asdict(replace(params, checkpoint_seconds=0.0)),
        "base": encoder.spec.base.get("digest"),
        "train": train.digest,
        "dev": None if dev is None else dev.digest,
        "mode": mode,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
