"""Events on a terminal: bars on a TTY, one plain line per stage elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from alambic.events import Event, Finished, Note, Progress, Skipped, Started

_WORTH_A_LINE = 0.5  # seconds


def duration(seconds: float) -> str:
    """Write a duration as a person would: 0.8 s, 42 s, 3 min 05 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


@contextmanager
def shown(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Callable[[Event], None]]:
    """Give a listener that shows events on stderr until the block ends."""
    out = stream if stream is not None else sys.stderr
    if quiet:
        yield lambda event: None
        return
    lines = _Lines(out)
    try:
        yield lines.on_event
    finally:
        lines.clear()
        if lines.kept:
            kept = len(lines.kept)
            out.write(f"  {kept} stage{'s' if kept > 1 else ''} kept from an earlier run\n")


class _Lines:
    """One status line that is rewritten on a terminal, and kept lines above it."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.live = out.isatty()
        self.ran: set[str] = set()
        self.kept: set[str] = set()

    def on_event(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Progress):
            if self.live:
                self._status(_progress(event))
        elif isinstance(event, Started):
            self.ran.add(event.stage)
            if self.live:
                self._status(f"  {event.stage} ...")
        elif isinstance(event, Finished):
            if event.seconds >= _WORTH_A_LINE:
                self._keep(f"  {event.stage:<28} {duration(event.seconds):>12}")
        elif isinstance(event, Skipped):
            if event.stage not in self.ran:
                self.kept.add(event.stage)
        elif isinstance(event, Note):
            self._keep(("warning: " if event.level == "warning" else "") + event.message)

    def clear(self) -> None:
        """Remove the status line."""
        if self.live:
            self.out.write("\r\x1b[2K")
            self.out.flush()

    def _status(self, text: str) -> None:
        self.out.write("\r\x1b[2K" + text[:118])
        self.out.flush()

    def _keep(self, text: str) -> None:
        self.clear()
        self.out.write(text + "\n")
        self.out.flush()


def _progress(event: Progress) -> str:
    values = "  ".join(f"{name} {value:.4g}" for name, value in event.values.items())
    left = "" if event.seconds_left is None else f"  {duration(event.seconds_left)} left"
    if event.total <= 0:
        return f"  {event.stage} {event.done:,}  {values}{left}"
    filled = round(20 * event.done / event.total)
    return f"  {event.stage} [{'#' * filled}{'.' * (20 - filled)}] {event.done}/{event.total}  {values}{left}"
