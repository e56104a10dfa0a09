"""The log of a pre-training: one JSON object a line, one line a fact, in the order of steps.

Killed and resumed, a run does again what came after its checkpoint: those lines are removed first, so that the log of
an interrupted run reads as that of one that was not, but for times and the lines that say where it was resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Log:
    """Appends to `path`; nothing is written when `writes` is false (another process does)."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def rewind(self, step: int) -> None:
        """Remove what was written after `step`, and a last line cut short."""
        if not self.writes or not self.path.exists():
            return
        kept = [json.dumps(line, ensure_ascii=False) for line in self.read() if line.get("step", 0) <= step]
        beside = self.path.with_name(f".{self.path.name}.partial")
        beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(beside, self.path)

    def add(self, kind: str, **facts: Any) -> None:
        """Write one line."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", newline="\n") as out:
                out.write(json.dumps({"kind": kind, **facts}, ensure_ascii=False) + "\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """Give the lines; one cut short by a kill is left out."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)
