"""What long work tells its caller while it runs.

Long work is a generator that yields events and returns a value:

    def finetune(...) -> Work[Model]:
        yield Progress("finetune", done=1, total=100)
        return model

Callers inside the library pass events on with ``value = yield from finetune(...)``; a program at the edge (the command
line, a notebook) uses `drain`. Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True)
class Started:
    """A stage begins; `seconds` is its predicted duration when one is known."""

    stage: str
    seconds: float | None = None


@dataclass(frozen=True)
class Skipped:
    """A stage was already done with the same inputs, and is taken from the run folder."""

    stage: str


@dataclass(frozen=True)
class Finished:
    """A stage ended after `seconds`."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class Progress:
    """A stage advanced to `done` of `total` units; `values` holds losses and scores, `seconds_left` the estimate."""

    stage: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)
    seconds_left: float | None = None


@dataclass(frozen=True)
class Note:
    """Something the user should know; `level` is ``info`` or ``warning``."""

    message: str
    level: str = "info"


Event = Started | Skipped | Finished | Progress | Note
T = TypeVar("T")
Work = Generator[Event, None, T]


def drain(work: Work[T], on_event: Callable[[Event], None] | None = None) -> T:
    """Run `work` to its end, hand each event to `on_event`, and return what it returns."""
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            value: T = stop.value
            return value
        if on_event is not None:
            on_event(event)
