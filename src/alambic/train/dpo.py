"""Direct preference optimisation: of two answers to one prompt, make the chosen likelier than the rejected.

Loss: -log sigmoid(beta * ((log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected)))), where p0 is the
base (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290). The base's log-probabilities are taken once, before the
first step, so no second model is kept. Turns before the answer are the same in both and cancel out.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alambic.errors import TrainError
from alambic.events import Event, Finished, Note, Progress, Started, Work
from alambic.kinds.chat import Chat, Message
from alambic.model.adapter import model_digest
from alambic.train.distributed import sum_gradients, total, world
from alambic.train.loop import Loop, Plan, Point, changed
from alambic.train.packing import Sample
from alambic.train.precision import threads
from alambic.train.schedule import Shape
from alambic.train.sft_model import Setting, is_new, needs_checkpointing, open_learner, write_result
from alambic.train.sft_rates import default_preference_rate
from alambic.train.sft_rows import rows_of


@dataclass(frozen=True)
class Pair:
    """One prompt and two answers.

    Attributes:
        prompt: the conversation that waits for the assistant.
        chosen: the better answer.
        rejected: the worse one.
        where: ``file:line`` of origin, for messages.
    """

    prompt: Chat
    chosen: Message
    rejected: Message
    where: str = ""


@dataclass(frozen=True)
class DpoParams:
    """How to learn preferences; attributes not listed are those of `SftParams`.

    Attributes:
        beta: how far the model may move from its base: smaller moves further.
        label_smoothing: share of pairs that are the wrong way round (Mitchell 2023).
        batch_size: pairs a step.
        batch_tokens: most tokens that go through the model at once; a step of more goes in parts of whole pairs.
    """

    seed: int = 0
    method: Literal["auto", "full", "lora", "dora", "qlora"] = "auto"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rank: int = 16
    alpha: float = 32.0
    epochs: float = 2.0
    steps: int | None = None
    batch_size: int = 16
    batch_tokens: int = 4096
    learning_rate: float | None = None
    shape: Shape = "cosine"
    warmup: float = 0.1
    long: str = "error"
    max_tokens: int | None = None
    checkpointing: Literal["auto", "on", "off"] = "auto"
    evaluations: int = 2
    patience: int = 3
    device: str = "auto"
    threads: int | None = None
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class DpoResult:
    """What came out.

    Attributes:
        model: Model directory, the adapter merged in.
        adapter: the adapter alone, None when all weights were trained.
        steps: steps of the weights that were kept.
        best_dev: loss on dev of the kept weights; log 2 is that of the base.
        accuracy: share of dev where the chosen answer gained more than the rejected one, at the last score.
        margin: beta times how much more it gained, on average, at the last score.
        history: every score on dev.
        learning_rate: peak.
        left_out: rows that were too long.
        seconds: of everything.
        method: how it was trained.
        interrupted: stopped by Ctrl-C before its end.
    """

    model: Path
    adapter: Path | None
    steps: int
    best_dev: float | None
    accuracy: float | None
    margin: float | None
    history: tuple[Point, ...]
    learning_rate: float
    left_out: tuple[str, ...]
    seconds: float
    method: str = "full"
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, for a stage's record; paths are left to the caller."""
        data = {k: v for k, v in asdict(self).items() if k not in ("model", "adapter")}
        return {**data, "history": [asdict(point) for point in self.history], "left_out": list(self.left_out)}


@dataclass(frozen=True)
class _Row:
    """A pair as ids, with the log-probabilities that the base gives its answers."""

    chosen: Sample
    rejected: Sample
    base: tuple[float, float] = (0.0, 0.0)

    @property
    def n_tokens(self) -> int:
        return self.chosen.n_tokens + self.rejected.n_tokens


