"""The machine that a figure comes from: processor, memory, system, versions, and one digest of them all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# Instruction sets that decide which kernels an engine runs: spellings of Linux (x86, Arm) and macOS.
FLAGS = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "feat_bf16"),
    "amx": ("amx_tile", "amx_int8"),
    "neon": ("asimd", "neon", "advsimd"),
    "dotprod": ("asimddp", "feat_dotprod"),
    "i8mm": ("i8mm", "feat_i8mm"),
}
ENGINES = ("alambic", "numpy", "openvino", "openvino-tokenizers", "onnxruntime", "tokenizers")


def fingerprint(*, root: Path = Path("/")) -> dict[str, Any]:
    """Describe this machine; `digest` changes when anything in it does. Facts the system does not tell are absent.

    Args:
        root: where `/proc` and `/sys` are.
    """
    model, flags = _processor(root)
    facts: dict[str, Any] = {
        "cpu": model,
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(root),
        "flags": sorted(name for name, spellings in FLAGS.items() if flags.intersection(spellings)),
        "ram_gb": _ram_gb(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
    }
    facts = {key: value for key, value in facts.items() if value is not None}
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    return {**facts, "digest": hashlib.sha256(canonical).hexdigest()[:16]}


def versions() -> dict[str, str]:
    """Return the installed versions of what predicts: alambic and its engines."""
    found = {}
    for name in ENGINES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(machine: dict[str, Any]) -> str:
    """Say in one line what a reader of a figure wants to know of the machine."""
    parts = [str(machine.get("cpu", "unknown processor")), f"{machine.get('cores_usable', '?')} cores"]
    if "ram_gb" in machine:
        parts.append(f"{machine['ram_gb']:g} GB")
    parts.extend([" ".join(machine.get("flags", ())), str(machine.get("os", ""))])
    return ", ".join(part for part in parts if part)


def _processor(root: Path) -> tuple[str, set[str]]:
    cpuinfo = root / "proc/cpuinfo"
    if cpuinfo.is_file():
        return _from_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    if platform.system() == "Darwin":
        features = _sysctl("machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional.arm")
        return _sysctl("machdep.cpu.brand_string").strip() or platform.processor(), set(features.lower().split())
    return platform.processor() or "unknown", set()


def _from_cpuinfo(text: str) -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    model = next((fields[key] for key in ("model name", "hardware", "cpu part") if fields.get(key)), "unknown")
    flags = fields.get("flags") or fields.get("features") or ""
    return " ".join(model.split()), set(flags.lower().split())


def _sysctl(*names: str) -> str:
    done = subprocess.run(["/usr/sbin/sysctl", *names], capture_output=True, text=True, check=False)
    words = []
    for line in done.stdout.splitlines():
        key, _, value = line.partition(":")
        # `hw.optional.arm.FEAT_BF16: 1` is a flag of its own; the others list theirs in the value.
        words.append(key.rpartition(".")[2] if key.startswith("hw.optional") and value.strip() == "1" else value)
    return " ".join(words)


def _usable_cores(root: Path) -> int | float:
    """Return the cores this process may use: its affinity, cut by a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quota = root / "sys/fs/cgroup/cpu.max"
    if quota.is_file():
        limit, _, period = quota.read_text(encoding="ascii").partition(" ")
        if limit.isdigit() and period.strip().isdigit():
            return min(cores, round(int(limit) / int(period), 2))
    return cores


def _ram_gb() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
