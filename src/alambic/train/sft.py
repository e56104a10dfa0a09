"""Fine-tune a model that writes on conversations: all weights or an adapter, learning what the assistant says only."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from alambic.errors import TrainError
from alambic.events import Event, Finished, Note, Progress, Started, Work
from alambic.kinds.chat import Chat
from alambic.model.adapter import model_digest
from alambic.train.distributed import sum_gradients, total, world
from alambic.train.loop import Loop, Plan, Point, changed
from alambic.train.packing import parts
from alambic.train.precision import threads
from alambic.train.recipes import read_recipe
from alambic.train.schedule import Shape
from alambic.train.sft_model import Setting, is_new, needs_checkpointing, open_learner, write_result
from alambic.train.sft_rates import default_epochs, default_rate, default_rows_a_step
from alambic.train.sft_rows import rows_of

_LN2 = 0.6931471805599453


@dataclass(frozen=True)
class SftParams:
    """How to fine-tune.

    Attributes:
        seed: of every random choice.
        method: ``full`` trains all weights, ``lora``/``dora``/``qlora`` an adapter; ``auto`` takes ``full`` for new
            models and up to 150 M parameters, and ``lora`` above.
        rank: width of the adapter.
        alpha: the adapter's product is multiplied by `alpha / rank`.
        lora_dropout: of the adapter's input.
        epochs: passes over train at most; by size and kind of base when None.
        steps: exact number of steps, without dev.
        schedule: steps over which the rate rises and falls; `steps` or those of `epochs` when None.
        batch_size: rows a step; by their length when None.
        batch_tokens: most tokens that go through the model at once; a step of more goes in parts.
        learning_rate: peak; by the table in `alambic.train.sft_rates` when None.
        shape: of the rate after its rise: ``cosine``, ``wsd`` or ``linear``.
        warmup: share of the steps spent rising.
        weight_decay: of matrices.
        label_smoothing: share of each target spread over the vocabulary.
        dropout: in all layers; the base's own when None.
        long: ``error`` refuses rows over the context, ``leave_out`` lists them.
        max_tokens: of a row; the base's context when None.
        packing: ``auto`` packs rows without padding where the model can (decoders), ``off`` pads rows of like length.
        checkpointing: ``on`` recomputes layers on the way back, ``auto`` where memory asks for it.
        evaluations: scores on dev an epoch.
        patience: scores without progress before stopping.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: of torch; its own choice when None.
        checkpoint_seconds: time between two checkpoints.
    """

    seed: int = 0
    method: Literal["auto", "full", "lora", "dora", "qlora"] = "auto"
    rank: int = 16
    alpha: float = 32.0
    lora_dropout: float = 0.0
    epochs: float | None = None
    steps: int | None = None
    schedule: int | None = None
    batch_size: int | None = None
    batch_tokens: int = 4096
    learning_rate: float | None = None
    shape: Shape = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    dropout: float | None = None
    long: str = "error"
    max_tokens: int | None = None
    packing: Literal["auto", "off"] = "auto"
    checkpointing: Literal["auto", "on", "off"] = "auto"
    evaluations: int = 2
    patience: int = 3
    device: str = "auto"
    threads: int | None = None
    checkpoint_seconds: float = 60.0

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], **known: Any) -> SftParams:
        """Build from a candidate's recipe; `known` are the task's own values (seed, long, threads).

        Raises:
            TrainError: an unknown key, or a value of the wrong type or out of range.
        """
        return read_recipe(cls, recipe, known, of="finetune").checked()

    def checked(self) -> SftParams:
        """Return itself once every value is possible.

        Raises:
            TrainError: naming the first that is not.
        """
        allowed: dict[str, tuple[str, ...]] = {
            "method": ("auto", "full", "lora", "dora", "qlora"),
            "shape": ("cosine", "wsd", "linear"),
            "long": ("error", "leave_out"),
            "packing": ("auto", "off"),
            "checkpointing": ("auto", "on", "off"),
            "device": ("auto", "cpu", "cuda"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise TrainError(f"{name} = {getattr(self, name)!r}; allowed: {', '.join(values)}")
        positive = (
            "rank",
            "alpha",
            "epochs",
            "batch_size",
            "batch_tokens",
            "learning_rate",
            "max_tokens",
            "evaluations",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainError(f"{name} = {value}: expected more than 0")
        for name in ("warmup", "label_smoothing", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"{name} = {getattr(self, name)}: expected a share from 0 to below 1")
        if self.steps is not None and self.steps < 0:
            raise TrainError(f"steps = {self.steps}: expected 0 or more")
        return self


@dataclass(frozen=True)
class SftResult:
    """What came out.

    Attributes:
        model: Model directory, the adapter merged in.
        adapter: the adapter alone, None when all weights were trained.
        method: how it was trained.
        steps: steps of the weights that were kept; give it as `SftParams.steps` to refit on more rows.
        schedule: steps of the whole schedule; give it too when refitting.
        best_dev: cross-entropy on dev of the kept weights, in nats per learnt token.
        bits_per_byte: the same per byte of text, comparable across tokenizers.
        history: every score on dev.
        tokens: that went through the model in training.
        tokens_per_second: of training alone.
        left_out: rows that were too long.
        learning_rate: peak.
        seconds: of everything.
        interrupted: stopped by Ctrl-C before its end.
    """

    model: Path
    adapter: Path | None
    method: str
    steps: int
    schedule: int
    best_dev: float | None
    bits_per_byte: float | None
    history: tuple[Point, ...]
    tokens: int
    tokens_per_second: float
    left_out: tuple[str, ...]
    learning_rate: float
    seconds: float
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, for a stage's record; paths are left to the caller."""
        data = {k: v for k, v in asdict(self).items() if k not in ("model", "adapter")}
        return {**data, "history": [asdict(point) for point in self.history], "left_out": list(self.left_out)}


