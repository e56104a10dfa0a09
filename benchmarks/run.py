"""Run the benchmarks: `python benchmarks/run.py` lists them, `python benchmarks/run.py NAME` runs one.

Each is a file of this folder with MINUTES, WHAT and `run(store)`. Results of finished parts are kept in
.bench/NAME/, so an interrupted benchmark goes on from there; --fresh starts again. The table is printed and written to
docs/benchmarks/NAME.md.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TINY = bool(os.environ.get("ALAMBIC_BENCH_TINY"))  # tries a benchmark out; what it finds is printed and not kept
NAMES = ("quality", "latency", "training", "startup", "multi30k", "lora_step", "families", "serving", "shared_base",
         "writing", "extract", "pretrain", "own_base", "decoder_speed", "encoder", "labelling", "audit", "calibration",
         "abstain", "distil", "cascade")  # fmt: skip


class Store:
    """Finished parts of one benchmark, one JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the kept result of part `name`, or run `work` and keep what it returns."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))["result"]
        began = time.perf_counter()
        say(f"{name} ...")
        result = work()
        seconds = time.perf_counter() - began
        path.with_suffix(".tmp").write_text(json.dumps({"result": result, "seconds": seconds}), "utf-8")
        path.with_suffix(".tmp").replace(path)
        say(f"{name}: {seconds:.0f} s")
        return result


def say(text: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def data_folder() -> Path:
    """Return the folder of public data sets, or stop with what to do."""
    folder = Path(os.environ.get("ALAMBIC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        sys.exit(
            "this benchmark needs public data sets: set ALAMBIC_SHARED_DATA to their folder (benchmarks/README.md)"
        )
    return folder


def main() -> None:
    """Parse, announce, run, write."""
    sys.path.insert(0, str(HERE))
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    if not names:
        for name in NAMES:
            module = importlib.import_module(name)
            print(f"{name:<10} about {module.MINUTES:>3} min on 2 cores  {module.WHAT}")
        return
    if len(names) > 1:  # one process each: what one has loaded must not weigh on the next
        options = [option for option in sys.argv[1:] if option.startswith("-")]
        sys.exit(max(subprocess.call([sys.executable, __file__, name, *options]) for name in names))
    for name in names:
        if name not in NAMES:
            sys.exit(f"no benchmark {name!r}; known: {', '.join(NAMES)}")
        module = importlib.import_module(name)
        folder = ROOT / ".bench" / (f"{name}-tiny" if TINY else name)
        if "--fresh" in sys.argv:
            shutil.rmtree(folder, ignore_errors=True)
        say(f"{name}: about {module.MINUTES} minutes on 2 cores; interrupt and rerun as you like")
        text = _page(name, module, module.run(Store(folder)))
        if not TINY:
            out = ROOT / "docs" / "benchmarks" / f"{name}.md"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, "utf-8")
        print(text)


def _page(name: str, module: Any, table: str) -> str:
    from alambic.measure.machine import fingerprint

    machine = fingerprint()
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    lines = [
        f"# Benchmark: {name}",
        "",
        f"{module.WHAT}.",
        "",
        f"`make bench B={name}`",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}), {machine['os']}; "
        f"Python {machine['python']}; {versions}.",
        "",
        table,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
