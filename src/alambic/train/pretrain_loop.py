"""Steps of a pre-training: read, backward part by part, clip, update, look, keep; killed at any moment, it goes on.

Everything a step does is a function of its number and of the weights, so on one machine a resumed run gives the same
losses to the last bit. Several processes take every n-th window of a step and add up their gradients; where the weights
are between two steps is the business of `pretrain_sharding`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from alambic.errors import TrainError
from alambic.events import Note, Progress, Work
from alambic.train.distributed import exchanging, total, wait, world
from alambic.train.pretrain_checkpoint import load_checkpoint, save_checkpoint
from alambic.train.pretrain_data import Ids, Windows
from alambic.train.pretrain_log import Log
from alambic.train.pretrain_optimiser import Optimisers
from alambic.train.pretrain_params import PretrainParams
from alambic.train.pretrain_score import Score
from alambic.train.pretrain_sharding import Replicated, Sharded
from alambic.train.schedule import factor

_SMOOTH = 0.98  # of the running mean and variance of the loss
_SPIKE = 6.0  # standard deviations above the mean
_LEAST = 0.15  # nats; a smaller rise is no spike
_SETTLED = 50  # steps before which nothing is called a spike


class Objective(Protocol):
    """What a model learns: `Causal` or `Masked`."""

    model: Any
    device: torch.device
    extra: int
    enter: Any

    def counted(self, windows: Ids, numbers: Sequence[int]) -> int:
        """Return how many tokens are predicted."""

    @property
    def multiplied(self) -> int:
        """Weights that a forward pass multiplies."""

    def loss(self, windows: Ids, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the summed loss and its cross-entropy."""

    def nats(self, windows: Ids, numbers: Sequence[int]) -> tuple[float, int]:
        """Return the summed cross-entropy of held-out windows and the tokens predicted."""


