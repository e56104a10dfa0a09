"""What a build gives back, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BuildResult:
    """What a build gave.

    Attributes:
        bundle: folder of the sealed bundle.
        report: the page, one HTML file.
        chosen: name of the chosen candidate.
        candidates: figures of each candidate on the rows that decide.
        budget: whether the final bundle meets it on test, limit by limit.
        sentences: the outcome in words.
        sample: a text to try.
        seconds: wall time of this build.
        ran: whether there was anything to do; False when nothing changed since the last build.
    """

    bundle: Path
    report: Path
    chosen: str
    candidates: tuple[dict[str, Any], ...]
    budget: dict[str, Any]
    sentences: tuple[str, ...]
    sample: str
    seconds: float
    ran: bool

    @property
    def met(self) -> bool:
        """Whether the final bundle meets the budget, on test."""
        return bool(self.budget["met"])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON that `alambic build --json` ends with."""
        return {
            "bundle": str(self.bundle),
            "report": str(self.report),
            "chosen": self.chosen,
            "candidates": list(self.candidates),
            "budget": self.budget,
            "sentences": list(self.sentences),
            "seconds": round(self.seconds, 2),
            "ran": self.ran,
        }
