"""Several tasks on one base in one server: adapters beside a shared base against merged models, memory and time.

A Llama shape of 45 million random weights in 8 bits stands for the base, adapters of rank 16 with random matrices for
what training leaves. Each set of bundles is opened by `alambic.serve.models.load` in a fresh process, which writes one
answer of each and tells its peak memory and how long 24 tokens take.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from run import HERE, TINY

MINUTES = 8
WHAT = "Memory and time of several tasks on one base: adapters beside it, and merged"
_TASKS = 3
_REPEATS = 8
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.serve.models import load
paths, repeats = [Path(p) for p in sys.argv[2:]], int(sys.argv[1])
times, first = [], []
with load(paths, threads=1) as models:
    for i in range(repeats):
        for name, model in models.items():
            ask = GenerationRequest(chat=Chat.of(f"word {i} of {name}"), sampling=Sampling(max_tokens=24))
            for again in range(2):
                reply = model.writer.write([ask])[0]
                if i:
                    (times if again else first).append(reply.timings.prompt_ms + reply.timings.generation_ms)
peak = [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")][0] * 1024 / 1e6
print(json.dumps({"peak_mb": peak, "same_ms": times, "switched_ms": first}))
"""


def run(store: Any) -> str:
    """Pack the bundles, open them together and alone, and tell what it takes."""
    rows = store.part("rows", _rows)
    lines = [
        "| bundles | on disk MB | peak memory MB | 24 tokens, same task as before ms | after another task ms | n |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['disk_mb']:.0f} | {row['peak_mb']:.0f} | {_spread(row['same_ms'])} | "
            f"{_spread(row['switched_ms'])} | {len(row['same_ms'])} |"
        )
    lines += [
        "",
        "Medians with quartiles; one thread. Files that bundles share by hard links are counted once on disk.",
    ]
    return "\n".join(lines)


def _spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.0f} [{low:.0f}, {high:.0f}]"


def _rows() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        beside, merged = _bundles(Path(folder))
        sets = {
            "1, merged": merged[:1],
            f"{_TASKS}, merged": merged,
            "1, adapter beside": beside[:1],
            f"{_TASKS}, adapters beside one base": beside,
        }
        return [{"what": what, "disk_mb": _disk_mb(paths), **_child(paths)} for what, paths in sets.items()]


def _child(paths: list[Path]) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, str(_REPEATS), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _disk_mb(paths: list[Path]) -> float:
    sizes = {}
    for path in paths:
        for file in path.rglob("*"):
            if file.is_file():
                status = file.stat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values()) / 1e6


def _bundles(folder: Path) -> tuple[list[Path], list[Path]]:
    """Make a base, adapters, and for each a bundle with the adapter beside and one with it merged."""
    from alambic.events import drain
    from alambic.model.adapter import merge_adapter
    from alambic.pack.writer_openvino import pack_openvino

    sys.path.insert(0, str(HERE.parent / "tests"))
    from adapted_model import beside_bundle, make_adapter
    from genai_model import make_model

    shape = {"layers": 2, "hidden": 64} if TINY else {"layers": 12, "hidden": 640}
    plain, _ = make_model(folder / "base", **shape)
    part = drain(pack_openvino(plain, folder / "packed", precision="int8"))
    beside, merged = [], []
    for seed in range(_TASKS):
        adapter = make_adapter(plain, folder / f"adapter{seed}", seed=seed, rank=16)
        name = f"task{seed}"
        base = (plain, folder / "packed")
        beside.append(beside_bundle(folder / "beside" / name, name, base, adapter, params=part.params).path)
        whole = merge_adapter(adapter, plain, folder / "whole" / name)
        made = drain(pack_openvino(whole, folder / "repacked" / name, precision="int8"))
        own = (plain, folder / "repacked" / name)
        merged.append(beside_bundle(folder / "merged" / name, name, own, None, params=made.params, shares=False).path)
    return beside, merged