@dataclass(frozen=True)
class Pace:
    """What turns tokens and seconds into figures.

    Attributes:
        flops_a_token: of training.
        peak: operations a second of all devices together; None: unknown.
    """

    flops_a_token: float
    peak: float | None

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Return the share of the peak that is used."""
        return None if self.peak is None else self.flops_a_token * tokens_per_second / self.peak


@dataclass
class State:
    """Where the run is.

    Attributes:
        step: steps done.
        seconds: of steps, all sittings together; looking and keeping left out.
        cpu_seconds: of this process in those steps, which a busy machine does not stretch.
        mean: running mean of the loss, nats a token.
        variance: running variance of the loss.
        spikes: steps whose loss jumped.
        scores: [step, bits per byte] of every validation.
    """

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    mean: float | None = None
    variance: float = 0.0
    spikes: list[int] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)


class PretrainLoop:
    """Holds the objective, the optimisers and the state between two steps.

    Args:
        objective: model and loss.
        placed: its weights.
        optimisers: with a ``peak`` rate in each group.
        windows: of the whole training.
        params: how.
        steps: of the whole training.
        score: validation of a part of the held-out text, or None.
        pace: for figures.
        folder: of checkpoints.
        log: of everything.
        identity: of the run; a checkpoint of another is refused.
    """

    def __init__(
        self, objective: Objective, placed: Replicated | Sharded, optimisers: Optimisers, *, windows: Windows,
        params: PretrainParams, steps: int, score: Callable[[], Score | None], pace: Pace, folder: Path, log: Log,
        identity: dict[str, Any],
    ) -> None:  # fmt: skip
        self.objective, self.placed, self.optimisers, self.windows = objective, placed, optimisers, windows
        self.params, self.steps, self.score, self.pace = params, steps, score, pace
        self.folder, self.log = folder, log
        self.identity = json.loads(json.dumps(identity))
        self.state = State()
        self.last_score: Score | None = None
        self._updating = False
        self._saved_at = self._begun = time.monotonic()
        self.rows_at_once = params.rows_at_once(objective.device.type)

    @property
    def finished(self) -> bool:
        """Tell whether every step is done."""
        return self.state.step >= self.steps

    def run(self) -> Work[None]:
        """Train to the end, or to the end of the sitting; Ctrl-C keeps a checkpoint, unless weights are cut.

        Raises:
            TrainError: the loss is not a number, or the checkpoints are of another run.
        """
        yield from self._resume()
        try:
            yield from self._steps()
        except (KeyboardInterrupt, GeneratorExit):
            if not self._updating and not self.placed.in_step:
                self._save()
            raise
        self._save()

    def _steps(self) -> Work[None]:
        state, params = self.state, self.params
        every = max(1, (params.valid_every or self.steps * self._step_tokens // 10) // self._step_tokens)
        while not self.finished and not self._over():
            began, cpu = time.monotonic(), time.process_time()
            with exchanging():
                loss, norm = self._step(state.step)
            spent = time.monotonic() - began
            state.step += 1
            state.seconds += spent
            state.cpu_seconds += time.process_time() - cpu
            speed = self._step_tokens / spent
            yield from self._watch(loss)
            yield Progress("pretrain", state.step, self.steps, self._values(loss, norm, speed), self._left(spent))
            if state.step % every == 0 and not self.finished:
                yield from self._judge()
            self._save_if_due()

    def _step(self, step: int) -> tuple[float, float]:
        """Do one step; return its cross-entropy in nats a token and the norm of its gradient."""
        params, objective = self.params, self.objective
        share = self._share(step)
        for group in self.optimisers.param_groups:
            group["lr"] = group["peak"] * share
        first, rows = step * params.rows, self.windows.read(step * params.rows, params.rows)
        numbers = range(first, first + params.rows)
        divisor = objective.counted(rows, numbers)
        plain = torch.zeros((), device=objective.device)
        for part in self._parts(params.rows):
            shown = part or [0]
            loss, entropy = self.placed.run(objective.loss, rows[shown], [numbers[i] for i in shown])
            (loss / divisor if part else loss * 0.0).backward()
            if part:
                plain += entropy
        norm = self.placed.clip(params.clip)
        (value,) = total([float(plain) / divisor])
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.log.add("diverged", step=step + 1, loss=value, gradient_norm=norm)
            raise TrainError(
                f"pretrain: the loss is {value}, the norm of its gradient {norm}, at step {step + 1} of {self.steps}",
                hint="lower train.learning_rate (and muon_rate), or raise warmup",
            )
        self._updating = True
        self.optimisers.step()
        self.optimisers.zero_grad()
        self._updating = False
        self.log.add("step", step=step + 1, tokens=(step + 1) * self._step_tokens, loss=value, gradient_norm=norm,
                     rate_share=share, seconds=round(self.state.seconds, 3),
                     cpu_seconds=round(self.state.cpu_seconds, 3))  # fmt: skip
        return value, norm

    def _share(self, step: int) -> float:
        params = self.params
        return factor(step, total=self.steps, warmup=params.warmup, shape=params.schedule, decay=params.decay,
                      final=params.final_rate)  # fmt: skip

    def _parts(self, rows: int) -> Iterator[list[int]]:
        """Give the rows of a step that this process computes, as many at once as fit; none while others still do."""
        mine = world().share(range(rows))
        most = -(-rows // world().size) if self.placed.in_step else len(mine)
        for start in range(0, most, self.rows_at_once):
            yield mine[start : start + self.rows_at_once]

    @property
    def _step_tokens(self) -> int:
        return self.params.rows * self.params.context

    def _watch(self, loss: float) -> Work[None]:
        state = self.state
        mean = loss if state.mean is None else state.mean
        rise = loss - mean
        spiked = state.step > _SETTLED and rise > max(_LEAST, _SPIKE * math.sqrt(state.variance))
        if spiked:
            state.spikes.append(state.step)
            self.log.add("spike", step=state.step, loss=loss, mean=mean)
            yield Note(f"pretrain: the loss jumped to {loss:.3f} at step {state.step} (mean {mean:.3f})", "warning")
        state.mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
        state.variance = _SMOOTH * state.variance + (1 - _SMOOTH) * rise * rise

    def _judge(self) -> Work[None]:
        began = time.monotonic()
        found = self.score()
        if found is None:
            return
        self.last_score = found
        self.state.scores.append((self.state.step, found.bits_per_byte))
        speed = self.state.step * self._step_tokens / self.state.seconds
        used = self.pace.utilisation(speed)
        self.log.add("valid", step=self.state.step, bits_per_byte=found.bits_per_byte,
                     sources={name: asdict(s) for name, s in found.sources.items()},
                     seconds=round(time.monotonic() - began, 3), tokens_per_second=round(speed, 1),
                     utilisation=used)  # fmt: skip
        share = "" if used is None else f", {used:.1%} of the peak"
        yield Note(f"pretrain: step {self.state.step} of {self.steps}: {found.bits_per_byte:.4f} bits per byte on "
                   f"held-out text; {speed:,.0f} tokens/s{share}")  # fmt: skip

    def _values(self, loss: float, norm: float, speed: float) -> dict[str, float]:
        values = {"loss": loss, "gradient_norm": norm, "tokens_per_second": speed}
        if (used := self.pace.utilisation(speed)) is not None:
            values["utilisation"] = used
        if self.state.scores:
            values["bits_per_byte"] = self.state.scores[-1][1]
        return values

    def _left(self, spent: float) -> float:
        mean = self.state.seconds / self.state.step if self.state.step else spent
        return mean * (self.steps - self.state.step)

    def _over(self) -> bool:
        """Tell whether the sitting is over; all processes agree."""
        minutes = self.params.sitting_minutes
        if minutes is None:
            return False
        return total([float(time.monotonic() - self._begun > 60 * minutes)])[0] > 0

    @property
    def _free_until(self) -> int:
        """Step up to which a run of another length would be the same, once both are warm."""
        if self.params.schedule == "wsd":
            return int(self.steps - self.steps * self.params.decay)
        return 0

    def _save_if_due(self) -> None:
        step, free = self.state.step, self._free_until
        if free and step == free and step < self.steps:
            self._save(stable=True)
        elif not self.finished and self._due():
            self._save()

    def _due(self) -> bool:
        """Tell whether it is time to save; where all processes do, all agree."""
        due = time.monotonic() - self._saved_at > 60 * self.params.checkpoint_minutes
        return total([float(due)])[0] > 0 if self.placed.in_step else due

    def _save(self, *, stable: bool = False) -> None:
        tensors = self.placed.tensors(self.optimisers) if self.state.step else {}
        if world().writes and self.state.step:
            state = {**asdict(self.state), "steps": self.steps, "free_until": self._free_until,
                     "identity": self.identity}  # fmt: skip
            save_checkpoint(self.folder, tensors, state, stable=stable)
            self.log.add("checkpoint", step=self.state.step)
        self._saved_at = time.monotonic()

    def _resume(self) -> Work[None]:
        found = load_checkpoint(self.folder, identity=self.identity, steps=self.steps)
        if found is None:
            self.log.rewind(0)
            return
        tensors, state = found
        self.placed.take(tensors, self.optimisers)
        known = {key: state[key] for key in State.__dataclass_fields__}
        self.state = State(**{**known, "scores": [(int(step), float(bits)) for step, bits in known["scores"]]})
        wait()
        self.log.rewind(self.state.step)
        self.log.add("resumed", step=self.state.step)
        yield Note(f"pretrain: goes on from step {self.state.step} of {self.steps}")
