"""Whole-process times of the command line, and the memory of a predicting process."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MINUTES = 3
WHAT = "Whole-process wall time of `alambic -h` and of `alambic predict` of one text (warm cache), and peak memory"
_RUNS = 15


def run(store: Any) -> str:
    """Build a small bundle of each engine and time the command line on it."""
    rows = store.part("times", _times)
    lines = ["| command | median s | least | most | n | peak memory MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = " | ".join(f"{row[key]:.3f}" for key in ("median", "least", "most"))
        lines.append(f"| `{row['what']}` | {times} | {row['n']} | {row['mb']:.0f} |")
    return "\n".join(lines)


def _times() -> list[dict[str, Any]]:
    alambic = str(Path(sys.executable).with_name("alambic"))
    rows = [_time("alambic -h", [alambic, "-h"])]
    for name, bundle in _bundles().items():
        rows.append(
            _time(f"alambic predict ({name})", [alambic, "predict", str(bundle), "My card has not arrived yet"])
        )
    return rows


def _bundles() -> dict[str, Path]:
    found = {"the demo's bundle": Path("runs/field-service/bundle")}
    for folder in sorted(Path(".bench/quality").glob("banking77-0-*.bundle")):
        found[f"BANKING77 {folder.name.split('-')[-1].removesuffix('.bundle')}"] = folder
    present = {name: path.resolve() for name, path in found.items() if path.is_dir()}
    if not present:
        sys.exit("no bundle to start: run make demo, or make bench B=quality, first")
    return present


def _time(what: str, command: list[str]) -> dict[str, Any]:
    times, peak = [], 0.0
    with tempfile.TemporaryFile() as out:
        for i in range(_RUNS + 2):
            began = time.perf_counter()
            child = subprocess.Popen(command, stdout=out, stderr=out)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - began
            if child.returncode != 0:
                raise SystemExit(f"{' '.join(command)}: exit {child.returncode}")
            if i >= 2:  # the first two warm the file and compilation caches
                times.append(seconds)
                peak = max(peak, _mb(usage))
    return {
        "what": what,
        "median": statistics.median(times),
        "least": min(times),
        "most": max(times),
        "n": len(times),
        "mb": peak,
    }


def _mb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
