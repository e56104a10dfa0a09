"""Data parallel training in several processes: each takes its share of a step's rows, gradients are added up.

The processes are started by `torchrun` or `accelerate launch`, which say who is who in the environment; `joined` reads
it once, at the edge of the program. A step is the same step whatever the number of processes: the same rows, the same
divisor, so the loss curve differs by rounding only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alambic.errors import ProcessLost, TrainError

T = TypeVar("T")

# One process may write a large model, or take over from a checkpoint, while the others wait for the next step.
_PATIENCE = timedelta(hours=2)
_FOR_EVER = timedelta(days=365)  # between two trainings the first process packs and measures


@dataclass(frozen=True)
class World:
    """This process among `size`; the one of rank 0 writes files."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Tell whether this process writes what all have made."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return every `size`-th item from `rank` on."""
        return list(items[self.rank :: self.size])


def world() -> World:
    """Return the place of this process; alone unless inside `joined`."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def joined(environment: Mapping[str, str] | None = None) -> Iterator[World]:
    """Meet the other processes that `environment` (os.environ) names, and part at the end; alone when it names none.

    Raises:
        TrainError: they cannot be met.
    """
    names = os.environ if environment is None else environment
    if int(names.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield world()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(names.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise TrainError(
            f"the processes of this training cannot meet: {error}",
            hint="start them with torchrun --nproc-per-node N (or accelerate launch)",
        ) from error
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place, in one exchange."""
    if world().size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # this process had no row
            parameter.grad = torch.zeros_like(parameter)
    grads: list[Tensor] = [p.grad for p in trained if p.grad is not None]
    flat = torch.cat([grad.reshape(-1).float() for grad in grads])
    with _together():
        dist.all_reduce(flat)
    for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(piece.view_as(grad))


def total(values: Sequence[float]) -> list[float]:
    """Return the sums over all processes."""
    if world().size == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flat = torch.tensor(list(values), dtype=torch.float64, device=device)
    with _together():
        dist.all_reduce(flat)
    summed: list[float] = flat.tolist()
    return summed


def wait() -> None:
    """Wait until every process is here."""
    if world().size > 1:
        with _together():
            dist.barrier()


class Orders:
    """What the first process has the others do. Made by all of them at once, inside `joined`.

    Orders go through a group of their own on the CPU: they wait without a limit and without keeping a GPU busy.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_FOR_EVER)

    def give(self, order: Any) -> None:
        """Send `order`, any value that can be pickled, to the others; only the first process does."""
        with _together():
            dist.broadcast_object_list([order], src=0, group=self._group, device=torch.device("cpu"))

    def take(self) -> Any:
        """Wait for the next order and return it; every process but the first does."""
        box: list[Any] = [None]
        with _together():
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]


@contextmanager
def _together() -> Iterator[None]:
    """Turn the loss of another process into an error that says so."""
    try:
        yield
    except RuntimeError as error:  # dist.DistBackendError too
        raise _lost(error) from error


@contextmanager
def exchanging() -> Iterator[None]:
    """Say the same of a block that computes too, where only what comes from the exchange means a lost process."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise _lost(error) from error
        raise


def _lost(error: Exception) -> ProcessLost:
    place = world()
    return ProcessLost(
        f"process {place.rank + 1} of {place.size}: another process of this build has ended ({_first_line(error)})",
        hint="run the same command again: it goes on from the last checkpoint",
    )


def _first_line(error: Exception) -> str:
    """Return what happened, without the place in the library's source and without its advice."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"^\[\S+\]\s*", "", line).partition(". ")[0].strip()
