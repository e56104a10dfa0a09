"""Size on disk and peak memory of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alambic.measure import probe


@dataclass(frozen=True)
class Memory:
    """Largest resident memory of a fresh process that predicts real texts.

    Attributes:
        peak_ram_mb: in MB (10^6 bytes); None where the system does not tell.
        source: ``VmHWM`` (Linux), ``ru_maxrss``, ``PeakWorkingSetSize``, or ``unavailable``.
        n: texts predicted, one at a time.
    """

    peak_ram_mb: float | None
    source: str
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def measure_peak_ram(
    bundle: str, texts: Sequence[str], *, threads: int | None = None, command: Sequence[str] = probe.COMMAND
) -> Memory:
    """Open the bundle and predict `texts` one by one in a fresh process.

    Raises:
        EngineError: the process failed; its own message is given.
    """
    result = probe.run(probe.Request(bundle, tuple(texts), threads=threads), command=command)
    return Memory(result.peak_ram_mb, result.ram_source, result.n)


def size_mb(path: Path) -> float:
    """Return the size of a file, or of all files under a folder, in MB (10^6 bytes)."""
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(item.stat().st_size for item in files) / 1e6
