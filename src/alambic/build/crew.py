"""One build in several processes: the first one builds, the others take their share of its trainings.

    torchrun --nproc-per-node 2 -m alambic build task.toml

Only the first process reads the task, holds the run folder, writes, prints, packs and measures. The others wait for
its orders: a training and everything it is called with. Alone, nothing of this imports torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from alambic._registry import Registry
from alambic.errors import AlambicError, ProcessLost
from alambic.events import Work, drain

if TYPE_CHECKING:
    from alambic.train.distributed import Orders

TRAININGS = Registry(
    "training",
    {
        "sft": "alambic.train.sft:finetune_chats",
        "dpo": "alambic.train.dpo:prefer_chats",
        "pretrain": "alambic.train.pretrain:pretrain",
    },
)
# What launchers name the number of processes.
_SIZE = "WORLD_SIZE"
_LAUNCHER_SECONDS = 5.0
_orders: Orders | None = None


def processes() -> int:
    """Return how many processes the environment says this build has."""
    value = os.environ.get(_SIZE, "1")
    return int(value) if value.isdecimal() else 1


@contextmanager
def crew() -> Iterator[bool]:
    """Meet the other processes of this build, if any, and tell whether this one leads.

    For every process but the first the block begins when the build has ended.

    Raises:
        TrainError: the others cannot be met.
        ProcessLost: one of them has ended.
        AlambicError: a training failed in this process; in the first one, any error of the block.
    """
    global _orders
    if processes() < 2:
        yield True
        return
    from alambic.train.distributed import Orders, joined

    with joined() as place:
        orders = Orders()
        if not place.writes:
            _follow(orders)
            yield False
            return
        _orders = orders
        with _stopped_by_launcher():
            try:
                yield True
            finally:
                _orders = None
        orders.give(None)


def shared(name: str, *args: Any, **options: Any) -> Work[Any]:
    """Run the training `name` of `TRAININGS` with the arguments given, in all processes of this build."""
    if _orders is not None:
        _orders.give((name, args, options))
    result = yield from TRAININGS.get(name)(*args, **options)
    return result


def _follow(orders: Orders) -> None:
    """Take part in each training that the first process begins, until it says that the build has ended."""
    try:
        while (order := orders.take()) is not None:
            name, args, options = order
            drain(TRAININGS.get(name)(*args, **options))
    except AlambicError:
        # The first process fails for the same reason, or has ended: it speaks, and the launcher ends this one.
        time.sleep(_LAUNCHER_SECONDS)
        raise


@contextmanager
def _stopped_by_launcher() -> Iterator[None]:
    """Say what happened when the launcher ends this process because another one has ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise ProcessLost(
            "this build was told to end (SIGTERM), as a launcher does when another of its processes has ended",
            hint="run the same command again: finished stages are kept, and a training goes on from its checkpoint",
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what went wrong is still to be said
        raise
    signal.signal(signal.SIGTERM, before)