def prefer_chats(
    base: Path, train: Sequence[Pair], dev: Sequence[Pair] | None, *, params: DpoParams, out: Path
) -> Work[DpoResult]:
    """Train on `train`, choose on `dev`, write the Model directory `out` (and `out`/adapter when there is one).

    Resumes, stops and shares work as `finetune_chats` does.

    Raises:
        TrainError: rows that cannot be learnt, a method that this machine cannot run, or a loss that diverges.
        BaseModelError: the base cannot be loaded.
    """
    if not train:
        raise TrainError("there are no pairs to train on")
    if not params.beta > 0 or not 0 <= params.label_smoothing < 0.5:
        raise TrainError(f"beta = {params.beta}, label_smoothing = {params.label_smoothing}: expected beta over 0 and "
                         "a smoothing from 0 to below 0.5")  # fmt: skip
    with threads(params.threads):
        return (yield from _Run(base, train, dev, params=params, out=out).run())


class _Run:
    """One training on preferences, from base to Model directory."""

    def __init__(
        self, base: Path, train: Sequence[Pair], dev: Sequence[Pair] | None, *, params: DpoParams, out: Path
    ) -> None:
        self.begun = time.monotonic()
        self.params, self.out, self.base = params, out, base
        self.learner = open_learner(
            base, Setting(params.method, params.rank, params.alpha, 0.0, 0.0, "auto", params.device, params.seed)
        )
        self.left_out: list[str] = []
        self.rows = self._rows(train, long=params.long)
        self.dev = None if dev is None or params.steps is not None else self._rows(dev, long="leave_out")
        self.rate = params.learning_rate or default_preference_rate(
            self.learner.writer.spec.parameters, method=self.learner.method, new=is_new(base)
        )
        self.per_epoch = -(-len(self.rows) // params.batch_size)
        self.batches = lru_cache(maxsize=1)(self._epoch)
        self.last = (0.0, 0.0)
        self.learner.set_dropout(0.0)  # the base was asked without
        longest = max(params.batch_tokens, *(row.n_tokens for row in self.rows))
        on = params.checkpointing == "on"
        self.learner.checkpointing(on or (params.checkpointing == "auto"
                                          and needs_checkpointing(self.learner, tokens=longest)))  # fmt: skip

    def _rows(self, pairs: Sequence[Pair], *, long: str) -> list[_Row]:
        writer = self.learner.writer
        most = min(self.params.max_tokens or writer.context_tokens, writer.context_tokens)
        sides = []
        for answer in ("chosen", "rejected"):
            chats = [Chat((*pair.prompt.messages, getattr(pair, answer)), pair.prompt.tools) for pair in pairs]
            names = [f"{pair.where or f'pair {i + 1}'} ({answer})" for i, pair in enumerate(pairs)]
            # One by one: a pair goes when either side is too long.
            sides.append(
                [rows_of(writer, [c], long=long, max_tokens=most, where=[n]) for c, n in zip(chats, names, strict=True)]
            )
        rows = []
        for chosen, rejected in zip(*sides, strict=True):
            self.left_out += [*chosen.left_out, *rejected.left_out]
            if chosen.samples and rejected.samples:
                rows.append(_Row(chosen.samples[0], rejected.samples[0]))
        if not rows:
            raise TrainError("no pair is left: all are too long")
        return rows

    def run(self) -> Work[DpoResult]:
        learner = self.learner
        yield Started("dpo")
        if self.left_out:
            yield Note(f"{len(self.left_out)} answers are too long and left out: {'; '.join(self.left_out)}", "warning")
        self.rows = self._with_base(self.rows)
        self.dev = None if self.dev is None else self._with_base(self.dev)
        loop = self._loop()
        try:
            state = yield from changed(loop.run(), self._event)
        except GeneratorExit:
            write_result(learner, self.base, self.out)
            raise
        adapter = write_result(learner, self.base, self.out)
        if not loop.interrupted and world().writes:
            loop.forget()
        seconds = time.monotonic() - self.begun
        yield Finished("dpo", seconds)
        scored = self.dev is not None
        return DpoResult(
            model=self.out,
            adapter=adapter,
            steps=state.best_step if scored else state.step,
            best_dev=None if state.best_dev is None else -state.best_dev,
            accuracy=self.last[0] if scored else None,
            margin=self.last[1] if scored else None,
            history=tuple(replace(point, dev=-point.dev) for point in state.history),
            learning_rate=self.rate,
            left_out=tuple(self.left_out),
            seconds=seconds,
            method=learner.method,
            interrupted=loop.interrupted,
        )

    def _with_base(self, rows: list[_Row]) -> list[_Row]:
        """Take the log-probabilities of both answers from the model as it is now: the base (adapters begin at zero)."""
        self.learner.model.eval()
        done: list[_Row] = []
        for part in self._parts(rows):
            found = (-self.learner.losses([s for row in part for s in (row.chosen, row.rejected)])).view(-1, 2).tolist()
            done += [replace(row, base=(c, r)) for row, (c, r) in zip(part, found, strict=True)]
        return done

    def _parts(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        parts: list[list[_Row]] = []
        size = 0
        for row in rows:
            if not parts or size + row.n_tokens > self.params.batch_tokens:
                parts.append([])
                size = 0
            parts[-1].append(row)
            size += row.n_tokens
        return parts

    def _margins(self, rows: Sequence[_Row], losses: Tensor) -> Tensor:
        """Return beta times how much more the chosen answers gained [N], from the losses of both [2 N]."""
        base = torch.tensor([row.base for row in rows], device=losses.device)
        gained = -losses.view(-1, 2) - base  # N, (chosen, rejected)
        return self.params.beta * (gained[:, 0] - gained[:, 1])

    def _losses(self, margins: Tensor) -> Tensor:
        share = self.params.label_smoothing
        return -(1 - share) * F.logsigmoid(margins) - share * F.logsigmoid(-margins)

    def _step(self, step: int) -> float:
        epoch, offset = divmod(step, self.per_epoch)
        rows = [self.rows[i] for i in self.batches(epoch)[offset]]
        value = 0.0
        for part in self._parts(world().share(rows)):
            losses = self.learner.row_losses([s for row in part for s in (row.chosen, row.rejected)])
            loss = self._losses(self._margins(part, losses)).sum() / len(rows)
            loss.backward()
            value += float(loss.detach())
        sum_gradients(self.learner.model.parameters())
        return total([value])[0]

    def _score(self) -> float:
        assert self.dev is not None
        sums = [0.0, 0.0, 0.0]
        for part in self._parts(world().share(self.dev)):
            losses = self.learner.losses([s for row in part for s in (row.chosen, row.rejected)])
            margins = self._margins(part, losses)
            found = (self._losses(margins), (margins > 0).float(), margins)
            sums = [one + float(two.double().sum()) for one, two in zip(sums, found, strict=True)]
        loss, right, margin = (value / len(self.dev) for value in total(sums))
        self.last = (right, margin)
        return -loss

    def _loop(self) -> Loop:
        params = self.params
        stop = max(1, round(self.per_epoch * params.epochs)) if params.steps is None else params.steps
        plan = Plan(
            stage="dpo",
            total=stop,
            stop=stop,
            warmup=params.warmup,
            every=None if self.dev is None else max(1, self.per_epoch // params.evaluations),
            patience=params.patience,
            seed=params.seed,
            checkpoint=self.out.with_name(f"{self.out.name}.checkpoint"),
            checkpoint_seconds=params.checkpoint_seconds if world().writes else float("inf"),
            key=self._key(),
            shape=params.shape,
        )
        trained = [p for p in self.learner.model.parameters() if p.requires_grad]
        group = {"params": trained, "lr": self.rate, "peak": self.rate, "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([group], lr=self.rate, fused=True)
        score = None if self.dev is None else self._score
        return Loop(self.learner.model, optimizer, loss_of=self._step, score=score, plan=plan)

    def _epoch(self, number: int) -> list[list[int]]:
        order: list[int] = np.random.default_rng((self.params.seed, number)).permutation(len(self.rows)).tolist()
        size = self.params.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _event(self, event: Event) -> Event:
        if not isinstance(event, Progress):
            return event
        values = {k: -v if k in ("dev", "best_dev") else v for k, v in event.values.items()}
        if self.dev is not None:
            values |= {"accuracy": self.last[0], "margin": self.last[1]}
        return replace(event, values=values)

    def _key(self) -> str:
        what: dict[str, Any] = {
            "params": asdict(replace(self.params, checkpoint_seconds=0.0)),
            "base": model_digest(self.base),
            "rows": [[asdict(row) for row in rows] for rows in (self.rows, self.dev or [])],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "world": world().size,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
