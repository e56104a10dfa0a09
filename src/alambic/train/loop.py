"""The training loop: one generator that steps, scores on dev, keeps the best, and survives kill -9."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alambic.errors import TrainError, WorkspaceError
from alambic.events import Event, Note, Progress, Work
from alambic.train.schedule import Shape, factor, set_rates

_NORM = 1.0  # gradients are clipped to this length


@dataclass(frozen=True)
class Point:
    """One score on dev; `seconds` of training until then, the time taken by scoring left out."""

    step: int
    dev: float
    loss: float
    seconds: float


@dataclass
class State:
    """Where a loop is; what a checkpoint holds besides the weights."""

    step: int = 0
    best_step: int = 0
    best_dev: float | None = None
    seconds: float = 0.0
    running_loss: float | None = None
    history: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        stage: name in events.
        total: steps of the whole schedule.
        stop: steps to run, fewer than `total` when the schedule was found to be best left before its end.
        warmup: share of `total` spent rising.
        every: steps between two scores on dev; None never scores.
        patience: scores without progress before stopping.
        seed: random choices of step n depend on (seed, n) only, so a resumed run repeats them.
        checkpoint: folder of the checkpoint, or None.
        checkpoint_seconds: time between two checkpoints.
        key: a checkpoint of another key is ignored.
        shape: of the rate after its warm-up.
    """

    stage: str
    total: int
    stop: int
    warmup: float
    every: int | None
    patience: int
    seed: int
    checkpoint: Path | None
    checkpoint_seconds: float
    key: str
    shape: Shape = "linear"


