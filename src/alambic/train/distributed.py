"""Data parallel training in several processes: each takes its share of a step's rows, gradients are added up.

The processes are started by `torchrun` or `accelerate launch`, which say who is who in the environment; `joined` reads
it once, at the edge of the program. A step is the same step whatever the number of processes: the same rows, the same
divisor, so the loss curve differs by rounding only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alambic.errors import TrainError

T = TypeVar("T")


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
        dist.init_process_group("nccl" if cuda else "gloo")
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
    dist.all_reduce(flat)
    for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(piece.view_as(grad))


def total(values: Sequence[float]) -> list[float]:
    """Return the sums over all processes."""
    if world().size == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flat = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(flat)
    summed: list[float] = flat.tolist()
    return summed


def wait() -> None:
    """Wait until every process is here."""
    if world().size > 1:
        dist.barrier()