def finetune_chats(
    base: Path,
    train: Sequence[Chat],
    dev: Sequence[Chat] | None,
    *,
    params: SftParams,
    out: Path,
    where: Sequence[str] | None = None,
) -> Work[SftResult]:
    """Train on `train`, choose on `dev`, write the Model directory `out` (and `out`/adapter when there is one).

    Run again after a kill with the same arguments, it goes on from its last checkpoint (beside `out`) to the same
    weights. Ctrl-C keeps the best so far. Inside `distributed.joined`, every process takes its share.

    Args:
        base: Model directory or base in Hugging Face layout, a decoder or an encoder-decoder.
        train: conversations with their answers.
        dev: the same, never trained on; None trains `params.steps` steps.
        params: how.
        out: folder to write.
        where: ``file:line`` of each row of train, for messages.

    Raises:
        TrainError: rows that cannot be learnt, a method that this machine cannot run, or a loss that diverges.
        BaseModelError: the base cannot be loaded.
    """
    params = params.checked()
    if not train:
        raise TrainError("there are no rows to train on")
    with threads(params.threads):
        run = _Run(base, train, dev, params=params, out=out, where=where)
        return (yield from run.run())


class _Run:
    """One fine-tuning, from base to Model directory."""

    def __init__(
        self,
        base: Path,
        train: Sequence[Chat],
        dev: Sequence[Chat] | None,
        *,
        params: SftParams,
        out: Path,
        where: Sequence[str] | None,
    ) -> None:
        self.begun = time.monotonic()
        self.params, self.out, self.base = params, out, base
        setting = Setting(params.method, params.rank, params.alpha, params.lora_dropout, params.label_smoothing,
                          params.packing, params.device, params.seed)  # fmt: skip
        self.learner = open_learner(base, setting)
        writer = self.learner.writer
        most = min(params.max_tokens or writer.context_tokens, writer.context_tokens)
        self.rows = rows_of(writer, train, long=params.long, max_tokens=most, where=where)
        if not self.rows.samples:
            raise TrainError("no row is left to train on: all are too long")
        scored = None if dev is None or params.steps is not None else dev
        self.dev = None if scored is None else rows_of(writer, scored, long="leave_out", max_tokens=most)
        if self.dev is not None and not self.dev.samples:
            raise TrainError("no row of dev is left to choose on")
        self._set_up()

    def _set_up(self) -> None:
        params, learner = self.params, self.learner
        samples = self.rows.samples
        mean = sum(sample.n_tokens for sample in samples) / len(samples)
        self.new = is_new(self.base)
        self.batch_size = params.batch_size or default_rows_a_step(len(samples), mean, new=self.new)
        self.rate = params.learning_rate or default_rate(
            learner.writer.spec.parameters, method=learner.method, new=self.new
        )
        longest = max(params.batch_tokens, *(sample.n_tokens for sample in samples))
        on = params.checkpointing == "on"
        if params.checkpointing == "auto":
            on = needs_checkpointing(learner, tokens=longest)
        learner.checkpointing(on)
        if params.dropout is not None:
            learner.set_dropout(params.dropout)
        self.recomputes = on
        self.per_epoch = -(-len(samples) // self.batch_size)
        self.batches = lru_cache(maxsize=1)(self._epoch)
        self.tokens = 0
        self.trained_seconds = 0.0

    def run(self) -> Work[SftResult]:
        learner = self.learner
        yield Started("sft")
        yield from self._notes()
        loop = self._loop()
        try:
            state = yield from changed(loop.run(), self._event)
        except GeneratorExit:
            self._finish()  # closed half-way: what was best is not lost
            raise
        adapter = self._finish()
        if not loop.interrupted and world().writes:
            loop.forget()
        seconds = time.monotonic() - self.begun
        yield Finished("sft", seconds)
        history = tuple(replace(point, dev=-point.dev) for point in state.history)
        best = None if state.best_dev is None else -state.best_dev
        return SftResult(
            model=self.out,
            adapter=adapter,
            method=learner.method,
            steps=state.step if self.dev is None else state.best_step,
            schedule=loop.plan.total,
            best_dev=best,
            bits_per_byte=None if best is None else self._bits_per_byte(best),
            history=history,
            tokens=self.tokens,
            tokens_per_second=self.tokens / self.trained_seconds if self.trained_seconds else 0.0,
            left_out=self.rows.left_out,
            learning_rate=self.rate,
            seconds=seconds,
            interrupted=loop.interrupted,
        )

    def _notes(self) -> list[Note]:
        notes = []
        if self.rows.left_out:
            notes.append(Note(f"{len(self.rows.left_out)} rows are too long and left out: "
                              + "; ".join(self.rows.left_out), "warning"))  # fmt: skip
        if self.dev is not None and self.dev.left_out:
            notes.append(Note(f"{len(self.dev.left_out)} rows of dev are too long and not scored", "warning"))
        if self.rows.blurred:
            notes.append(
                Note(
                    f"in {self.rows.blurred} of {len(self.rows.samples)} rows the first token of an answer also holds "
                    "the end of the prompt; an engine never reads it so",
                    "warning",
                )
            )
        return notes

    def _loop(self) -> Loop:
        params, place = self.params, world()
        stop = params.steps
        if stop is None:
            passes = params.epochs or default_epochs(len(self.rows.samples), new=self.new)
            stop = max(1, round(self.per_epoch * passes))
        plan = Plan(
            stage="sft",
            total=stop if params.schedule is None else params.schedule,
            stop=stop,
            warmup=params.warmup,
            every=None if self.dev is None else max(1, self.per_epoch // params.evaluations),
            patience=params.patience,
            seed=params.seed,
            checkpoint=self.out.with_name(f"{self.out.name}.checkpoint"),
            checkpoint_seconds=params.checkpoint_seconds if place.writes else float("inf"),
            key=self._key(),
            shape=params.shape,
        )
        optimizer = torch.optim.AdamW(
            self._groups(), lr=self.rate, betas=(0.9, 0.98 if self.new else 0.999), fused=True
        )
        score = None if self.dev is None else self._score
        return Loop(self.learner.model, optimizer, loss_of=self._step, score=score, plan=plan)

    def _groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.learner.model.parameters() if p.requires_grad]
        split = [
            ([p for p in trained if p.ndim > 1], self.params.weight_decay),
            ([p for p in trained if p.ndim < 2], 0.0),
        ]
        return [
            {"params": group, "lr": self.rate, "peak": self.rate, "weight_decay": decay}
            for group, decay in split
            if group
        ]

    def _epoch(self, number: int) -> list[list[int]]:
        """Return the rows of each step of an epoch: shuffled, of like length where padding would be wasted."""
        rng = np.random.default_rng((self.params.seed, number))
        order: list[int] = rng.permutation(len(self.rows.samples)).tolist()
        size = self.batch_size
        if self.learner.packed:
            return [order[i : i + size] for i in range(0, len(order), size)]
        samples, batches = self.rows.samples, []
        for start in range(0, len(order), size * 50):
            chunk = sorted(order[start : start + size * 50], key=lambda i: samples[i].n_tokens)
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _step(self, step: int) -> float:
        """Go forward and backward through the rows of `step`, part by part; return the mean loss of a learnt token."""
        began = time.monotonic()
        epoch, offset = divmod(step, self.per_epoch)
        rows = [self.rows.samples[i] for i in self.batches(epoch)[offset]]
        count = sum(row.n_learnt for row in rows)
        mine = world().share(sorted(rows, key=lambda row: row.n_tokens))
        value = 0.0
        for part in parts(mine, most_tokens=self.params.batch_tokens, packed=self.learner.packed):
            loss = self.learner.loss(part) / count
            loss.backward()
            value += float(loss.detach())
        sum_gradients(self.learner.model.parameters())
        self.tokens += sum(row.n_tokens for row in rows)
        self.trained_seconds += time.monotonic() - began
        return total([value])[0]

    def _score(self) -> float:
        """Return minus the cross-entropy of a learnt token of dev: the loop keeps what is highest."""
        assert self.dev is not None
        rows = sorted(self.dev.samples, key=lambda row: row.n_tokens)
        found = 0.0
        for part in parts(world().share(rows), most_tokens=self.params.batch_tokens, packed=self.learner.packed):
            found += float(self.learner.losses(part).double().sum())
        return -total([found])[0] / sum(row.n_learnt for row in rows)

    def _bits_per_byte(self, loss: float) -> float:
        assert self.dev is not None
        tokens, said = (sum(getattr(row, name) for row in self.dev.samples) for name in ("n_learnt", "said_bytes"))
        return float(loss * tokens / said / _LN2)

    def _event(self, event: Event) -> Event:
        if not isinstance(event, Progress):
            return event
        values = {k: -v if k in ("dev", "best_dev") else v for k, v in event.values.items()}
        if self.trained_seconds:
            values["tokens_per_second"] = self.tokens / self.trained_seconds
        return replace(event, values=values)

    def _finish(self) -> Path | None:
        return write_result(self.learner, self.base, self.out)

    def _key(self) -> str:
        free = {"checkpoint_seconds": 0.0}
        what = {
            "params": asdict(replace(self.params, **free)),  # type: ignore[arg-type]
            "base": model_digest(self.base),
            "train": self.rows.digest,
            "dev": None if self.dev is None else self.dev.digest,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "world": world().size,
            "device": self.learner.device.type,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