class Loop:
    """Holds the model, the optimizer and the state between two steps.

    Args:
        model: what is trained; only weights that require a gradient are kept and saved.
        optimizer: with a ``peak`` rate in each group.
        loss_of: step number to loss; batches are a function of the step. A number instead of a tensor says that the
            gradients are there already: a large batch goes backward part by part.
        score: dev score, or None in a run of a fixed number of steps.
        plan: what to run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss_of: Callable[[int], Tensor | float],
        score: Callable[[], float] | None,
        plan: Plan,
    ) -> None:
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.loss_of, self.score = loss_of, score
        self.state = State()
        self.best: dict[str, Tensor] = {}
        self.interrupted = False
        self._saved_at = time.monotonic()

    def run(self) -> Work[State]:
        """Train to the end of the plan, or until dev stops rising; the best weights are then in the model.

        Ctrl-C ends the loop with the best so far; closing the generator leaves the best in the model too.

        Raises:
            TrainError: the loss is not a number any more.
        """
        self._resume()
        try:
            if self.score is not None and self.state.best_dev is None:
                self._judge(self.score, loss=0.0)  # the fitted head is the score to beat
            yield from self._steps()
        except KeyboardInterrupt:
            self.interrupted = True
            self._restore()
            yield Note(f"{self.plan.stage}: stopped at step {self.state.step}, the best so far is kept", "warning")
        except GeneratorExit:
            self.interrupted = True
            self._restore()
            raise
        self._restore()
        return self.state

    def forget(self) -> None:
        """Remove the checkpoint: the result is safely written."""
        if self.plan.checkpoint is not None:
            shutil.rmtree(self.plan.checkpoint, ignore_errors=True)
            shutil.rmtree(_partial(self.plan.checkpoint), ignore_errors=True)

    def _steps(self) -> Work[None]:
        plan, state = self.plan, self.state
        begun, before = time.monotonic(), state.step
        while state.step < plan.stop and not self._stalled():
            started = time.monotonic()
            loss = self._step(state.step)
            state.step += 1
            state.seconds += time.monotonic() - started
            state.running_loss = loss if state.running_loss is None else 0.95 * state.running_loss + 0.05 * loss
            if self.score is not None and plan.every and (state.step % plan.every == 0 or state.step == plan.stop):
                self._judge(self.score, loss=state.running_loss)
            self._checkpoint_if_due()
            pace = (time.monotonic() - begun) / (state.step - before)
            yield Progress(plan.stage, state.step, plan.stop, self._values(), pace * (plan.stop - state.step))

    def _step(self, step: int) -> float:
        torch.manual_seed(self.plan.seed * 1_000_003 + step)
        self.model.train()
        set_rates(self.optimizer, factor(step, total=self.plan.total, warmup=self.plan.warmup, shape=self.plan.shape))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(step)
        value = loss if isinstance(loss, float) else float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise TrainError(
                f"{self.plan.stage}: the loss is {value} at step {step + 1} of {self.plan.total}",
                hint="lower learning_rate in the candidate's recipe",
            )
        if isinstance(loss, Tensor):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained().values(), _NORM)
        self.optimizer.step()
        return value

    def _judge(self, score: Callable[[], float], *, loss: float) -> None:
        self.model.eval()
        with torch.no_grad():
            dev = score()
        state = self.state
        state.history.append(Point(state.step, dev, loss, state.seconds))
        if state.best_dev is None or dev >= state.best_dev:  # of equals the later, trained at a lower rate
            state.best_dev, state.best_step = dev, state.step
            self.best = {name: p.detach().clone() for name, p in self._trained().items()}

    def _stalled(self) -> bool:
        since = [point for point in self.state.history if point.step > self.state.best_step]
        return len(since) >= self.plan.patience > 0

    def _restore(self) -> None:
        self.model.eval()
        if self.best:
            with torch.no_grad():
                for name, parameter in self._trained().items():
                    parameter.copy_(self.best[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _values(self) -> dict[str, float]:
        values = {"loss": self.state.running_loss or 0.0}
        if self.state.history:
            values |= {"dev": self.state.history[-1].dev, "best_dev": self.state.best_dev or 0.0}
        return values

    def _checkpoint_if_due(self) -> None:
        if self.plan.checkpoint is None or time.monotonic() - self._saved_at < self.plan.checkpoint_seconds:
            return
        save_checkpoint(self.plan.checkpoint, self)
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        if self.plan.checkpoint is not None:
            load_checkpoint(self.plan.checkpoint, self)


def save_checkpoint(folder: Path, loop: Loop) -> None:
    """Write the loop's weights, optimizer and state beside `folder`, then move them into place.

    Raises:
        WorkspaceError: the disk is full or the folder cannot be written.
    """
    beside = _partial(folder)
    tensors = {"model": {k: v.detach() for k, v in loop._trained().items()}, "best": loop.best,
               "optimizer": loop.optimizer.state_dict()}  # fmt: skip
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        torch.save(tensors, beside / "tensors.pt")
        # Last, so that a folder with a whole state.json is a whole checkpoint.
        (beside / "state.json").write_text(json.dumps({"key": loop.plan.key, **asdict(loop.state)}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    except (OSError, RuntimeError) as error:  # torch.save gives RuntimeError when the disk is full
        raise WorkspaceError(
            f"{folder}: the checkpoint cannot be written ({error})", hint="free some disk space, then run it again"
        ) from error


def load_checkpoint(folder: Path, loop: Loop) -> bool:
    """Continue from the checkpoint in `folder` when it belongs to this very run; tell whether it did."""
    for place in (folder, _partial(folder)):  # killed between the two last moves, the new one is still beside
        state = _read_state(place)
        if state is not None and state.pop("key", None) == loop.plan.key:
            break
    else:
        return False
    tensors = torch.load(place / "tensors.pt", weights_only=True)
    with torch.no_grad():
        for name, parameter in loop._trained().items():
            parameter.copy_(tensors["model"][name])
    loop.optimizer.load_state_dict(tensors["optimizer"])
    loop.best = tensors["best"]
    loop.state = State(**{**state, "history": [Point(**point) for point in state["history"]]})
    return True


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _read_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut short by a kill
        return None
    return state if isinstance(state, dict) else None


def changed(work: Work[State], change: Callable[[Event], Event]) -> Work[State]:
    """Pass the events of `work` on, each changed; what is thrown in goes to `work`."""
    try:
        event = next(work)
        while True:
            try:
                yield change(event)
            except GeneratorExit:
                work.close()
                raise
            except BaseException as error:
                event = work.throw(error)
            else:
                event = next(work)
    except StopIteration as stop:
        state: State = stop.value
        return state
