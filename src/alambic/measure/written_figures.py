"""The scores of written answers as shares with intervals: what a build keeps, chooses by, shows and seals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alambic.measure.metrics import Interval
from alambic.measure.text import TextScore
from alambic.measure.written import Written, WrittenRow


@dataclass(frozen=True)
class WrittenFigures:
    """Everything a report shows of the answers of one model on one set of rows.

    Attributes:
        split: which rows these are: ``dev``, ``test``, or a file's name.
        n: number of rows.
        scores: interval of each metric, as shares 0..1; the first decides.
        signatures: how each metric was computed.
        endings: how many answers ended how.
        worst: the answers with the lowest score by the first metric, lowest first.
        row_scores: the first metric row by row, for paired tests.
    """

    split: str
    n: int
    scores: dict[str, Interval]
    signatures: dict[str, str]
    endings: dict[str, int]
    worst: tuple[WrittenRow, ...]
    row_scores: tuple[float, ...]

    @classmethod
    def of(cls, written: Written) -> WrittenFigures:
        """Keep what is shown of `written`."""
        return cls(
            split=written.split,
            n=written.n,
            scores={name: share(score) for name, score in written.scores.items()},
            signatures={name: score.signature for name, score in written.scores.items()},
            endings=written.endings,
            worst=written.worst,
            row_scores=tuple(float(value) for value in written.row_scores),
        )

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Return the figures, ready for JSON; with `rows`, the worst answers and the scores of each row too."""
        figures: dict[str, Any] = {
            "split": self.split,
            "n": self.n,
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "signatures": self.signatures,
            "endings": self.endings,
        }
        return (
            {**figures, "worst": [vars(row) for row in self.worst], "row_scores": self.row_scores} if rows else figures
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> WrittenFigures:
        """Read back `to_dict(rows=True)`, also after a trip through JSON."""
        rows: Sequence[dict[str, Any]] = data["worst"]
        return cls(
            split=data["split"],
            n=data["n"],
            scores={name: Interval(**score) for name, score in data["scores"].items()},
            signatures=dict(data["signatures"]),
            endings=dict(data["endings"]),
            worst=tuple(WrittenRow(**row) for row in rows),
            row_scores=tuple(data["row_scores"]),
        )


def share(score: TextScore) -> Interval:
    """Return a score as a share 0..1: budgets and tables know one scale, whatever the metric's own (BLEU: 0 to 100)."""
    scale, own = score.high, score.interval
    return Interval(
        own.value / scale, own.low / scale, own.high / scale, own.n, own.level, own.low_90 / scale, own.high_90 / scale
    )
